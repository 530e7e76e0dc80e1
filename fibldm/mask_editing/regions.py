"""The voxels that an edit of a mask wins and gives up; distances in millimetres between voxel centres."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.volumes.grid import Grid, Volume

Region = NDArray[np.bool_]
Labels = NDArray[np.uint8]


def box_of(region: Region, margin: int = 1) -> tuple[slice, ...]:
    """The smallest box around a region that is not empty, with so many voxels more on each side as there are."""
    found = ndimage.find_objects(region.astype(np.uint8))[0]
    return tuple(
        slice(max(part.start - margin, 0), min(part.stop + margin, length))
        for part, length in zip(found, region.shape, strict=True)
    )


def nearest_other(mask: Volume, region: Region) -> Labels:
    """The label of the nearest voxel outside of a region, for each voxel of it in order; 0 where there is none.

    That is what lies where a structure is taken away: what surrounds it closes the gap.
    """
    if not region.any():
        return np.zeros(0, dtype=np.uint8)
    box = box_of(region)  # the nearest voxel outside lies in it: its rim is nearer than what is beyond
    inside, labels = region[box], mask.array[box]
    if inside.all():
        return np.zeros(int(inside.sum()), dtype=np.uint8)
    indices = ndimage.distance_transform_edt(
        inside, sampling=mask.grid.spacing, return_distances=False, return_indices=True
    )
    nearest: Labels = labels[tuple(indices)][inside]
    return nearest


def distance_outside(region: Region, grid: Grid) -> NDArray[np.float64]:
    """mm from each voxel to the nearest one of a region, 0 inside; infinite where the region is empty."""
    if not region.any():
        return np.full(region.shape, np.inf)
    distances: NDArray[np.float64] = ndimage.distance_transform_edt(~region, sampling=grid.spacing)
    return distances


def distance_inside(region: Region, grid: Grid) -> NDArray[np.float64]:
    """mm from each voxel of a region to the nearest one outside, 0 outside; what lies beyond the volume is inside."""
    distances: NDArray[np.float64] = ndimage.distance_transform_edt(region, sampling=grid.spacing)
    return distances


def first(distances: NDArray[np.float64], candidates: Region, count: int) -> Region:
    """The ``count`` candidates of the least distance; of equal ones, those that come first in memory."""
    chosen = np.zeros(candidates.shape, dtype=bool)
    places = np.flatnonzero(candidates)
    order = np.argsort(distances.ravel()[places], kind="stable")[:count]
    chosen.ravel()[places[order]] = True
    return chosen


def millilitres(voxels: int, grid: Grid) -> float:
    """Volume of so many voxels."""
    return voxels * abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000


def voxels_of(ml: float, grid: Grid) -> int:
    """How many voxels come nearest to a volume."""
    return round(ml / millilitres(1, grid))


def shifted(region: Region, steps: tuple[int, ...]) -> tuple[Region, int]:
    """The region moved by whole voxels along each axis, and how many voxels of it left the volume."""
    moved = np.zeros_like(region)
    source, target = [], []
    for step, length in zip(steps, region.shape, strict=True):
        source.append(slice(max(-step, 0), max(length - max(step, 0), 0)))
        target.append(slice(max(step, 0), max(length + min(step, 0), 0)))
    moved[tuple(target)] = region[tuple(source)]
    return moved, int(region.sum() - moved.sum())


def steps_of(millimetres: tuple[float, ...], grid: Grid) -> tuple[tuple[int, ...], list[float]]:
    """The whole voxels that come nearest to a way along R, A, S, and the way that they are, mm."""
    steps = np.rint(np.linalg.solve(grid.affine[:3, :3], np.asarray(millimetres, float))).astype(int)
    return tuple(steps.tolist()), np.round(grid.affine[:3, :3] @ steps, 3).tolist()
