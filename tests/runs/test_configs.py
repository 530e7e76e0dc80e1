"""The shipped configurations: every part they name exists, and a mistyped key is refused."""

import inspect
import json
import pydoc
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import STAGES
from conftest import TinyStage
from monai.bundle import ConfigParser, ConfigWorkflow
from processes import by_monai, finish, start

from fibldm import __version__
from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.runs import StageFolder, decisive
from fibldm.runs.config_files import ConfigFiles, configs_folder, shipped
from fibldm.runs.configuration import Configuration, IncompatibleGrid, check_grid, stage_configuration
from fibldm.runs.options import parse_overrides
from fibldm.runs.stages import TABLE
from fibldm.training.muon import Muon

ROOT = Path(__file__).parents[2]

ALONE = ("inference", "evaluate", "load_dicom")  # configurations that are run by themselves
DATA = sorted(path.stem for path in configs_folder().glob("data_*.yaml"))
AUTOENCODERS = sorted(path.stem for path in configs_folder().glob("autoencoder_*.yaml"))
MASKS = sorted(path.stem for path in configs_folder().glob("mask_*.yaml"))
SIZES = ("unet_s", "unet_m", "unet_l")
LEARNING = ("learned_variance", "learned_variance_vlb", "loss_aware_times", "loss_log_variance")
TRACKERS = ("mlflow", "wandb")  # of training
COMBINATIONS = [
    *((stage, data, ()) for stage in TABLE for data in DATA),
    *((stage, DATA[0], ("image", "image_latents")) for stage in ("diffusion", "controlnet")),
    *(("controlnet", DATA[0], ("image_controlnet", *more)) for more in ((), ("image_latents",))),
    *((stage, DATA[0], (name,)) for stage in TABLE for name in ("tiny", "demo", "multi_gpu")),
    *((stage, DATA[0], (name,)) for stage in TABLE if stage != "latents" for name in TRACKERS),
    *(("autoencoder", DATA[0], (name,)) for name in AUTOENCODERS),
    *((stage, DATA[0], ("augment_torchio_mr",)) for stage in ("autoencoder", "segmenter")),
    ("segmenter", DATA[0], ("partial_masks",)),
    ("diffusion", DATA[0], ("unet_generative",)),
    ("diffusion", DATA[0], ("token",)),
    *((stage, DATA[0], ("masks",)) for stage in ("autoencoder", "latents")),
    *(("autoencoder", DATA[0], names) for names in (("masks_autoencoder",), ("masks", "masks_autoencoder"))),
    ("diffusion", DATA[0], ("masks_by_volume",)),
    ("controlnet", DATA[0], ("controlnet_generative",)),
    *(
        (stage, DATA[0], (name,))
        for stage in ("diffusion", "controlnet")
        for name in (*MASKS, *SIZES, *LEARNING, "covariates", "covariates_in_time", "boxes", "image", "adapter", "text")
    ),
]


def files(stage: str, data: str, *extra: str) -> list[str]:
    return [str(shipped(name)) for name in ("common", *TABLE[stage].files, data, *extra)]


def components(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a ``_target_``, at any depth."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and "_target_" in value:
        yield value
    for part in parts:
        yield from components(part)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(part)


def locate(target: str) -> Any:
    found = pydoc.locate(target)  # as MONAI does, which knows methods of classes, too
    assert found is not None, f"{target} cannot be imported"
    return found


def check_component(component: dict[str, Any]) -> None:
    given = {key: None for key in component if not (key.startswith("_") and key.endswith("_"))}
    inspect.signature(locate(component["_target_"])).bind(**given)


def check_references(parser: ConfigParser) -> None:
    for text in texts(parser.get()):
        if text.startswith(("$", "@")):
            for reference in re.findall(r"@([\w:#]+)", text):
                assert reference.rstrip(":") in parser, f"{text!r} names {reference!r}, which does not exist"


def check_all(merged: list[str]) -> None:
    parser = ConfigParser(ConfigFiles.load_config_files(merged))
    found = list(components(parser.get()))
    assert found
    for component in found:
        check_component(component)
    check_references(parser)


@pytest.mark.parametrize(("stage", "data", "extra"), COMBINATIONS, ids=str)
def test_every_part_of_a_configuration_exists(stage: str, data: str, extra: tuple[str, ...]) -> None:
    check_all(files(stage, data, *extra))


@pytest.mark.parametrize("name", ALONE)
def test_every_part_of_a_configuration_that_runs_alone_exists(name: str) -> None:
    check_all([str(shipped(name))])


@pytest.mark.parametrize("wrong", [{"_target_": "torch.nn.Lineer"}, {"_target_": "torch.nn.Linear", "in_feetures": 3}])
def test_a_part_that_does_not_exist_would_be_seen(wrong: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, TypeError)):
        check_component(wrong)
    with pytest.raises(AssertionError, match="'a::c', which does not exist"):
        check_references(ConfigParser({"a": {"b": 1}, "d": "$@a::b + @a::c"}))


