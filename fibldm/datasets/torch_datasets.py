"""Between torch datasets and work folders: a work folder as a dataset, and any dataset of images as a source."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from fibldm.datasets.torch_items import Keys, Parts, parts_of, volume_of
from fibldm.errors import FibldmError
from fibldm.files import write_text
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.intensity import load_intensity
from fibldm.volumes.writer import write_nifti

Item = dict[str, Any]

_SAME_PLACE = 1e-3


class WorkDataset(Dataset[Item]):
    """The cases of one split of a work folder, each on its own voxels in RAS+ order.

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
    class_key: str | None = "class",
    spacing: Sequence[float] | None = None,
) -> Path:
    """Write the images of any torch dataset to ``images/`` and ``labels/``, a source of ``fibldm prepare``.

    Where items have classes, masks lie in ``masks/`` and a table ``cases.csv`` names the images, masks and classes: the
    column ``class``, by the names in ``dataset.classes`` where the dataset has them, as those of torchvision do.

    Args:
        dataset: has a length; its items are mappings, such as a ``torchio.Subject`` whose images are named by the keys,
            or pairs of an image and its mask or class. A volume is
            ``(X, Y, Z)`` or ``(C, X, Y, Z)`` along R, A, S, in HU or the data's own units, its mask ``(X, Y, Z)`` or
            ``(1, X, Y, Z)``. A slice is a PIL image, ``(1, rows, columns)`` or ``(X, Y, 1)``, and becomes
            ``(X, Y, 1)``; rows run from front to back, columns from the patient's right to left.
        folder: to write to; made if absent.
        image_key: of the image in a mapping.
        mask_key: of the mask in a mapping; ``None`` or absent from an item: no mask.
        affine_key: of the affine ``(4, 4)`` in a mapping, voxel index to RAS+ mm.
        class_key: of the class in a mapping, a number or a text; as ``mask_key``.
        spacing: mm along R, A, S where no item states an affine.

    Raises:
        FibldmError: an item has no image, a shape that is neither volume nor slice, a mask of another size, or neither
            affine nor spacing; image and mask have other affines; or some items have a class and others have none.
    """
    keys = Keys(image_key, mask_key, affine_key, class_key)
    count, rows = len(dataset), list[dict[str, Any]]()  # type: ignore[arg-type]
    width = len(str(max(count - 1, 0)))
    for index in range(count):
        name = f"case_{index:0{width}d}.nii.gz"
        parts = parts_of(dataset[index], keys, name)
        masks = "labels" if parts.label is None else "masks"
        masked = _write(Path(folder), name, parts, spacing, masks)
        files = {
            "case": name.removesuffix(".nii.gz"),
            "image": f"images/{name}",
            "label": f"{masks}/{name}" if masked else "",
        }
        rows.append({**files, "class": _named(parts.label, dataset)})
    known = [row["class"] is not None for row in rows]
    if any(known) and not all(known):
        raise FibldmError(f"every item must have a class or none; {sum(known)} of {count} have one")
    if any(known):
        _write_table(Path(folder) / "cases.csv", rows)
    return Path(folder)


def _write(folder: Path, name: str, parts: Parts, spacing: Sequence[float] | None, masks: str) -> bool:
    """Write image and mask of an item; whether there is a mask."""
    placed = parts.affine is not None
    voxels, affine = volume_of(parts.image, name, placed=placed), _affine(parts.affine, spacing, name)
    write_nifti(folder / "images" / name, np.moveaxis(voxels, 0, 3) if voxels.ndim == 4 else voxels, affine)
    if parts.mask is None:
        return False
    labels = volume_of(parts.mask, name, placed=placed)
    if labels.shape != voxels.shape[-3:]:
        raise FibldmError(f"{name}: image and mask must have one size; image {voxels.shape[-3:]}, mask {labels.shape}")
    image, mask = (getattr(part, "affine", None) for part in (parts.image, parts.mask))
    if image is not None and mask is not None and not np.allclose(image, mask, atol=_SAME_PLACE):
        raise FibldmError(
            f"{name}: image and mask must lie at one place; their affines are not the same", "resample one to the other"
        )
    write_nifti(folder / masks / name, labels, affine)
    return True


def _named(label: str | float | None, dataset: Any) -> str | float | None:
    """A class by its name, where the dataset has names for the numbers."""
    names = getattr(dataset, "classes", None)
    if isinstance(label, float) and label.is_integer():
        return str(names[int(label)]) if names and 0 <= label < len(names) else int(label)
    return label


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    masked = any(row["label"] for row in rows)
    writer = csv.DictWriter(text, ["case", "image", *(["label"] if masked else []), "class"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _affine(affine: ArrayLike | None, spacing: Sequence[float] | None, name: str) -> NDArray[np.float64]:
    if affine is not None:
        return np.asarray(affine, dtype=np.float64)
    if spacing is None or len(spacing) != 3:
        raise FibldmError(f"{name}: an affine or three spacings in mm must be known; got {spacing}", "give spacing=...")
    return np.diag([*spacing, 1.0]).astype(np.float64)
