"""Closed planar contours drawn on the slices of an image: which voxels lie inside.

Voxel indices ``(X, Y, Z)`` of the image's array count voxel centres from 0. A voxel belongs to a structure if its
centre lies on one of its contours, be it of a hole, or inside of an odd number of them: an inner contour is a hole, and
contours side by side are one, also where they touch. Contours traced around the voxels of a mask run through their
centres.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.polygons import cycle, region
from fibldm.volumes.dicom.segments import DAMAGED
from fibldm.volumes.grid import LPS_TO_RAS
from fibldm.volumes.scan import Remark

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array = NDArray[np.float64]

_OFF_SLICE = 0.25
_DECIMALS = 2
"""Of voxel indices: what files round off in mm moves no centre off the contour that was drawn through it."""
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_REMEDY = "draw the structures on this image's slices, or export them as a segmentation"


@dataclass(frozen=True)
class Contour:
    """A closed polygon: ``points`` ``(N, 3)``, RAS+ mm; ``exclusive`` where the file itself asks for exclusive or."""

    points: Array
    exclusive: bool = False


def slice_axis(contours: Sequence[Contour], affine: Array) -> int:
    """The axis of the image that is normal to all contours' planes.

    Args:
        contours: at least one.
        affine: ``(4, 4)``, voxel index to RAS+ mm.

    Raises:
        FibldmError: the contours do not lie in planes of slices of one axis.
    """
    inverse = _inverse(affine)
    thickness = np.max([np.ptp(_indices(contour, inverse), axis=0) for contour in contours], axis=0)
    axis = int(np.argmin(thickness))
    if thickness[axis] > 2 * _OFF_SLICE:
        raise FibldmError(
            "contours of a structure set must lie in planes of image slices, all along one axis; they reach through "
            f"{thickness[axis]:.3g} slices at least",
            _REMEDY,
        )
    return axis


def filled(
    contours: Sequence[Contour], affine: Array, shape: tuple[int, ...], axis: int, name: str
) -> tuple[NDArray[np.bool_], list[Remark]]:
    """Voxels ``shape`` whose centres lie inside of a structure, and what is remarkable about it.

    Args:
        contours: of the structure.
        affine: ``(4, 4)``, voxel index to RAS+ mm.
        shape: ``(X, Y, Z)`` of the image.
        axis: of `slice_axis`.
        name: of the structure.

    Raises:
        FibldmError: a contour lies between slices or beyond them, crosses another one, or is there twice.
    """
    inverse = _inverse(affine)
    planes: dict[int, list[Contour]] = {}
    for contour in contours:
        planes.setdefault(_slice_of(contour, inverse, axis, shape[axis], name), []).append(contour)
    in_plane = [other for other in range(3) if other != axis]
    rows, columns = (shape[other] for other in in_plane)
    inside = np.zeros((shape[axis], rows, columns), dtype=bool)
    for index, drawn in planes.items():
        polygons = [_indices(contour, inverse)[:, in_plane] for contour in drawn]
        exclusive = any(contour.exclusive for contour in drawn)
        inside[index] = _plane(polygons, (rows, columns), exclusive, name)
    return np.moveaxis(inside, 0, axis), list(_findings(contours, inverse, shape, sorted(planes), in_plane, name))


def _inverse(affine: Array) -> Array:
    return np.linalg.inv(affine).astype(np.float64)


def _indices(contour: Contour, inverse: Array) -> Array:
    """Rounded, so that a centre on a contour falls to the same side whatever the orientation."""
    indices: Array = np.round(nibabel.affines.apply_affine(inverse, contour.points), _DECIMALS)
    return indices


def _slice_of(contour: Contour, inverse: Array, axis: int, count: int, name: str) -> int:
    places = _indices(contour, inverse)[:, axis]
    index = round(float(places.mean()))
    off = float(np.abs(places - index).max())
    if off > _OFF_SLICE:
        raise FibldmError(
            f"every contour must lie on a slice of the image; one of {name} lies {off:.2g} slices off the nearest",
            _REMEDY,
        )
    if not 0 <= index < count:
        beyond = -index if index < 0 else index - count + 1
        raise FibldmError(
            f"every contour must lie on a slice of the image; one of {name} lies {beyond} slices beyond the last",
            "give the whole series that the structures were drawn on",
        )
    return index


def _plane(polygons: Sequence[Array], shape: tuple[int, int], exclusive: bool, name: str) -> NDArray[np.bool_]:
    """Voxels ``shape`` of one slice that belong to a structure."""
    if len({cycle(polygon) for polygon in polygons}) < len(polygons):
        raise FibldmError(f"contours must be there once; {name} has the same contour twice on a slice", _REMEDY)
    depth, on = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=bool)
    regions = sorted((region(polygon, shape) for polygon in polygons), key=lambda item: -item.size)
    for number, item in enumerate(regions):
        if not exclusive and any(item.crosses(larger) for larger in regions[:number]):
            raise FibldmError(
                f"contours of one structure must not cross; two of {name} do on a slice, and which part belongs to it "
                "is not known",
                "join them where they were drawn",
            )
        depth[item.box] += item.inside
        on[item.box] |= item.on
    belongs: NDArray[np.bool_] = on | (depth % 2 == 1)
    return belongs


def _findings(
    contours: Sequence[Contour],
    inverse: Array,
    shape: tuple[int, ...],
    slices: Sequence[int],
    in_plane: Sequence[int],
    name: str,
) -> Iterator[Remark]:
    places = np.concatenate([_indices(contour, inverse) for contour in contours])[:, in_plane]
    if (places <= -1).any() or (places >= np.array(shape)[list(in_plane)]).any():
        yield "warning", f"{name} reaches out of the image and was cut there"
    if len(slices) > 1 and np.median(np.diff(slices)) > 1:
        yield "warning", f"{name} is drawn on {len(slices)} slices of {slices[-1] - slices[0] + 1}; none was filled in"


def structures_of(dataset: "Dataset") -> dict[str, list["Dataset"]]:
    """Contours of the structures by name; structures of one name are one.

    Raises:
        FibldmError: there is no structure, or one has no number or name.
    """
    try:
        contours = {
            int(item.ReferencedROINumber): list(item.get("ContourSequence") or ())
            for item in dataset.get("ROIContourSequence") or ()
        }
        structures: dict[str, list[Dataset]] = {}
        for item in dataset.StructureSetROISequence:
            structures.setdefault(str(item.ROIName).strip(), []).extend(contours.get(int(item.ROINumber), ()))
    except DAMAGED:
        structures = {}
    if not structures or "" in structures:
        message = "an RT structure set must hold at least one structure, and each must have a number and a name"
        raise FibldmError(message, "export it again")
    return structures


def is_closed(item: "Dataset") -> bool:
    """Whether a contour is a polygon of three points at least."""
    return item.get("ContourGeometricType") in _CLOSED and np.size(item.get("ContourData") or ()) >= 9


def unclosed(name: str, items: Sequence["Dataset"]) -> Iterator[Remark]:
    """What of a structure is no polygon."""
    count = sum(not is_closed(item) for item in items)
    if count or not items:
        what = f"{count} points or open contours of {name} were left out" if count else f"{name} has no contour"
        yield "warning", what


def contour_of(item: "Dataset") -> Contour:
    """A polygon from its Contour Data, ``x, y, z`` of one point after the other, LPS+ mm.

    Raises:
        FibldmError: they are not finite points, as many as stated.
    """
    try:
        points = np.array(item.ContourData, dtype=np.float64).reshape(-1, 3)
        whole = len(points) == int(item.get("NumberOfContourPoints", len(points))) and np.isfinite(points).all()
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise FibldmError("contours must be finite points x, y, z, as many as stated; one is not", "export it again")
    return Contour(points @ LPS_TO_RAS[:3, :3], exclusive=item.ContourGeometricType == "CLOSEDPLANAR_XOR")