def test_a_file_is_read_anew_when_it_changed_and_what_was_read_is_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("a: {b: 1}\n")
    ConfigFiles.load_config_file(file)["a"]["b"] = 2
    assert ConfigFiles.load_config_file(file) == {"a": {"b": 1}}
    file.write_text("a: {b: 30}\n")
    assert ConfigFiles.load_config_files([str(file)]) == {"a": {"b": 30}}


def test_every_shipped_configuration_is_one_of_the_documented() -> None:
    used = {Path(file).stem for combination in COMBINATIONS for file in files(*combination[:2], *combination[2])}
    recipes = {path.stem for path in configs_folder().glob("recipe_*.yaml")}
    assert used | recipes | {*ALONE} == {path.stem for path in configs_folder().glob("*.yaml")}


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "controlnet", "segmenter"])
def test_the_training_configurations_have_the_properties_of_a_bundle(
    tiny_stage: TinyStage, tiny_run: Path, stage: str
) -> None:
    configuration = tiny_stage(stage, tiny_run)
    workflow = ConfigWorkflow(
        config_file=[str(file) for file in configuration.files], workflow_type="train", **configuration.overrides
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.version == __version__


def header(name: str) -> str:
    found = re.match(r"(#.*\n)+", shipped(name).read_text())
    assert found is not None
    return found.group()


def header_arguments(name: str) -> list[str]:
    """The MONAI command that the header of a configuration says."""
    text = re.sub(r"\\?\n#\s*", " ", header(name))
    return shlex.split(text[text.index("python -m") : text.index("Override")])


@pytest.mark.parametrize("stage", TABLE)
def test_a_stage_is_the_same_by_monai_and_by_fibldm(stage: str, tmp_path: Path) -> None:
    """The user's own values win by both: those of a data configuration that a stage file has, too."""
    listed = [str(ROOT / file) for file in yaml.safe_load(header_arguments(TABLE[stage].files[-1])[5])]
    by_monai = ConfigWorkflow(listed, workflow_type="train", work="w", run_dir="r").parser
    ours = make(stage, "data_chest_phantom")
    assert {**by_monai.get(), "_meta_": None} == {**ours.parser().get(), "_meta_": None}
    if stage == "controlnet":
        assert by_monai["label_weights"] == {3: 2, 4: 4, 5: 4, 6: 4}


OPTIONS = sorted({extra[0] for _, _, extra in COMBINATIONS if extra})


def stages_of(option: str) -> set[str]:
    """The stages whose files an option comes after, as its header says: two lines, what it does and where it stands."""
    _, after, *more = header(option).splitlines()
    assert after.startswith("# After ") and not more
    if "any stage" in after:
        return {stage for stage in TABLE if stage != "latents" or "trained" not in after}
    return {stage for stage, kind in TABLE.items() if f"{kind.files[-1]}.yaml" in after}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_follows_the_stages_that_it_names_in_the_documented_command(option: str) -> None:
    """The one command of docs/training.md, with another option in it and the files of another stage."""
    page = (ROOT / "docs" / "training.md").read_text()
    command = re.search(r'--config_file "(\[.*my_data.*\])"', page)
    assert command is not None
    common, *stage_files, data, example = yaml.safe_load(command[1])
    assert [Path(file).stem for file in (common, *stage_files)] == ["common", *TABLE["diffusion"].files]
    assert (data, Path(example).stem) == ("my_data.yaml", "mask_concat")
    tried = {stage for stage, _, extra in COMBINATIONS if extra == (option,)}
    assert stages_of(option) and stages_of(option) <= tried  # all parts of these exist
    for stage in stages_of(option):
        listed = [common, *(f"configs/{name}.yaml" for name in TABLE[stage].files), shipped(DATA[0]), shipped(option)]
        assert make(stage, DATA[0], option).files == tuple(ROOT / file for file in listed)


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_files_of_a_documented_command_are_in_the_order_of_fibldm(page: str) -> None:
    found = re.findall(r'--config_file "(\[.*\])"', (ROOT / page).read_text())
    assert found
    for text in found:
        names = [Path(file).stem for file in yaml.safe_load(text)]
        data = next(position for position, name in enumerate(names) if "data" in name)
        assert names[0] == "common" and tuple(names[1:data]) in [kind.files for kind in TABLE.values()]


@pytest.mark.parametrize("page", ["README.md", "docs/troubleshooting.md"])
def test_keys_that_a_page_mentions_are_taken_by_a_stage_with_a_mask(page: str) -> None:
    """Stages 1 and 2, or the option that the same row of a table names."""
    found = 0
    for line in (ROOT / page).read_text().splitlines():
        options = [name for name in re.findall(r"`(?:--config )?([a-z_0-9]+)`", line) if is_option(name)]
        keys = re.findall(r'`(?:--set "?)?([a-z_]+(?:::[a-z_]+)*)=[^`]+`', line)
        for key in (key for key in keys if key != "key"):
            found += 1
            assert any(takes(key, stage, *more) for stage, more in TAKERS + [("autoencoder", options)]), key
    assert found > 1


TAKERS: list[tuple[str, list[str]]] = [("autoencoder", []), ("diffusion", ["mask_concat"]), ("latents", [])]


def is_option(name: str) -> bool:
    return (ROOT / "configs" / f"{name}.yaml").is_file()


def takes(key: str, stage: str, *options: str) -> bool:
    try:
        make(stage, DATA[0], *options, **{key: 1})
    except FibldmError as error:
        return "is not known" not in str(error)
    return True


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("training", ("common", *TABLE["autoencoder"].files, "data_chest_phantom")),
        ("inference", ("inference",)),
        ("evaluate", ("evaluate",)),
    ],
)
def test_monais_names_of_what_runs_run_it_once(
    capsys: pytest.CaptureFixture[str], name: str, files: tuple[str, ...]
) -> None:
    workflow = ConfigWorkflow([str(shipped(file)) for file in files], run_id=name, workflow_type=None)
    workflow.parser["run"] = ["$print('ran')"]
    workflow.run()
    assert capsys.readouterr().out == "ran\n"


