"""Covariates (age, sex, ...) as tokens for cross-attention, from the table to the volume: A15, A28."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from builders import STAGES, awake, unet_numbers
from conftest import TinyStage
from monai.bundle import create_workflow
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import Tensor, nn

from fibldm import UNKNOWN_LABEL
from fibldm.cli import run as cli
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.conditions.condition import Case, Condition
from fibldm.models.conditions.covariates import Categorical, CovariateEncoding, CovariateTokens, Numeric
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.denoiser import Denoiser
from fibldm.models.network import ConditionedNetwork, combine_controlnets, steered
from fibldm.models.process import RectifiedFlow
from fibldm.models.timesteps import UniformTimes
from fibldm.runs import StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.synthesis import Output, SamplingSettings, SynthesisRequest, SynthesisSettings, Synthesizer, jobs_of
from fibldm.training.inferers import AutocastInferer
from fibldm.training.latents import Latents, LoadLatent
from fibldm.training.losses import DenoisingLoss
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import sidecar

CASES: list[dict[str, Any]] = [
    {"age": 40.0, "sex": "M", "centre": 10.0, "kernel": "b"},
    {"age": 50.0, "sex": "F", "centre": 2.0, "kernel": "b"},
    {"age": 60.0, "sex": "F", "centre": 2.0},
    {"age": None, "sex": "F", "centre": 10.0, "kernel": "b"},
]
ENCODING = CovariateEncoding.fit(["age", "sex", "centre"], CASES, ["centre"])
MASK = MaskEncoding((0, 1, 4), 4)
SHOWN: dict[str, Condition | None] = {"mask": MASK, "covariates": ENCODING}
Z, T = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])
FRACTIONS = MASK.encode(torch.tensor([0, 1, 4, 1]).repeat_interleave(4).view(1, 1, 16, 1, 1).expand(2, 1, 16, 16, 16))
WIDTH = 12


def encoded(case: dict[str, Any]) -> Tensor:
    return ENCODING.encode([case])[0]


def asked(mask: Tensor | None = None, *cases: dict[str, Any], encoded: Tensor | None = None) -> dict[str, Tensor]:
    """What a network is given of a mask, and of covariates where there are some."""
    covariates = ENCODING.encode(cases) if cases else encoded
    return {name: part for name, part in (("mask", mask), ("covariates", covariates)) if part is not None}


# --- what is known, as numbers


def test_kinds_are_those_of_the_training_cases() -> None:
    age = ENCODING.kinds["age"]
    assert age == Numeric(mean=50.0, std=pytest.approx(np.std([40, 50, 60])), low=40.0, high=60.0)
    assert ENCODING.kinds["sex"] == Categorical(("F", "M"))
    assert ENCODING.kinds["centre"] == Categorical(("10", "2"))
    assert list(ENCODING.kinds) == ["age", "sex", "centre"]


def test_values_are_standardised_or_places_with_a_flag() -> None:
    made = encoded({"sex": "M", "age": 60.0})
    torch.testing.assert_close(made, torch.tensor([[10 / np.std([40, 50, 60]), 1], [1, 1], [0, 0]]).float())
    assert torch.equal(encoded({"age": "60", "sex": "M", "centre": None}), made)
    assert torch.equal(encoded({"centre": "2"}), encoded({"centre": 2}))
    assert torch.equal(encoded({}), torch.zeros(3, 2))
    assert torch.equal(encoded({"age": 50.0})[0], torch.tensor([0.0, 1.0]))  # the mean is not unknown


def test_dropping_makes_unknown_and_nothing_else() -> None:
    given = ENCODING.encode([{"age": 40, "sex": "M"}] * 2)
    before = given.clone()
    dropped = ENCODING.drop(given, torch.tensor([[True, False, False], [False, False, False]]))
    assert torch.equal(dropped[0], encoded({"sex": "M"}))
    assert torch.equal(dropped[1], before[1])
    assert torch.equal(given, before)
    assert torch.equal(ENCODING.null(given), torch.zeros(2, 3, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"agee": 1}, r"must be those of training \(age, sex, centre\); there is no agee"),
        ({"age": "old"}, "age must be a number, not 'old'"),
        ({"age": float("nan")}, "age must be a number, not nan"),
        ({"age": True}, "age must be a number, not True"),
        ({"age": [3]}, r"age must be a number, not \[3\]"),
        ({"sex": "female"}, "sex must be one of F, M, not 'female'"),
        ({"centre": 3}, "centre must be one of 10, 2, not 3"),
        (
            {"sex": "", "x": 1, "age": ""},
            "there is no x; age must be a number, not ''; sex must be one of F, M, not ''",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        encoded(given)


def test_beyond_training_needs_leave() -> None:
    values = ENCODING.read({"age": "61", "sex": "F"})
    assert values == {"age": 61.0, "sex": "F"}
    with pytest.raises(FibldmError, match=r"covered; age 61 \(training 40 to 60\); give --allow-extrapolation"):
        ENCODING.check(values, allow=False)
    assert ENCODING.check(values, allow=True) == ["age 61 (training 40 to 60)"]
    for age in (40, 60):
        assert ENCODING.check(ENCODING.read({"age": age}), allow=False) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["agee", "age"], "which have age, centre, kernel, sex; agee has no value;"),
        (["kernel"], "must differ between the training cases, .*; kernel has 1 value; prepare the data with"),
    ],
)
def test_covariates_that_say_nothing_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        CovariateEncoding.fit(names, CASES)


def test_categories_must_be_covariates() -> None:
    with pytest.raises(FibldmError, match="must be some of the covariates age; got also centre"):
        CovariateEncoding.fit(["age"], CASES, ["centre"])


def test_a_case_of_the_data_may_hold_what_training_never_saw() -> None:
    case = Case(torch.empty(0), {"sex": "X", "age": 99.0, "day": "x"})
    assert torch.equal(ENCODING.encode_case(case), encoded({"age": 99.0}))


# --- tokens and networks


def numbers(**changes: object) -> dict[str, Any]:
    return unet_numbers(**{"in_channels": 2, "with_conditioning": True, "cross_attention_dim": WIDTH, **changes})


def base(kind: str = "plain") -> ConditionedNetwork:
    torch.manual_seed(1)
    tokens, norms = CovariateTokens(ENCODING, WIDTH), {"mask": nn.Identity()} if kind == "spade" else {}
    if kind == "spade":
        unet = SPADEDiffusionModelUNet(
            **numbers(), out_channels=2, label_nc=MASK.channels, spade_intermediate_channels=8
        )
    else:
        unet = DiffusionModelUNet(**numbers(spatial_dims=2 if kind == "2d" else 3), out_channels=2)
    return awake(ConditionedNetwork(unet, norms=norms, tokens={"covariates": tokens}))  # type: ignore[return-value]


def controlnet(**changes: object) -> ControlNet:
    torch.manual_seed(2)
    return ControlNet(
        **numbers(**changes),
        conditioning_embedding_in_channels=MASK.channels,
        conditioning_embedding_num_channels=(8,),
    )


def test_every_covariate_has_a_token_of_its_own_and_unknown_ones_a_learned_one() -> None:
    torch.manual_seed(0)
    tokens = CovariateTokens(ENCODING, WIDTH)
    made = tokens(ENCODING.encode([{"age": 40, "sex": "F"}, {"age": 50, "sex": "M", "centre": "2"}, {"age": 50}]))
    assert made.shape == (3, 3, WIDTH)
    assert not torch.allclose(made[0, 0], made[1, 0]) and not torch.allclose(made[0, 1], made[1, 1])
    assert torch.equal(made[1, 0], made[2, 0])
    assert torch.equal(made[0, 2], tokens.unknown[2]) and torch.equal(made[2, 1:], tokens.unknown[1:])
    made.sum().backward()
    assert all(weight.grad is not None for weight in tokens.parameters())  # as DDP needs it


@pytest.mark.parametrize("kind", ["plain", "spade", "2d", "control"])
def test_covariates_change_what_a_network_says_and_the_null_is_unknown(kind: str) -> None:
    network = base("plain" if kind == "control" else kind)
    if kind == "control":
        network = awake(steered(network, controlnet(), conditions=SHOWN))  # type: ignore[assignment]
    z, mask = (Z[..., :1], None) if kind == "2d" else (Z, None if kind == "plain" else FRACTIONS)
    with torch.no_grad():
        old, young = (network(z, T, asked(mask, *[{"age": age, "sex": "F"}] * 2)) for age in (60, 40))
        null = network(z, T, asked(mask))
        unknown = ENCODING.drop(ENCODING.encode([{"age": 60}, {"sex": "M"}]), torch.ones(2, 3) > 0)
        for nothing in (ENCODING.null(unknown), unknown):
            assert torch.equal(null, network(z, T, asked(mask, encoded=nothing)))
        one = network(z, T, asked(mask, {"age": 60, "sex": "F"}, {}))
    assert float((old - young).abs().mean()) > 1e-4 and float((old - null).abs().mean()) > 1e-4
    torch.testing.assert_close(one, torch.stack([old[0], null[1]]))


def test_a_new_controlnet_on_a_base_with_covariates_changes_nothing_and_sees_them() -> None:
    plain, network = base(), steered(base(), controlnet(), conditions=SHOWN).eval()
    cases: tuple[dict[str, Any], ...] = ({"age": 60}, {"sex": "M"})
    with torch.no_grad():
        assert torch.equal(network(Z, T, asked(FRACTIONS, *cases)), plain(Z, T, asked(None, *cases)))
        control, tokens = awake(network.controls[0], 3), network.covariate_tokens
        covariates = ENCODING.encode(cases)
        parts = [
            control(Z, T, {"mask": FRACTIONS}, tokens(given))[1] for given in (covariates, ENCODING.null(covariates))
        ]
    assert float((parts[0] - parts[1]).abs().mean()) > 1e-4
    assert not any(weight.requires_grad for weight in tokens.parameters())
    assert sorted(dict(network.named_parameters())) == sorted(network.state_dict())


@pytest.mark.parametrize("covariates", [None, CovariateEncoding.fit(["age", "sex"], CASES)])
def test_a_controlnet_for_other_covariates_is_refused(covariates: CovariateEncoding | None) -> None:
    with pytest.raises(FibldmError, match=r"of its base network, {'covariates': \['age', 'sex', 'centre'\]}, .*; got"):
        steered(base(), controlnet(), conditions={"mask": MASK, "covariates": covariates})


def test_a_controlnet_without_cross_attention_is_refused() -> None:
    other = controlnet(with_conditioning=False, cross_attention_dim=None)
    with pytest.raises(FibldmError, match="must be built with the numbers of its base network; .* layers differ"):
        steered(base(), other, conditions=SHOWN)


def test_controlnets_join_on_one_base_with_its_covariates_only() -> None:
    one, two = (awake(steered(base(), controlnet(), conditions=SHOWN), seed) for seed in (1, 2))
    given = asked(FRACTIONS, {"age": 60}, {"sex": "M"})
    with torch.no_grad():
        both = combine_controlnets([one, two], [1, 0])  # type: ignore[list-item]
        assert torch.equal(both(Z, T, given), one(Z, T, given))
        two.covariate_tokens.unknown += 1  # type: ignore[union-attr, operator]
    with pytest.raises(FibldmError, match="only where they were trained on the same base network"):
        combine_controlnets([one, two], [1, 1])  # type: ignore[list-item]


def test_covariates_and_networks_that_do_not_go_together_are_refused() -> None:
    plain = DiffusionModelUNet(**numbers(with_conditioning=False, cross_attention_dim=None), out_channels=2)
    with pytest.raises(FibldmError, match="need a base network with cross-attention; .* set unet::with_conditioning"):
        ConditionedNetwork(plain, tokens={"covariates": CovariateTokens(ENCODING, WIDTH)})
    with pytest.raises(FibldmError, match="this network knows no covariates; got some"):
        ConditionedNetwork(plain)(Z, T, asked(None, {}, {}))


def test_without_covariates_there_is_nothing_new_in_a_network() -> None:
    plain = DiffusionModelUNet(**numbers(with_conditioning=False, cross_attention_dim=None), out_channels=2)
    network = ConditionedNetwork(awake(plain)).eval()  # type: ignore[arg-type]
    assert {name.removeprefix("unet.") for name in network.state_dict()} == set(plain.state_dict())
    assert network.encodings == {} and network.context_width is None
    with torch.no_grad():
        assert torch.equal(network(Z, T), plain(Z, T))


def test_tokens_go_with_reduced_precision_and_activation_checkpointing() -> None:
    """Gradients are the same, and reach the tokens."""
    plain, saving, covariates = base().train(), base().train(), asked(None, {"age": 60}, {"sex": "M"})
    assert checkpoint_activations(saving)
    for network in (plain, saving):
        network(Z, T, covariates).square().mean().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad)
    inferer = AutocastInferer("bfloat16")
    with torch.no_grad():
        made, exact = inferer(Z, plain, T, covariates), plain(Z, T, covariates)
    assert float((made - exact).abs().mean()) < 0.05 * float(exact.std())


# --- training


def item(number: int, **covariates: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    drawn = {"mean": torch.randn(2, 4, 4, 4, generator=generator), "std": torch.full((2, 4, 4, 4), 0.3)}
    more = {"mask": FRACTIONS[0], "valid": torch.ones(1, 4, 4, 4), "seed": 7 * number, "view": number}
    return {**drawn, **more, "covariates": encoded(covariates)}


def batch(*items: dict[str, Any]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(one[key]) for one in items]) for key in items[0]}


def prepared(items: list[dict[str, Any]], **changes: Any) -> tuple[Any, ...]:
    dropout = {"mask": {"each": 0.3}, **changes.pop("dropout", {})}
    conditions = {"mask": MASK, "covariates": changes.pop("covariates", None)}
    chosen = {"target": "flow", "times": UniformTimes(), "conditions": conditions, "dropout": dropout, **changes}
    return LatentPrepareBatch(RectifiedFlow(), **chosen)(batch(*items), device="cpu")


def known(items: list[dict[str, Any]], dropout: Any = 0.0) -> Tensor:
    """Their covariates, as training shows them."""
    shown: Tensor = prepared(items, covariates=ENCODING, dropout={"covariates": dropout})[2][1]["covariates"]
    return shown


def test_training_draws_the_same_with_and_without_covariates() -> None:
    """To the bit: latent, time, noise and mask; and a batch is only a way of grouping."""
    items = [item(number, age=40 + number, sex="F") for number in range(8)]
    without, among = prepared(items), prepared(items, covariates=ENCODING, dropout={"covariates": 0.5})
    assert torch.equal(without[0], among[0]) and torch.equal(without[1].value, among[1].value)
    (time, shown), (same_time, more) = without[2], among[2]
    assert torch.equal(time, same_time) and torch.equal(shown["mask"], more["mask"])
    assert shown.keys() == {"mask"} and more.keys() == {"mask", "covariates"}
    assert torch.equal(torch.cat([known([one], 0.5) for one in items]), more["covariates"])


def test_dropout_makes_single_covariates_or_all_of_them_unknown() -> None:
    items = [item(number, age=47, sex="M", centre="2") for number in range(2000)]
    kept = known(items, 0.2)
    there = kept[..., 1] > 0
    assert torch.equal(kept[there], items[0]["covariates"].expand(2000, -1, -1)[there])
    assert not kept[~there].any()
    shares = there.float().mean(dim=0)
    torch.testing.assert_close(shares, torch.full((3,), 0.8**2), atol=0.04, rtol=0)
    assert float((~there).all(dim=1).float().mean()) == pytest.approx(0.2 + 0.8 * 0.2**3, abs=0.03)
    kept = known(items[:9])
    assert torch.equal(kept, items[0]["covariates"].expand(9, -1, -1))


def test_every_covariate_may_have_a_dropout_of_its_own() -> None:
    """And all together one; what is not named is dropped with all or the mask only."""
    items = [item(number, age=47, sex="M", centre="2") for number in range(2000)]
    by_name = {"age": 0.5, "sex": 0.1, "all": 0.2}
    kept = known(items, by_name)
    shares = (kept[..., 1] > 0).float().mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.72, 0.8]), atol=0.04, rtol=0)
    one = known(items[:50], 0.2)
    same = dict.fromkeys(("age", "sex", "centre", "all"), 0.2)
    assert torch.equal(one, known(items[:50], same))
    assert torch.equal(one, known(items[:50], {"each": 0.2, "all": 0.2}))
    for wrong, message in (
        ({"agee": 0.1}, "dropout of covariates must name some of age, sex, centre, all or each; got agee"),
        ({"age": 1.5}, "must be probabilities, 0 to 1; got {'age': 1.5}"),
        (-0.1, "must be probabilities"),
    ):
        with pytest.raises(FibldmError, match=message):
            known(items[:1], wrong)


def test_with_the_whole_mask_goes_what_is_known() -> None:
    """Guidance asks for neither, so training must show both unknown together."""
    items = [item(number, age=47, sex="M") for number in range(400)]
    _, _, (_, shown), _ = prepared(items, dropout={"mask": {"all": 0.4}}, covariates=ENCODING)
    mask = shown["mask"]
    nothing = (mask == MASK.null(mask)).flatten(1).all(dim=1)
    assert 100 < int(nothing.sum()) < 220
    assert torch.equal(~shown["covariates"].flatten(1).any(dim=1), nothing)


@pytest.mark.slow
def test_a_network_learns_what_depends_on_covariates() -> None:
    """One channel is the age, one the sex: what is said at pure noise is the mean of such patients."""
    cases = [{"age": float(age), "sex": sex} for age in (20, 35, 50, 65, 80) for sex in "FM"]
    encoding = CovariateEncoding.fit(["age", "sex"], cases)
    torch.manual_seed(0)
    small = numbers(channels=(16, 16), num_head_channels=16, norm_num_groups=8, cross_attention_dim=16)
    unet = DiffusionModelUNet(**small, out_channels=2)
    network = ConditionedNetwork(unet, tokens={"covariates": CovariateTokens(encoding, 16)})
    process, steps, count = RectifiedFlow(), 300, 24
    prepare = LatentPrepareBatch(
        process, target="flow", times=UniformTimes(), conditions={"covariates": encoding}, dropout={"covariates": 0.1}
    )
    means = torch.tensor([[(case["age"] - 50) / 30, 1.0 if case["sex"] == "F" else -1.0] for case in cases])
    covariates = encoding.encode(cases)
    shape, rest = (count, 2, 2, 2, 2), {"std": torch.full((count, 2, 2, 2, 2), 0.3), "view": torch.zeros(count)}
    optimizer, loss = torch.optim.AdamW(network.parameters()), DenoisingLoss()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        seeds = torch.arange(count) + count * step
        chosen = torch.randint(len(cases), (count,), generator=torch.Generator().manual_seed(step))
        given = {"mean": means[chosen, :, None, None, None].expand(shape), "covariates": covariates[chosen]}
        x, target, more, also = prepare(
            {**given, **rest, "valid": torch.ones(count, 1, 2, 2, 2), "seed": seeds}, device="cpu"
        )
        optimizer.zero_grad()
        loss(network(x, *more, **also), target).backward()
        optimizer.step()
    network.eval()
    noise = torch.randn(64, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def said(**known: Any) -> Tensor:
        given = {"covariates": encoding.encode([known] * 64)} if known else {}
        with torch.no_grad():
            made = Denoiser(network, process, "flow", given)(noise, torch.ones(64))
        return made.z_0.mean(dim=(0, 2, 3, 4))

    near = {"atol": 0.4, "rtol": 0.0}
    torch.testing.assert_close(said(age=20, sex="F"), torch.tensor([-1.0, 1.0]), **near)
    torch.testing.assert_close(said(age=80, sex="M"), torch.tensor([1.0, -1.0]), **near)
    torch.testing.assert_close(said(age=57, sex="F"), torch.tensor([7 / 30, 1.0]), **near)  # no patient's own
    torch.testing.assert_close(said(age=57), torch.tensor([7 / 30, 0.0]), **near)
    torch.testing.assert_close(said(sex="M"), torch.tensor([0.0, -1.0]), **near)
    torch.testing.assert_close(said(), torch.tensor([0.0, 0.0]), **near)


# --- the stages

SEXES = ("F", "M")


@pytest.fixture
def told(tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes runs with autoencoder and latents of `tiny_run`, as if its patients had an age and a sex."""

    def copied(name: str, *stages: str) -> Path:
        for stage in ("autoencoder", "latents", *stages):
            shutil.copytree(tiny_run / stage, tmp_path / name / stage)
        file = tmp_path / name / "latents" / "latents.json"
        facts = json.loads(file.read_text())
        cases = list(dict.fromkeys(one["case"] for split in facts["items"].values() for one in split))
        facts["covariates"] = {case: {"age": 40.0 + 7 * n, "sex": SEXES[n % 2]} for n, case in enumerate(cases)}
        file.write_text(json.dumps(facts))
        return tmp_path / name

    return copied


