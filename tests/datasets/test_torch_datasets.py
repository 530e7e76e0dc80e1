"""Torch datasets in and out of work folders."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.torch_datasets import WorkDataset, write_source
from fibldm.errors import FibldmError
from fibldm.volumes.datalist import SPLITS

AFFINE = np.array([[0, -1.5, 0, 20], [0, 0, 2.5, -7], [-0.8, 0, 0, 31], [0, 0, 0, 1]])


class Volumes(Dataset):
    """Six patients as somebody else's dataset gives them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        random = np.random.default_rng(index)
        image = random.integers(-1000, 900, (5, 6, 7)).astype(np.int16)
        return {"vol": torch.from_numpy(image), "seg": torch.from_numpy((image > 0).astype(np.int64)), "affine": AFFINE}


def test_any_dataset_becomes_a_source_and_comes_back_d25(tmp_path: Path) -> None:
    """Voxels and affine of an off-the-shelf dataset survive; A1, A6: keys, ranges and types of an item."""
    source = write_source(Volumes(), tmp_path / "source", image_key="vol", mask_key="seg")
    prepare(source, tmp_path / "work", PrepareSettings(modality="ct"))
    items = {}
    for split in ("training", "validation", "test"):
        dataset = WorkDataset(tmp_path / "work", split, image_key="ct", mask_key="lung")
        items |= {item["meta"]["case"]: item for item in dataset}
    assert sorted(items) == [f"case_{index}" for index in range(6)]
    item, given = items["case_4"], Volumes()[4]
    assert set(item) == {"ct", "lung", "meta"}
    assert item["ct"].dtype == torch.float32 and item["lung"].dtype == torch.int64
    back = np.einsum("xyz->zxy", given["vol"].numpy())[:, ::-1]  # the axes of AFFINE, brought to RAS+
    turned = [np.transpose(given["vol"].numpy(), (1, 2, 0))[::-1, :, ::-1], back]
    np.testing.assert_allclose(item["ct"][0].numpy(), np.clip(turned[0], -1000, 1000) / 1000, atol=1e-6)
    assert item["ct"].shape == item["lung"].shape == (1, 6, 7, 5)
    np.testing.assert_array_equal(item["lung"][0].numpy(), turned[0] > 0)
    assert item["meta"]["spacing"] == pytest.approx((1.5, 2.5, 0.8))


def test_a_loader_and_a_transform_work_on_it_a7(tmp_path: Path) -> None:
    """Batches, shuffling and worker processes are those of torch."""
    source = write_source(Volumes(), tmp_path / "source", image_key="vol", mask_key="seg")
    prepare(source, tmp_path / "work", PrepareSettings(modality="ct"))
    images = WorkDataset(tmp_path / "work", "training", transform=_image_of)
    batch = next(iter(DataLoader(images, batch_size=2, shuffle=True, num_workers=1)))
    assert batch.shape == (2, 1, 6, 7, 5) and batch.min() >= -1 and batch.max() <= 1


def _image_of(item: dict) -> torch.Tensor:
    return item["image"]


def test_pairs_and_channels_are_taken(tmp_path: Path) -> None:
    pairs = [(np.random.default_rng(i).normal(size=(2, 5, 6, 7)), np.ones((1, 5, 6, 7), bool)) for i in range(3)]
    source = write_source(pairs, tmp_path / "source", spacing=(1, 2, 3))
    settings = PrepareSettings(modality="mr", channels=("T1", "T2"))
    prepare(source, tmp_path / "work", settings)
    item = WorkDataset(tmp_path / "work", "training")[0]
    assert item["image"].shape == (2, 5, 6, 7) and item["mask"].unique().tolist() == [1]


class Digits:
    """torchvision's MNIST in its form: pairs of a PIL image, or a tensor (1, rows, columns), and a class number."""

    classes = ["0 - zero", "1 - one"]

    def __init__(self, transform: Callable[[Image.Image], object] | None = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def rows(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (28, 20)).astype(np.uint8)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = Image.fromarray(self.rows(index), mode="L")
        return (self.transform(image) if self.transform else image), index % 2


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(image)).float()[None] / 255


