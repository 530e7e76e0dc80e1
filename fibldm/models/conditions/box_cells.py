"""Boxes of masks, and how much of every latent cell lies in boxes.

Places are in voxels from the outer face of the first voxel, so that voxel ``i`` reaches from ``i`` to ``i + 1``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_TOUCHING = np.ones((3, 3, 3), dtype=bool)  # by a face, an edge or a corner


class Span(NamedTuple):
    """From the low faces of a box to its high ones, along the three axes."""

    low: tuple[float, ...]
    high: tuple[float, ...]


def spans_of(labels: NDArray[np.integer], value: int, smallest: int) -> list[Span]:
    """The boxes of a label: of each of its connected components, the voxels that it reaches.

    Args:
        labels: ``(X, Y, Z)``.
        value: of the label.
        smallest: voxels that a component has at least; smaller ones are left out.
    """
    shape = labels == value
    around = ndimage.find_objects(shape.astype(np.uint8))
    if not around:
        return []
    components, count = ndimage.label(shape[around[0]], structure=_TOUCHING)
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    start = [part.start for part in around[0]]
    return [
        Span(
            tuple(first + part.start for first, part in zip(start, found, strict=True)),
            tuple(first + part.stop for first, part in zip(start, found, strict=True)),
        )
        for found, size in zip(ndimage.find_objects(components), sizes, strict=True)
        if size >= smallest
    ]


def coverage(spans: Sequence[Span], cells: Sequence[int], factors: Sequence[int]) -> NDArray[np.float32]:
    """How much of each cell lies in at least one of the boxes, exactly: ``(x, y, z)``, 0 to 1.

    Every axis is cut at the faces of cells and boxes; between two cuts a place is in a box or not.

    Args:
        spans: the boxes, in voxels.
        cells: of the latent along each axis.
        factors: voxels in a cell along each axis.
    """
    low, high = (np.array([span[end] for span in spans], dtype=float).reshape(-1, 3) / factors for end in (0, 1))
    low, high = low.clip(0, cells), high.clip(0, cells)
    covered = np.zeros(tuple(cells), dtype=np.float32)
    cuts = [np.unique([*range(n + 1), *low[:, axis], *high[:, axis]]) for axis, n in enumerate(cells)]
    first, last = (
        np.stack([np.searchsorted(cut, ends[:, axis]) for axis, cut in enumerate(cuts)], axis=1) for ends in (low, high)
    )
    along_y, along_z = (_lengths(cuts[axis], cells[axis]) for axis in (1, 2))
    for place, (start, stop) in enumerate(zip(cuts[0][:-1], cuts[0][1:], strict=True)):
        here = (first[:, 0] <= place) & (place < last[:, 0])
        if not here.any():
            continue
        plane = np.zeros((len(cuts[1]) - 1, len(cuts[2]) - 1), dtype=np.float32)
        for (_, y, z), (_, y_end, z_end) in zip(first[here], last[here], strict=True):
            plane[y:y_end, z:z_end] = 1
        covered[int(start)] += np.float32(stop - start) * (along_y @ plane @ along_z.T)
    return covered.clip(0, 1)


def _lengths(cut: NDArray[np.float64], cells: int) -> NDArray[np.float32]:
    """Length of every piece in the cell that it lies in: ``(cells, pieces)``."""
    lengths = np.zeros((cells, len(cut) - 1), dtype=np.float32)
    lengths[cut[:-1].astype(int), np.arange(len(cut) - 1)] = np.diff(cut)
    return lengths
