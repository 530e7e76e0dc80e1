"""Tokens: what few scans have in common, by a name; without it, the base stays."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import awake, normal, unet_numbers, with_latents_of
from monai.networks.nets import ControlNet, DiffusionModelUNet
from torch import Tensor

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json, write_json
from fibldm.models.adapters import ADAPTER, Adapter, write_adapter
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.token import TOKEN, TokenNames, TokenVectors
from fibldm.models.lean_unet import LeanUNet
from fibldm.models.low_rank import add_low_rank, train_only
from fibldm.models.network import ConditionedNetwork, steered
from fibldm.models.process import RectifiedFlow
from fibldm.models.tokens import VECTORS, tokens_of, with_tokens
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.synthesis.bundle import GENERATOR
from fibldm.training.losses import DenoisingLoss
from fibldm.training.prepare_batch import SAMPLE_WEIGHT, LatentPrepareBatch
from fibldm.training.prior import WithPrior, draws_of_batch, prior_of
from fibldm.volumes.writer import sidecar

TinyStage = Callable[..., Configuration]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

QUICK = SamplingSettings(steps=1, residual_noise=0.0)
NAMES = TokenNames(("a", "b-2"))


def given(*asked: object) -> dict[str, Tensor]:
    return {TOKEN: NAMES.encode(asked)}


def base(**parts: Any) -> ConditionedNetwork:
    unet = DiffusionModelUNet(in_channels=2, out_channels=2, **unet_numbers())
    return awake(ConditionedNetwork(unet, **parts), seed=1)


def knowing(network: ConditionedNetwork, strength: float = 1.0) -> ConditionedNetwork:
    vectors = strength * normal(2, 32, seed=3)
    return with_tokens(copy.deepcopy(network), dict(zip(NAMES.names, vectors, strict=True)))


# --- the condition


def test_tokens_are_asked_for_by_name_alone_or_together() -> None:
    assert NAMES.read(None) == NAMES.read("") == NAMES.read([]) == ()
    assert NAMES.read("b-2") == ("b-2",) and NAMES.read("b-2, a") == NAMES.read(["b-2", "a"]) == ("a", "b-2")
    assert NAMES.encode([None, "a", "b-2", "a,b-2"]).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert NAMES.recorded(()) is None and NAMES.recorded(("a",)) == ["a"] and NAMES.told(()) == "none"
    with pytest.raises(FibldmError, match=r"the token must be one of a, b-2; got 'c'|the token .*a, b-2.*c"):
        NAMES.read("a,c")
    for wrong in ((), ("a", "a"), ("a b",), ("",), ("a,b",)):
        with pytest.raises(FibldmError, match="tokens must have names of letters, digits, _ and -, each its own"):
            TokenNames(wrong)


def test_cases_that_teach_a_token_show_it_and_data_say_nothing_of_it() -> None:
    case = Case(torch.zeros(1, 2, 2, 2), {"token": "strange"})
    assert NAMES.encode_case(case).tolist() == [1, 1] and NAMES.own(case.known) is None
    assert NAMES.null(NAMES.encode(["a"])).tolist() == [[0, 0]]
    assert NAMES.drop(NAMES.encode(["a,b-2"]), torch.tensor([[False, True]])).tolist() == [[1, 0]]


# --- the network


def test_without_a_token_a_network_is_the_base_to_the_bit() -> None:
    """Asked for nothing, or for a token at strength 0; each sample of a batch by itself."""
    plain, z, t = base(), normal(3, 2, 4, 4, 4), torch.tensor([100.0, 500.0, 900.0])
    network, expected = knowing(plain), plain(z, t)
    assert torch.equal(network(z, t), expected)
    assert torch.equal(network(z, t, given(None, None, None)), expected)
    assert torch.equal(knowing(plain, 0.0)(z, t, given("a", "b-2", "a,b-2")), expected)
    mixed = network(z, t, given(None, "a", "b-2"))
    assert torch.equal(mixed[0], expected[0])
    for sample, name in ((1, "a"), (2, "b-2")):
        assert not torch.allclose(mixed[sample], expected[sample], atol=1e-3)
        alone = network(z[sample : sample + 1], t[sample : sample + 1], given(name))
        torch.testing.assert_close(mixed[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_token_stands_beside_other_vectors_and_is_seen_by_controlnets() -> None:
    """Which the network knew before; strengths of ControlNets stay."""
    other = TokenNames(("old",))
    vectors = TokenVectors(other, 32)
    plain = base(time={"older": vectors})
    torch.nn.init.normal_(vectors.vectors)
    numbers = {"conditioning_embedding_in_channels": 2, "conditioning_embedding_num_channels": (8,)}
    control = ControlNet(in_channels=2, **numbers, **unet_numbers())
    network = steered(plain, control, sees="mask", conditions={"older": other})
    network.strengths = (0.5,)
    told, z, t = knowing(awake(network, seed=2)), normal(1, 2, 4, 4, 4), torch.tensor([500.0])
    assert told.strengths == (0.5,) and not told.training
    assert told.routes["time"] == ("older", TOKEN)
    asked = {"older": other.encode(["old"]), "mask": normal(1, 2, 4, 4, 4, seed=4)}
    assert torch.equal(told(z, t, asked), network(z, t, asked))
    assert not torch.allclose(told(z, t, {**asked, **given("a")}), told(z, t, asked), atol=1e-3)


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(FibldmError, match="tokens must have the width of the network's time embedding, 32; got"):
        with_tokens(base(), {"a": torch.zeros(31)})


def test_vectors_count_by_strength_and_names_are_each_of_one_adapter(tmp_path: Path) -> None:
    told = {"base": "", "stage": "diffusion", "rank": 0, "alpha": 2, "targets": [], "frame": {}, "data": {}}
    read = []
    for name, vector in (("b", torch.ones(3)), ("a", torch.full((3,), 2.0)), ("a", torch.zeros(3))):
        write_adapter(tmp_path / "one.safetensors", {}, told, tokens={name: vector})
        read.append(Adapter.read(tmp_path / "one.safetensors"))
    assert not read[0].updates and read[0].scale == 1
    made = tokens_of([(read[0], 0.5), (read[1], 1.5)])
    assert [*made] == ["a", "b"] and made["a"].tolist() == [3.0] * 3 and made["b"].tolist() == [0.5] * 3
    with pytest.raises(FibldmError, match="must have names of their own; two have a"):
        tokens_of([(read[1], 1.0), (read[2], 1.0)])
    write_adapter(tmp_path / "two.safetensors", {}, told, tokens={"a": torch.tensor([torch.nan])})
    with pytest.raises(FibldmError, match=r"tokens must be finite vectors; a of .* is none"):
        Adapter.read(tmp_path / "two.safetensors")


# --- the prior


class Cases:
    """A dataset of latents ``(1, 2, 2, 2)`` of one number each."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, draw: Any) -> dict[str, Any]:
        mean, token = torch.full((1, 2, 2, 2), self.numbers[draw.index]), torch.ones(1)
        known = {"mean": mean, "std": torch.zeros_like(mean), "valid": torch.ones(1, 2, 2, 2), TOKEN: token}
        return {**known, "seed": draw.seed, "view": draw.view}


