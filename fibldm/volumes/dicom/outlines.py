"""The outline of a mask on one slice: polygons along the borders of its voxels, from which every reader gets it back.

Corners ``(N, 2)`` are in voxel indices, which count voxel centres from 0.

* Edges run along the borders of voxels, so that areas and volumes are those of the voxels, but `INSET` inside of them.
  Voxels that touch in a corner thus have outlines that do not meet, no edge or corner lies on a voxel centre or in line
  with one, and readers that round corners to voxels (such as by OpenCV's ``fillPoly``) round to voxels of the mask.
* A hole is reached from outside through a channel without width, the *keyhole* of DICOM PS3.3, C.8.8.6.3. Then the
  polygons of a slice neither cross nor lie within each other, and their union, their exclusive or, and even-odd filling
  are the same.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]

INSET = 0.01
"""Of a voxel."""

_CHANNEL = 0.25
"""Of a voxel: how far beside voxel centres a channel runs."""
_SAME = 1e-6


def outlines(inside: NDArray[np.bool_]) -> list[Array]:
    """Closed simple polygons around the voxels of a slice, one for each part that hangs together by edges of voxels.

    Args:
        inside: the voxels.

    Returns:
        Corners of each polygon; the last one is joined to the first.
    """
    from skimage.measure import find_contours

    padded = np.pad(inside, 1)
    parts, _ = ndimage.label(padded)
    outer: dict[int, Array] = {}
    holes: list[tuple[NDArray[np.int64], int, Array]] = []
    for crossings in find_contours(padded.astype(np.float64), 0.5, fully_connected="low"):
        places = crossings[:-1]
        inwards = _inwards(places, padded)
        ring = _ring(places, inwards)
        top = int(np.argmin(places[:, 0]))
        voxel = np.rint(places[top] + inwards[top] / 2).astype(int)
        part = int(parts[tuple(voxel)])
        if inwards[top, 0] > 0:
            outer[part] = ring
        else:
            holes.append((voxel, part, ring))
    for voxel, part, ring in sorted(holes, key=lambda hole: int(hole[0][0])):  # what lies above is joined already
        outer[part] = _joined(outer[part], ring, voxel, padded)
    return [polygon - 1 for polygon in outer.values()]


def _inwards(places: Array, inside: NDArray[np.bool_]) -> Array:
    """Unit steps from borders between two voxels to the one that is inside."""
    before, after = np.floor(places), np.ceil(places)
    is_before = inside[tuple(before.astype(int).T)][:, np.newaxis]
    inwards: Array = 2 * (np.where(is_before, before, after) - places)
    return inwards


def _ring(places: Array, inwards: Array) -> Array:
    """The corners of a closed row of borders between voxels.

    Args:
        places: middles of the borders, one after the other, as marching squares finds them.
        inwards: of `_inwards`.
    """
    following = np.roll(inwards, -1, axis=0)
    between = np.floor((places + np.roll(places, -1, axis=0)) / 2) + 0.5
    ring: Array = (between + INSET * (inwards + following))[(inwards != following).any(axis=1)]
    return ring


def _joined(polygon: Array, hole: Array, voxel: NDArray[np.int64], inside: NDArray[np.bool_]) -> Array:
    """A polygon with a hole of it, by a channel that runs from the hole along the first axis, towards lower indices.

    Args:
        polygon: with all of its holes that the channel may meet.
        hole: goes round in the other sense.
        voxel: inside, beside the hole's border where that has the lowest index.
        inside: all voxels.
    """
    row, column = voxel
    beyond = int(np.flatnonzero(~inside[:row, column])[-1])
    start = np.array([row + 0.5 - INSET, column - _CHANNEL])
    end = np.array([beyond + 0.5 + INSET, column - _CHANNEL])
    at, own = _edge_through(polygon, end), _edge_through(hole, start)
    turned = np.roll(hole, -own - 1, axis=0)
    return np.concatenate([polygon[: at + 1], [end, start], turned, [start, end], polygon[at + 1 :]])


def _edge_through(polygon: Array, place: Array) -> int:
    """Which edge along the second axis a place lies on, by the number of its first corner."""
    following = np.roll(polygon, -1, axis=0)
    level = (np.abs(polygon[:, 0] - place[0]) < _SAME) & (np.abs(following[:, 0] - place[0]) < _SAME)
    spans = (polygon[:, 1] < place[1]) != (following[:, 1] < place[1])
    (edge,) = np.flatnonzero(level & spans)
    return int(edge)
