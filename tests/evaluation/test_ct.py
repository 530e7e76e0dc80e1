"""Densities of synthetic CT beside real CT: what was changed is what is found, and what cannot be seen is not told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fibldm.cli import run as cli
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.ct import WHOLE_LUNGS, Regions, measure_ct
from fibldm.files import read_json, write_json
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import write_labels, write_nifti, write_synthetic

SHAPE = (22, 20, 18)
NAMES = {0: "background", 1: "right lung", 2: "left lung", 3: "airways", 4: "reticulation", 5: "spleen"}
PATIENTS = 20
RARE = 3  # patients with a spleen


def scan(patient: int) -> tuple[np.ndarray, np.ndarray]:
    """Lungs of -850 HU and a mean of their own, denser below; whole HU."""
    rng = np.random.default_rng([1, patient])
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:9, 3:17, 1:17], labels[13:20, 3:17, 1:17] = 1, 2
    labels[4:6, 8:10, 4:14] = 3
    labels[2:5, 4:9, 2:5] = 4
    if patient < RARE:
        labels[10:13, 3:6, 2:5] = 5
    means = np.array([30.0, -850, -850, -980, -550, 60])[labels]
    gradient = np.isin(labels, (1, 2)) * 10.0 * (8 - np.arange(SHAPE[2]))
    image = means + gradient + rng.normal(0, 5) + rng.normal(0, 25, SHAPE)
    return labels, np.clip(np.round(image), -1024, 1000).astype(np.int16)


def opened(folder: Path, spacing: float, intensity: Intensity | None = None) -> Evaluated:
    """20 patients, the last 10 of them for testing, on the model grid."""
    work, affine, entries = folder / "work", np.diag([spacing] * 3 + [1.0]), []
    for patient in range(PATIENTS):
        labels, image = scan(patient)
        write_nifti(work / f"images/c{patient:02d}.nii.gz", image, affine)
        write_labels(work / f"labels/c{patient:02d}.nii.gz", Volume(labels, affine))
        files = {"image": f"images/c{patient:02d}.nii.gz", "label": f"labels/c{patient:02d}.nii.gz"}
        entries.append({"case": f"c{patient:02d}", "subject": f"p{patient:02d}", **files})
    content = {"training": entries[:10], "validation": [], "test": entries[10:], "content": "c"}
    write_json(work / "datalist.json", content)
    window = intensity or Intensity("window", low=-1000.0, high=1000.0)
    return Evaluated(folder / "run", work, ModelGrid((spacing,) * 3, (24, 24, 20)), window, NAMES)


def drawn(evaluated: Evaluated, folder: Path, spacing: float, change: dict[int, float]) -> list[Case]:
    """Volumes of the test masks: their scans, some labels denser."""
    affine = np.diag([spacing] * 3 + [1.0])
    for patient in range(10, PATIENTS):
        labels, image = scan(patient)
        denser = image + sum(np.where(labels == label, by, 0) for label, by in change.items())
        write_synthetic(folder / f"c{patient}_000.nii.gz", Volume(denser.astype(np.int16), affine), {})
        write_labels(folder / "masks" / f"c{patient}.nii.gz", Volume(labels, affine))
    return evaluated.synthetic(folder)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return opened(tmp_path_factory.mktemp("ct"), 2.0)


def test_the_scans_themselves_are_as_dense_as_scans(coarse: Evaluated, tmp_path: Path) -> None:
    section = measure_ct(coarse, drawn(coarse, tmp_path, 2.0, {}))
    for name, figure in section.figures.items():
        if figure.note == "":
            assert figure.value == figure.real_vs_real and figure.n == 10, name
            assert figure.low is not None and figure.high is not None and figure.low <= figure.value <= figure.high
    assert section.facts["lungs"] == ["right lung", "left lung", "reticulation"]
    assert len(section.facts["real"]) == len(section.facts["reference"]) == 10
    json.dumps(section.to_dict(), allow_nan=False)


def test_denser_lungs_are_found_by_how_much_and_nothing_else_is(coarse: Evaluated, tmp_path: Path) -> None:
    section = measure_ct(coarse, drawn(coarse, tmp_path, 2.0, {2: 40.0}))
    figures = section.figures

    def change(name: str) -> float:
        value, real = figures[name].value, figures[name].real_vs_real
        assert value is not None and real is not None
        return value - real

    assert change("hu_mean/left lung") == pytest.approx(40, abs=0.1)
    assert change("hu_mean/right lung") == change("hu_std/airways") == 0
    assert change("hu_std/left lung") == pytest.approx(0, abs=0.5) and change("perc15/left lung") == pytest.approx(40)
    share = np.mean([(scan(p)[0] == 2).sum() / np.isin(scan(p)[0], (1, 2, 4)).sum() for p in range(10, PATIENTS)])
    assert change(f"hu_mean/{WHOLE_LUNGS}") == pytest.approx(40 * share, abs=0.1)
    distance = figures["hu_distance/left lung"]
    assert (
        distance.value == pytest.approx(40, abs=6) and distance.real_vs_real is not None and distance.real_vs_real < 6
    )
    assert change("hu_distance/right lung") == 0
    assert change("laa950/left lung") < 0 and "haa/airways" not in figures and "haa/left lung" in figures
    heights = [figures[f"apex_to_base/{part} %"].real_vs_real for part in ("0-20", "20-40", "40-60", "60-80", "80-100")]
    assert heights == sorted(heights), "denser towards the base"  # type: ignore[type-var]
    same, others = section.facts["of_real"]["hu_mean/left lung"]
    assert same == figures["hu_mean/left lung"].real_vs_real and same != others and abs(same - others) < 10


def test_patterns_too_fine_for_the_voxels_are_withheld_and_said(coarse: Evaluated, tmp_path: Path) -> None:
    section = measure_ct(coarse, drawn(coarse, tmp_path / "coarse", 2.0, {4: 100.0}))
    for name in ("hu_distance", "hu_std", "hu_skewness", "hu_kurtosis", "haa", "laa950", "perc15"):
        figure = section.figures[f"{name}/reticulation"]
        assert (figure.value, figure.low, figure.real_vs_real) == (None, None, None)
        assert figure.note == "withheld at 2.0 mm voxels"
    assert section.figures["hu_mean/reticulation"].value is not None
    told = [name for where in (section.facts["of_real"], *section.cases) for name in where if "reticulation" in name]
    assert set(told) == {"hu_mean/reticulation"}, "nor is it elsewhere in the file"
    assert section.facts["withheld"] == dict.fromkeys(("reticulation", "honeycombing"), "withheld at 2.0 mm voxels")
    assert any(note.startswith("reticulation and honeycombing: withheld at 2.0 mm voxels") for note in section.notes)
    assert "withheld at 2.0 mm voxels" in section.text("ct")
    fine = opened(tmp_path, 1.5)
    section = measure_ct(fine, drawn(fine, tmp_path / "fine", 1.5, {4: 100.0}))
    assert section.figures["hu_distance/reticulation"].value == pytest.approx(100, abs=15)
    assert section.facts["withheld"] == {} and not any("withheld" in note for note in section.notes)


def test_a_label_of_few_patients_is_compared_among_these(coarse: Evaluated, tmp_path: Path) -> None:
    """Of the scans only those of training patients show a spleen, and none a cyst; two masks ask for both."""
    volumes = drawn(coarse, tmp_path, 2.0, {})
    section = measure_ct(coarse, volumes)
    assert not any("spleen" in name for name in section.figures)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for patient in (10, 11):
        labels, _ = scan(patient)
        labels[10:13, 3:6, 2:5], labels[10:13, 8:11, 2:5] = 5, 6
        write_labels(tmp_path / "masks" / f"c{patient}.nii.gz", Volume(labels, affine))
    section = measure_ct(replace(coarse, labels={**NAMES, 6: "cyst"}), coarse.synthetic(tmp_path))
    figure = section.figures["hu_mean/spleen"]
    assert (figure.n, figure.note, figure.real_vs_real) == (2, "too few to say", None)
    distance = section.figures["hu_distance/spleen"]
    assert (distance.n, distance.real_vs_real) == (2, None) and distance.value == pytest.approx(30, abs=6)
    distance = section.figures["hu_distance/cyst"]
    assert distance.value is None and distance.note == "too few to say: no other patient has this label"


def test_lungs_can_be_named_and_organs_without_lungs_have_densities(coarse: Evaluated, tmp_path: Path) -> None:
    volumes = drawn(coarse, tmp_path, 2.0, {})
    section = measure_ct(coarse, volumes, lungs=["left lung"])
    assert section.facts["lungs"] == ["left lung"] and not any(WHOLE_LUNGS in name for name in section.figures)
    assert "haa/left lung" in section.figures and "haa/right lung" not in section.figures
    with pytest.raises(FibldmError, match="label must be one of right lung, .*; got .lung."):
        measure_ct(coarse, volumes, lungs=["lung"])
    abdomen = replace(coarse, labels={0: "background", 1: "liver", 2: "kidney"})
    section = measure_ct(abdomen, volumes)
    assert {name.partition("/")[0] for name in section.figures} == {
        "hu_distance", "hu_mean", "hu_std", "hu_skewness", "hu_kurtosis"
    }  # fmt: skip
    assert section.facts["lungs"] == [] and "--lungs names them" in section.notes[-1]
    assert not any("withheld" in note for note in section.notes)


def test_a_label_named_like_the_whole_does_not_hide_it() -> None:
    regions = Regions.of({1: WHOLE_LUNGS, 2: "emphysema"})
    assert regions.values == {f"{WHOLE_LUNGS} together": (1, 2), WHOLE_LUNGS: (1,), "emphysema": (2,)}


@pytest.mark.parametrize("kind", ["percentile", "range"])
def test_only_ct_has_hounsfield_units(coarse: Evaluated, kind: str) -> None:
    ends = {"output_low": 0.0, "output_high": 900.0} if kind == "percentile" else {}
    other = replace(coarse, intensity=Intensity(kind, **ends))  # type: ignore[arg-type]
    with pytest.raises(FibldmError, match="need a run of CT, in HU; .* arbitrary units; measure realism"):
        measure_ct(other, [])


def test_the_commands_measure_a_bundle_without_a_run(
    tiny_bundle: Path, phantom_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Densities and spread of phantoms that pose as volumes of two seeds; nothing but --out is written to."""
    training = read_json(phantom_work / "datalist.json")["training"]
    entries = list({entry["subject"]: entry for entry in training}.values())[:2]
    for entry in entries:
        for number in range(2):
            image = phantom_work / entry["image"]
            target = tmp_path / "synthetic" / f"{entry['case']}_{number:03d}.nii.gz"
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(image)
        (tmp_path / "synthetic" / "masks").mkdir(exist_ok=True)
        mask = tmp_path / "synthetic" / "masks" / f"{entry['case']}.nii.gz"
        mask.symlink_to(phantom_work / entry["label"])
    words = ["--data", str(phantom_work), "--synthetic", str(tmp_path / "synthetic"), "--bundle", str(tiny_bundle)]
    before = sorted(tiny_bundle.rglob("*"))
    for name in ("ct", "spread"):
        assert cli(["evaluate", name, *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "withheld at 10.0 mm voxels" in said and "Lungs are right lung, left lung, ground glass" in said
    sections = read_json(tmp_path / "out" / "evaluation" / "metrics.json")
    ct = sections["ct"]["figures"][f"hu_mean/{WHOLE_LUNGS}"]
    assert ct["value"] == ct["real_vs_real"] and -900 < ct["value"] < -500
    assert sections["spread"]["figures"]["spread/whole"]["value"] == 0
    assert sorted(tiny_bundle.rglob("*")) == before
    assert cli(["evaluate", "ct", *words, "--out", str(tmp_path / "out"), "--lungs", "left lung,,"]) == 2
    assert "parted by commas" in capsys.readouterr().err
