"""What the model grid holds of volumes and labels: a label that no network would see is refused."""

import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.volumes import coverage
from fibldm.volumes.coverage import GridCheck, measure_coverage
from fibldm.volumes.grid import ModelGrid

SHAPE = (10, 12, 20)
SPACING = (2.0, 2.0, 1.0)


def write_work(work: Path, labels: list[np.ndarray | None], spacing=SPACING) -> Path:
    """A work folder with a training case for each label volume."""
    (work / "images").mkdir(parents=True)
    (work / "labels").mkdir()
    affine, training, cases = np.diag([*spacing, 1.0]), [], {}
    for number, label in enumerate(labels):
        name = f"c{number}"
        shape = SHAPE if label is None else label.shape
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), affine), work / "images" / f"{name}.nii.gz")
        training.append({"image": f"images/{name}.nii.gz", "case": name, "subject": name})
        cases[name] = {"label_volume_ml": None}
        if label is not None:
            nibabel.save(nibabel.Nifti1Image(label, affine), work / "labels" / f"{name}.nii.gz")
            training[-1]["label"] = f"labels/{name}.nii.gz"
            counts = {str(value): int((label == value).sum()) for value in np.unique(label)}
            voxel = float(np.prod(spacing)) / 1000
            cases[name] = {"label_volume_ml": {value: count * voxel for value, count in counts.items()}}
    names = {"0": "background", "1": "lung", "2": "nodule"}
    datalist = {"labels": names, "training": training, "validation": [], "test": []}
    (work / "datalist.json").write_text(json.dumps(datalist))
    (work / "report.json").write_text(json.dumps({"cases": cases}))
    return work


def labelled(*boxes: tuple[int, slice], shape=SHAPE) -> np.ndarray:
    """Boxes of a value, along Z."""
    label = np.zeros(shape, np.uint8)
    for value, along_z in boxes:
        label[4:6, 4:6, along_z] = value
    return label


def test_shares_are_those_of_the_voxels_that_are_left(tmp_path: Path) -> None:
    """The grid takes the middle 8 of 20 voxels along Z, and pads X and Y."""
    label = labelled((1, slice(0, 10)), (2, slice(10, 12)))
    found = measure_coverage(write_work(tmp_path / "w", [label, None]), ModelGrid(SPACING, (16, 16, 8)))
    assert found.volumes == pytest.approx(8 / 20)
    assert found.labels == {1: pytest.approx(4 / 10), 2: 1.0}
    assert found.sentence() == (
        "the model grid, 16 x 16 x 8 voxels of 2 x 2 x 1 mm, holds 40 % of the volumes, and of labels: lung (1) 40 %"
    )
    found.require()


def test_volumes_that_fit_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = write_work(tmp_path / "w", [labelled((1, slice(0, 20)), (2, slice(3, 4)))])
    monkeypatch.setattr(coverage, "resample", lambda *_, **__: pytest.fail("nothing is cut off"))
    found = measure_coverage(work, ModelGrid(SPACING, (16, 16, 32)))
    assert found.sentence().endswith("holds all of the volumes, and all of every label")


def test_a_label_outside_of_the_grid_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = write_work(tmp_path / "w", [labelled((1, slice(8, 12)), (2, slice(0, 3)))] * 2)
    grid = ModelGrid(SPACING, (16, 16, 8))
    with pytest.raises(FibldmError, match=r"of nodule \(2\) it holds nothing in any training case .*40 %.*larger size"):
        GridCheck(work, grid)()
    with caplog.at_level(logging.INFO, "fibldm"):
        GridCheck(work, ModelGrid(SPACING, (16, 16, 16)))()
    assert "80 % of the volumes, and of labels: nodule (2) 33 %" in caplog.text


def test_a_label_too_fine_for_the_spacing_is_refused(tmp_path: Path) -> None:
    """The grid covers all of the volumes, but its voxels fall between those of the label."""
    work = write_work(tmp_path / "w", [labelled((1, slice(0, 20)), (2, slice(3, 4)))])
    with pytest.raises(FibldmError, match=r"of nodule \(2\) it holds nothing .*of the volumes, all lies on it"):
        measure_coverage(work, ModelGrid((2.0, 2.0, 4.0), (16, 16, 16))).require()


def test_a_label_that_few_cases_have_is_looked_for_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_LOOKED_AT", 2)
    inside, outside = labelled((1, slice(8, 12)), (2, slice(9, 10))), labelled((1, slice(8, 12)), (2, slice(0, 1)))
    grid = ModelGrid(SPACING, (16, 16, 8))
    found = measure_coverage(write_work(tmp_path / "w", [outside, inside, outside, outside]), grid)
    assert found.cases == 2 and found.labels == {1: 1.0, 2: pytest.approx(1 / 2)}
    found.require()
    never = measure_coverage(write_work(tmp_path / "n", [outside] * 3), grid)
    assert never.lost == ["nodule (2)"]


def test_a_label_that_no_training_case_has_is_none_that_the_grid_loses(tmp_path: Path) -> None:
    found = measure_coverage(write_work(tmp_path / "w", [labelled((1, slice(0, 20)))]), ModelGrid(SPACING, (16, 16, 8)))
    assert found.labels.keys() == {1}


def test_volumes_that_are_gone_are_told_before_training(tmp_path: Path) -> None:
    work = write_work(tmp_path / "w", [labelled((1, slice(0, 20)))] * 2)
    (work / "labels" / "c1.nii.gz").unlink()
    with pytest.raises(FibldmError, match="1 of 4 volumes of the work folder are gone, the first is .*c1.nii.gz"):
        GridCheck(work, ModelGrid(SPACING, (16, 16, 8)))()


def test_axes_stored_in_another_order_give_the_same(tmp_path: Path) -> None:
    """Flipped and permuted; what is cut off is the same tissue."""
    label = labelled((1, slice(0, 10)), (2, slice(10, 12)))
    work = write_work(tmp_path / "w", [label])
    plain = measure_coverage(work, ModelGrid(SPACING, (16, 16, 8)))
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [-1.0, 0, 0, 19.0], [0, 0, 0, 1.0]])
    turned = np.flip(np.moveaxis(label, 2, 0), 0)
    nibabel.save(nibabel.Nifti1Image(np.zeros(turned.shape, np.int16), affine), work / "images" / "c0.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(turned), affine), work / "labels" / "c0.nii.gz")
    again = measure_coverage(work, ModelGrid(SPACING, (16, 16, 8)))
    assert (again.volumes, again.labels) == (pytest.approx(plain.volumes), plain.labels)