@pytest.mark.parametrize("stage", TABLE)
def test_the_command_in_a_stage_file_is_the_one_that_runs_it(stage: str) -> None:
    name = TABLE[stage].files[-1]
    text = re.sub(r"\\?\n#\s*", " ", header(name))
    for word in ("Needs:", "Override: --", "Expect"):
        assert word in text
    arguments = header_arguments(name)
    assert arguments[:5] == ["python", "-m", "monai.bundle", "run", "--config_file"]
    listed = [ROOT / file for file in yaml.safe_load(arguments[5])]
    assert all(file.is_file() for file in listed)
    assert [str(file) for file in listed] == files(stage, "data_chest_phantom")
    option = re.search(r"Override: --([\w:]+) ", text)
    assert option is not None
    assert option.group(1) in ConfigParser(ConfigFiles.load_config_files(files(stage, DATA[0])))


def test_presets_of_three_sizes_have_the_parameters_that_the_docs_say(tiny_run: Path, tiny_data: Path) -> None:
    """Docs/training.md lists them, in millions, with the mask as a further input."""
    told = re.findall(r"`(unet_[sml])` \| .* \| ([\d.]+) \|", (ROOT / "docs" / "training.md").read_text())
    assert [name for name, _ in told] == list(SIZES)
    for name, millions in told:
        parser = make("diffusion", str(tiny_data), name, run_dir=str(tiny_run), mask_way="concat").parser()
        with torch.device("meta"):
            network = parser.get_parsed_content("unet")
        assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(float(millions), rel=0.02)


def test_no_file_that_the_readme_names_is_missing() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    named = set(re.findall(r"(?:configs|docs|scripts|bundles|tests|fibldm)/[\w./-]*\w", readme.read_text()))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert named
    assert not missing


# --- keys


def make(stage: str = "autoencoder", *configs: str, **overrides: Any) -> Configuration:
    return stage_configuration(
        stage, work=Path("w"), run_dir=Path("r"), configs=configs or (DATA[0],), overrides=overrides
    )