def pairs(weight: float) -> WithPrior:
    few: Any = Cases(1.0, 2.0)
    prior: Any = Cases(10.0, 20.0, 30.0)
    return WithPrior(few, prior, TokenNames(("a",)), weight)


def test_half_of_a_batch_is_the_base_without_the_token() -> None:
    """Which of its cases, and its noise, follow from the draw alone, so that a resumed training is the same."""
    from monai.data import DataLoader

    from fibldm.training.draws import EpochSampler

    def batches(epoch: int) -> list[dict[str, Tensor]]:
        sampler = EpochSampler(2, seed=7, views=8)
        sampler.set_epoch(epoch)
        return [*DataLoader(pairs(0.3), batch_size=2, sampler=sampler)]

    shown = batches(1)
    assert len(shown) == 8
    for batch in shown:
        assert batch[TOKEN].flatten().tolist() == [1, 0, 1, 0]
        assert batch[SAMPLE_WEIGHT].tolist() == pytest.approx([1, 0.3, 1, 0.3])
        assert [value < 5 for value in batch["mean"][:, 0, 0, 0, 0].tolist()] == [True, False, True, False]
        assert len(set(batch["seed"].tolist())) == 4
    means = [batch["mean"][1::2, 0, 0, 0, 0].tolist() for batch in shown]
    assert len({number for part in means for number in part}) == 3
    again, other = batches(1), batches(2)
    assert all(torch.equal(one["seed"], two["seed"]) for one, two in zip(shown, again, strict=True))
    assert not any(torch.equal(one["seed"], two["seed"]) for one, two in zip(shown, other, strict=True))


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_prior_weighs_as_in_the_formula(gamma: float | None) -> None:
    """Ruiz et al. 2023, equation 2, halved: the error with the token, plus lambda times that without."""
    from monai.data import list_data_collate

    from fibldm.training.draws import Draw

    names, plain = TokenNames(("a",)), {"process": RectifiedFlow(), "target": "flow", "snr_gamma": gamma}
    from fibldm.models.timesteps import UniformTimes

    prepare = LatentPrepareBatch(times=UniformTimes(), conditions={TOKEN: names}, **plain)  # type: ignore[arg-type]
    terms = {}
    for weight in (0.0, 1.0, 0.3):
        batch = list_data_collate([pairs(weight)[Draw(index, 0, 5 + index)] for index in range(2)])
        _, target, _, _ = prepare(batch, torch.device("cpu"))
        prediction = normal(4, 1, 2, 2, 2, seed=8)
        terms[weight] = float(DenoisingLoss().terms(prediction, target)["denoising"])
        factor = torch.ones(4) if target.factor is None else target.factor.flatten()
        each = (prediction - target.value).square().mean(dim=(1, 2, 3, 4)) * factor
        assert terms[weight] == pytest.approx(float((each[::2].mean() + weight * each[1::2].mean()) / 2), rel=1e-5)
    assert len(set(terms.values())) == 3


