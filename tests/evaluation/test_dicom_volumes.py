"""Volumes that were written as DICOM are measured like those of NIfTI: the same voxels, masks and sidecars."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.dicom_volumes import as_nifti, series_in
from fibldm.evaluation.provenance import read_provenance
from fibldm.files import read_json, write_json
from fibldm.synthesis import SamplingSettings
from fibldm.volumes.dicom.output import DicomOutput
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar, write_labels, write_nifti, write_synthetic

SHAPE = (9, 8, 7)
AFFINE = np.array([[0.0, -1.5, 0, 30], [1.5, 0, 0, -20], [0, 0, -2.5, 7], [0, 0, 0, 1]])  # axes A, L, I
NAMES = {0: "background", 1: "left lung", 2: "ground glass"}
CT = Intensity("window", low=-1000.0, high=600.0)
WEIGHTS = "a" * 64
FACTS = {"source": {"weights": WEIGHTS}, "sampling": SamplingSettings().to_dict()}


def labels_of(number: int) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:5, 2:4, 1:3], labels[5 : 7 + number, :, 4] = 1, 2
    return labels


def image_of(number: int) -> np.ndarray:
    return np.rint(np.random.default_rng(number).uniform(-1000, 600, SHAPE)).astype(np.int16)


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    work, entries = tmp_path / "work", []
    for number, name in enumerate(("c_0", "c_1")):
        write_nifti(work / f"images/{name}.nii.gz", image_of(10 + number), AFFINE)
        write_labels(work / f"labels/{name}.nii.gz", Volume(labels_of(number), AFFINE))
        files = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        entries.append({"case": name, "subject": f"p{number}", **files})
    write_json(work / "datalist.json", {"training": [], "validation": [], "test": entries, "content": "c"})
    return Evaluated(tmp_path / "run", work, ModelGrid((1.5, 1.5, 2.5), (12, 12, 8)), CT, NAMES)


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """As `fibldm synthesize --format dicom` leaves it."""
    return written(tmp_path, "seg")


def written(tmp_path: Path, mask_format: str) -> Path:
    output = DicomOutput.read(mask_format=mask_format)
    for number, name in enumerate(("c_0", "c_1")):
        output.write(
            tmp_path / "dicom" / f"{name}_000",
            Volume(image_of(number), AFFINE),
            Volume(labels_of(number), AFFINE),
            names={value: name for value, name in NAMES.items() if value},
            intensity=CT,
            request={"mask": f"{name}.nii.gz", "mask_sha256": "f" * 64, "request": "r"},
            provenance=FACTS,
        )
    return tmp_path / "dicom"


@pytest.mark.parametrize("mask_format", ["seg", "rtstruct", "both"])
def test_a_series_is_measured_like_its_nifti(evaluated: Evaluated, tmp_path: Path, mask_format: str) -> None:
    dicom = written(tmp_path, mask_format)
    for number, name in enumerate(("c_0", "c_1")):
        write_synthetic(tmp_path / "nifti" / f"{name}_000.nii.gz", Volume(image_of(number), AFFINE), FACTS)
        write_labels(tmp_path / "nifti" / "masks" / f"{name}.nii.gz", Volume(labels_of(number), AFFINE))
    pairs = list(zip(evaluated.synthetic(dicom), evaluated.synthetic(tmp_path / "nifti"), strict=True))
    assert [one.name for one, _ in pairs] == ["c_0_000", "c_1_000"]
    for one, other in pairs:
        assert (one.subject, one.split) == (other.subject, other.split) == (f"p{one.name[2]}", "test")
        for ours, theirs in zip(evaluated.read(one), evaluated.read(other), strict=True):
            assert np.array_equal(ours, theirs)
        assert one.label is not None and one.label.name == f"{one.name[:3]}.nii.gz"
        assert one.written == dicom / one.name and other.written == other.image
    assert read_json(sidecar(pairs[0][0].image))["synthetic"] is True, "copies are marked as well"


def test_a_copy_is_made_once_for_each_content(evaluated: Evaluated, dicom: Path) -> None:
    first, again = (evaluated.synthetic(dicom) for _ in range(2))
    assert first == again and len(list((evaluated.folder / "cache" / "dicom").iterdir())) == 2
    facts = sidecar(dicom / "c_0_000")
    write_json(facts, read_json(facts) | {"more": 1})
    assert evaluated.synthetic(dicom)[0].image != first[0].image


def test_series_of_other_weights_are_refused(evaluated: Evaluated, dicom: Path) -> None:
    files = [case.written for case in evaluated.synthetic(dicom)]
    drawn = read_provenance(files, lambda: {WEIGHTS}, of="mine")
    assert (drawn.volumes, drawn.weights) == (2, WEIGHTS)
    with pytest.raises(FibldmError, match=r"made with the weights of mine .*; c_0_000, c_1_000 with others \(aaaaaaaa"):
        read_provenance(files, lambda: {"b" * 64}, of="mine")
    sidecar(dicom / "c_1_000").unlink()
    with pytest.raises(FibldmError, match="either all volumes of .*dicom must have the sidecar .*; c_1_000 without"):
        read_provenance(files, lambda: {WEIGHTS}, of="mine")


def test_a_series_without_mask_or_sidecar_is_a_volume_of_unknown_origin(evaluated: Evaluated, dicom: Path) -> None:
    shutil.rmtree(dicom / "masks")
    for file in dicom.glob("*.json"):
        file.unlink()
    cases = evaluated.synthetic(dicom)
    assert [case.label for case in cases] == [None, None] and [case.subject for case in cases] == ["p0", "p1"]
    assert read_provenance([case.written for case in cases], set, of="mine").weights is None


def test_a_series_that_is_not_whole_or_there_twice_is_refused(evaluated: Evaluated, dicom: Path) -> None:
    sorted((dicom / "c_1_000").iterdir())[2].unlink()
    with pytest.raises(FibldmError, match=r"c_1_000 must hold the 7 slices that its sidecar tells of; 6 are there"):
        evaluated.synthetic(dicom)
    shutil.rmtree(dicom / "c_1_000")
    write_synthetic(dicom / "c_0_000.nii.gz", Volume(image_of(0), AFFINE), FACTS)
    with pytest.raises(FibldmError, match="every volume must be there once; c_0_000 came as NIfTI and as DICOM"):
        evaluated.synthetic(dicom)


def test_a_segment_that_is_no_label_is_refused(dicom: Path, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="every segment of c_0_000.dcm must have the name of a label .* left lung"):
        as_nifti(dicom / "c_0_000", "c_0", {2: "ground glass"}, tmp_path / "copies")
    series = written(tmp_path / "other", "rtstruct") / "c_0_000"
    with pytest.raises(FibldmError, match="every structure of c_0_000.dcm must have the name of a label .* left lung"):
        as_nifti(series, "c_0", {2: "ground glass"}, tmp_path / "copies")


def test_other_folders_are_no_series(dicom: Path) -> None:
    (dicom / "notes").mkdir()
    (dicom / ".hidden").mkdir()
    shutil.copy(next((dicom / "c_0_000").iterdir()), dicom / ".hidden")
    assert [part.name for part in series_in(dicom)] == ["c_0_000", "c_1_000"]