COVARIATES: dict[str, Any] = {"covariates": ["age", "sex"], "covariate_width": WIDTH, "covariate_dropout": 0.2}


def test_latents_know_covariates_by_case(told: Callable[..., Path], tiny_run: Path) -> None:
    latents = Latents.open(told("run"))
    encoding = latents.covariates(["sex", "age"])
    assert encoding is not None and encoding.kinds["sex"] == Categorical(SEXES)
    first = latents.items("validation")[0]
    given = latents.known_of(first["case"])
    loaded = LoadLatent(latents, {"mask": latents.mask(2), "covariates": encoding})(first)
    assert torch.equal(loaded["covariates"], encoding.encode([given])[0]) and given.keys() == {"age", "sex"}
    plain = Latents.open(tiny_run)
    assert "covariates" not in plain.facts and plain.covariates([]) is None
    assert "covariates" not in LoadLatent(plain, {"covariates": None})(plain.items("validation")[0])
    with pytest.raises(FibldmError, match="which have none; age has no value; .* encode them"):
        plain.covariates(["age"])


def test_a_stage_with_covariates_that_broke_off_ends_with_the_same_weights(
    told: Callable[..., Path], tiny_stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8 too: the tokens are averaged, and it is their average that is kept."""
    whole, broken = told("whole"), told("broken")
    settings = {**COVARIATES, "epochs": 3, "batch_size": 1}
    tiny_stage("diffusion", whole, **settings).run()
    original, calls = LatentPrepareBatch.__call__, 0

    def break_off(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyError("stands for whatever ends a process")
        return original(self, *arguments, **options)

    monkeypatch.setattr(LatentPrepareBatch, "__call__", break_off)
    with pytest.raises((KeyError, RuntimeError)):
        tiny_stage("diffusion", broken, **settings).run()
    assert StageFolder(broken, "diffusion").done() is None
    tiny_stage("diffusion", broken, **settings).run()
    folders = [StageFolder(run, "diffusion") for run in (whole, broken)]
    assert "going on after epoch" in (broken / "diffusion" / "log.txt").read_text()
    assert folders[0].require()["weights"] == folders[1].require()["weights"]
    objects = folders[0].weights("last")["objects"]
    names = [name for name in objects["network"] if name.startswith("covariate_tokens.")]
    assert len(names) == 2 + 1 + 1  # a line, a table, and what is unknown of both
    assert all(not torch.equal(objects["network"][name], objects["ema"][name]) for name in names)
    best = folders[0].weights()["model"]
    assert all(torch.equal(best[name], weight) for name, weight in folders[0].trained().state_dict().items())


def test_stage_3_must_see_what_stage_2_saw(told: Callable[..., Path], tiny_stage: TinyStage) -> None:
    """Either way round, and before anything is trained."""
    run = told("run")
    tiny_stage("diffusion", run, **COVARIATES).run()
    with pytest.raises(FibldmError, match=r"{'covariates': \['age', 'sex'\]}, .*; got {}; set covariates to \['age'"):
        tiny_stage("controlnet", run).run()
    shutil.rmtree(run / "controlnet")
    with pytest.raises(
        FibldmError, match=r"network, {}, encoded in the same way; got {'covariates': .*; set covariates to \[\]"
    ):
        tiny_stage("controlnet", told("other", "diffusion"), **COVARIATES).run()


# --- synthesis

QUICK = SamplingSettings(sampler="ddim", steps=2, guidance=2.0)


@pytest.fixture
def synthesizer(tiny_run: Path) -> Synthesizer:
    """That of the tiny run, with a network of random weights that knows covariates."""
    made = Synthesizer.from_run(tiny_run)
    torch.manual_seed(3)
    channels = len(made.space.mean)
    unet = DiffusionModelUNet(**numbers(in_channels=channels + made.mask.channels), out_channels=channels)
    tokens = {"covariates": CovariateTokens(ENCODING, WIDTH)}
    network = awake(ConditionedNetwork(unet, channels={"mask": nn.Identity()}, tokens=tokens))
    conditions = {"mask": made.mask, "covariates": ENCODING}
    return replace(made, network=network, conditions=conditions)  # type: ignore[arg-type]


def test_covariates_steer_a_volume_and_stand_in_the_sidecar(
    synthesizer: Synthesizer, mask_file: Path, tmp_path: Path
) -> None:
    """A rerun keeps the file, also where the same is written in another way; other covariates are another request."""

    def write(covariates: dict[str, Any], out: str = "out", **given: Any) -> Path:
        asked = SynthesisSettings.of(QUICK, covariates=covariates, **{"allow_extrapolation": True, **given})
        return Output(synthesizer, tmp_path / out, asked).write(jobs_of([mask_file], synthesizer.names, 1))[0]

    path = write({"age": 60, "sex": "F"})
    told = read_json(sidecar(path))
    assert told["covariates"] == {"age": 60.0, "sex": "F", "centre": None}
    assert not any("age" in finding for finding in told["extrapolation"])
    before = path.stat().st_mtime_ns
    assert write({"sex": "F", "age": "60.0", "centre": None}).stat().st_mtime_ns == before
    for other in ({}, {"age": 59, "sex": "F"}):
        with pytest.raises(FibldmError, match="lies there already and was made from another mask, run or settings"):
            write(other)
    unknown = write({}, "unknown")
    assert not np.array_equal(read_volume(str(path)).array, read_volume(str(unknown)).array)
    assert read_json(sidecar(unknown))["covariates"] == {"age": None, "sex": None, "centre": None}
    old = write({"age": 95}, "old")
    assert "age 95 (training 40 to 60)" in read_json(sidecar(old))["extrapolation"]
    with pytest.raises(FibldmError, match="covariates must lie within what the training data covered|a mask must lie"):
        write({"age": 95}, "refused", allow_extrapolation=False)
    with pytest.raises(FibldmError, match="sex must be one of F, M, not 'f'"):
        write({"sex": "f"}, "refused")
    assert not (tmp_path / "refused").exists()


def test_a_volume_with_covariates_is_the_same_in_any_batch(synthesizer: Synthesizer, mask_file: Path) -> None:
    mask, settings = read_volume(str(mask_file)), {"settings": QUICK, "allow_extrapolation": True}
    wanted = [SynthesisRequest(mask, "a", 0, {"covariates": {"age": age}}) for age in (40, 60)]
    together = synthesizer.batch(wanted, **settings)  # type: ignore[arg-type]
    for one, alone in zip(wanted, together, strict=True):
        made = synthesizer(mask, name="a", covariates=one.conditions["covariates"], **settings)  # type: ignore[arg-type]
        assert np.abs(made.volume.array.astype(float) - alone.volume.array).max() <= 1
    assert not np.array_equal(together[0].volume.array, together[1].volume.array)


def test_guidance_goes_from_all_unknown_to_what_is_asked(synthesizer: Synthesizer, mask_file: Path) -> None:
    """Guidance 0 is the null, whatever is asked; 1 never looks at it."""
    mask, given = read_volume(str(mask_file)), {"name": "a", "allow_extrapolation": True}

    def made(guidance: float, **covariates: Any) -> np.ndarray:
        settings = replace(QUICK, guidance=guidance)
        volume: np.ndarray = synthesizer(mask, covariates=covariates, settings=settings, **given).volume.array
        return volume

    assert np.array_equal(made(0.0, age=60, sex="F"), made(0.0, sex="M"))
    assert not np.array_equal(made(1.0, age=60, sex="F"), made(1.0, sex="M"))
    mask = replace(mask, array=np.full_like(mask.array, UNKNOWN_LABEL))
    one, none = made(1.0), made(0.0)
    assert np.abs(one.astype(int) - none).max() <= 1  # HU: guidance asks in a batch of two, which rounds otherwise


def test_a_run_without_covariates_has_none(
    tiny_run: Path, mask_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthesizer = Synthesizer.from_run(tiny_run)
    with pytest.raises(FibldmError, match=r"those of training \(none\); there is no age"):
        synthesizer(read_volume(str(mask_file)), covariates={"age": 3})
    command = ["synthesize", "--run", str(tiny_run), "--masks", str(mask_file), "--out", str(tmp_path / "out")]
    assert cli([*command, "--covariate", "age=63"]) == 2
    assert "there is no age" in " ".join(capsys.readouterr().err.split())
    for wrong in (["age"], ["=3"], ["age="], ["age=1", "--covariate", "age=2"]):
        assert cli([*command, "--covariate", *wrong]) == 2
        assert "--covariate needs NAME=VALUE, each name once; got" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# --- the other doors


@pytest.fixture
def bundle(told: Callable[..., Path], tiny_stage: TinyStage, tmp_path: Path) -> Path:
    """Of a run that sees mask, age and sex."""
    run_dir = told("run")
    tiny_stage("diffusion", run_dir, "mask_concat", **COVARIATES).run()
    export(run_dir, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    return tmp_path / "bundle"


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_every_door_takes_covariates(
    bundle: Path, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Card, ``inference.json`` and watch folder, by the same names; what is left out is said to be unknown."""
    age = Synthesizer.from_bundle(bundle).covariates.kinds["age"]
    assert isinstance(age, Numeric)
    card = (bundle / "docs" / "README.md").read_text()
    assert f"| age | a number, {age.low:g} to {age.high:g} in training |" in card
    assert "| sex | one of F, M |" in card and f"`--covariate age={age.high:g} --covariate sex=F`" in card
    assert read_json(bundle / "configs" / "metadata.json")["covariates"]["sex"] == {"values": ["F", "M"]}

    given = {"masks": str(mask_file), "inferer::steps": 1, "allow_extrapolation": True, "device": "cpu"}
    workflow = create_workflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(bundle),
        output_dir=str(tmp_path / "monai"),
        covariates={"age": age.low},
        **given,
    )
    workflow.run()
    (volume,) = (tmp_path / "monai").glob("*.nii.gz")
    assert read_json(sidecar(volume))["covariates"] == {"age": age.low, "sex": None}

    for name, content in {"one": {"age": age.high}, "two": {"agee": 3}, "three": [1]}.items():
        (tmp_path / "inbox" / name).mkdir(parents=True)
        shutil.copy(mask_file, tmp_path / "inbox" / name / "mask.nii.gz")
        (tmp_path / "inbox" / name / "covariates.json").write_text(json.dumps(content))
    shutil.copy(mask_file, tmp_path / "inbox" / "four.nii.gz")
    options = ["--once", "--json", "--interval", "0.01", "--steps", "1", "--allow-extrapolation", "--device", "cpu"]
    folders = ["--bundle", str(bundle), "--inbox", str(tmp_path / "inbox"), "--outbox", str(tmp_path / "outbox")]
    capsys.readouterr()
    cli(["watch", *folders, *options, "--format", "nifti", "--covariate", "sex=F"])
    said = capsys.readouterr()
    reports = [json.loads(line) for line in said.out.splitlines()[:-1]]
    asked = [read_json(sidecar(Path(report["outputs"][0])))["covariates"] for report in reports if report["ok"]]
    told = [{"age": age.high, "sex": "F"}, {"age": None, "sex": "F"}]
    assert sorted(asked, key=str) == sorted(told, key=str)
    assert f"(age {age.high}, sex F)" in said.err and "(age unknown, sex F)" in said.err
    refused = " ".join(report["error"]["message"] for report in reports if not report["ok"])
    assert "there is no agee" in refused and 'covariates.json must be such as {"age": 63' in refused
    assert cli(["watch", *folders, *options, "--covariate", "sex=X"]) == 2
    assert "sex must be one of F, M" in capsys.readouterr().out