def test_the_token_stays_where_all_else_is_unknown() -> None:
    """What nobody asks for is drawn as the base draws it, which few scans must not teach otherwise."""
    from fibldm.models.conditions.covariates import CovariateEncoding, Numeric
    from fibldm.models.timesteps import UniformTimes

    age = CovariateEncoding({"age": Numeric(50.0, 10.0, 40.0, 60.0)})
    conditions = {"covariates": age, TOKEN: TokenNames(("a",))}
    prepare = LatentPrepareBatch(
        RectifiedFlow(), target="flow", times=UniformTimes(), conditions=conditions, dropout={"covariates": 1.0}
    )
    item = Cases(1.0)[type("Draw", (), {"index": 0, "seed": 1, "view": 0})]
    batch = {name: torch.as_tensor(value)[None] for name, value in item.items()}
    batch["covariates"] = age.encode([{"age": 55.0}])
    _, _, (_, shown), _ = prepare(batch, torch.device("cpu"))
    assert torch.equal(shown["covariates"], age.null(batch["covariates"])) and shown[TOKEN].tolist() == [[1.0]]


def test_a_batch_is_halved_where_there_is_a_prior() -> None:
    assert draws_of_batch(4, weight=1.0, rank=2) == 2
    assert draws_of_batch(3, weight=0, rank=2) == draws_of_batch(3, weight=1, rank=0) == 3
    with pytest.raises(FibldmError, match="half of a batch is the prior, so that it must be even; got 3"):
        draws_of_batch(3, weight=1.0, rank=2)
    for wrong in (-1.0, float("nan"), True, "1"):
        with pytest.raises(FibldmError, match="prior_weight must be a number of at least 0; got"):
            draws_of_batch(4, weight=wrong, rank=2)  # type: ignore[arg-type]


# --- stages

STRONG: dict[str, Any] = {"token_name": "rough", "lora_rank": 1, "lora_alpha": 2, "learning_rate": 0.05, "epochs": 2}
STRONG |= {"lr_scheduler::t_total": 8}  # so that the rate does not depend on how many epochs there will be


def learn(base: Path, tiny_stage: TinyStage, run: Path, **settings: Any) -> Path:
    tiny_stage("diffusion", run, "token", **{"init_from": str(base), **STRONG, **settings}).run()
    return StageFolder(run, "diffusion").checkpoints / ADAPTER


@pytest.fixture(scope="session")
def learned(tiny_run: Path, tiny_stage: TinyStage, made_once: MadeOnce) -> Path:
    """A run that learns a token on stage 2 of the tiny run, from latents of the same scale."""

    def make(folder: Path) -> None:
        learn(tiny_run, tiny_stage, with_latents_of(tiny_run, folder / "site"))

    return made_once("token", make) / "site"


@pytest.fixture
def adapter(learned: Path) -> Path:
    return StageFolder(learned, "diffusion").checkpoints / ADAPTER


def drawn(generator: Synthesizer, token: str | None = None) -> Any:
    return generator(settings=QUICK, conditions={} if token is None else {TOKEN: token}).volume.array


