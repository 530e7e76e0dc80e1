"""Between torch datasets and work folders: a work folder as a dataset, and any dataset of volumes as a source (D25)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from fibldm.errors import FibldmError
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.intensity import load_intensity
from fibldm.volumes.writer import write_nifti

Item = dict[str, Any]


class WorkDataset(Dataset[Item]):
    """The cases of one split of a work folder, each on its own voxels in RAS+ order (A1, A6).

    An item holds the image, float32 ``(C, X, Y, Z)`` in ``[-1, 1]``; the mask, int64 ``(1, X, Y, Z)``, absent from a
    case without one; and ``meta``: the case's entry in ``datalist.json``, its affine ``(4, 4)`` and spacing in mm.

    Args:
        work: the folder that ``fibldm prepare`` wrote.
        split: ``training``, ``validation`` or ``test``.
        image_key: of the image in an item.
        mask_key: of the mask in an item.
        transform: applied to every item, for example a MONAI ``Compose``.

    Raises:
        FibldmError: unknown split, or the folder holds no datalist or intensity.
    """

    def __init__(
        self,
        work: str | Path,
        split: str,
        *,
        image_key: str = "image",
        mask_key: str = "mask",
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        self.entries = load_datalist(work, split)
        self.intensity = load_intensity(Path(work) / "intensity.json")
        self.image_key, self.mask_key, self.transform = image_key, mask_key, transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        entry = self.entries[index]
        image = nibabel.load(entry["image"])
        voxels = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
        channels = voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, 3, 0)
        spacing = tuple(float(length) for length in nibabel.affines.voxel_sizes(image.affine))  # type: ignore[attr-defined]
        item: Item = {
            self.image_key: torch.from_numpy(self.intensity.normalise(channels)),
            "meta": {**entry, "affine": image.affine, "spacing": spacing},  # type: ignore[attr-defined]
        }
        if "label" in entry:
            labels = np.asanyarray(nibabel.load(entry["label"]).dataobj)  # type: ignore[attr-defined]
            item[self.mask_key] = torch.from_numpy(labels.astype(np.int64))[None]
        return self.transform(item) if self.transform else item


def write_source(
    dataset: Sequence[Any] | Dataset[Any],
    folder: str | Path,
    *,
    image_key: str = "image",
    mask_key: str | None = "mask",
    affine_key: str | None = "affine",
    spacing: Sequence[float] | None = None,
) -> Path:
    """Write the volumes of any torch dataset to ``images/`` and ``labels/``, a source of ``fibldm prepare``.

    Args:
        dataset: has a length; its items are mappings, or pairs of image and mask. An image is ``(X, Y, Z)`` or
            ``(C, X, Y, Z)`` along R, A, S, in HU or MR units; a mask ``(X, Y, Z)`` or ``(1, X, Y, Z)``.
        folder: to write to; made if absent.
        image_key: of the image in a mapping.
        mask_key: of the mask in a mapping; ``None`` or absent from an item: no mask.
        affine_key: of the affine ``(4, 4)`` in a mapping, voxel index to RAS+ mm.
        spacing: mm along R, A, S where no item states an affine.

    Raises:
        FibldmError: an item has no image, a shape that is no volume, a mask of another size, or neither affine nor
            spacing.
    """
    count = len(dataset)  # type: ignore[arg-type]
    width = len(str(max(count - 1, 0)))
    for index in range(count):
        name = f"case_{index:0{width}d}.nii.gz"
        image, mask, affine = _parts(dataset[index], name, image_key, mask_key, affine_key)
        affine = _affine(affine, spacing, name)
        voxels = _volume(image, name)
        write_nifti(Path(folder) / "images" / name, np.moveaxis(voxels, 0, 3) if voxels.ndim == 4 else voxels, affine)
        if mask is not None:
            labels = _volume(mask, name)
            if labels.shape != voxels.shape[-3:]:
                raise FibldmError(
                    f"image and mask of item {index} must have one size; image {voxels.shape[-3:]}, mask {labels.shape}"
                )
            write_nifti(Path(folder) / "labels" / name, labels, affine)
    return Path(folder)


def _parts(item: Any, name: str, image_key: str, mask_key: str | None, affine_key: str | None) -> tuple[Any, Any, Any]:
    if isinstance(item, Mapping):
        if image_key not in item:
            raise FibldmError(f"{name}: an item must have the key {image_key!r}; it has {', '.join(map(str, item))}")
        image = item[image_key]
        mask = item.get(mask_key) if mask_key is not None else None
        affine = item.get(affine_key) if affine_key is not None else None
        return image, mask, getattr(image, "affine", None) if affine is None else affine
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        return item[0], item[1] if len(item) == 2 else None, getattr(item[0], "affine", None)
    raise FibldmError(f"{name}: an item must be a mapping or a pair of image and mask; got {type(item).__name__}")


def _affine(affine: ArrayLike | None, spacing: Sequence[float] | None, name: str) -> NDArray[np.float64]:
    if affine is not None:
        return np.asarray(affine, dtype=np.float64)
    if spacing is None or len(spacing) != 3:
        raise FibldmError(f"{name}: an affine or three spacings in mm must be known; got {spacing}", "give spacing=...")
    return np.diag([*spacing, 1.0]).astype(np.float64)


def _volume(values: Any, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf":
        raise FibldmError(
            f"{name}: a volume must be numbers (X, Y, Z) or (C, X, Y, Z); got {array.dtype} {array.shape}"
        )
    narrow = {"b": np.uint8, "i": np.int32, "u": np.int32}  # NIfTI readers are few that take 64 bits
    return array.astype(narrow.get(array.dtype.kind, np.float32))
