"""Lungs and large airways of a chest CT from its HU alone, where no mask came with it.

Air inside the body is found by a threshold (Hu, Hoffman, Reinhardt 2001, doi:10.1109/42.929615), the airways are grown
from the trachea until they would leak into the lung, lungs that touch are parted where they are thinnest, and vessels
and dense tissue at the pleura come back by a closing. It is a derived mask, not an annotation: tumours and
consolidations at the pleura that are wider than the closing are left out.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume, turned_like
from fibldm.volumes.scan import Scan

LABELS = {1: "right lung", 2: "left lung", 3: "airways"}

_AIR = -320
"""HU; between lung with ground glass and soft tissue."""
_SMALLEST_LUNG_ML = 100.0
_SMALLEST_PART = 0.1
"""Of the largest part of the lungs; what is smaller is gas of the bowel, or noise."""
_APART = 0.2
"""Distance of the centres of both lungs in their width."""
_DEEPEST_CUT_MM = 30
_CLOSING_MM = 10.0
_TRACHEA_MM2 = (40.0, 900.0)
_AIRWAY_ML = (4.0, 120.0)
_AIRWAY_HU = range(-1000, -700, 20)
_LEAK_ML = 15.0
_AIRWAY_WALL_MM = 1.5

Mask = NDArray[np.bool_]
Labels = NDArray[np.uint8]
Spacing = tuple[float, float, float]
Voxel = tuple[int, ...]


def lung_mask(ct: Scan | Volume) -> Labels:
    """Right lung 1, left lung 2, trachea and main bronchi 3 where they can be told from the lungs; 0 elsewhere.

    Args:
        ct: HU, ``(X, Y, Z)`` in any axis order; the whole width of the chest, so that air around it reaches the sides.

    Returns:
        On the grid of ``ct``.

    Raises:
        FibldmError: lungs are not found on both sides.
    """
    stored = Volume(ct.array, ct.affine)
    volume = stored.canonical()
    mask = _segmented(volume.array, volume.grid.spacing)
    return turned_like(Volume(mask, volume.affine), stored.grid).array


def _segmented(hu: NDArray[Any], spacing: Spacing) -> Labels:
    inside = (hu < _AIR) & ~_outside(hu < _AIR)
    if not inside.any():
        raise _no_lungs()
    mask = np.zeros(hu.shape, dtype=np.uint8)
    box = ndimage.find_objects(inside.view(np.uint8))[0]
    mask[box] = _labelled(hu[box], inside[box], spacing)
    return mask


def _labelled(hu: NDArray[Any], inside: Mask, spacing: Spacing) -> Labels:
    airways = _airways(hu, inside, spacing)
    lungs = _closed(_sides(inside & ~airways, spacing), spacing)
    lungs[(hu < _AIR) & ~inside] = 0
    lungs[airways] = 3
    return lungs


def _outside(air: Mask) -> Mask:
    """Air that reaches a side of its axial slice; where it only leaves at the top it is the trachea."""
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[:, :, [0, 2]] = False
    parts, count = ndimage.label(air, in_plane)
    touching = np.zeros(count + 1, dtype=bool)
    touching[parts[[0, -1]]] = touching[parts[:, [0, -1]]] = True
    touching[0] = False
    found: Mask = touching[parts]
    return found


def _airways(hu: NDArray[Any], inside: Mask, spacing: Spacing) -> Mask:
    """What is open to the trachea, below the HU at which it would leak into the lungs; empty without a trachea."""
    from skimage.morphology import isotropic_dilation

    airways = np.zeros_like(inside)
    volume_ml = 0.0
    for region in _grown(hu, inside, _trachea(hu, inside, spacing)):
        grown_ml = float(region.sum() * np.prod(spacing)) / 1000
        if grown_ml > _AIRWAY_ML[1] or (volume_ml and grown_ml > volume_ml + _LEAK_ML):
            break
        if grown_ml >= _AIRWAY_ML[0]:
            airways, volume_ml = region, grown_ml
    wall: Mask = isotropic_dilation(airways, _AIRWAY_WALL_MM, spacing=spacing) if airways.any() else airways
    return wall & inside


def _grown(hu: NDArray[Any], inside: Mask, seed: Voxel | None) -> Iterator[Mask]:
    if seed is None:
        return
    for limit in _AIRWAY_HU:
        if hu[seed] < limit:
            parts, _ = ndimage.label(inside & (hu < limit))
            yield parts == parts[seed]


def _trachea(hu: NDArray[Any], inside: Mask, spacing: Spacing) -> Voxel | None:
    """The darkest voxel of the round and central section with the darkest air, in the upper half of the air."""
    heights = np.flatnonzero(inside.any(axis=(0, 1)))
    best: tuple[float, Voxel] | None = None
    for z in heights[len(heights) // 2 :]:
        for points in _round_sections(inside[:, :, z], spacing):
            values = hu[points[:, 0], points[:, 1], z]
            if best is None or values.mean() < best[0]:
                x, y = points[values.argmin()]
                best = float(values.mean()), (int(x), int(y), int(z))
    return best[1] if best else None


def _round_sections(air: Mask, spacing: Spacing) -> Iterator[NDArray[np.intp]]:
    """Voxels ``(N, 2)`` of the sections in an axial slice that may be a trachea."""
    from skimage.measure import label, regionprops

    least, most = _TRACHEA_MM2
    width = air.shape[0]
    for part in regionprops(label(air, connectivity=1)):
        lengths = np.array([part.bbox[2] - part.bbox[0], part.bbox[3] - part.bbox[1]]) * spacing[:2]
        if (
            least <= part.area * spacing[0] * spacing[1] <= most
            and lengths.max() < 2 * lengths.min()
            and part.extent > 0.5
            and abs(part.centroid[0] / width - 0.5) < 0.15
        ):
            yield part.coords


def _sides(air: Mask, spacing: Spacing) -> Labels:
    """Right 1 and left 2: each lung is what lies around its own core, parted where it is thinnest between them."""
    from skimage.segmentation import watershed

    lungs = _large_parts(air)
    depth = ndimage.distance_transform_edt(lungs, sampling=spacing)
    cores = _cores(depth)
    sides: Labels = watershed(-depth, cores, mask=lungs).astype(np.uint8)
    middle = np.mean([centre[0] for centre in ndimage.center_of_mass(cores > 0, cores, [1, 2])])
    parts, count = ndimage.label(lungs & (sides == 0))
    for number, centre in enumerate(ndimage.center_of_mass(parts > 0, parts, range(1, count + 1)), start=1):
        sides[parts == number] = 1 if centre[0] > middle else 2
    volumes_ml = np.bincount(sides.ravel(), minlength=3)[1:] * np.prod(spacing) / 1000
    if volumes_ml.min() < _SMALLEST_LUNG_ML:
        raise _no_lungs()
    return sides


def _large_parts(air: Mask) -> Mask:
    parts, _ = ndimage.label(air)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large: Mask = (sizes >= max(_SMALLEST_PART * sizes.max(), 1))[parts]
    return large


def _cores(depth: NDArray[np.float64]) -> NDArray[np.int32]:
    """A core of the right lung, 1, and of the left, 2: the first two that come apart as the lungs are eroded.

    Args:
        depth: mm to the edge of the lungs.
    """
    width = np.count_nonzero((depth > 0).any(axis=(1, 2)))
    for limit in range(0, min(_DEEPEST_CUT_MM, int(np.ceil(depth.max()))), 2):
        parts, count = ndimage.label(depth > limit)
        sizes = np.bincount(parts.ravel())[1:]
        x = np.array([centre[0] for centre in ndimage.center_of_mass(parts > 0, parts, range(1, count + 1))])
        far = (np.abs(x - x[sizes.argmax()]) > _APART * width) & (sizes > _SMALLEST_PART * sizes.max())
        if far.any():
            both = sorted((int(sizes.argmax()), int(np.where(far, sizes, 0).argmax())), key=lambda number: -x[number])
            right, left = (parts == number + 1 for number in both)
            return right + 2 * left.astype(np.int32)
    raise _no_lungs()


def _closed(sides: Labels, spacing: Spacing) -> Labels:
    """Each lung closed by a ball, and its holes filled; what both would take stays with the one that had it."""
    from skimage.morphology import isotropic_closing

    closed = sides.copy()
    margin = [int(np.ceil(_CLOSING_MM / step)) + 1 for step in spacing]
    for side, box in enumerate(ndimage.find_objects(sides), start=1):
        lung = np.pad(sides[box] == side, [(width, width) for width in margin])
        filled = ndimage.binary_fill_holes(isotropic_closing(lung, _CLOSING_MM, spacing=spacing))
        inner = filled[tuple(slice(width, -width) for width in margin)]
        closed[box][inner & (closed[box] == 0)] = side
    return closed


def _no_lungs() -> FibldmError:
    return FibldmError(
        "a lung mask can be derived only from a CT in HU that shows both lungs with air around the chest; "
        "they were not found",
        "give a mask, or leave the case out",
    )
