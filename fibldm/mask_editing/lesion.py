"""A lesion of one patient put into an organ of another, where it may lie."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

from fibldm.errors import FibldmError
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.labels import Done, done, hosts_of, put
from fibldm.mask_editing.regions import Labels, Region, box_of
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid, Volume, resample
from fibldm.volumes.masks import as_labels


@dataclass(frozen=True)
class Insert:
    """The largest connected part of a label in another mask, put to a place drawn by chance where all of it fits.

    Attributes:
        label: name or number.
        source: NIfTI file of the mask it comes from, with the same label values; its mm are kept.
        organ: the label that it is to lie in; None is all that it may lie in.
    """

    label: str
    source: Path
    organ: str | None = None

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        value = anatomy.label(self.label)
        over = None if self.organ is None else (self.organ,)
        organ = np.isin(mask.array, list(hosts_of(anatomy, value, over)))
        lesion = _lesion(self.source, value, anatomy, mask.grid)
        places = np.argwhere(_fits(organ, lesion))
        if not len(places):
            depth = ndimage.distance_transform_edt(organ, sampling=mask.grid.spacing).max()
            raise FibldmError(
                f"{anatomy.names[value]!r} of {self.source.name} fits nowhere into "
                f"{self.organ or anatomy.listed(hosts_of(anatomy, value, over))}, the largest ball in which has a "
                f"radius of {depth:.3g} mm",
                "take a smaller one, or shrink it first",
            )
        corner = places[rng.integers(len(places))]
        region = np.zeros(mask.array.shape, dtype=bool)
        region[tuple(slice(start, start + length) for start, length in zip(corner, lesion.shape, strict=True))] = lesion
        labels = mask.array.copy()
        put(labels, region, value, anatomy, over)
        middle = mask.affine @ [*np.argwhere(region).mean(0), 1]
        return labels, done(mask, labels, anatomy, value) | {
            "from": self.source.name,
            "middle_mm": np.round(middle[:3], 2).tolist(),
        }


def _lesion(source: Path, value: int, anatomy: Anatomy, grid: Grid) -> Region:
    """Its voxels on the spacing and axes of a grid, cut to their box."""
    other = as_labels(read_volume(source)).canonical()
    region = other.array == value
    if not region.any():
        raise FibldmError(f"{source.name} must have {anatomy.names[value]!r} to take it from there; it has none")
    parts, _ = ndimage.label(region)
    largest = parts == 1 + np.argmax(np.bincount(parts[region])[1:])
    box = box_of(largest, margin=2)
    start = [part.start for part in box]
    cut = Volume(largest[box].astype(np.uint8), other.affine @ _translation(start))
    size = np.ceil(np.array(cut.grid.field_of_view) / grid.spacing).astype(int) + 2
    own = np.eye(4)
    own[:3, :3] = grid.affine[:3, :3]
    own[:3, 3] = cut.grid.centre - own[:3, :3] @ (size - 1) / 2
    found = resample(cut, Grid((int(size[0]), int(size[1]), int(size[2])), own), kind="label", fill=0).array > 0
    if not found.any():
        raise FibldmError(f"{anatomy.names[value]!r} of {source.name} is smaller than a voxel of this mask")
    return found[box_of(found, margin=0)]


def _fits(organ: Region, lesion: Region) -> Region:
    """The places, of the lesion's first corner, at which all of the lesion lies in the organ."""
    if any(small > large for small, large in zip(lesion.shape, organ.shape, strict=True)):
        return np.zeros((0, 0, 0), dtype=bool)
    overlap: NDArray[np.float64] = signal.correlate(
        organ.astype(np.float64), lesion.astype(np.float64), mode="valid", method="fft"
    )
    fits: Region = np.rint(overlap) == lesion.sum()
    return fits


def _translation(offset: list[int]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix
