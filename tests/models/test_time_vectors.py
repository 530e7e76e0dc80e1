"""Classes and numbers in the time embedding, beside tokens or alone: networks, training on tensors, a whole run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import awake, normal, unet_numbers, with_latents_of
from conftest import TinyStage
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import Tensor, nn

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.conditions.condition import Condition
from fibldm.models.conditions.covariate_vectors import CovariateVectors
from fibldm.models.conditions.covariates import CovariateEncoding, CovariateTokens
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.lean_unet import LeanUNet
from fibldm.models.low_rank import add_low_rank
from fibldm.models.network import ConditionedNetwork, combine_controlnets, steered
from fibldm.models.one_tensor import OneTensorNetwork
from fibldm.models.process import RectifiedFlow
from fibldm.models.time_vectors import time_width
from fibldm.models.timesteps import UniformTimes
from fibldm.runs import StageFolder
from fibldm.synthesis import Synthesizer
from fibldm.synthesis.bundle import GENERATOR
from fibldm.training.inferers import AutocastInferer
from fibldm.training.latents import Latents
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.volumes.writer import sidecar

CASES: list[dict[str, Any]] = [
    {"position": 0.0, "disease": "healthy"},
    {"position": 0.5, "disease": "fibrosis"},
    {"position": 1.0, "disease": "fibrosis"},
]
ENCODING = CovariateEncoding.fit(["position", "disease"], CASES)
MASK = MaskEncoding((0, 1, 4), 4)
SHOWN: dict[str, Condition | None] = {"mask": MASK, "covariates": ENCODING}
Z, T = normal(2, 2, 4, 4, 4), torch.tensor([3.0, 700.0])
FRACTIONS = MASK.encode(torch.tensor([0, 1, 4, 1]).repeat_interleave(4).view(1, 1, 16, 1, 1).expand(2, 1, 16, 16, 16))
WIDTH, TOKEN_WIDTH = 32, 12
KINDS = ["plain", "lean", "spade", "2d", "generative", "control"]


def numbers(**changes: Any) -> dict[str, Any]:
    return unet_numbers(**{"in_channels": 2, **changes})


def unet(kind: str = "plain", **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    if kind == "spade":
        more = {"label_nc": MASK.channels, "spade_intermediate_channels": 8}
        return awake(SPADEDiffusionModelUNet(**numbers(), out_channels=2, **more))  # type: ignore[no-any-return]
    if kind == "generative":
        nets = pytest.importorskip("generative.networks.nets")
        given = numbers()
        return awake(nets.DiffusionModelUNet(**given | {"num_channels": given.pop("channels")}, out_channels=2))  # type: ignore[no-any-return]
    made = LeanUNet if kind == "lean" else DiffusionModelUNet
    return awake(made(**numbers(spatial_dims=2 if kind == "2d" else 3, **changes), out_channels=2))  # type: ignore[no-any-return]


def vectors(names: list[str] | None = None, **changes: Any) -> CovariateVectors:
    return CovariateVectors(ENCODING, WIDTH, names, **changes)


def controlnet() -> ControlNet:
    torch.manual_seed(2)
    return ControlNet(
        **numbers(), conditioning_embedding_in_channels=MASK.channels, conditioning_embedding_num_channels=(8,)
    )


def network(kind: str = "plain", *, known: bool = True) -> ConditionedNetwork:
    """With covariates in the time embedding, or without them; all weights but those of covariates are the same."""
    routes: dict[str, Any] = {"norms": {"mask": nn.Identity()}} if kind == "spade" else {}
    routes |= {"time": {"covariates": vectors()}} if known else {}
    made = ConditionedNetwork(unet("plain" if kind == "control" else kind), **routes).eval()  # type: ignore[arg-type]
    if kind == "control":
        made = steered(made, controlnet(), conditions=SHOWN if known else {"mask": MASK}).eval()
        awake(made.controls, 3)
    return made


def given(kind: str, *cases: dict[str, Any]) -> dict[str, Tensor]:
    mask = {"mask": FRACTIONS} if kind in ("spade", "control") else {}
    return {**mask, **({"covariates": ENCODING.encode(cases)} if cases else {})}


def latent(kind: str) -> Tensor:
    return Z[..., :1] if kind == "2d" else Z


# --- networks


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_with_classes_and_numbers_begins_as_without_them(kind: str) -> None:
    """To the bit, whatever is asked; and its weights have the names that they had."""
    without, among = network(kind, known=False), network(kind)
    assert all(torch.equal(value, among.state_dict()[name]) for name, value in without.state_dict().items())
    assert {name.split(".")[0] for name in among.state_dict().keys() - without.state_dict().keys()} == {
        "vectors_covariates"
    }
    with torch.no_grad():
        plain = without(latent(kind), T, given(kind))
        for cases in ((), ({"position": 0.7, "disease": "fibrosis"}, {})):
            assert torch.equal(among(latent(kind), T, given(kind, *cases)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_and_numbers_change_what_a_network_says_and_unknown_is_dropped(kind: str) -> None:
    made = network(kind)
    awake(made.parts("time")["covariates"], 4)
    full, z = {"position": 0.7, "disease": "fibrosis"}, latent(kind)
    with torch.no_grad():
        null, one, two = (
            made(z, T, given(kind, *cases)) for cases in ((), (full, full), (full | {"disease": "healthy"}, full))
        )
        for gone in ((), ("position",), ("disease",), ("position", "disease")):
            dropped = torch.tensor([[name in gone for name in ENCODING.kinds]] * 2)
            lost = {"covariates": ENCODING.drop(ENCODING.encode([full, full]), dropped)}
            rest = {name: value for name, value in full.items() if name not in gone}
            assert torch.equal(made(z, T, given(kind) | lost), made(z, T, given(kind, rest, rest)))
        assert torch.equal(made(z, T, given(kind, {}, {})), null)
    assert float((one - null).abs().mean()) > 1e-3 and float((one[0] - two[0]).abs().mean()) > 1e-3
    torch.testing.assert_close(one[1], two[1])


def test_a_controlnet_adds_the_same_vectors_to_its_time() -> None:
    made = network("control")
    awake(made.parts("time")["covariates"], 4)
    covariates = ENCODING.encode([{"position": 0.7}, {"disease": "healthy"}])
    seen: list[Tensor] = []
    for part in (made.unet, made.controls[0].controlnet):  # type: ignore[union-attr]
        part.class_embedding.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    with torch.no_grad():
        made(Z, T, {"mask": FRACTIONS, "covariates": covariates})
        wanted = made.parts("time")["covariates"](covariates)
    assert len(seen) == 2 and all(torch.equal(one, wanted) for one in seen)
    assert not any(weight.requires_grad for weight in made.parts("time")["covariates"].parameters())
    again = combine_controlnets([made, made], [1, 0])
    with torch.no_grad():
        both = {"mask": FRACTIONS, "covariates": covariates}
        assert torch.equal(again(Z, T, both), made(Z, T, both))


def test_a_class_and_a_number_are_a_vector_each() -> None:
    """Of the number a line, and waves; a sum, so that one that is dropped takes its own part only."""
    made = awake(vectors(), 5)
    with torch.no_grad():
        cases = [{"position": 0.7, "disease": "healthy"}, {"position": 0.7}, {"disease": "healthy"}, {}]
        both, first, second, none = made(ENCODING.encode(cases))
        torch.testing.assert_close(both - first, second - none)
        torch.testing.assert_close(none, made.unknown)
        line = awake(vectors(["position"], frequencies=0), 6)
        low, middle, high = line(ENCODING.encode([{"position": at} for at in (0, 0.5, 1)]))
        torch.testing.assert_close(low + high, 2 * middle)
    assert [tuple(weight.shape) for weight in line.parameters()] == [(1, WIDTH), (2, WIDTH)]
    made(ENCODING.encode(cases)).sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())  # as DDP needs it


def test_tokens_and_time_go_together() -> None:
    """Each sees what it is told to see, of one encoding; a covariate may be on both ways."""
    context = {"with_conditioning": True, "cross_attention_dim": TOKEN_WIDTH}
    tokens = CovariateTokens(ENCODING, TOKEN_WIDTH, ["position"])
    made = ConditionedNetwork(
        unet(**context),  # type: ignore[arg-type]
        tokens={"covariates": tokens},
        time={"covariates": vectors(["disease", "position"])},
    ).eval()
    assert made.routes["tokens"] == made.routes["time"] == ("covariates",) and made.sees == {"covariates"}
    assert made.encodings == {"covariates": ENCODING} and made.context_width == TOKEN_WIDTH
    assert tokens(ENCODING.encode([{"position": 1}])).shape == (1, 1, TOKEN_WIDTH)
    cases = ({"position": 0.1, "disease": "fibrosis"}, {"position": 0.9, "disease": "fibrosis"})
    with torch.no_grad():
        healthy = [case | {"disease": "healthy"} for case in cases]
        assert torch.equal(made(Z, T, given("plain", *cases)), made(Z, T, given("plain", *healthy)))
        other = made(Z, T, given("plain", *reversed(cases)))
        assert not torch.allclose(made(Z, T, given("plain", *cases)), other)
        awake(made.parts("time")["covariates"], 4)
        assert not torch.allclose(made(Z, T, given("plain", *cases)), made(Z, T, given("plain", *healthy)))


def test_what_cannot_be_added_to_the_time_is_refused() -> None:
    with pytest.raises(FibldmError, match=r"the width of the time embedding, 32, four times .*; got {'covariates': 8}"):
        ConditionedNetwork(unet(), time={"covariates": CovariateVectors(ENCODING, 8)})  # type: ignore[arg-type]
    for route in ({"time": {"covariates": vectors()}}, {}):
        with pytest.raises(FibldmError, match="no table of classes of its own; it has 3 classes; .*in_time"):
            ConditionedNetwork(unet(num_class_embeds=3), **route)  # type: ignore[arg-type]
    for wrong in (CovariateVectors, CovariateTokens):
        with pytest.raises(FibldmError, match="a network can see position, disease; there is no age"):
            wrong(ENCODING, WIDTH, ["age"])
    with pytest.raises(FibldmError, match="frequencies must be a whole number of at least 0; got -1"):
        vectors(frequencies=-1)
    with pytest.raises(FibldmError, match=r"a ControlNet must see the conditions of its base network, {'covariates'"):
        steered(network(), controlnet(), conditions={"mask": MASK})


def test_vectors_go_with_reduced_precision_checkpointing_adapters_and_exporters() -> None:
    plain, saving, cases = network().train(), network().train(), given("plain", {"position": 0.7}, {})
    for made in (plain, saving):
        awake(made.parts("time")["covariates"], 4)
    assert checkpoint_activations(saving)
    for made in (plain, saving):
        made(Z, T, cases).square().mean().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad)
    with torch.no_grad():
        made, exact = AutocastInferer("bfloat16")(Z, plain, T, cases), plain(Z, T, cases)
        assert float((made - exact).abs().mean()) < 0.05 * float(exact.std())
        packed = torch.cat([Z, T.view(2, 1, 1, 1, 1).expand(2, 1, 4, 4, 4)], dim=1)
        one_tensor = OneTensorNetwork(plain.eval(), 2)
        exported = torch.export.export(one_tensor, (packed,), strict=False).module()
        assert torch.equal(one_tensor(packed), plain(Z, T))
        torch.testing.assert_close(exported(packed), plain(Z, T), rtol=1e-4, atol=1e-5)
        add_low_rank(plain, 1, ["*"])
        torch.testing.assert_close(plain(Z, T, cases), exact)


# --- training


def shown(seeds: range, dropout: Any) -> Tensor:
    """The covariates of a batch, as training shows them."""
    count = len(seeds)
    batch = {name: torch.zeros(count, 1, 2, 2, 2) for name in ("mean", "std", "valid")}
    batch |= {"seed": torch.tensor(list(seeds)), "view": torch.zeros(count)}
    batch |= {"covariates": ENCODING.encode([CASES[seed % 3] for seed in seeds])}
    prepare = LatentPrepareBatch(
        RectifiedFlow(), target="flow", times=UniformTimes(), conditions={"covariates": ENCODING}, dropout=dropout
    )
    made: Tensor = prepare(batch, device="cpu")[2][1]["covariates"]
    return made


def trained(steps: int = 250) -> tuple[ConditionedNetwork, Any]:
    """A network that says the class in one channel and the number in another, by the time embedding alone."""
    torch.manual_seed(0)
    small = DiffusionModelUNet(**numbers(attention_levels=(False, False)), out_channels=2)
    made = ConditionedNetwork(small, time={"covariates": vectors()})
    optimizer = torch.optim.Adam(made.parameters(), lr=4e-3)
    for step in range(steps):
        seeds = range(12 * step, 12 * step + 12)
        values = [CASES[seed % 3] for seed in seeds]
        wanted = torch.tensor([[1.0 if case["disease"] == "fibrosis" else -1.0, case["position"]] for case in values])
        covariates = shown(seeds, {"covariates": {"each": 0.15, "all": 0.1}})
        z, time = normal(12, 2, 2, 2, 2, seed=step), torch.rand(12) * 1000
        said = made(z, time, {"covariates": covariates}).flatten(2).mean(dim=2)
        loss = (said - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def say(**case: Any) -> tuple[float, float]:
        with torch.no_grad():
            z, time = normal(4, 2, 2, 2, 2, seed=10_000), torch.tensor([50.0, 300.0, 600.0, 900.0])
            output = made.eval()(z, time, {"covariates": ENCODING.encode([case] * 4)})
        disease, position = output.flatten(2).mean(dim=(0, 2)).tolist()
        return disease, position

    return made, say


def test_a_trained_network_follows_class_and_number_and_does_not_mix_them_up() -> None:
    """Two at once; each that is dropped takes its own effect only, and where it is unknown the mean is said.

    Position tells something of the disease in these cases, so what is unknown goes by what the other one says.
    """
    _, say = trained()
    for disease, sign in (("healthy", -1), ("fibrosis", 1)):
        for position in (0.0, 0.5, 1.0):
            told = say(disease=disease, position=position)
            if (disease == "healthy") == (position == 0.0):  # what training had
                assert told == pytest.approx((sign, position), abs=0.25)
    low, high = say(disease="fibrosis", position=0.5), say(disease="fibrosis", position=1.0)
    assert high[1] - low[1] == pytest.approx(0.5, abs=0.2) and abs(high[0] - low[0]) < 0.25
    alone = say(disease="fibrosis")
    assert alone[0] == pytest.approx(1, abs=0.25) and alone[1] == pytest.approx(0.75, abs=0.25)
    assert say(position=1.0) == pytest.approx((1, 1.0), abs=0.3)
    assert say() == pytest.approx((1 / 3, 0.5), abs=0.35)


# --- a run


@pytest.fixture
def told(tiny_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A run folder, trained as far as its latents, whose cases have a position and a disease."""

    def copied(name: str) -> Path:
        run = with_latents_of(tiny_run, tmp_path / name)
        file = run / "latents" / "latents.json"
        facts = json.loads(file.read_text())
        cases = dict.fromkeys(one["case"] for split in facts["items"].values() for one in split)
        facts["covariates"] = {case: CASES[number % 3] | {"age": 40.0 + number} for number, case in enumerate(cases)}
        file.write_text(json.dumps(facts))
        return run

    return copied


