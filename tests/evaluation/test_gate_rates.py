"""How good the quality gate is: false alarms on real scans, and faults that it catches."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fibldm.cli import run as cli
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.gate import faults_of, in_units, measure_gate
from fibldm.files import read_json, write_json
from fibldm.volumes.gate import Gate, measure
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar, write_labels, write_nifti, write_synthetic

SHAPE = (20, 18, 14)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
NAMES = {0: "background", 2: "organ"}
RANGE = (100.0, 1100.0)
TRAINED = 12


def scan(patient: int) -> tuple[np.ndarray, np.ndarray]:
    """In the range of output, so that percentiles of a real scan, 3 times as bright, lead back to about that."""
    generator = np.random.default_rng(patient)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    y = 2 + patient % 7
    labels[5:15, y : y + 8, 2:10] = 2
    smooth = ndimage.gaussian_filter(np.where(labels == 2, 800.0, 400.0), 0.6)
    ends = np.zeros(SHAPE)
    ends[0, 0], ends[-1, -1] = -300, 700
    return labels, (smooth + ends + ndimage.gaussian_filter(generator.normal(0, 60, SHAPE), 0.4)).astype(np.float32)


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """Eight test patients; the others are told by their scans as they would be written."""
    work = tmp_path / "work"
    entries = []
    for patient in range(8):
        labels, image = scan(patient)
        write_nifti(work / f"images/c{patient}.nii.gz", 3 * image, AFFINE)
        write_labels(work / f"labels/c{patient}.nii.gz", Volume(labels, AFFINE))
        entry = {"case": f"c{patient}", "subject": f"p{patient}", "image": f"images/c{patient}.nii.gz"}
        entries.append(entry | {"label": f"labels/c{patient}.nii.gz"})
    write_json(work / "datalist.json", {"training": [], "validation": [], "test": entries, "content": "c"})
    intensity = Intensity("percentile", lower=0.0, upper=100.0, output_low=RANGE[0], output_high=RANGE[1])
    return Evaluated(tmp_path / "run", work, ModelGrid((2.0, 3.0, 4.0), (24, 20, 16)), intensity, NAMES, ("MR",))


@pytest.fixture
def gate(evaluated: Evaluated) -> Gate:
    cases = []
    for case in evaluated.real("test"):  # more of the kind
        for more in range(2):
            sample = in_units(evaluated, case)
            image = sample.image[None] + np.float32(5 * more)
            cases.append((f"{case.name}-{more}", measure(["MR"], image, sample.labels, sample.valid)))
    made = Gate.fit(cases, names=NAMES, width={"MR": RANGE[1] - RANGE[0]})
    assert made is not None
    return made


def synthetic(evaluated: Evaluated, folder: Path, factor: float, **facts: object) -> list[Case]:
    for case in evaluated.real("test"):
        sample = in_units(evaluated, case)
        inside = tuple(slice(2, -2) if n == 24 else slice(1, -1) for n in sample.labels.shape)
        volume = Volume(np.ascontiguousarray(sample.image[inside] * factor), AFFINE)
        write_synthetic(folder / f"{case.name}_000.nii.gz", volume, facts)
        labels = Volume(np.ascontiguousarray(sample.labels[inside]), AFFINE)
        write_labels(folder / f"masks/{case.name}.nii.gz", labels)
    return evaluated.synthetic(folder)


def test_real_scans_pass_and_faults_are_caught(evaluated: Evaluated, gate: Gate, tmp_path: Path) -> None:
    section = measure_gate(evaluated, synthetic(evaluated, tmp_path / "good", 1.0), gate)
    share = {name: figure.value for name, figure in section.figures.items()}
    assert (share.pop("outside"), section.figures["outside"].real_vs_real, section.figures["outside"].n) == (0, 0, 8)
    assert share.keys() == {f"caught/{name}" for name in faults_of(evaluated)}
    missed = {name.partition("/")[2]: value for name, value in share.items() if value != 1}
    assert missed.keys() <= {
        "upside down",
        "mask of another patient",
        "blurred, 0.5 voxels",
        "grain added, 5% of the range",
    }
    assert section.facts["why"] == {} and "16 training patients" in section.notes[0] and len(section.notes) == 1


def test_synthetic_volumes_are_measured_as_they_were_written(evaluated: Evaluated, gate: Gate, tmp_path: Path) -> None:
    """Not by their own percentiles, which would hide other units; those that were checked are told."""
    section = measure_gate(evaluated, synthetic(evaluated, tmp_path / "bright", 2.0, check={"draws": 1}), gate)
    assert section.figures["outside"].value == 1 and section.figures["outside"].real_vs_real == 0
    assert section.facts["why"]["label 2 (organ) median"] == 8
    assert section.cases[0]["outside"][0].startswith("volume median ")
    assert "8 of 8 volumes were drawn with --check" in section.notes[1]
    assert read_json(sidecar(tmp_path / "bright" / "c0_000.nii.gz"))["check"] == {"draws": 1}


def test_a_run_without_ranges_cannot_be_measured(
    tiny_run: Path, phantom_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "latents").mkdir(parents=True)
    for part in [*tiny_run.iterdir(), *(tiny_run / "latents").iterdir()]:
        if part.name not in ("latents", "gate.json", "evaluation"):
            (run / part.relative_to(tiny_run)).symlink_to(part)
    weights = read_json(tiny_run / "controlnet" / "done.json")["weights"]
    case = read_json(phantom_work / "datalist.json")["test"][0]
    facts = {"source": {"weights": weights}, "sampling": {"sampler": "ddim", "steps": 1}}
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    write_synthetic(tmp_path / "out" / f"{case['case']}_000.nii.gz", Volume(labels.astype(np.float32), AFFINE), facts)
    write_labels(tmp_path / "out" / "masks" / f"{case['case']}.nii.gz", Volume(labels, AFFINE))
    words = ["--run", str(run), "--data", str(phantom_work), "--synthetic", str(tmp_path / "out"), "--device", "cpu"]
    assert cli(["evaluate", "gate", *words]) == 2
    assert "this generator has none" in capsys.readouterr().err