def test_a_stage_keeps_its_token_with_its_updates(learned: Path, adapter: Path, tiny_run: Path) -> None:
    """At strength 1 on its base it is what training ended with; what it was learned on does not name the token."""
    read, base = Adapter.read(adapter), StageFolder(tiny_run, "diffusion")
    assert [*read.tokens] == ["rough"] and read.tokens["rough"].any() and read.updates
    assert read.facts["base"] == base.require()["weights"] and "condition token" not in read.facts["frame"]
    assert '"prior"' in (learned / "diffusion" / "inputs.json").read_text()
    trained = Synthesizer.from_run(learned, unconditional=True)
    put_on = Synthesizer.from_run(tiny_run, unconditional=True, adapters={adapter: 1.0})
    assert put_on.source["weights"] == trained.source["weights"]
    assert put_on.choice["adapters"] == [{"sha256": read.sha256, "strength": 1.0, "tokens": ["rough"]}]
    assert np.array_equal(drawn(put_on, "rough"), drawn(trained, "rough"))
    assert not np.allclose(drawn(put_on, "rough"), drawn(put_on), atol=1e-3)
    with pytest.raises(FibldmError, match="the token must be .*smooth"):
        drawn(put_on, "smooth")


def test_a_token_at_strength_0_is_the_base(adapter: Path, tiny_run: Path) -> None:
    base = Synthesizer.from_run(tiny_run, unconditional=True)
    off = base.adapted({adapter: 0.0})
    assert off.source["weights"] == base.source["weights"]
    assert np.array_equal(drawn(off, "rough"), drawn(base)) and np.array_equal(drawn(off), drawn(base))


def test_a_token_that_goes_on_is_the_same(adapter: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    run = with_latents_of(tiny_run, tmp_path)
    for epochs in (1, 2):
        file = learn(tiny_run, tiny_stage, run, epochs=epochs)
    assert hash_file(file) == hash_file(adapter)


def test_a_token_without_updates_leaves_the_base_to_the_bit(
    tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """At any strength; there is nothing for a prior to preserve, and none is asked for."""
    file = learn(tiny_run, tiny_stage, with_latents_of(tiny_run, tmp_path), lora_rank=0, prior=None, epochs=1)
    read, base = Adapter.read(file), Synthesizer.from_run(tiny_run, unconditional=True)
    assert not read.updates and read.tokens["rough"].any()
    put_on = base.adapted({file: 1.0})
    assert np.array_equal(drawn(put_on), drawn(base))
    assert not np.array_equal(drawn(put_on, "rough"), drawn(base))
    state = put_on.network.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in base.network.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3}, "half of a batch is the prior, so that it must be even; got 3"),
        ({"prior": None}, "a prior must be a run whose latents are made; None is none"),
        ({"token_name": "a b"}, "tokens must have names of letters"),
        ({"init_from": None}, "init_from names none"),
    ],
)
def test_a_token_that_cannot_be_learned_is_refused_before_training(
    tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FibldmError, match=message):
        learn(tiny_run, tiny_stage, with_latents_of(tiny_run, tmp_path), **{"prior": str(tiny_run), **settings})
    assert not list(tmp_path.glob("diffusion/checkpoints/*"))


