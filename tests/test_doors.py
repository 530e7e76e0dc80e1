"""Every door reaches every condition: covariates, texts, boxes, images and a made-up kind, of all masks and of each.

One run with the smallest networks serves all; beside those it knows the field strength of scanners.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_condition import FieldStrength
from monai.bundle import create_workflow
from text_encoder import write_embeddings

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json, write_json
from fibldm.models.conditions.condition import Condition
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.pipeline import check_asked, synthesize_masks
from fibldm.recipe import Recipe
from fibldm.runs.causes import unwrapped
from fibldm.runs.config_files import configs_folder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files
from fibldm.synthesis.asked import ConditionsTable, known_cases, laid_over, own
from fibldm.synthesis.evaluator import SynthesisEvaluator, mask_items
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.gate import GATE, WHOLE, Gate, write_gate
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.second_image import ABOUT, SecondImages
from fibldm.volumes.writer import sidecar

TinyStage = Callable[..., Configuration]

MADE_UP = str(Path(__file__).with_name("made_up_condition.yaml"))
KNOWN = ("mask_concat", "image", "boxes", "text", MADE_UP)
PAGE = Path(__file__).parents[1] / "docs" / "diffusion.md"
EXAMPLE: dict[str, Any] = json.loads(re.findall(r"```json\n(\{.*?)```", PAGE.read_text(), re.DOTALL)[0])
"""What the page on asking shows, of three conditions."""

TEXTS = (EXAMPLE["text"], "No fibrosis.")
REPORT = "Mr Planted, 63, came with dry cough; reticulation of both lower lobes. " * 2
SECOND = SecondImages("mr", Intensity("percentile", output_low=-1.0, output_high=1.0))
QUICK = SamplingSettings(steps=1)
WAY: dict[str, Any] = {"settings": QUICK, "allow_extrapolation": True, "device": "cpu"}
IMPOSSIBLE = "the field strength must be a number (T); got 'strong'"
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


@dataclass(frozen=True)
class House:
    """Where the doors lead to."""

    run: Path
    bundle: Path
    work: Path
    out: Path

    @property
    def mask(self) -> Path:
        return Path(load_datalist(self.work, "test", masks=True)[0]["label"])

    @property
    def known(self) -> dict[str, Any]:
        """What the data say of the patient of the mask."""
        return load_datalist(self.work, "test", masks=True)[0]


@pytest.fixture(autouse=True)
def bundles_may_have_the_made_up_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.synthesis.definitions.CONDITIONS", ("fibldm.models.conditions.", "made_up_condition"))


@pytest.fixture(scope="module")
def made(
    tiny_run: Path, tiny_stage: TinyStage, phantom_work: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A run that sees all there is, its bundle, and a work folder whose patients have it."""
    folder = tmp_path_factory.mktemp("doors")
    write_embeddings(folder / "texts.npz", TEXTS)
    run, work = folder / "run", folder / "work"
    work.mkdir()
    for part in ("images", "labels"):
        (work / part).symlink_to(phantom_work / part)
    datalist = read_json(phantom_work / "datalist.json")
    cases = [case for split in SPLITS for case in datalist[split]]
    for number, case in enumerate(cases):
        case |= {"age": 40.0 + number % 2, "tesla": (1.5, 3.0)[number % 2], "text": TEXTS[number % 2]}
        case["second_image"] = f"second_images/{Path(case['image']).name}"
    (work / "second_images").mkdir()
    for image in (work / "images").iterdir():
        (work / "second_images" / image.name).symlink_to(image.resolve())
    write_json(work / "second_images" / ABOUT, SECOND.to_dict())
    write_json(work / "datalist.json", datalist)
    run.mkdir()
    for stage in ("autoencoder", "latents"):
        (run / stage).mkdir()
        for part in (tiny_run / stage).iterdir():
            (run / stage / part.name).symlink_to(part)
    (run / "latents" / "latents.json").unlink()
    known = {case["case"]: {name: case[name] for name in ("age", "tesla", "text")} for case in cases}
    facts = read_json(tiny_run / "latents" / "latents.json") | {"covariates": known, "second_image": SECOND.to_dict()}
    write_json(run / "latents" / "latents.json", facts)
    (run / "latents" / GATE).unlink()
    write_gate(
        run, facts, Gate({facts["channels"][0]: {WHOLE: {"median": (-2000.0, 2000.0)}}}, 2, {})
    )  # networks are not trained
    encoder = str(folder / "texts.npz")
    tiny_stage("diffusion", run, *KNOWN, covariates=["age"], covariate_width=12, text_encoder=encoder).run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fibldm.synthesis.definitions.CONDITIONS", ("fibldm.models.conditions.", "made_up_condition"))
        export(run, folder / "bundle", ExportSettings("CC0-1.0"))
    return run, folder / "bundle", work


