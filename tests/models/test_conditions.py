"""Conditions as one family: what every kind can do, a kind that is made up, and the names of before."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import awake, unet_numbers, with_latents_of
from conftest import TinyStage
from made_up_condition import FieldStrength, FieldToken
from monai.networks.nets import ControlNet, DiffusionModelUNet
from torch import nn

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.models.conditions.boxes import BoxClass, BoxEncoding
from fibldm.models.conditions.condition import Case, Condition
from fibldm.models.conditions.covariates import CovariateEncoding, CovariateTokens
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.network import ConditionedNetwork, steered
from fibldm.models.process import RectifiedFlow
from fibldm.models.timesteps import UniformTimes
from fibldm.runs import StageFolder
from fibldm.runs.renamed import current, current_generator
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.synthesis.bundle import GENERATOR
from fibldm.synthesis.definitions import build
from fibldm.training.latents import Latents
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid
from fibldm.volumes.writer import sidecar

FIELD = FieldStrength(1.5, 3.0)
MASK = MaskEncoding((0, 1, 4), 4)
COVARIATES = CovariateEncoding.fit(["age", "sex"], [{"age": 40, "sex": "F"}, {"age": 60, "sex": "M"}])
LABELS = torch.tensor([0, 1, 4, 1]).repeat_interleave(4).view(1, 1, 16, 1, 1).expand(2, 1, 16, 16, 16)
CASE = Case(LABELS[0], {"age": 50.0, "sex": "F", "tesla": 3.0})
BOXES = BoxEncoding(
    {name: BoxClass(value, (4.0,) * 3, (64.0,) * 3, 2) for name, value in (("lung", 1), ("tumour", 4))},
    (4, 4, 4),
    (1,) * 3,
)
GRID = Grid((16, 16, 16), np.eye(4))
LAYOUT = BOXES.place(
    BOXES.read("lung 4x16x16mm at 5.5,7.5,7.5; lung 4x16x16mm at 13.5,7.5,7.5; 4 4x16x16mm at 9.5,7.5,7.5"), GRID
)
EVERY: dict[str, tuple[Condition, Any]] = {
    "mask": (MASK, LABELS),
    "covariates": (COVARIATES, [{"age": 50.0, "sex": "F"}] * 2),
    "field": (FIELD, [3.0, 3.0]),
    "boxes": (BOXES, [LAYOUT] * 2),
}
MADE_UP = str(Path(__file__).parents[1].joinpath("made_up_condition.yaml"))


# --- the family


@pytest.mark.parametrize("name", EVERY)
def test_every_condition_keeps_what_its_kind_promises(name: str) -> None:
    condition, values = EVERY[name]
    encoded = condition.encode(values)
    before, parts = encoded.clone(), len(condition.parts)
    assert encoded.shape == (2, *condition.shape((4, 4, 4)))
    assert torch.equal(condition.encode_case(CASE), encoded[0])
    none, all_of_them = (torch.full((2, parts), gone) for gone in (False, True))
    assert torch.equal(condition.drop(encoded, none), before) and torch.equal(encoded, before)
    assert torch.equal(condition.drop(encoded, all_of_them), condition.null(encoded))
    assert not torch.equal(condition.null(encoded), encoded)
    assert condition.drop_(encoded, all_of_them) is encoded and torch.equal(encoded, condition.null(before))
    assert condition.chances(0.25).shape == (parts + 1,)
    if name != "mask":  # of which an envelope in millimetres knows that, and whose values are volumes
        asked = condition.read(values[0])
        assert condition.check(asked, allow=False) == []
        nothing = condition.place(condition.within(condition.read(None), GRID), GRID)
        assert torch.equal(condition.encode([nothing]), condition.null(before[:1]))
        json.dumps([condition.recorded(asked), condition.facts()])


def test_the_background_of_a_mask_goes_with_its_labels_only() -> None:
    assert MASK.chances({"each": 0.25, "all": 0.5}).tolist() == [0.0, 0.25, 0.25, 0.5]
    assert MASK.chances({"4": 0.25}).tolist() == [0.0, 0.0, 0.25, 0.0]


def test_where_the_first_condition_is_unknown_all_are() -> None:
    """Guidance asks for nothing; the other way round each is by itself, and draws nothing anew for those before it."""
    count = 300
    given = {"mean": torch.zeros(count, 2, 4, 4, 4), "std": torch.zeros(count, 2, 4, 4, 4)}
    given |= {"valid": torch.ones(count, 1, 4, 4, 4), "seed": torch.arange(count), "view": torch.zeros(count)}
    given |= {name: torch.cat([condition.encode(values)[:1]] * count) for name, (condition, values) in EVERY.items()}

    def shown(**dropout: Any) -> dict[str, torch.Tensor]:
        conditions = {name: condition for name, (condition, _) in EVERY.items()}
        prepare = LatentPrepareBatch(
            RectifiedFlow(), target="flow", times=UniformTimes(), conditions=conditions, dropout=dropout
        )
        made: dict[str, torch.Tensor] = prepare(given, device="cpu")[2][1]
        return made

    made = shown(mask={"all": 0.4}, field=0.2)
    nothing = (made["mask"] == MASK.null(made["mask"])).flatten(1).all(dim=1)
    assert 80 < int(nothing.sum()) < 160
    assert torch.equal(~made["covariates"].flatten(1).any(dim=1), nothing)
    alone = ~made["field"].any(dim=1) & ~nothing
    assert not made["field"][nothing].any() and 20 < int(alone.sum()) < 110
    assert torch.equal(shown(mask={"all": 0.4})["mask"], made["mask"])
    with pytest.raises(FibldmError, match="dropout must be of mask, covariates, field, boxes; got {'feild'}"):
        shown(feild=0.1)


def base(**routes: Any) -> ConditionedNetwork:
    torch.manual_seed(0)
    channels = 2 + 3 * sum(part is not None for part in routes.get("channels", {}).values())
    context = {"with_conditioning": True, "cross_attention_dim": 12} if routes.get("tokens") else {}
    unet = DiffusionModelUNet(in_channels=channels, out_channels=2, **unet_numbers(), **context)
    return ConditionedNetwork(awake(unet), **routes).eval()


def test_several_conditions_share_a_route() -> None:
    """Channels and tokens come one behind the other, each from its own module, which checkpoints know by its name."""
    tokens = {"covariates": CovariateTokens(COVARIATES, 12), "field": FieldToken(FIELD, 12)}
    network = base(channels={"image": nn.Identity(), "edges": nn.Identity(), "nothing": None}, tokens=tokens)
    names = {name.split(".")[0] for name in network.state_dict()}
    assert names == {"unet", "covariate_tokens", "condition_field"} and network.context_width == 12
    assert network.sees == {"image", "edges", "covariates", "field"} and not network.sees_mask
    z, image, edges = torch.randn(2, 2, 4, 4, 4), torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    times, given = torch.tensor([3.0, 700.0]), {"covariates": COVARIATES.encode([{"age": 50}, {}])}
    with torch.no_grad():
        made = network(z, times, {"image": image, "edges": edges, **given})
        context = torch.cat([tokens["covariates"](given["covariates"]), tokens["field"](torch.zeros(2, 2))], dim=1)
        torch.testing.assert_close(made, network.unet(torch.cat([z, image, edges], dim=1), times, context=context))
        with pytest.raises(FibldmError, match="this base network needs the edges; got none"):
            network(z, times, {"image": image})
        with pytest.raises(FibldmError, match="this network knows no mask; got some"):
            network(z, times, {"image": image, "edges": edges, "mask": image})
    with pytest.raises(FibldmError, match="all tokens must have one width, .*; got {'covariates': 12, 'field': 8}"):
        base(tokens=tokens | {"field": FieldToken(FIELD, 8)})
    with pytest.raises(FibldmError, match="has SPADE norms where conditions are seen in them; got DiffusionModelUNet"):
        base(norms={"mask": nn.Identity()})


def test_a_controlnet_may_be_steered_by_any_condition() -> None:
    control = ControlNet(
        in_channels=2, conditioning_embedding_in_channels=3, conditioning_embedding_num_channels=(8,), **unet_numbers()
    )
    network = steered(base(), control, sees="image").eval()
    nn.init.normal_(control.controlnet_mid_block.conv.weight)
    z, times, image = torch.randn(1, 2, 4, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 4, 4, 4)
    assert network.sees == {"image"}
    with torch.no_grad():
        assert not torch.equal(network(z, times, {"image": image}), network(z, times))
        assert torch.equal(network(z, times), base()(z, times))


# --- a kind that is made up


@pytest.fixture
def scanned(tiny_run: Path, tmp_path: Path) -> Path:
    """A run with autoencoder and latents, whose cases come from scanners of 1.5 and 3 T."""
    with_latents_of(tiny_run, tmp_path / "run")
    file = tmp_path / "run" / "latents" / "latents.json"
    facts = read_json(file)
    cases = dict.fromkeys(one["case"] for split in facts["items"].values() for one in split)
    write_json(file, facts | {"covariates": {case: {"tesla": (1.5, 3.0)[n % 2]} for n, case in enumerate(cases)}})
    return tmp_path / "run"


@pytest.mark.slow
def test_a_kind_of_one_file_and_one_yaml_goes_all_the_way(
    scanned: Path,
    tiny_stage: TinyStage,
    phantom_work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training of both stages, preview, Python, command, sidecar, and a bundle that holds no case of the data."""
    settings = {"covariate_width": 12, "preview_every": 1}
    tiny_stage("diffusion", scanned, MADE_UP, **settings).run()
    tiny_stage("controlnet", scanned, MADE_UP, **settings).run()
    assert list((scanned / "controlnet" / "previews").glob("*.png"))
    network = StageFolder(scanned, "controlnet").trained()
    assert network.sees == {"mask", "field"} and network.encodings == {"field": FIELD}
    mask_file = sorted((phantom_work / "labels").iterdir())[0]
    mask = read_volume(str(mask_file))

    def volume(synthesizer: Synthesizer, **asked: Any) -> Any:
        settings = SamplingSettings(sampler="ddim", steps=2, guidance=2.0)
        return synthesizer(mask, settings=settings, allow_extrapolation=True, **asked)

    synthesizer = Synthesizer.from_run(scanned)
    strong, unknown = volume(synthesizer, conditions={"field": 3}), volume(synthesizer)
    assert not np.array_equal(strong.volume.array, unknown.volume.array)
    assert strong.provenance["conditions"] == {"field": 3.0} and unknown.provenance["conditions"] == {"field": None}
    assert "7 T (training 1.5 to 3)" in volume(synthesizer, conditions={"field": 7}).provenance["extrapolation"]
    with pytest.raises(FibldmError, match=r"further conditions must be those of training \(field\); there is no feild"):
        volume(synthesizer, conditions={"feild": 3})
    with pytest.raises(FibldmError, match="the field strength must be a number .T.; got 'strong'"):
        volume(synthesizer, conditions={"field": "strong"})

    command = ["synthesize", "--run", str(scanned), "--masks", str(mask_file), "--out", str(tmp_path / "out")]
    command += ["--sampler", "ddim", "--steps", "2", "--guidance", "2", "--allow-extrapolation", "--json"]
    assert cli([*command, "--condition", "field=3"]) == 0
    assert cli([*command, "--condition", "field=3.0"]) == 0  # the same request
    (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert read_json(sidecar(Path(path)))["conditions"] == {"field": 3.0}
    assert cli([*command, "--condition", "field=1.5"]) == 2  # another one
    assert cli([*command, "--condition", "field"]) == 2
    assert "--condition needs NAME=VALUE" in " ".join(capsys.readouterr().err.split())

    monkeypatch.setattr("fibldm.synthesis.definitions.CONDITIONS", ("fibldm.models.conditions.", "made_up_condition"))
    export(scanned, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    assert read_json(tmp_path / "bundle" / GENERATOR)["conditions"]["field"] == {
        "_target_": "made_up_condition.FieldStrength",
        "low": 1.5,
        "high": 3.0,
    }
    assert "`--condition field=...`" in (tmp_path / "bundle" / "docs" / "README.md").read_text()
    bundled = volume(Synthesizer.from_bundle(tmp_path / "bundle"), conditions={"field": 3})
    assert np.array_equal(bundled.volume.array, strong.volume.array)


# --- the names of before

OLD_MASK = {"_target_": "fibldm.models.conditioning.MaskEncoding", "labels": [0, 1], "compression": 4}
OLD_TOKENS = {
    "_target_": "fibldm.models.covariates.CovariateTokens",
    "encoding": {
        "_target_": "fibldm.models.covariates.CovariateEncoding",
        "kinds": {"sex": {"_target_": "fibldm.models.covariates.Categorical", "values": ["F", "M"]}},
    },
    "width": 12,
}
OLD_ENCODER = {"_target_": "fibldm.models.mask_encoders.MaskRescaler", "mask": OLD_MASK, "channels": 3}
OLD_UNET = {"_target_": "monai.networks.nets.DiffusionModelUNet", "out_channels": 2, **unet_numbers()}
OLD_BASE = {"_target_": "fibldm.models.network.ConditionedNetwork", "unet": OLD_UNET | {"in_channels": 5}}


def test_definitions_of_before_make_the_same_networks() -> None:
    """By the names of weights that their checkpoints have."""
    context = {"with_conditioning": True, "cross_attention_dim": 12}
    concat = OLD_BASE | {"concat": True, "mask_encoder": OLD_ENCODER, "covariate_tokens": OLD_TOKENS}
    concat["unet"] = OLD_UNET | {"in_channels": 5} | context
    network = build(current(concat), "test")
    assert network.routes == {"channels": ("mask",), "norms": (), "tokens": ("covariates",), "time": ()}
    assert {"mask_encoder.mix.weight", "covariate_tokens.unknown"} <= network.state_dict().keys()
    plain = build(current(OLD_BASE | {"concat": False, "mask_encoder": None, "covariate_tokens": None}), "test")
    assert plain.sees == frozenset()
    spade = OLD_UNET | {"_target_": "monai.networks.nets.SPADEDiffusionModelUNet", "label_nc": 3, "in_channels": 2}
    spade |= {"spade_intermediate_channels": 8}
    seen = OLD_BASE | {"unet": spade, "concat": False, "mask_encoder": OLD_ENCODER}
    assert build(current(seen), "test").routes["norms"] == ("mask",)
    assert current(current(concat)) == current(concat)


def test_a_generator_of_before_has_its_conditions_apart() -> None:
    steering = {"_target_": "fibldm.models.network.steered", "covariates": OLD_TOKENS["encoding"]}
    for network in (OLD_BASE, steering | {"base": OLD_BASE | {"covariate_tokens": OLD_TOKENS}}):
        facts = {"format": 1, "network": network | {"covariate_tokens": OLD_TOKENS}, "mask": OLD_MASK}
        conditions = build(current_generator(facts)["conditions"], "test")
        assert conditions["mask"] == MaskEncoding((0, 1), 4) and conditions["covariates"].parts == ("sex",)
    assert current_generator({"format": 1, "network": 3, "mask": None})["conditions"]["covariates"] is None
    assert current_generator({"format": 3, "mask": OLD_MASK})["format"] == 3


def before(config: dict[str, Any]) -> dict[str, Any]:
    """A stage's configuration of today as it was before conditions had one place."""
    text = json.dumps({key: value for key, value in config.items() if key not in ("conditions", "routes")})
    for old, new in (
        ("conditioning", "conditions.mask"),
        ("covariates", "conditions.covariates"),
        ("mask_encoders", "conditions.mask_encoders"),
    ):
        text = text.replace(f"fibldm.models.{new}.", f"fibldm.models.{old}.")
    made: dict[str, Any] = json.loads(text)
    shown = config["conditions"]
    network, (loaded,) = made["network_def"], made["preprocessing"]["transforms"]
    if "base" in network:
        network["covariates"] = "@covariate_encoding"
    else:
        del network["channels"], network["norms"], network["tokens"]
        network |= {"concat": "$@mask_way == 'concat'", "mask_encoder": "$@mask_encoder if @mask_way else None"}
        network["covariate_tokens"] = "@covariate_tokens"
    loaded |= {"mask": "@mask", "covariates": "@covariate_encoding"}
    train, validate = (made[part]["prepare_batch"] for part in ("train", "validate"))
    del train["dropout"]
    train |= {f"{name}_dropout": f"@{name}_dropout" for name in ("mask", "label", "covariate")}
    for part in (train, validate):
        part |= shown
    for part in (network, loaded, train, validate):
        part.pop("conditions", None)
    return made


@pytest.mark.parametrize("stage", ["diffusion", "controlnet"])
def test_a_run_of_before_is_the_same_run_and_loads(
    stage: str, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """Neither refused nor trained anew; its folder says nothing of today's names."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    folder = StageFolder(run, stage)
    made_from = read_json(folder.path / "inputs.json")
    old = before(made_from["config"])
    assert current(old) == made_from["config"] != old and "fibldm.models.conditions" not in json.dumps(old)
    write_json(folder.path / "inputs.json", made_from | {"config": old})
    write_json(folder.path / "config.yaml", before(StageFolder(tiny_run, stage).parser().get()))  # JSON is YAML
    log = (folder.path / "log.txt").read_bytes()
    tiny_stage(stage, run).run()
    assert (folder.path / "log.txt").read_bytes() == log
    with pytest.raises(FibldmError, match="made with another configuration .*dropout"):
        tiny_stage(stage, run, label_dropout=0.5).run()
    assert Synthesizer.from_run(run).network.sees == {"mask"}
    assert Latents.open(run).mask(2) == Synthesizer.from_run(run).mask
