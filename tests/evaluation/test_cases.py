"""What is measured: the very voxels that training saw, whose patient they are, and arrays that are computed once."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated, FeatureCache, Sample, need_masks
from fibldm.files import read_json, write_json


@pytest.fixture
def evaluated(tiny_run: Path, phantom_work: Path, tmp_path: Path) -> Evaluated:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    return Evaluated.open(run, phantom_work)


@pytest.fixture
def synthetic(evaluated: Evaluated, tmp_path: Path) -> Path:
    """A folder as `fibldm synthesize` writes it, of real files: two volumes of a test case, one of a foreign mask."""
    case = evaluated.real("test")[0]
    folder = tmp_path / "synthetic"
    (folder / "masks").mkdir(parents=True)
    for name in (f"{case.name}_000", f"{case.name}_001", "drawn_by_hand_000"):
        shutil.copy(case.image, folder / f"{name}.nii.gz")
    shutil.copy(case.label, folder / "masks" / f"{case.name}.nii.gz")  # type: ignore[arg-type]
    return folder


def test_splits_and_patients_are_those_of_the_work_folder(evaluated: Evaluated) -> None:
    datalist = read_json(evaluated.work / "datalist.json")
    assert [case.name for case in evaluated.real("test")] == [entry["case"] for entry in datalist["test"]]
    assert {case.split for case in evaluated.real()} == {"training", "validation", "test"}
    assert evaluated.labels[0] == "background"


def test_a_synthetic_volume_is_of_the_patient_whose_mask_it_follows(evaluated: Evaluated, synthetic: Path) -> None:
    real = evaluated.real("test")[0]
    foreign, *own = sorted(evaluated.synthetic(synthetic), key=lambda case: case.name != "drawn_by_hand_000")
    assert [(case.subject, case.split) for case in own] == [(real.subject, "test")] * 2
    assert (foreign.subject, foreign.split, foreign.label) == ("drawn_by_hand", None, None)
    sample = evaluated.read(own[0])
    assert np.array_equal(sample.labels, evaluated.read(real).labels)
    assert (evaluated.read(foreign).labels == UNKNOWN_LABEL).all()
    with pytest.raises(FibldmError, match=r"faithfulness needs the mask of every volume; drawn_by_hand_000 came"):
        need_masks([foreign, *own], "faithfulness")


def test_a_cached_array_is_computed_once_for_each_content(evaluated: Evaluated, synthetic: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def compute(sample: Sample) -> np.ndarray:
        seen.append(sample.image.shape)
        return np.array([sample.image.mean(), len(seen)])

    cache = FeatureCache(evaluated, "mean", "a" * 64)
    case, copy = evaluated.synthetic(synthetic)[1:]
    first = cache.get(case, compute)
    assert np.array_equal(cache.get(case, compute), first)
    assert np.array_equal(cache.get(copy, compute), first)  # the same content under another name
    assert len(seen) == 1
    image = nibabel.load(case.image)
    voxels = np.asanyarray(image.dataobj).copy()  # type: ignore[attr-defined]
    voxels.flat[0] += 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), case.image)  # type: ignore[attr-defined]
    cache.get(case, compute)
    FeatureCache(evaluated, "mean", "b" * 64).get(copy, compute)
    assert len(seen) == 3


def test_another_work_folder_than_the_run_was_trained_on_is_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    other = tmp_path / "work"
    shutil.copytree(evaluated.work, other)
    write_json(other / "datalist.json", read_json(other / "datalist.json") | {"content": "0" * 64})
    with pytest.raises(FibldmError, match=r"measured on the data it was trained on; .* holds 000000000000"):
        Evaluated.open(evaluated.run_dir, other)


def test_a_folder_without_volumes_and_a_mask_of_another_grid_are_refused(
    evaluated: Evaluated, synthetic: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FibldmError, match="must hold synthetic volumes"):
        evaluated.synthetic(tmp_path / "empty")
    case = evaluated.synthetic(synthetic)[1]
    mask = nibabel.load(case.label)  # type: ignore[arg-type]
    cut = nibabel.Nifti1Image(np.asanyarray(mask.dataobj)[1:], mask.affine)  # type: ignore[attr-defined]
    nibabel.save(cut, case.label)  # type: ignore[arg-type]
    with pytest.raises(FibldmError, match="must lie on the grid of its mask"):
        evaluated.read(case)