IN_TIME: dict[str, Any] = {"covariates_in_time": ["position", "disease"], "covariate_dropout": 0.1}


def test_a_run_with_both_routes_goes_all_the_way(
    told: Callable[[str], Path],
    tiny_stage: TinyStage,
    mask_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stage 2, a ControlNet on it, export, and the command that asks a bundle."""
    run = told("run")
    settings = {**IN_TIME, "covariates": ["age", "position"], "covariate_width": TOKEN_WIDTH}
    settings |= {"epochs": 2, "batch_size": 1}  # the first step moves the last layer only, which begins with zeros
    tiny_stage("diffusion", run, "covariates_in_time", **settings).run()
    names = ["age", "position", "disease"]
    base = StageFolder(run, "diffusion").trained()
    assert list(base.encodings["covariates"].parts) == names and base.routes["time"] == ("covariates",)
    assert len(base.covariate_tokens.tokens) == 2 and base.vectors_covariates.width == time_width(base.unet)
    assert all(part.weight.any() for part in base.vectors_covariates.vectors)
    with pytest.raises(FibldmError, match=r"a ControlNet must see the conditions of its base .*\['age', 'position',"):
        tiny_stage("controlnet", run).run()
    shutil.rmtree(run / "controlnet")
    tiny_stage("controlnet", run, "covariates_in_time", **settings).run()
    export(run, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    facts = read_json(tmp_path / "bundle" / GENERATOR)
    assert facts["network"]["base"]["time"]["covariates"]["names"] == ["position", "disease"]
    assert facts["covariates"]["disease"] == {"values": ["fibrosis", "healthy"]}
    command = ["synthesize", "--bundle", str(tmp_path / "bundle"), "--masks", str(mask_file), "--steps", "1", "--json"]
    for disease in ("healthy", "fibrosis"):
        capsys.readouterr()
        asked = ["--covariate", f"disease={disease}", "--covariate", "position=0.5", "--allow-extrapolation"]
        assert cli([*command, *asked, "--out", str(tmp_path / disease)]) == 0
        (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
        told_of = read_json(sidecar(Path(path)))["covariates"]
        assert told_of == {"age": None, "position": 0.5, "disease": disease}
    assert cli([*command, "--covariate", "disease=mild", "--out", str(tmp_path / "no")]) == 2
    assert "disease must be one of fibrosis, healthy, not 'mild'" in " ".join(capsys.readouterr().err.split())


def test_covariates_in_time_alone_need_no_cross_attention(told: Callable[[str], Path], tiny_stage: TinyStage) -> None:
    run = told("run")
    tiny_stage("diffusion", run, "mask_concat", "covariates_in_time", **IN_TIME).run()
    synthesizer = Synthesizer.from_run(run)
    assert synthesizer.network.context_width is None and synthesizer.network.sees == {"mask", "covariates"}
    assert synthesizer.covariates.parts == ("position", "disease")
    assert Latents.open(run).covariates(["age", "age"]).parts == ("age",)  # type: ignore[union-attr]
