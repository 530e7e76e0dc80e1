"""What can be said of a mask without an image: size, shape and topology of its labels, and where they touch."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm import UNKNOWN_LABEL

SHAPE = ("volume_ml", "surface_mm2", "sphericity", "elongation", "flatness", *(f"extent_{axis}_mm" for axis in "xyz"))
PLACE = tuple(f"offset_{axis}_mm" for axis in "xyz")
TOPOLOGY = ("components", "cavities", "handles")
CONTACT = "contact_mm2"

_ROUNDING = 1e-9  # voxels
_ALL_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)

Labels = NDArray[np.uint8]


def describe(labels: Labels, spacing: Sequence[float], names: Mapping[int, str]) -> dict[str, float]:
    """Figures of a mask, as ``figure/label``, and ``contact_mm2/label+label``; 0 of a label that is absent.

    * volume; surface, by marching cubes, which the steps of voxels make too large, that of a ball by about a tenth;
      sphericity ``(36 pi V^2)^(1/3) / A``; elongation and flatness, the second and third principal axis over the first;
      extents of the bounding box; offset of the centre from that of all labels
    * components (26 neighbours), cavities (background that is shut in, 6 neighbours) and handles (tunnels), which are
      what Euler's number leaves
    * contact: the area of faces that voxels of two labels share

    Args:
        labels: ``(X, Y, Z)``; what is unknown is of no label.
        spacing: mm along each axis.
        names: of the labels by value; background is not described.
    """
    steps = np.asarray(spacing, dtype=np.float64)
    named = {value: name for value, name in names.items() if value}
    known = np.where(labels == UNKNOWN_LABEL, 0, labels).astype(np.uint8)
    centre = _centre(known > 0, steps)
    found = dict(enumerate(ndimage.find_objects(known), start=1))
    figures: dict[str, float] = {}
    for value, name in named.items():
        box = found.get(value)
        own = dict.fromkeys((*SHAPE, *PLACE, *TOPOLOGY), 0.0)
        if box is not None:
            part = known[box] == value
            corner = np.array([side.start for side in box]) * steps
            own = {**_shape(part, steps), **_place(_centre(part, steps) + corner - centre), **_topology(part)}
        figures |= {f"{figure}/{name}": number for figure, number in own.items()}
    touching = _contacts(known, steps)
    for (one, first), (two, second) in itertools.combinations(sorted(named.items()), 2):
        figures[f"{CONTACT}/{first}+{second}"] = touching.get((one, two), 0.0)
    return figures


def _shape(part: NDArray[np.bool_], steps: NDArray[np.float64]) -> dict[str, float]:
    from skimage.measure import marching_cubes, mesh_surface_area

    corners, faces, _, _ = marching_cubes(np.pad(part, 1).astype(np.float32), 0.5, spacing=tuple(steps))
    volume, surface = float(part.sum() * steps.prod()), float(mesh_surface_area(corners, faces))
    places = np.argwhere(part) * steps
    # a voxel is no point: its own spread keeps a plane from having no thickness
    spread = np.cov(places, rowvar=False, bias=True) + np.diag(steps**2 / 12)
    third, second, first = np.sqrt(np.linalg.eigvalsh(spread))
    sphericity = (36 * np.pi * volume**2) ** (1 / 3) / surface
    extents = np.array(part.shape) * steps
    numbers = (volume / 1000, surface, sphericity, second / first, third / first, *extents)
    return {name: float(number) for name, number in zip(SHAPE, numbers, strict=True)}


def _place(offset: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(number) for name, number in zip(PLACE, offset, strict=True)}


def _topology(part: NDArray[np.bool_]) -> dict[str, float]:
    from skimage.measure import euler_number

    around = np.pad(part, 1)
    components = int(ndimage.label(around, structure=_ALL_NEIGHBOURS)[1])
    cavities = int(ndimage.label(~around)[1]) - 1
    handles = components + cavities - int(euler_number(around, connectivity=3))
    return {"components": float(components), "cavities": float(cavities), "handles": float(handles)}


def _centre(part: NDArray[np.bool_], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argwhere(part).mean(axis=0) * steps if part.any() else np.zeros(3)


def _contacts(labels: Labels, steps: NDArray[np.float64]) -> dict[tuple[int, int], float]:
    """Area of shared faces, mm^2, by the values of two labels, the smaller first."""
    areas: dict[tuple[int, int], float] = {}
    for axis in range(3):
        before, after = (np.moveaxis(labels, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        differ = (before != after) & (before > 0) & (after > 0)
        low, high = np.minimum(before, after)[differ], np.maximum(before, after)[differ]
        pairs, counts = np.unique(np.stack([low, high]), axis=1, return_counts=True)
        area = float(steps.prod() / steps[axis])
        for one, two, count in zip(*pairs, counts, strict=True):
            key = int(one), int(two)
            areas[key] = areas.get(key, 0.0) + float(count) * area
    return areas


def centred(labels: Labels, size: Sequence[int]) -> Labels:
    """A mask moved by whole voxels, so that its labels lie around the middle of ``size``; what leaves that is cut."""
    known = np.where(labels == UNKNOWN_LABEL, 0, labels).astype(np.uint8)
    centre = np.array(known.shape) // 2
    if known.any():  # halves always go up, so that a mask that was moved comes to the same place
        centre = np.floor(_centre(known > 0, np.ones(3)) + 0.5 + _ROUNDING).astype(int)
    moved = np.zeros(tuple(size), dtype=np.uint8)
    low = centre - np.array(size) // 2
    source = tuple(
        slice(max(start, 0), min(start + long, there))
        for start, long, there in zip(low, size, known.shape, strict=True)
    )
    target = tuple(slice(part.start - start, part.stop - start) for part, start in zip(source, low, strict=True))
    moved[target] = known[source]
    return moved


def pairwise_dice(masks: NDArray[np.uint8], others: NDArray[np.uint8], values: Sequence[int]) -> NDArray[Any]:
    """Mean Dice over labels of each of some masks ``(n, ...)`` with each of others ``(m, ...)``, ``(n, m)``.

    A label that neither has does not count; two masks without any label are the same.
    """
    total, counted = (np.zeros((len(masks), len(others))) for _ in range(2))
    for value in values:
        one, two = ((part.reshape(len(part), -1) == value).astype(np.float32) for part in (masks, others))
        sizes = one.sum(axis=1)[:, None] + two.sum(axis=1)[None]
        total += np.where(sizes > 0, 2 * (one @ two.T) / np.maximum(sizes, 1), 0)
        counted += sizes > 0
    return np.where(counted > 0, total / np.maximum(counted, 1), 1.0)
