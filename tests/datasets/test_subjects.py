"""Work folders and synthetic volumes as TorchIO's datasets, and TorchIO's datasets as sources: the same places."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torchio

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.subjects import synthetic_subjects, work_subjects
from fibldm.datasets.torch_datasets import write_source
from fibldm.errors import FibldmError
from fibldm.files import write_json
from fibldm.volumes.datalist import SPLITS
from fibldm.volumes.writer import write_nifti

AFFINE = np.array([[0, -1.5, 0, 20], [0, 0, 2.5, -7], [-0.8, 0, 0, 31], [0, 0, 0, 1]])


def subject(index: int, mask_affine: np.ndarray = AFFINE) -> torchio.Subject:
    image = torch.from_numpy(np.random.default_rng(index).integers(-900, 900, (1, 5, 6, 7)).astype(np.int16))
    return torchio.Subject(
        ct=torchio.ScalarImage(tensor=image, affine=AFFINE),
        lung=torchio.LabelMap(tensor=(image > 0).to(torch.uint8), affine=mask_affine),
        scanner="any",
    )


def test_subjects_become_a_source_and_come_back_at_the_same_places(tmp_path: Path) -> None:
    given = torchio.SubjectsDataset([subject(index) for index in range(6)])
    source = write_source(given, tmp_path / "source", image_key="ct", mask_key="lung")
    prepare(source, tmp_path / "work", PrepareSettings(modality="ct"), progress=False)
    found = {}
    for split in SPLITS:
        dataset = work_subjects(tmp_path / "work", split)
        assert isinstance(dataset, torchio.SubjectsDataset)
        found |= {item["meta"]["case"]: item for item in dataset}
    assert sorted(found) == [f"case_{index}" for index in range(6)]
    for index in range(6):
        expected = torchio.ToCanonical()(subject(index))
        item = found[f"case_{index}"]
        assert item["image"].orientation == ("R", "A", "S")
        np.testing.assert_allclose(item["image"].affine, expected["ct"].affine, atol=1e-5)
        torch.testing.assert_close(item["image"].data.float(), expected["ct"].data.float(), rtol=0, atol=0)
        torch.testing.assert_close(item["mask"].data.float(), expected["lung"].data.float(), rtol=0, atol=0)
    batch = next(iter(torchio.SubjectsLoader(work_subjects(tmp_path / "work", "training"), batch_size=2)))
    assert batch["image"]["data"].shape == (2, 1, 6, 7, 5)


def test_a_mask_at_another_place_is_refused(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 1
    with pytest.raises(FibldmError, match=r"case_0.nii.gz: image and mask must lie at one place; .* resample one"):
        write_source([subject(0, moved)], tmp_path, image_key="ct", mask_key="lung")


def synthetic(folder: Path, name: str, mask: str | None = "pat_1.nrrd") -> None:
    write_nifti(folder / f"{name}.nii.gz", np.full((3, 4, 5), 7, np.int16), np.diag([2.0, 3, 4, 1]))
    write_json(folder / f"{name}.json", {"synthetic": True, "mask": mask, "seed": 3})


def test_synthetic_volumes_are_subjects_with_their_masks_and_sidecars(tmp_path: Path) -> None:
    for name in ("pat_1_000", "pat_1_001"):
        synthetic(tmp_path, name)
    write_nifti(tmp_path / "masks" / "pat_1.nii.gz", np.ones((3, 4, 5), np.uint8), np.diag([2.0, 3, 4, 1]))
    dataset = synthetic_subjects(tmp_path, torchio.RescaleIntensity((0, 1), in_min_max=(0, 14)))
    assert len(dataset) == 2
    for item in dataset:
        assert item.spacing == (2, 3, 4) and item["image"].data.unique().tolist() == [0.5]
        assert item["mask"].data.unique().tolist() == [1] and item["meta"]["synthetic"] and item["meta"]["seed"] == 3
    assert write_source(synthetic_subjects(tmp_path), tmp_path / "source").joinpath("labels", "case_1.nii.gz").is_file()
    read = nibabel.load(tmp_path / "source" / "images" / "case_1.nii.gz")
    np.testing.assert_array_equal(read.affine, np.diag([2.0, 3, 4, 1]))


def test_synthetic_volumes_that_follow_no_mask_have_none(tmp_path: Path) -> None:
    synthetic(tmp_path, "volume_000", mask=None)
    (item,) = synthetic_subjects(tmp_path)
    assert "mask" not in item and item["image"].data.unique().tolist() == [7]


def test_what_is_missing_is_named(tmp_path: Path, phantom_work: Path) -> None:
    with pytest.raises(FibldmError, match="must hold synthetic volumes"):
        synthetic_subjects(tmp_path)
    synthetic(tmp_path, "pat_1_000")
    with pytest.raises(FibldmError, match="pat_1_000.nii.gz must lie beside its mask masks/pat_1.nii.gz"):
        synthetic_subjects(tmp_path)
    with pytest.raises(FibldmError, match="split must be one of"):
        work_subjects(phantom_work, "all")