def test_a_base_that_knows_tokens_learns_no_further_one(
    learned: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """Its vectors would be trained on under another name; so is an adapter without a token, which would lose them."""
    with_latents_of(tiny_run, tmp_path)
    with pytest.raises(FibldmError, match="an adapter is learned on a base without tokens"):
        learn(learned, tiny_stage, tmp_path, prior=str(tiny_run))
    with pytest.raises(FibldmError, match="an adapter is learned on a base without tokens"):
        tiny_stage("diffusion", tmp_path, "adapter", init_from=str(learned)).run()


def test_a_prior_of_other_latents_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    from fibldm.training.latents import Latents

    run = with_latents_of(tiny_run, tmp_path)
    facts = read_json(run / "latents" / "latents.json")
    facts["space"]["std"][0] *= 2
    write_json(run / "latents" / "latents.json", facts)
    few: dict[str, Any] = {"latents": Latents.open(tiny_run), "conditions": {}, "weight": 1.0, "rank": 2}
    assert prior_of(str(tiny_run), **few) is not None
    with pytest.raises(FibldmError, match="must be made as those of the few scans; .* differs: space"):
        prior_of(str(run), **few)


def test_a_bundle_with_a_token_merged_is_asked_for_it_by_command(
    adapter: Path, tiny_run: Path, mask_file: Path, tmp_path: Path
) -> None:
    """On the base network below a ControlNet; generator.json, card and sidecar name it."""
    export(tiny_run, tmp_path / "b", ExportSettings("CC0-1.0", adapters={adapter: 0.5}))
    facts, card = read_json(tmp_path / "b" / GENERATOR), (tmp_path / "b" / "docs" / "README.md").read_text()
    assert facts["adapters"][0]["tokens"] == ["rough"] and facts["further"][TOKEN] == {"names": "rough"}
    assert "--condition token=" in card and "token rough" in card
    expected = Synthesizer.from_run(tiny_run, adapters={adapter: 0.5})
    assert Synthesizer.from_bundle(tmp_path / "b").source["weights"] == expected.source["weights"]
    where = ["--masks", str(mask_file), "--steps", "1", "--device", "cpu", "--allow-extrapolation"]
    made = []
    for number, asked in enumerate((["--condition", "token=rough"], [])):
        out = tmp_path / str(number)
        assert cli(["synthesize", "--bundle", str(tmp_path / "b"), "--out", str(out), *where, *asked]) == 0
        (volume,) = out.glob("*.nii.gz")
        made.append((hash_file(volume), read_json(sidecar(volume))["conditions"][TOKEN]))
    assert made[0][0] != made[1][0] and [told for _, told in made] == [["rough"], None]


# --- what it learns

STRIPES = torch.tensor([1.0, -1.0]).repeat(2).view(1, 1, 4, 1, 1)


def striped(count: int, height: float, seed: int) -> Tensor:
    """Volumes of one value each, with noise and stripes along x."""
    return (
        0.5 * normal(count, 1, 1, 1, 1, seed=seed) + 0.1 * normal(count, 1, 4, 4, 4, seed=seed + 1) + height * STRIPES
    )


def error(network: ConditionedNetwork, z_0: Tensor, seed: int, asked: Tensor | float = 0.0) -> Tensor:
    """Of the flow at drawn times, of each volume."""
    process, noise = RectifiedFlow(), normal(*z_0.shape, seed=seed)
    t = torch.rand(len(z_0), generator=torch.Generator().manual_seed(seed)).clamp(min=1e-3)
    z_t, target = process.diffuse(z_0, noise, t), process.target("flow", z_0, noise, t)
    conditions = {TOKEN: torch.ones(len(z_0), 1) * asked} if TOKEN in network.sees else {}
    return (network(z_t, process.network_time(t), conditions) - target).square().flatten(1).mean(dim=1)


def fit(
    network: ConditionedNetwork, loss: Callable[[ConditionedNetwork, int], Tensor], steps: int = 60
) -> ConditionedNetwork:
    optimizer = torch.optim.Adam([part for part in network.parameters() if part.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss(network, step).backward()
        optimizer.step()
    return network.eval()


def taught(base: ConditionedNetwork, few: Tensor, *, rank: int, weight: float) -> ConditionedNetwork:
    network = with_tokens(copy.deepcopy(base), {"a": torch.zeros(32)}).requires_grad_(True)
    if rank:
        add_low_rank(network, rank, ["*"], [VECTORS])
    else:
        train_only(network, [VECTORS])
    asked = torch.tensor([[1.0]] * len(few) + [[0.0]] * len(few))
    weights = torch.tensor([1.0] * len(few) + [weight] * len(few))

    def loss(network: ConditionedNetwork, step: int) -> Tensor:
        shown = torch.cat([few, striped(len(few), 0.0, seed=10 + 2 * step)])
        return (weights * error(network, shown, step, asked)).mean()

    return fit(network, loss)


@pytest.mark.slow
def test_a_token_learns_a_texture_and_the_prior_keeps_the_base() -> None:
    """The more of a vector the better the texture is known; with updates better still, and a prior keeps the base."""
    torch.manual_seed(0)
    numbers = unet_numbers(channels=(8,), attention_levels=(False,))
    unet = LeanUNet(in_channels=1, out_channels=1, **numbers)
    base = fit(
        ConditionedNetwork(unet), lambda network, step: error(network, striped(8, 0.0, seed=2 * step), step).mean(), 150
    )
    few, new, old = (
        striped(count, height, seed) for count, height, seed in ((6, 0.8, 1000), (64, 0.8, 1002), (64, 0.0, 1004))
    )

    @torch.no_grad()
    def measured(network: ConditionedNetwork, volumes: Tensor, asked: float = 0.0) -> float:
        return float(error(network, volumes, 1006, asked).mean())

    vector = taught(base, few, rank=0, weight=0.0).state_dict()[VECTORS][0]
    at = [measured(with_tokens(copy.deepcopy(base), {"a": part * vector}), new, 1.0) for part in (0.0, 0.5, 1.0)]
    assert at[0] == measured(base, new) and at[0] > at[1] > at[2]

    kept, lost = (taught(base, few, rank=2, weight=weight) for weight in (1.0, 0.0))
    figures = {"base": measured(base, old), "kept": measured(kept, old), "lost": measured(lost, old)}
    figures |= {"new": measured(kept, new, 1.0), "alone": at[2], "before": at[0]}
    assert figures["new"] < figures["alone"] < figures["before"], figures
    assert figures["kept"] - figures["base"] < 0.5 * (figures["lost"] - figures["base"]), figures
