"""Polygons on the grid of a slice: which voxel centres lie inside of them and which on them, and whether two cross.

Corners ``(N, 2)`` are in voxel indices, which count voxel centres from 0; the last one is joined to the first.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ON = 1e-6


@dataclass(frozen=True)
class Region:
    """Of the slice's voxels in ``box``, which centres lie inside of a polygon (by even-odd), and which on it."""

    box: tuple[slice, slice]
    inside: Bools
    on: Bools

    @property
    def size(self) -> int:
        """How many lie inside."""
        return int(np.count_nonzero(self.inside))

    def crosses(self, larger: "Region") -> bool:
        """Whether centres inside of it lie partly inside and partly outside of a larger one, and not on it."""
        common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(self.box, larger.box, strict=True)]
        if any(part.start >= part.stop for part in common):
            return False
        inside = self.inside[_part(common, self.box)]
        shared = np.count_nonzero(inside & larger.inside[_part(common, larger.box)])
        on = np.count_nonzero(inside & larger.on[_part(common, larger.box)])
        return bool(0 < shared < self.size - on)


def region(polygon: Array, shape: tuple[int, int]) -> Region:
    """The voxels of a slice inside of a polygon and on it.

    Args:
        polygon: corners ``(N, 2)``, also outside of the slice; edges may lie on each other, as those of a keyhole do.
        shape: of the slice.
    """
    from skimage.measure import grid_points_in_poly

    first = np.clip(np.floor(polygon.min(axis=0)), 0, shape).astype(int)
    last = np.clip(np.ceil(polygon.max(axis=0)) + 1, first, shape).astype(int)
    on = np.zeros(last - first, dtype=bool)
    inside = grid_points_in_poly(on.shape, polygon - first) if on.size else on
    places = _centres_on(polygon) - first
    rows, columns = places[((places >= 0) & (places < on.shape)).all(axis=1)].T
    on[rows, columns] = True
    return Region((slice(first[0], last[0]), slice(first[1], last[1])), inside & ~on, on)


def cycle(polygon: Array) -> tuple[tuple[float, ...], ...]:
    """The corners from the least one on, as the same polygon may begin at any of them, and go round in either sense.

    Not so one whose corners are all voxel centres: the two sides of a wall of one voxel may be traced along the same
    centres, the inner one in the other sense.
    """
    corners = [tuple(corner) for corner in polygon.tolist()]
    corners = [corner for number, corner in enumerate(corners) if corner != corners[number - 1]] or corners[:1]
    senses = [corners] if np.array_equal(polygon, np.rint(polygon)) else [corners, corners[::-1]]
    starts = [(turned, start) for turned in senses for start, corner in enumerate(turned) if corner == min(corners)]
    return min(tuple(turned[start:] + turned[:start]) for turned, start in starts)


def _part(common: list[slice], box: tuple[slice, slice]) -> tuple[slice, ...]:
    return tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True))


def _centres_on(polygon: Array) -> NDArray[np.int64]:
    """Voxel centres ``(N, 2)`` on the edges; scikit-image knows none on two edges that lie on each other.

    Every edge is followed along the axis in which it is longer.
    """
    step = np.roll(polygon, -1, axis=0) - polygon
    edges, longer = np.arange(len(polygon)), np.abs(step).argmax(axis=1)
    start, length = polygon[edges, longer], step[edges, longer]
    slope = step[edges, 1 - longer] / np.where(length == 0, 1, length)
    low = np.ceil(np.minimum(start, start + length) - _ON).astype(int)
    counts = np.maximum(np.floor(np.maximum(start, start + length) + _ON).astype(int) - low + 1, 0)
    edge = np.repeat(edges, counts)
    along = low[edge] + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    across = polygon[edge, 1 - longer[edge]] + (along - start[edge]) * slope[edge]
    places = np.stack([along, np.rint(across).astype(int)], axis=1)
    places[longer[edge] == 1] = places[longer[edge] == 1][:, ::-1]
    found: NDArray[np.int64] = places[np.abs(across - np.rint(across)) < _ON]
    return found