# --- all of it


def write_table(source: Path, file: Path) -> None:
    """The phantoms with an age and a sex, of which some are not known."""
    images = sorted((source / "images").glob("*.nii.gz"))
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "subject", "age", "sex"])
        for number, image in enumerate(images):
            subject = image.name.split("_")[0].removesuffix(".nii.gz")
            age, sex = ("" if number == 2 else 40 + 5 * number), SEXES[number % 2]
            writer.writerow([image, source / "labels" / image.name, subject, age, sex])


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("mask_concat",)])
def test_from_a_table_to_volumes_of_such_patients(
    phantom_work: Path, tiny_data: Path, tmp_path: Path, way: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prepare, every stage with the shipped configuration, and the command that asks for a patient."""
    write_table(phantom_work.parent / "source", tmp_path / "cases.csv")
    work, run, out = tmp_path / "work", tmp_path / "run", tmp_path / "out"
    prepare(tmp_path / "cases.csv", work, PrepareSettings(modality="ct"), progress=False)
    configs = [str(tiny_data), "tiny", "covariates", *way]
    for stage in STAGES if not way else STAGES[:3]:
        stage_configuration(
            stage, work=work, run_dir=run, configs=configs, overrides={"device": "cpu", "precision": "float32"}
        ).run()
    known = read_json(run / "latents" / "latents.json")["covariates"]
    entries = [entry for split in ("training", "validation") for entry in load_datalist(work, split)]
    assert known == {entry["case"]: {"age": entry["age"], "sex": entry["sex"]} for entry in entries}
    mask = sorted((work / "labels").iterdir())[0]
    training = StageFolder(run, STAGES[3] if not way else STAGES[2]).component("covariate_encoding").kinds["age"]
    command = ["synthesize", "--run", str(run), "--masks", str(mask), "--steps", "2", "--allow-extrapolation", "--json"]
    told = ["--covariate", f"age={training.high}", "--covariate", "sex=F"]
    assert cli([*command, *told, "--out", str(out)]) == 0
    (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert read_json(sidecar(Path(path)))["covariates"] == {"age": training.high, "sex": "F"}
    assert nibabel.load(path).shape == nibabel.load(mask).shape
    assert cli([*command, "--out", str(out)]) == 2  # nobody in particular is another request
    assert cli([*command, "--out", str(tmp_path / "anyone")]) == 0
    logging.getLogger("fibldm").handlers.clear()
