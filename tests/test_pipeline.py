"""From a dataset to a bundle by one command: recipes are checked before anything runs, and what is done is skipped."""

import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import verified_here

from fibldm.cli import run
from fibldm.delivery.export import ExportSettings
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.pipeline import pipeline
from fibldm.recipe import Recipe
from fibldm.runs.config_files import configs_folder
from fibldm.runs.options import as_options, parse_overrides
from fibldm.runs.stages import DEFAULT_RECIPE

RECIPES = sorted(path.stem for path in configs_folder().glob("recipe_*.yaml"))
CC0 = ExportSettings("CC0-1.0")


def quiet(line: str) -> None:
    pass


def refuse(*_: object) -> None:
    raise AssertionError("something asked for the network")


def refuse_network(connect: Callable[..., None]) -> Callable[..., None]:
    """`socket.socket.connect`, which reaches processes of this machine only."""
    return lambda self, address: connect(self, address) if self.family == socket.AF_UNIX else refuse()


# --- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_can_be_followed(name: str) -> None:
    """Every step's options and configuration keys exist."""
    recipe = Recipe.read(name, configs=["data_chest_phantom"] * (name == DEFAULT_RECIPE), overrides={})
    assert recipe.preparation and recipe.drawing(Path("work"))
    assert [step.configuration(Path("work"), Path("run")) for step in recipe.stages()]
    assert f"--recipe {name} " in (configs_folder() / f"{name}.yaml").read_text()


def test_changes_come_on_top_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("configs: [data_lung_ct]\ndiffusion: {epochs: 3, mask_detail: 4}\nprepare: {modality: ct}\n")
    overrides = parse_overrides(["diffusion::epochs=5", "controlnet=null", "synthesize::steps=7", "latents::views=2"])
    recipe = Recipe.read(str(file), configs=["tiny"], overrides=overrides)
    assert recipe.configs == ["data_lung_ct", "tiny"]
    assert [(step.name, dict(step.overrides)) for step in recipe.stages()] == [
        ("autoencoder", {}),
        ("latents", {"views": 2}),
        ("diffusion", {"epochs": 5, "mask_detail": 4}),
    ]
    assert recipe.drawing(tmp_path).sampling.steps == 7 and recipe.preparation.modality == "ct"


def test_a_whole_given_on_top_replaces_parts_of_the_file_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("diffusion: {times::shift: 2, times::times: null}\n")
    whole, part = {"diffusion::times": {"shift": 1}}, {"diffusion::times::shift": 3}
    for given in ({**whole, **part}, {**part, **whole}):
        recipe = Recipe.read(str(file), overrides=given)
        assert recipe.of_stages["diffusion"] == {"times": {"shift": 1}, "times::shift": 3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"difusion::epochs": 3}, "step of a recipe must be one of configs, prepare, .*got 'difusion'"),
        ({"diffusion": 3}, "step of a recipe diffusion must be a mapping from a text to any value; got 3"),
        ({"controlnet::epochs": 3, "controlnet": None}, "controlnet is None, of which controlnet::epochs cannot be"),
        ({"synthesize::conditions": {"field": 3}}, r"conditions must be those of training \(none\); there is no field"),
        ({"synthesize::conditions_table": "absent.json"}, "absent.json must exist"),
        ({"autoencoder": None}, "step of a recipe autoencoder must be a mapping"),
        ({"measure::0": "copies"}, "step of a recipe measure must be a list of values, each a text"),
        ({"configs": "tiny"}, "step of a recipe configs must be a list of values, each a text; got 'tiny'"),
        ({"diffusion": {1: 2}}, "a mapping from a text"),
        ({"diffusion::configs": "mask_concat"}, "configs of diffusion must be a list of names; got 'mask_concat'"),
        ({"diffusion::epohcs": 3}, "configuration key 'epohcs' is not known"),
        ({"segmenter::epohcs": 3}, "configuration key 'epohcs' is not known"),
        ({"prepare::modalty": "ct"}, "option of prepare must be one of layout, .*got 'modalty'"),
        ({"prepare::keep_columns": "age"}, "option of prepare keep_columns must be a list of values, each a text"),
        ({"prepare::skip_bad": "maybe"}, "option of prepare skip_bad must be true or false; got 'maybe'"),
        ({"prepare::seed": None}, "option of prepare seed must be a whole number; got None"),
        ({"prepare::window": [1, 2, 3]}, "a list of 2 values, each a number or null"),
        ({"prepare::labels": {"a": "b"}}, "a mapping from a whole number to a text"),
        ({"synthesize::step": 5}, "option of synthesize must be one of .*got 'step'"),
        ({"synthesize::steps": "abc"}, "option of synthesize steps must be a whole number; got 'abc'"),
        ({"synthesize::steps": 0}, "steps must be at least 1"),
        ({"synthesize::covariates": {"age": 63}}, r"those of training \(none\); there is no age; name them in cov"),
        ({"synthesize::covariates": 63}, "option of synthesize covariates must be a mapping"),
        ({"synthesize::batch_size": 0}, "batch_size must be at least 1"),
        ({"perceptual": "absent.pth"}, r"LPIPS needs a local file of weights \(perceptual\); there is no absent.pth"),
        ({"measure": ["realness"]}, "measure must be one of faithfulness, .*got 'realness'"),
        (
            {"diffusion::configs": []},
            "without a ControlNet that sees the mask, stage 2 must see it; its mask_way is null",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    overrides: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FibldmError, match=message):
        recipe = Recipe.read(None, configs=["data_chest_phantom"], overrides=overrides)
        pipeline(tmp_path / "absent", tmp_path / "out", recipe, CC0, say=quiet)
    assert not (tmp_path / "out").exists()