@pytest.mark.parametrize(("transform", "high"), [(None, 255.0), (to_tensor, 1.0)], ids=["PIL", "tensor"])
def test_mnist_becomes_slices_with_the_class_as_a_covariate_d25(tmp_path: Path, transform, high: float) -> None:
    digits = Digits(transform)
    source = write_source(digits, tmp_path / "source", spacing=(1, 2, 3))
    prepare(source, tmp_path / "work", PrepareSettings(modality="other", range=(0, high)), progress=False)
    for split in SPLITS:
        for item in WorkDataset(tmp_path / "work", split):
            index = int(item["meta"]["case"].rpartition("_")[2])
            image = item["image"]
            assert image.shape == (1, 20, 28, 1) and item["meta"]["spacing"] == (1, 2, 3)
            looked_at = image[0, :, :, 0].numpy()[::-1, ::-1].T  # columns from R to L, rows from front to back
            np.testing.assert_allclose((looked_at + 1) / 2 * 255, digits.rows(index), atol=1e-3)
            assert item["meta"]["class"] == digits.classes[index % 2]


def test_slices_with_masks_and_classes_and_without(tmp_path: Path) -> None:
    rows = np.arange(20.0).reshape(1, 4, 5)
    source = write_source([{"image": rows, "mask": rows > 9, "class": "x"}] * 3, tmp_path / "a", spacing=(1, 1, 1))
    assert (source / "cases.csv").read_text().splitlines()[1] == "case_0,images/case_0.nii.gz,masks/case_0.nii.gz,x"
    assert nibabel.load(source / "masks/case_0.nii.gz").shape == (5, 4, 1)
    pairs = write_source([(rows, rows > 9)], tmp_path / "b", spacing=(1, 1, 1))
    assert nibabel.load(pairs / "labels/case_0.nii.gz").shape == (5, 4, 1) and not (pairs / "cases.csv").exists()
    colours = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    shown = nibabel.load(
        write_source([colours_of(colours)], tmp_path / "c", spacing=(1, 1, 1)) / "images/case_0.nii.gz"
    )
    assert shown.shape == (5, 4, 1, 3)
    np.testing.assert_array_equal(np.asarray(shown.dataobj)[4, 3, 0], [0, 1, 2])  # the upper left corner: right, front


def colours_of(image: Image.Image) -> tuple[Image.Image]:
    return (image,)


def test_a_slice_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="wider than one voxel along X; .* give a slice as .X, Y, 1."):
        write_source([{"image": np.zeros((1, 4, 5)), "affine": np.eye(4)}], tmp_path)
    with pytest.raises(FibldmError, match="one of the modes .*; it is RGBA"):
        write_source([(Image.new("RGBA", (4, 5)), 3)], tmp_path, spacing=(1, 1, 1))
    with pytest.raises(FibldmError, match="every item must have a class or none; 1 of 2 have one"):
        write_source([(np.zeros((3, 4, 5)), 3), (np.zeros((3, 4, 5)),)], tmp_path, spacing=(1, 1, 1))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"volume": np.zeros((3, 4, 5))}, "must have the key 'image'; it has volume"),
        ("text", "must be a mapping or a pair of image and mask; got str"),
        ({"image": np.zeros((3, 4))}, r"must be numbers \(X, Y, Z\) or \(C, X, Y, Z\); got float64 \(3, 4\)"),
        ({"image": np.zeros((3, 4, 5)), "mask": np.zeros((3, 4, 6))}, "one size; image .3, 4, 5., mask .3, 4, 6."),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path: Path, item: object, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        write_source([item], tmp_path, spacing=(1, 1, 1))
    with pytest.raises(FibldmError, match="an affine or three spacings in mm must be known"):
        write_source([{"image": np.zeros((3, 4, 5))}], tmp_path)