@pytest.fixture
def house(made: tuple[Path, Path, Path], tmp_path: Path) -> House:
    return House(*made, tmp_path / "out")


def told(house: House) -> dict[str, Any]:
    (volume,) = house.out.glob("**/*.nii.gz" if not (house.out / "masks").exists() else "*.nii.gz")
    return dict(read_json(sidecar(volume)))


def table(house: House, asked: Any) -> dict[str, Any]:
    return {house.mask.name: asked}


def as_word(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


# --- the doors, each with how it is told what to ask


def by_python(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    synthesizer, mask = Synthesizer.from_run(house.run), read_volume(str(house.mask))
    return synthesizer(mask, settings=QUICK, allow_extrapolation=True, **asked).provenance


def by_files(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    synthesize_files(house.run, [house.mask], house.out, **WAY, **asked)
    return told(house)


def by_command(house: House, asked: dict[str, Any], capsys: Any, *generator: str) -> dict[str, Any]:
    words = [f"--covariate={name}={value}" for name, value in asked.get("covariates", {}).items()]
    words += [f"--condition={name}={as_word(value)}" for name, value in asked.get("conditions", {}).items()]
    for name, value in asked.items():
        if name == "conditions_table":
            house.out.parent.joinpath("table.json").write_text(json.dumps(value))
            words += ["--conditions-table", str(house.out.parent / "table.json")]
        elif name == "own_conditions":
            words.append("--own-conditions")
        elif name == "check":
            words += ["--check", str(value)]
    masks = ["--data", str(house.work)] if "own_conditions" in asked else ["--masks", str(house.mask)]
    options = ["--out", str(house.out), "--steps", "1", "--allow-extrapolation", "--device", "cpu", "--json"]
    generator = generator or ("--run", str(house.run))
    code = cli(["synthesize", *generator, *masks, *options, *words])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    if code:
        assert code == 2
        raise FibldmError(said["error"]["message"])
    return told(house)


def by_command_of_a_bundle(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    return by_command(house, asked, capsys, "--bundle", str(house.bundle))


def by_monai(house: House, file: Path, given: dict[str, Any]) -> dict[str, Any]:
    with unwrapped():
        workflow = create_workflow(config_file=str(file), workflow_type="inference", device="cpu", **given)
        workflow.run()
    return told(house)


def by_inference_json(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    given = {"bundle_root": str(house.bundle), "masks": str(house.mask), "output_dir": str(house.out)}
    given |= {"inferer::steps": 1, "allow_extrapolation": True, **asked}
    return by_monai(house, house.bundle / "configs" / "inference.json", given)


def by_inference_yaml(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    given = {"run_dir": str(house.run), "masks": [str(house.mask)], "out": str(house.out)}
    given |= {"settings::steps": 1, "allow_extrapolation": True, **asked}
    return by_monai(house, configs_folder() / "inference.yaml", given)


def by_evaluator(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    synthesizer, items = Synthesizer.from_run(house.run), mask_items([house.mask], 1)
    engine = SynthesisEvaluator(synthesizer, items, house.out, inferer=QUICK, allow_extrapolation=True, **asked)
    engine.run()
    return told(house)


def by_recipe(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    """What a pipeline checks before it trains, and what it does after that."""
    recipe = {"configs": ["data_chest_phantom", "tiny"], "controlnet": None}
    texts = str(house.run.parent / "texts.npz")
    recipe |= {"diffusion": {"configs": [*KNOWN], "covariates": ["age"], "text_encoder": texts}}
    recipe |= {"synthesize": {"steps": 1, "allow_extrapolation": True, **asked}}
    if "own_conditions" in asked:
        recipe["synthesize"]["own_conditions"] = True
    file = house.out.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    read = Recipe.read(str(file), overrides={})
    drawing = read.drawing(house.work)
    stages = {step.name: step.configuration(house.work, house.out / "none") for step in read.stages()}
    check_asked(stages, house.work, drawing, [house.mask])
    synthesize_masks(house.run, [house.mask], house.out, drawing)
    return told(house)


def by_watch_folder(house: House, asked: dict[str, Any], capsys: Any, options: tuple[str, ...] = ()) -> dict[str, Any]:
    item = house.out.parent / "inbox" / "item"
    item.mkdir(parents=True)
    (item / "mask.nii.gz").write_bytes(house.mask.read_bytes())
    asked = dict(asked)
    if "check" in asked:
        options = (*options, "--check", str(asked.pop("check")))
    for name, values in asked.items():
        (item / f"{name}.json").write_text(json.dumps(values))
        if "image" in values:
            (item / values["image"]).write_bytes(Path(values["image"]).read_bytes())
    folders = ["--bundle", str(house.bundle), "--inbox", str(item.parent), "--outbox", str(house.out)]
    more = ["--once", "--json", "--interval", "0.01", "--steps", "1", "--allow-extrapolation", "--device", "cpu"]
    cli(["watch", *folders, *more, "--format", "nifti", *options])
    report = json.loads(capsys.readouterr().out.splitlines()[0])
    if not report["ok"]:
        raise FibldmError(report["error"]["message"])
    return dict(read_json(sidecar(Path(report["outputs"][0]))))


def by_options_of_a_watch_folder(house: House, asked: dict[str, Any], capsys: Any) -> dict[str, Any]:
    words = [f"--covariate={name}={value}" for name, value in asked.get("covariates", {}).items()]
    words += [f"--condition={name}={as_word(value)}" for name, value in asked.get("conditions", {}).items()]
    return by_watch_folder(house, {name: asked[name] for name in ("check",) if name in asked}, capsys, tuple(words))


TAKE_TABLES = [
    by_files,
    by_command,
    by_command_of_a_bundle,
    by_inference_json,
    by_inference_yaml,
    by_evaluator,
    by_recipe,
]
DOORS = [*TAKE_TABLES, by_python, by_watch_folder, by_options_of_a_watch_folder]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    yield


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_reaches_every_condition(
    door: Callable[..., dict[str, Any]],
    house: House,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The sidecar has what was asked, as the page shows it; what cannot be asked is refused in the same words.

    Nothing but the sidecar tells a text.
    """
    monkeypatch.chdir(house.out.parent)
    image = Path(shutil.copy(house.known["image"], EXAMPLE["image"]))
    facts = door(house, {"covariates": {"age": 41}, "conditions": {"field": 3, **EXAMPLE}}, capsys)
    told = facts["conditions"]
    assert facts["covariates"] == {"age": 41.0} and told["field"] == 3.0
    assert told["text"]["text"] == EXAMPLE["text"] and told["image"]["sha256"] == hash_file(image)
    assert [box["class"] for box in told["boxes"]] == ["ground glass", "airways"]
    if door is by_watch_folder:  # its name may tell the patient
        assert EXAMPLE["image"] not in f"{caplog.text} {facts}"
    written = [file for file in house.out.rglob("*.json") if EXAMPLE["text"] in file.read_text()]
    assert all(file.stem.endswith("_000") or "done" in file.parts for file in written)
    for asked, message in (
        ({"conditions": {"field": "strong"}}, IMPOSSIBLE),
        ({"conditions": {"feild": 3}}, "; there is no feild"),
        ({"covariates": {"age": REPORT}}, f"age must be a number, not a text of {len(REPORT)} characters"),
        ({"covariates": {"sex": "F"}}, "covariates must be those of training (age); there is no sex"),
    ):
        other = House(house.run, house.bundle, house.work, house.out.parent / f"{len(message)}" / "out")
        other.out.parent.mkdir()
        with pytest.raises(FibldmError, match=re.escape(message)):
            door(other, asked, capsys)
    said = "".join(record.getMessage() for record in caplog.records if record.name.startswith("fibldm"))
    assert EXAMPLE["text"] not in said and REPORT not in said  # MONAI's own command prints its arguments


FURTHER = (("text", "text"), ("image", "sha256"))


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_reaches_the_check(
    door: Callable[..., dict[str, Any]], house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    told = door(house, {"check": 2}, capsys)["check"]
    assert (told["most"], told["draws"], told["outside"], told["patients"]) == (2, 1, [], 2)
    ((value, low, high),) = (part["median"] for part in told["measured"].values())
    assert (low, high) == (-2000, 2000) and -1000 <= value <= 1000


@pytest.mark.parametrize("door", TAKE_TABLES, ids=lambda door: door.__name__)
def test_every_door_asks_of_each_mask_its_own(
    door: Callable[..., dict[str, Any]], house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a table, over what is asked of all; or what the data say of its patient."""

    def asked(name: str, **given: Any) -> tuple[Any, Any]:
        (house.out.parent / name).mkdir()
        facts = door(House(house.run, house.bundle, house.work, house.out.parent / name / "out"), given, capsys)
        shown = facts["conditions"]
        told["text"], told["image"] = (shown[name] and shown[name][key] for name, key in FURTHER)
        return facts["covariates"]["age"], shown["field"]

    told: dict[str, Any] = {}
    image = house.known["image"]
    of_all = {"covariates": {"age": 41}, "conditions": {"field": 3}}
    row = {"field": 1.5, "text": TEXTS[1], "image": image}
    assert asked("table", conditions_table=table(house, row), **of_all) == (41.0, 1.5)
    assert told == {"text": TEXTS[1], "image": hash_file(Path(image))}
    assert asked("empty", conditions_table=table(house, {"age": None}), **of_all) == (None, 3.0)
    known = house.known
    assert asked("own", own_conditions=str(house.work)) == (known["age"], known["tesla"])
    assert told == {"text": known["text"], "image": hash_file(Path(image))}
    assert asked("over", own_conditions=str(house.work), conditions={"field": 2}) == (known["age"], 2.0)
    with pytest.raises(FibldmError, match=re.escape(IMPOSSIBLE)):
        asked("impossible", conditions_table=table(house, {"field": "strong"}))
    with pytest.raises(
        FibldmError, match=re.escape(f"there is no row of {house.mask.name}; there is no mask of the row z")
    ):
        asked("other", conditions_table={"z": {"age": 41}})


def test_the_card_names_all_that_may_be_asked(house: House) -> None:
    card = " ".join((house.bundle / "docs" / "README.md").read_text().split())
    assert "| age | a number, 40 to 41 in training |" in card and "`--covariate age=41`" in card
    assert "`--condition field=...`" in card and "low 1.5, high 3.0" in card
    assert "a row for each, with the columns mask, age, image, boxes, text, field." in card
    assert "another image of the patient (scan MR, kind percentile, " in card and "by `--image SCAN`" in card
    assert "By `--check 3`" in card and "| volume | -2000 to 2000 | | | |" in card
    facts = read_json(house.bundle / "configs" / "metadata.json")
    assert facts["conditions"]["field"] == {"low": 1.5, "high": 3.0} and "age" in facts["covariates"]


# --- what is asked of each mask

KINDS: dict[str, Condition] = {
    "covariates": CovariateEncoding.fit(["age", "sex"], [{"age": 40, "sex": "F"}, {"age": 60, "sex": "M"}]),
    "field": FieldStrength(1.5, 3.0),
}
A, B = Path("masks/a.nii.gz"), Path("masks/b.nrrd")


def test_a_table_is_csv_json_or_plain_values(tmp_path: Path) -> None:
    """By file names or stems, separated as spreadsheets do; what is empty is unknown."""
    rows = [{"mask": "a.nii.gz", "age": "63", "field": "3"}, {"mask": "b", "age": None, "field": "1.5"}]
    (tmp_path / "t.csv").write_text("\ufeffmask;age;field\na.nii.gz;63;3\n\nb;;1.5\n", encoding="utf-8")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    by_mask = {row["mask"]: {name: value for name, value in row.items() if name != "mask"} for row in rows}
    for given in (tmp_path / "t.csv", str(tmp_path / "t.json"), rows, by_mask):
        made = ConditionsTable.read(given)
        made.check_masks([A, B])
        assert made.of(A, KINDS) == {"covariates": {"age": "63"}, "field": "3"}
        assert made.of(B, KINDS) == {"covariates": {"age": None}, "field": "1.5"}
    assert list(made.only([B]).rows) == ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,age\na,3\n", "must have a column mask"),
        ("mask,age\na\n", "and a value for every column in every line"),
        ("mask,age,age\na,3,4\n", "every column of .* given twice: age"),
        ("mask,age\na,3\na,4\n", "must have one row a mask; given twice: a"),
        ("mask,age\n,3\n", "must name its mask"),
        ("mask,age\na,3\na.nii.gz,4\nb,5\n", "there are two rows of a.nii.gz"),
        ("mask,age\na,3\n", "there is no row of b.nrrd; where nothing is known of a mask"),
        ("mask,age\na,3\nb,4\nc,5\nd,6\n", "there is no mask of the row c, d"),
        (
            "mask,agee\na,3\nb,4\n",
            r"a covariate of training \(age, sex\) or a further condition \(field\); agee is not",
        ),
        ([{"mask": "a", "age": 3}, {"age": 4}], "must name its mask"),
        ({"a": {"age": 3}, "b": 4}, "must name its mask and hold values by name"),
        ({"a": {"mask": "b", "age": 3}}, "must name its mask"),
        ("[3]", "must name its mask"),
    ],
)
def test_tables_that_do_not_fit_their_masks_are_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, str):
        file = tmp_path / ("t.json" if content.startswith("[") else "t.csv")
        file.write_text(content)
        content = file
    with pytest.raises(FibldmError, match=message):
        made = ConditionsTable.read(content)
        made.check_masks([A, B])
        made.of(A, KINDS)


def test_a_column_that_a_covariate_and_a_condition_share_is_refused() -> None:
    kinds = {**KINDS, "age": FieldStrength(1, 2)}
    with pytest.raises(FibldmError, match="either a covariate .*; age is not"):
        ConditionsTable.read({"a": {"age": 3}}).of(A, kinds)


def test_what_is_asked_of_one_goes_before_what_is_asked_of_all() -> None:
    """Of covariates each by itself; nothing is changed in place."""
    under = {"covariates": {"age": 3, "sex": "F"}, "field": 3}
    assert laid_over(under, {"covariates": {"age": None}}) == {"covariates": {"age": None, "sex": "F"}, "field": 3}
    assert laid_over(under, {"field": None})["field"] is None and under["field"] == 3
    assert laid_over({}, {}) == {}


def test_the_data_tell_what_is_known_of_the_case_of_a_mask(phantom_work: Path) -> None:
    cases = known_cases(phantom_work)
    assert len(cases) == sum(len(load_datalist(phantom_work, split, masks=True)) for split in SPLITS)
    mask = next(iter(cases))
    known = {mask: {"age": 50.0, "sex": "X", "tesla": 3.0, "kernel": "b"}}
    assert own(KINDS, known, mask, {}) == {"covariates": {"age": 50.0, "sex": None}, "field": 3.0}
    assert own(KINDS, known, mask, {"field": 2}) == {"covariates": {"age": 50.0, "sex": None}}
    with pytest.raises(FibldmError, match="own conditions are those of cases of the work folder; .*b.nrrd is no mask"):
        own(KINDS, cases, B, {})

    class Silent(FieldStrength):
        own = Condition.own

    with pytest.raises(FibldmError, match="the field strength must be said, as the data do not tell"):
        own({"field": Silent(1, 2)}, known, mask, {})


def test_own_conditions_need_masks_of_a_work_folder(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="conditions of each mask by itself need masks; there are none"):
        SynthesisSettings.of(own_conditions=str(tmp_path)).check_masks([])
    with pytest.raises(FibldmError, match="datalist.json must exist"):
        SynthesisSettings.of(own_conditions=str(tmp_path)).check_masks([A])


def test_a_recipe_is_refused_before_training_where_its_conditions_are(house: House) -> None:
    """Names by the recipe itself, values by the prepared cases; so is what training could not be fitted to."""

    def checked(
        covariates: tuple[str, ...] = ("age",), *, way: tuple[str, ...] = ("mask_concat",), **synthesize: Any
    ) -> None:
        given = {"configs": [*way, MADE_UP], "covariates": list(covariates)}
        stages = {"diffusion": given, "controlnet": None if way else given}
        recipe = Recipe.read(None, configs=["data_chest_phantom", "tiny"], overrides=stages)
        stages = {step.name: step.configuration(house.work, house.out) for step in recipe.stages()}
        check_asked(stages, house.work, SynthesisSettings.of(**synthesize), [house.mask])

    checked(conditions={"field": 3})
    checked(conditions={"field": 3}, way=())  # of a ControlNet, whose base is not there yet
    checked(conditions={"field": 7}, allow_extrapolation=True)
    for wrong, message in (
        ({"conditions": {"field": 7}}, r"7 T \(training 1.5 to 3\)"),
        ({"conditions_table": {house.mask.name: {"age": 95}}}, rf"{house.mask.name[:5]}.*age 95 \(training 40 to 41\)"),
        ({"own_conditions": "absent"}, "absent/datalist.json must exist"),
    ):
        with pytest.raises(FibldmError, match=message):
            checked(**wrong)
    with pytest.raises(FibldmError, match="covariates must differ between the training cases, .*; weight has no value"):
        checked(("age", "weight"))