def test_a_grid_that_stage_2_refuses_is_refused_before_stage_1(tmp_path: Path, tiny_data: Path) -> None:
    """After the preparation, which tells channels and labels."""
    write_phantoms(tmp_path / "phantoms", subjects=4, seed=0)
    given = {"autoencoder::size": [36, 32, 32], "diffusion::unet_channels": [8, 8], "prepare::modality": "ct"}
    recipe = Recipe.read(None, configs=[str(tiny_data), "tiny"], overrides=given)
    with pytest.raises(FibldmError, match=r"size \(36, 32, 32\) .* by \(8, 8, 8\),.* 2\^1 .*\(40, 32, 32\)"):
        pipeline(tmp_path / "phantoms", tmp_path / "out", recipe, CC0, say=quiet)
    assert not (tmp_path / "out" / "run").exists()


def test_what_an_export_would_refuse_is_refused_first(tmp_path: Path) -> None:
    """The licence, the words, and a ControlNet that the recipe does not know of."""
    recipe = Recipe.read(None, configs=["data_chest_phantom"], overrides={})
    with pytest.raises(FibldmError, match="--license must be the SPDX identifier"):
        pipeline(tmp_path / "absent", tmp_path / "out", recipe, ExportSettings("mine"), say=quiet)
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / "bundle" / "export.yaml").write_text("titel: mine")
    with pytest.raises(FibldmError, match=r"export\.yaml must hold some of title"):
        pipeline(tmp_path / "absent", tmp_path / "out", recipe, CC0, say=quiet)
    (tmp_path / "other" / "run" / "controlnet").mkdir(parents=True)
    with pytest.raises(FibldmError, match="the recipe has no controlnet, and .*run has one"):
        pipeline(tmp_path / "absent", tmp_path / "other", recipe, CC0, say=quiet)


def test_without_a_recipe_the_network_sees_the_mask_and_there_is_no_controlnet() -> None:
    """The README's road."""
    steps = Recipe.read(None, configs=["my_data.yaml"], overrides={}).stages()
    assert [(step.name, list(step.configs)) for step in steps] == [
        ("autoencoder", ["my_data.yaml"]),
        ("latents", ["my_data.yaml"]),
        ("diffusion", ["my_data.yaml", "mask_concat"]),
    ]