@pytest.mark.parametrize(
    ("stage", "key", "owner"),
    [
        ("diffusion", "label_weights", r"belongs to stage controlnet; set it for that stage"),
        ("diffusion", "kl_weight", r"belongs to stage autoencoder;"),
        ("autoencoder", "unet_channels", r"belongs to stage diffusion;"),
        (
            "autoencoder",
            "discriminator_start",
            r"belongs to the configuration autoencoder_adversarial; add --config",
        ),
        ("diffusion", "wandb::pictures", r"belongs to the configuration wandb; add --config wandb"),
    ],
)
def test_a_key_of_another_stage_or_option_is_refused_with_its_owner(stage: str, key: str, owner: str) -> None:
    with pytest.raises(FibldmError, match=rf"key '{key}' is not known here; it {owner}"):
        make(stage, "data_lung_ct", **{key: 1})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epohcs", "epochs"),
        ("train::trainer::max_epohcs", "train::trainer::max_epochs"),
        ("network_def::wavelat", "network_def::wavelet"),
    ],
)
def test_a_mistyped_key_names_the_nearest_one(tmp_path: Path, key: str, nearest: str) -> None:
    """Of an override, and in a file."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"{key}: 3")
    for configs, overrides, where in (((), {key: 1}, ""), ((DATA[0], str(file)), {}, f" in {file}")):
        with pytest.raises(FibldmError, match=f"key '{key}'{where} is not known") as raised:
            make("autoencoder", *configs, **overrides)
        assert raised.value.remedy == f"did you mean '{nearest}'?"


def test_an_override_of_another_stage_is_none_of_this_one() -> None:
    with pytest.raises(FibldmError, match="key 'views' is not known"):
        make("autoencoder", views=1)


@pytest.mark.parametrize("classes_first", [True, False])
def test_overrides_are_checked_against_each_other(classes_first: bool) -> None:
    """As docs/diffusion.md has it: another process, and what only that takes."""
    given = {
        "process::_target_": "fibldm.models.process.VariancePreserving",
        "process::schedule": "cosine",
        "times::times::_target_": "fibldm.models.timesteps.LogitNormalTimes",
        "times::times::mean": 0.5,
        "target": "v",
    }
    items = list(given.items())
    made = make("diffusion", DATA[0], **dict(items if classes_first else items[::-1]))
    assert made.parser().get_parsed_content("process").schedule == "cosine"
    with pytest.raises(FibldmError, match="key 'process::shedule' is not known") as raised:
        make("diffusion", DATA[0], **{"process::_target_": given["process::_target_"], "process::shedule": "cosine"})
    assert raised.value.remedy == "did you mean 'process::schedule'?"
    with pytest.raises(FibldmError, match="key 'process::schedule' is not known"):
        make("diffusion", DATA[0], **{"process::schedule": "cosine"})


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_whole_and_its_parts_are_taken_in_any_order(whole_first: bool) -> None:
    whole = {"times": {"_target_": "fibldm.models.timesteps.ShiftedTimes", "times": "$None", "shift": 2.0}}
    parts = {"times::shift": 3.0, "times::times": {"_target_": "fibldm.models.timesteps.UniformTimes"}}
    made = make("diffusion", DATA[0], **({**whole, **parts} if whole_first else {**parts, **whole}))
    assert made.parser()["times"] == {**whole["times"], "shift": 3.0, "times": parts["times::times"]}
    assert made.command.index("--times '{") < made.command.index("--times::shift 3.0")


@pytest.mark.parametrize("whole", [None, "@process", 3])
def test_a_part_of_an_override_without_parts_is_refused_with_both(whole: Any) -> None:
    with pytest.raises(FibldmError, match=f"must go together; times is {whole!r}, of which times::shift cannot be"):
        make("diffusion", DATA[0], **{"times::shift": 3.0, "times": whole})


def test_a_file_that_replaces_what_it_said_of_a_part_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("times::shift: 3.0\ntimes: {_target_: fibldm.models.timesteps.UniformTimes}\n")
    with pytest.raises(FibldmError, match="mine.yaml gives 'times' behind 'times::shift', which it would drop"):
        make("diffusion", DATA[0], str(file))


def test_overrides_of_a_class_that_does_not_exist_are_refused() -> None:
    with pytest.raises(FibldmError, match="_target_ must name a class .* can be imported; .*'Proces'"):
        make(
            "diffusion", DATA[0], **{"process::_target_": "fibldm.models.process.Proces", "process::schedule": "cosine"}
        )


def test_arguments_of_a_class_method_may_be_overridden() -> None:
    """A condition is fitted by one, and image_latents gives it further arguments."""
    made = make("diffusion", DATA[0], "image", "image_latents", **{"conditions::image::device": "cpu"})
    assert made.parser()["conditions"]["image"]["_target_"].endswith("image_latents.ImageLatents.fit")
    assert made.parser()["conditions"]["image"]["compression"] == "$@mask.factors"
    with pytest.raises(FibldmError, match="conditions::image::devic"):
        make("diffusion", DATA[0], "image", **{"conditions::image::devic": "cpu"})


def test_keys_of_a_file_are_checked_against_each_other_too(tmp_path: Path) -> None:
    """Whatever their order: an argument of a class that the same file names."""
    file = tmp_path / "mine.yaml"
    named = "process::_target_: fibldm.models.process.VariancePreserving\n"
    file.write_text("process::schedule: cosine\n" + named)
    assert make("diffusion", DATA[0], str(file)).parser().get_parsed_content("process").schedule == "cosine"
    file.write_text(named + "process::shedule: cosine\n")
    with pytest.raises(FibldmError, match=f"key 'process::shedule' in {file} is not known") as raised:
        make("diffusion", DATA[0], str(file))
    assert raised.value.remedy == "did you mean 'process::schedule'?"


@pytest.mark.parametrize("key", ["+trackers", "+validate::key_metric"])
def test_additions_belong_into_files(key: str, tmp_path: Path) -> None:
    """MONAI merges ``+key`` of a file; of an override it would make a key of that name."""
    with pytest.raises(FibldmError, match="is not known"):
        make("diffusion", DATA[0], **{key: []})
    file = tmp_path / "mine.yaml"
    file.write_text(f"{key}: {{}}" if "::" in key else f"{key}: []")
    assert make("diffusion", DATA[0], str(file)).files[-1] == file


@pytest.mark.parametrize("spacing", [[0, 2, 2], [-2, 2, 2], [2, 2, float("nan")]])
def test_a_grid_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, spacing: list[float]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"spacing": spacing, "size": [32, 32, 32]}))
    with pytest.raises(FibldmError, match="spacing must be three numbers above 0"):
        make("autoencoder", str(file))


@pytest.mark.parametrize("key", ["epochs", "optimizer::betas", "preprocessing::0::keys", "train::dataset::progress"])
def test_a_key_that_exists_or_that_a_component_takes_is_let_through(key: str) -> None:
    assert make("autoencoder", **{key: 1}).overrides[key] == 1


def test_a_file_may_change_any_stage_and_name_values_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "views: 2\nunet_channels: [8, 8]\nhalf: 0.5\nlearning_rate: '$@half / 100'\nstage::name: autoencoder"
    )
    assert make("autoencoder", DATA[0], str(file)).files[-1] == file


def test_a_file_that_changes_a_part_which_the_stage_lacks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train::trainer::max_epochs: 3")
    with pytest.raises(FibldmError, match=f"{file} changes '.*max_epochs', and this stage has no 'train'; leave it"):
        make("latents", DATA[0], str(file))
    assert make("latents", DATA[0], "autoencoder_adversarial").files[-1].stem == "autoencoder_adversarial"


def test_the_model_grid_may_come_as_overrides() -> None:
    assert make("segmenter", "tiny", spacing=[1.0, 2.0, 3.0], size=[16, 32, 64]).overrides["size"] == [16, 32, 64]
    with pytest.raises(FibldmError, match="a data configuration must give spacing and size"):
        make("segmenter", "tiny", spacing=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (("tiny",), "a data configuration must give spacing and size"),
        (
            ("data_chest_fantom",),
            "configuration must be one of adapter, .*common, .*data_chest_phantom",
        ),
        (("absent.yaml",), "configuration absent.yaml must exist"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(configs: tuple[str, ...], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        make("autoencoder", *configs)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("epochs", "abc", 0), ("epochs", -1, 0), ("batch_size", 0, 1), ("val_interval", 1.5, 1)],
)
def test_a_count_that_is_none_is_refused(name: str, value: object, least: int) -> None:
    with pytest.raises(FibldmError, match=f"{name} must be a whole number of at least {least}; got {value!r}"):
        make("autoencoder", "data_chest_phantom", **{name: value})


def grid_of(work: Path, size: list[int], *configs: str, **overrides: object) -> None:
    given = {"spacing": [1.0, 1.0, 1.0], "size": size, **overrides}
    check_grid(stage_configuration("autoencoder", work=work, run_dir=work, configs=configs, overrides=given))


@pytest.mark.parametrize(
    ("size", "autoencoder", "fitting"),
    [
        ([48, 64, 48], None, None),
        ([52, 64, 48], None, (64, 64, 48)),
        ([48, 64, 48], "autoencoder_f8", (64, 64, 64)),
        ([256, 256, 1], "autoencoder_slices", None),
        ([288, 256, 1], "autoencoder_slices", (320, 256, 1)),
        ([46, 64, 48], "autoencoder_identity", (48, 64, 48)),
        ([48, 64, 48], "autoencoder_identity", None),
        ([64, 64, 16], "autoencoder_anisotropic", None),
    ],
)
def test_a_grid_that_stage_2_refuses_is_told_before_stage_1(
    phantom_work: Path, size: list[int], autoencoder: str | None, fitting: tuple[int, ...] | None
) -> None:
    """The sizes that would do are named; a single slice stays one."""
    configs = () if autoencoder is None else (autoencoder,)
    if fitting is None:
        return grid_of(phantom_work, size, *configs)
    with pytest.raises(IncompatibleGrid, match=re.escape(f"choose size {fitting}, or fewer unet_channels")):
        grid_of(phantom_work, size, *configs)


def test_a_network_of_another_kind_is_not_judged_by_its_grid(phantom_work: Path, tmp_path: Path) -> None:
    """One without ``unet::channels`` may divide otherwise; expressions of the configuration are followed."""
    (tmp_path / "mine.yaml").write_text("unet: {_target_: mine.Network, width: 8}")
    (tmp_path / "grid.yaml").write_text("edge: 52\nspacing: [1.0, 1.0, 1.0]\nsize: '$[@edge, 64, 48]'")
    one, two = (tuple(map(shipped, ("common", *TABLE[stage].files))) for stage in ("autoencoder", "diffusion"))
    first = Configuration((*one, tmp_path / "grid.yaml"), {"work": phantom_work})
    check_grid(first, Configuration((*two, tmp_path / "mine.yaml"), {}))
    with pytest.raises(IncompatibleGrid, match=r"size \(52, 64, 48\)"):
        check_grid(first)


def test_the_grid_of_a_refused_autoencoder_is_not_told(phantom_work: Path) -> None:
    """What the autoencoder refuses comes as itself, without MONAI's wrapping."""
    with pytest.raises(FibldmError, match="strides") as refused:
        grid_of(phantom_work, [64, 64, 1], "autoencoder_anisotropic")
    assert not isinstance(refused.value, IncompatibleGrid)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.yaml", "a: [", "must be YAML or JSON"),
        ("mine.json", "a: 1", "must be YAML or JSON"),
        ("mine.yaml", "- a", "must hold a mapping .* list"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FibldmError, match=message):
        make("autoencoder", DATA[0], str(tmp_path / name))


def test_an_unknown_stage_lists_the_stages() -> None:
    with pytest.raises(FibldmError, match="stage must be one of autoencoder, latents, diffusion, controlnet"):
        make("autoencodr")


def test_overrides_are_yaml() -> None:
    assert parse_overrides(["a=3", "b::c=[1, 2]", "d=1e-4", "e=text", "f=", "g=a=b", "h=true"]) == {
        "a": 3,
        "b::c": [1, 2],
        "d": 1e-4,
        "e": "text",
        "f": None,
        "g": "a=b",
        "h": True,
    }


def test_the_rate_warms_up_falls_and_may_follow_the_batch() -> None:
    """As docs/training.md says it: an expression as a value, on a schedule; by Muon, or by AdamW if asked for."""
    overrides = parse_overrides(["learning_rate=$1e-5 * @batch_size * @accumulation_steps", "batch_size=4"])
    changes = {"accumulation_steps": 2, "warmup_steps": 10, "lr_scheduler::t_total": 100, **overrides}
    parser = ConfigParser(ConfigFiles.load_config_files(files("diffusion", DATA[0])))
    for key, value in changes.items():
        parser[key] = value
    parser["network"] = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    optimizer, schedule = parser.get_parsed_content("optimizer"), parser.get_parsed_content("lr_scheduler")
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert isinstance(optimizer, Muon)
    parser["optimizer"]["_target_"] = "torch.optim.AdamW"
    parser.parse(reset=True)
    assert isinstance(parser.get_parsed_content("optimizer"), torch.optim.AdamW)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((0.05 * 8e-5, (0.05 + 0.95 * 0.5) * 8e-5, 8e-5))
    assert (rates[55], rates[100]) == pytest.approx((8e-7 + 0.5 * (8e-5 - 8e-7), 8e-7), rel=0.01)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("wrong", ["epochs", "=3", "a=["])
def test_an_override_that_is_no_assignment_is_refused(wrong: str) -> None:
    with pytest.raises(FibldmError, match="--set needs"):
        parse_overrides([wrong])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "autoencoder", "--set", "epohcs=1"], "'epohcs' is not known; did you mean 'epochs'?"),
        (["train", "autoencodr"], "stage must be one of"),
        (["encode", "--set", "veiws=1"], "did you mean 'views'?"),
    ],
)
def test_the_command_line_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--config", DATA[0], "--json"]
    assert run([*arguments, *places]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in f"{error['message']}; {error['remedy']}"
    assert list(tmp_path.iterdir()) == []


def test_a_work_folder_that_is_none_is_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    places = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--config", DATA[0]]
    assert run(["train", "autoencoder", *places]) == 2
    assert f"{tmp_path / 'datalist.json'} must exist" in capsys.readouterr().err


def test_the_command_line_trains_and_says_how_monai_would(
    capsys: pytest.CaptureFixture[str], phantom_work: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """And warns of a grid that the later stages will not take as they ship."""
    chosen = ["--config", str(tiny_data), "--config", "tiny", "--set", "device=cpu", "--set", "size=[36, 32, 32]"]
    places = ["--data", str(phantom_work), "--run", str(tmp_path / "run")]
    assert run(["train", "autoencoder", *places, *chosen, "--json"]) == 0
    printed = capsys.readouterr()
    assert "warning: for stage 2, size (36, 32, 32) of the model grid must be divisible by (16, 16, 16)" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["outputs"] == [str(tmp_path / "run" / "autoencoder")]
    assert "python -m monai.bundle run --config_file" in printed.err
    assert not any(word in printed.err for word in ("Logging file", "Not all config files", "nvImageCodec"))
    kept = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    channels = ["--set", "network_def::network::in_channels=7"]  # found by the first step
    assert run(["train", "autoencoder", *places, *chosen, *channels, "--restart"]) == 2
    assert "in_channels of a network must be the number of channels that it gets, 8; it is 7" in capsys.readouterr().err
    assert {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == kept


@pytest.mark.parametrize(("change", "key"), [("spacing=2,2,2", "spacing"), ("autoencoder_channels=[7]", "network_def")])
def test_a_wrong_value_leaves_nothing_behind_but_its_key(
    capsys: pytest.CaptureFixture[str], phantom_work: Path, tiny_data: Path, tmp_path: Path, change: str, key: str
) -> None:
    chosen = ["--config", str(tiny_data), "--config", "tiny", "--set", change]
    assert run(["train", "autoencoder", "--data", str(phantom_work), "--run", str(tmp_path / "run"), *chosen]) == 2
    told = capsys.readouterr().err.split("fibldm: ")[1]
    assert key in told and "Failed to" not in told


# --- what decides

# What runs of before the list leave out of the comparison; the same now, or they would be refused.
LEFT_OUT = frozenset(
    "_meta_ activation_checkpointing bundle_root checkpoint_every dataset_dir device epochs finalize imports "
    "init_trust initialize keep_best keep_every limit_val_batches log_every minutes mlflow num_workers patience "
    "preview preview_eta preview_every preview_metrics preview_sampler preview_steps profile restart run run_dir stage "
    "stop_gap trackers training wall_time wandb watch watch_training work "
    "experiment_name is_not_rank0 output_dir run_name save_execute_config tracking_uri".split()
)
NEW = {"not_decisive", "decisive_unless"}


@pytest.mark.parametrize(("stage", "extra"), [*((stage, ()) for stage in TABLE), ("diffusion", TRACKERS)])
def test_a_configuration_says_itself_which_keys_decide(stage: str, extra: tuple[str, ...]) -> None:
    config = make(stage, DATA[0], *extra).parser().get()
    left_out = {*LEFT_OUT, *NEW, "latent_draw", "masks_only", "latent_space", "lora_alpha", "lora_apart"}
    left_out |= {"workers", "cluster"}
    assert decisive(config) == {key: value for key, value in config.items() if key not in left_out}
    changed = {**config, "latent_draw": "mean", "mine": 1}  # neither as before, nor known to anybody
    assert {key for key in decisive(changed) if key not in decisive(config)} == {"latent_draw", "mine"}
    assert decisive({**config, "not_decisive": [*config["not_decisive"], "seed"]}) == {
        key: value for key, value in decisive(config).items() if key != "seed"
    }


def test_what_has_no_such_list_is_judged_by_the_shipped_ones() -> None:
    """As the training configurations of bundles that were made before."""
    config = json.loads((ROOT / "bundles" / "hippocampus_mri" / "configs" / "train.json").read_text())
    assert NEW.isdisjoint(config)
    assert decisive({**config, "mlflow": 1, "masks_only": True}) == {
        key: value for key, value in config.items() if key not in LEFT_OUT
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"not_decisive": "epochs"}, "not_decisive must be a list of keys; got 'epochs'"),
        ({"not_decisive": ["epochs", 3]}, "not_decisive must be a list of keys"),
        ({"decisive_unless": ["seed"]}, "decisive_unless must be a mapping"),
    ],
)
def test_a_list_of_what_decides_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        decisive({"not_decisive": [], **change})


