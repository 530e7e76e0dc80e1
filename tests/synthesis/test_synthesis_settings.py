"""What may be asked of a synthesis is listed once, and every door takes all of it."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fibldm.cli.synthesize import synthesize
from fibldm.delivery.configurations import inference_configuration
from fibldm.errors import FibldmError
from fibldm.recipe import Recipe
from fibldm.synthesis import FileFormat, SamplingSettings, SynthesisSettings, synthesize_files
from fibldm.synthesis.settings import OF_SAMPLING, OPTIONS

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULTS = {
    part.name: part.default for kind in (SamplingSettings, FileFormat, SynthesisSettings) for part in fields(kind)
} | {"covariates": {}, "conditions": {}, "adapters": {}}
EACH = [{"mask": "a.nii.gz", "age": 63}]


def test_options_are_laid_over_settings_by_their_names() -> None:
    base = SynthesisSettings.of(SamplingSettings(sampler="ddim", steps=3), count=2, covariates={"age": 63})
    made = SynthesisSettings.of(base, eta=0.5, batch_size=4, format="dicom", patient_position="HFS")
    assert made.sampling == SamplingSettings(sampler="ddim", steps=3, eta=0.5)
    assert (made.count, made.batch_size, made.covariates) == (2, 4, {"age": 63})
    assert made.files == FileFormat("dicom", patient_position="HFS")
    assert made.files.dicom is not None and made.files.dicom.position == "HFS"
    assert SynthesisSettings.of(made, count=3).files.dicom is made.files.dicom, "a template is read once"
    assert SynthesisSettings.of() == SynthesisSettings() and SynthesisSettings().files.dicom is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "option of synthesis must be one of sampler, steps, .*got 'step'"),
        ({"sampling": SamplingSettings()}, "option of synthesis must be one of .*got 'sampling'"),
        ({"steps": 2.5}, "option of synthesis steps must be a whole number; got 2.5"),
        ({"count": "4"}, "option of synthesis count must be a whole number; got '4'"),
        ({"allow_extrapolation": "false"}, "allow_extrapolation must be true or false; got 'false'"),
        ({"covariates": ["age"]}, "covariates must be a mapping from a text to any value; got"),
        ({"template": 3}, "template must be a text or a path or null; got 3"),
        ({"conditions_table": 3}, "conditions_table must be a text or a path or a list of values, .*; got 3"),
        ({"conditions": {"covariates": {"age": 3}}}, "covariates are asked for by their own names"),
        ({"adapters": ["a"]}, "adapters must be a mapping from a text or a path to a number; got"),
        ({"adapters": {"a": -1}}, "strength of an adapter must be a number of at least 0; a has -1"),
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"format": "dcm"}, "format must be one of nifti, dicom; got 'dcm'"),
        (
            {"label_codes": "a.csv", "patient_position": "HFS"},
            "format nifti takes no label_codes and no patient_position",
        ),
        (
            {"mask_format": "both"},
            "format nifti takes no mask_format",
        ),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        SynthesisSettings.of(**options)
    with pytest.raises(FibldmError, match=message):
        synthesize_files(None, [], "out", **options)


def test_a_recipe_takes_the_same_options_but_writes_what_is_measured() -> None:
    given = {"steps": 5, "guidance_interval": [0.1, 0.9], "count": 2, "covariates": {"sex": "F"}}
    given |= {"conditions": {"field": 3}, "conditions_table": EACH}
    drawing = Recipe.read(None, overrides={"synthesize": given}).drawing(Path("work"))
    assert drawing == SynthesisSettings.of(**given) and drawing.sampling.guidance_interval == (0.1, 0.9)
    assert drawing.own_conditions is None
    own = Recipe.read(None, overrides={"synthesize::own_conditions": True})
    assert own.drawing(Path("work")).own_conditions == Path("work")
    with pytest.raises(FibldmError, match="own_conditions must be true or false; got 'work'"):
        Recipe.read(None, overrides={"synthesize::own_conditions": "work"}).drawing(Path("work"))
    with pytest.raises(FibldmError, match="measures volumes in NIfTI; its synthesize asks for format dicom; leave"):
        Recipe.read(None, overrides={"synthesize::format": "dicom"}).drawing(Path("work"))


def test_the_command_has_every_option_with_its_default() -> None:
    """None of sampling, for which a bundle has its own."""
    renamed = {"format": "output_format", "covariates": "covariate", "conditions": "condition", "adapters": "adapter"}
    taken = inspect.signature(synthesize).parameters
    given = {name: taken[renamed.get(name, name)].default for name in OPTIONS}
    assert given == {name: None if name in OF_SAMPLING else DEFAULTS[name] for name in OPTIONS} | {
        "covariates": [],
        "conditions": [],
        "own_conditions": False,  # of --data
        "adapters": [],
    }


def test_the_configuration_has_every_option_with_its_default_and_hands_it_on() -> None:
    config = yaml.safe_load((CONFIGS / "inference.yaml").read_text())
    flat = {**config, **config["settings"]}
    assert {name: SynthesisSettings.of(**{name: flat[name]}) for name in OPTIONS} == dict.fromkeys(
        OPTIONS, SynthesisSettings()
    )
    call = config["synthesis"]
    parameters = {name for name in inspect.signature(synthesize_files).parameters if name not in ("bundle", "trust")}
    assert set(call) - {"_target_"} == (parameters - {"options"}) | (set(OPTIONS) - set(config["settings"]))
    assert all(value == f"@{name}" for name, value in call.items() if name != "_target_")


def test_a_bundle_has_every_option_but_those_of_sampling() -> None:
    facts = {"space": {"mean": [0.0]}, "sees_mask": True, "network": {}, "autoencoder": {}, "sampling": {}}
    config = inference_configuration(facts)
    sampling = {part.name for part in fields(SamplingSettings)}
    for name in set(OPTIONS) - sampling - {"count"}:
        assert config[name] == DEFAULTS[name] and config["evaluator"][name] == f"@{name}"