def test_a_run_of_the_old_default_goes_on_as_it_was_begun_or_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    """A stage 2 without masks under a ControlNet, of which the latter may not be begun yet."""
    recipes = {
        way: Recipe.read(None, configs=["data_chest_phantom"], overrides=changes)
        for way, changes in {
            "now": {},
            "before": {"controlnet": {}, "diffusion::configs": []},
            "anew": {"diffusion::restart": True},
        }.items()
    }
    going_on = re.escape("; choose another --out folder; --set controlnet={} --set diffusion::configs=[] goes on")
    for stages, message, way in (
        (("diffusion",), "was begun as a network that sees no mask, and the recipe shows it the mask", "anew"),
        (("diffusion", "controlnet"), "the recipe has no controlnet, and .* has one, which would be used", "before"),
    ):
        out = tmp_path / way
        for stage in stages:
            shutil.copytree(tiny_run / stage, out / "run" / stage)
        with pytest.raises(FibldmError, match=message + going_on):
            pipeline(tmp_path / "absent", out, recipes["now"], CC0, say=quiet)
        with pytest.raises(FibldmError, match="absent"):  # the next thing that is looked at
            pipeline(tmp_path / "absent", out, recipes[way], CC0, say=quiet)


def test_the_command_refuses_what_is_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["pipeline", str(tmp_path), "--out", str(tmp_path / "out"), "--license", "CC0-1.0"]
    assert run([*given, "--recipe", "recipe_of_nothing"]) == 2
    assert "configuration must be one of" in capsys.readouterr().err


def test_changes_come_back_as_they_were() -> None:
    """Through a shell and YAML."""
    given = {
        "epochs": 3,
        "mask": "a b",
        "steps": "3",
        "rate": "1e-4",
        "folder": "[größe]: *x",
        "nothing": "null",
        "label_weights": {"4": 4},
        "layer_rates": {"*": 1e-05},
        "snr_gamma": None,
        "wavelet": True,
        "sizes": [1, 2.5],
    }
    words = shlex.split(as_options(given))
    assert words[::2] == ["--set"] * len(given)
    assert parse_overrides(words[1::2]) == given


# --- all of it


@pytest.mark.slow
def test_one_command_from_a_folder_of_volumes_to_a_bundle(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is verified; a second run finds all of it done; nothing asks for the network."""
    monkeypatch.setattr(socket.socket, "connect", refuse_network(socket.socket.connect))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("fibldm.pipeline.verify", verified_here)
    write_phantoms(tmp_path / "phantoms", subjects=7, seed=0)
    command = [
        *("pipeline", str(tmp_path / "phantoms"), "--out", str(tmp_path / "made"), "--license", "CC0-1.0"),
        *("--config", str(tiny_data), "--config", "tiny", "--set", "segmenter::steps=2"),
        *("--set", "segmenter::segmenter_channels=[4, 8, 8]", "--set", "synthesize::steps=2"),
        *("--set", "synthesize::allow_extrapolation=true", "--set", "measure=[faithfulness, utility]"),
    ]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "all 5 checks are ok" in told
    assert re.search(r"fibldm train diffusion .*--config mask_concat", told) and "train controlnet" not in told
    files = [*tmp_path.glob("made/synthetic*/*.nii.gz"), *tmp_path.glob("made/run/*/checkpoints/*.pt")]
    assert {file.parent.name for file in files} == {"synthetic", "synthetic_training", "checkpoints"}
    shown = (tmp_path / "made" / "report.html").read_text()
    assert "Left out: real scans" in shown and "shuffled masks" in shown
    assert "neither volumes nor names" in (tmp_path / "made" / "bundle" / "docs" / "report.html").read_text()
    metadata = read_json(tmp_path / "made" / "bundle" / "configs" / "metadata.json")
    assert metadata["name"] == "made" and any(key.startswith("utility/") for key in metadata["eval_metrics"])
    figures = read_json(tmp_path / "made" / "run" / "evaluation" / "metrics.json")
    drawn = figures["faithfulness"]["drawn"]["sampling"]
    assert drawn == figures["utility"]["drawn"]["sampling"] and drawn["steps"] == 2
    assert metadata["sampling"] == {**drawn, "seed": 0, "shift": None} and "note: the figures" not in told
    before = {file: file.stat().st_mtime_ns for file in files}
    assert run(command) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    capsys.readouterr()
    assert run([*command, "--set", "synthesize::steps=1"]) == 2
    assert re.search(r"lies there already.*move .*synthetic away", " ".join(capsys.readouterr().err.split()))
    assert run([*command, "--set", "diffusion::seed=1"]) == 2
    assert re.search(r"made with another.*diffusion::restart=true, once", " ".join(capsys.readouterr().err.split()))