# --- showing


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    assert run([*arguments, "--data", str(folder / "work #1"), "--run", str(folder / "r"), "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", TABLE)
def test_a_printed_configuration_is_the_merged_one_and_can_be_used_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stage: str
) -> None:
    """Nothing is started: there is no data, and no run folder afterwards."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "note: \"two\\nlines: # 3\"\ninit_from: '@note'\nlayer_rates: {'*a*': 1.0e-05}\n+not_decisive: [note]\n"
    )
    given = ["--config", "data_chest_phantom", "--config", str(mine), "--set", "grid::size=[16, 16, 16]"]
    command = ["encode"] if stage == "latents" else ["train", stage]
    text = shown(capsys, tmp_path, *command, *given)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]
    made = stage_configuration(
        stage,
        work=tmp_path / "work #1",
        run_dir=tmp_path / "r",
        configs=["data_chest_phantom", str(mine)],
        overrides={"grid::size": [16, 16, 16]},
    )
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert ConfigParser.load_config_files([str(again)]) == made.parser().get()  # by MONAI alone
    assert make(stage, str(again)).parser().get() == {**made.parser().get(), "work": "w", "run_dir": "r"}


def test_a_printed_configuration_says_where_each_part_comes_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train::trainer::decollate: true\n+trackers: ['@wandb']\n+state: {more: '@ema'}\n")
    configs = [word for name in ("data_chest_phantom", "mlflow", "wandb", "mine.yaml") for word in ("--config", name)]
    options = ["--set", "unet::channels=[8, 8]", "--minutes", "5", "--restart"]
    text = shown(capsys, tmp_path, "train", "diffusion", *configs, *options)
    lines = text.splitlines()
    for line in (
        "#   mine.yaml",
        "tf32: true  # common.yaml",
        "optimizer:  # common_training.yaml",
        "train:  # common_training.yaml",
        "    decollate: true  # mine.yaml",
        "    data: $take_subset(@latents.items('training'), @subset)  # train_diffusion.yaml",
        "trackers:  # train_diffusion.yaml",
        "- '@preview'",
        "- '@mlflow'  # mlflow.yaml",
        "- '@wandb'  # wandb.yaml",
        "- '@wandb'  # mine.yaml",
        "  more: '@ema'  # mine.yaml",
        "size: [64, 64, 64]  # data_chest_phantom.yaml",
        "  channels: [8, 8]  # --set",
        "minutes: 5.0  # --minutes",
        "restart: true  # --restart",
        f"run_dir: {tmp_path}/r  # --run",
    ):
        assert line in lines
    sampler = lines[lines.index("train:  # common_training.yaml") + 1 :]
    assert sampler[:2] == ["  sampler:", "    _target_: fibldm.training.draws.EpochSampler"]  # of the same file


def test_a_configuration_that_is_refused_is_not_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--data", "w", "--run", str(tmp_path / "r"), "--config", DATA[0], "--print-config"]
    assert run(["train", "diffusion", *options, "--set", "epohcs=3"]) == 2
    assert capsys.readouterr().out == ""
    assert run(["train", "diffusion", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(result["configuration"]) == make("diffusion", run_dir=str(tmp_path / "r")).parser().get()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "controlnet"])
def test_the_plain_monai_command_trains_the_same(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path, stage: str
) -> None:
    """With the name of what runs that MONAI's cards have, and the labels' weights of the user's own file."""
    run_dir, given = tmp_path / "run #1", {"patch": [16, 16, 16]} if stage == "autoencoder" else {}
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(tiny_run / earlier, run_dir / earlier)
    configuration = tiny_stage(stage, run_dir, **given)
    arguments = shlex.split(configuration.command)
    assert arguments[:5] == ["python", "-m", "monai.bundle", "run", "--config_file"]
    resolved = [(Path.cwd() / file).resolve() for file in yaml.safe_load(arguments[5])]
    assert resolved == [*configuration.files]
    log = tmp_path / "log.txt"
    finish(start(log, by_monai, "run", "training", *arguments[4:]), log=log)
    theirs = StageFolder(run_dir, stage).weights("last")["objects"]["network"]
    ours = StageFolder(tiny_run, stage).weights("last")["objects"]["network"]
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
