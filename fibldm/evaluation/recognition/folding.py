"""Grain laid together by the period of a mark, so that what repeats adds up: as it is, or at another size of voxels."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fibldm.evaluation.recognition.grain import Grain
from fibldm.models.mark import PERIOD

Sizes = tuple[float, float, float]
"""How many voxels of a volume a voxel of the mark measures along each axis."""

_LONGEST = 80  # voxels of the mark along an axis, beyond which a size would have to be met too exactly
_LOBES = 2  # of the interpolation (Lanczos)


def folded(grain: Grain) -> Grain:
    """Sums over whole periods, ``(P, P, P)``."""
    padded = np.pad(grain, [(0, -length % PERIOD) for length in grain.shape])
    x, y, z = (length // PERIOD for length in padded.shape)
    return padded.reshape(x, PERIOD, y, PERIOD, z, PERIOD).sum((0, 2, 4))


def folded_at(grain: Grain, sizes: Sizes, *, quick: bool = False) -> Grain:
    """The same for voxels of the mark of another size, ``(N, P, P, P)``: at whole and half ones of its voxels.

    Only the middle of a volume that is very long counts. Along an axis of size 1 nothing was resampled, so that voxels
    are whole.

    Args:
        grain: of the volume.
        sizes: of the mark's voxels.
        quick: of whole and half ones, only all alike.
    """
    for axis, size in enumerate(sizes):
        length = min(grain.shape[axis], int(np.ceil(_LONGEST * size)))
        start = (grain.shape[axis] - length) // 2
        grain = grain[(slice(None),) * axis + (slice(start, start + length),)]
    resampled = [length > 1 and size != 1 for length, size in zip(grain.shape, sizes, strict=True)]
    phases = set(product(*((0.0, 0.5) if axis else (0.0,) for axis in resampled)))
    if quick:
        phases = {phase for phase in phases if not any(phase) or all(np.array(phase)[resampled])}
    return np.stack([_summed(grain, sizes, phase) for phase in sorted(phases)])


def _summed(grain: Grain, sizes: Sizes, phases: tuple[float, ...]) -> Grain:
    for size, phase in zip(sizes, phases, strict=True):  # the first axis becomes the last
        grain = np.tensordot(grain, _weights(grain.shape[0], size, phase), (0, 1))
    return grain


def ladder(shape: Sequence[int], low: float, high: float, axes: Sequence[int] = (0, 1, 2)) -> Iterator[float]:
    """Sizes from low to high, so near each other that one is right to a quarter of a voxel at the ends of the volume.

    Args:
        shape: of the volume.
        low: above 0.
        high: at least ``low``.
        axes: along which voxels of the mark have that size.
    """
    size = low
    while size <= high:
        yield size
        size *= 1 + 1 / max(min(shape[axis] / size, _LONGEST) for axis in axes)


@lru_cache(maxsize=64)
def _weights(length: int, size: float, phase: float) -> NDArray[np.float32]:
    """Of voxels for the places in a tile whose voxels begin there, ``(P, length)``."""
    at = (np.arange(length) - (length - 1) / 2) / size
    cells = np.arange(np.floor(at[0]) - _LOBES - 2, np.ceil(at[-1]) + _LOBES + 3)
    off = (at - (cells[:, None] + phase)) / max(1.0, 1 / size)
    weights = np.sinc(off) * np.sinc(off / _LOBES) * (np.abs(off) < _LOBES)
    summed = np.zeros((PERIOD, length))
    np.add.at(summed, cells.astype(int) % PERIOD, weights)
    return summed.astype(np.float32)
