"""What tells patients apart, in a cube that all volumes are brought to: their detail and their coarse shape.

Two chests correlate because both are chests. What tells patients apart is their detail: a band of scales above what an
autoencoder or a blur takes away and below what a body has in common with others, divided by how strong it is nearby, so
that another window or brightness curve changes little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Grid, Volume

SIDE = 48
"""Voxels along each axis of the cube that volumes are compared in."""

FREQUENCIES = SIDE // 4
"""Of the spectrum, along each axis."""

SHAPE = 12
"""Voxels along each axis of the cube of the coarse shape."""

_FINE, _COARSE = 0.7, 2.0  # voxels: what is finer and what is coarser is no detail
_EVEN = 0.3  # of the mean strength of detail: where there is less, it is not made as strong as elsewhere
_FLAT = 0.15  # of the standard deviation of a volume: slices with less hold next to nothing
_TAPER = 4  # voxels at a border that count less and less
_POOLED = (
    0.45  # of a voxel of the cube, half of it at the smallest scale: what is finer becomes means of voxels at once
)
_PERCENTILES = (1, 99)
_LONGEST = 95  # percentile of the longest axes, in mm, that the cube holds

Floats = NDArray[np.float32]


class Constant(FibldmError):
    """A volume has next to one value, so that it cannot be looked up."""


@dataclass(frozen=True)
class Prepared:
    """A volume in the cube: its detail, how many voxels of the cube it fills along each axis, and its coarse shape."""

    detail: Floats
    lengths: tuple[int, int, int]
    shape: Floats

    @property
    def weight(self) -> Floats:
        """How much each voxel of the cube counts."""
        return _weight(self.lengths)

    @cached_property
    def weighted(self) -> Floats:
        """The detail, as much as it counts."""
        return self.detail * self.weight

    @cached_property
    def norm(self) -> float:
        """Of the weighted detail."""
        return float(np.linalg.norm(self.weighted))

    @cached_property
    def transformed(self) -> NDArray[np.complex64]:
        """The Fourier transform of the weighted detail."""
        frequencies: NDArray[np.complex64] = fft.rfftn(self.weighted)
        return frequencies

    @cached_property
    def spectrum(self) -> Floats:
        """Low frequencies of the amplitude spectrum, zero in the middle; each frequency's mean is 1."""
        middle = slice(SIDE // 2 - FREQUENCIES, SIDE // 2 + FREQUENCIES + 1)
        amplitude = np.abs(fft.fftshift(fft.fftn(self.weighted)))[middle, middle, middle]
        sums = np.bincount(_RADII.ravel(), amplitude.ravel()) / np.bincount(_RADII.ravel())
        whitened: Floats = (amplitude / (sums[_RADII] + 1e-9)).astype(np.float32)
        return whitened


class Opened:
    """A volume that is looked up, prepared once at each scale that it is asked for.

    Args:
        volume: its axes in any order.
        spacing: mm of a voxel of the cube.

    Raises:
        Constant: nearly all of it has one value.
    """

    def __init__(self, volume: Volume, spacing: float) -> None:
        turned = volume.canonical()
        fine = np.asarray(turned.grid.spacing)
        steps = np.clip(_POOLED * spacing // fine, 1, turned.array.shape).astype(int)
        array = _pooled(turned.array, steps)
        low, high = np.percentile(array, _PERCENTILES)
        if not high > low:
            raise Constant(f"a volume that is looked up must not be constant; nearly all of it is {low:g}")
        self._array = _without_padding(np.clip((array - low) / (high - low), 0, 1))
        self._zoom = fine * steps / spacing
        self._prepared: dict[float, Prepared] = {}

    def at(self, scale: float = 1.0) -> Prepared:
        """The volume in the cube, made smaller by ``scale``."""
        if scale not in self._prepared:
            array = self._resampled(scale)
            x, y, z = array.shape
            self._prepared[scale] = Prepared(_cube(_detail(array), SIDE), (x, y, z), _shape(array))
        return self._prepared[scale]

    def grey(self, scale: float = 1.0) -> Floats:
        """Its grey values in the cube, ``(SIDE, SIDE, SIDE)`` in ``[0, 1]``."""
        return _cube(self._resampled(scale), SIDE)

    def _resampled(self, scale: float) -> Floats:
        zoom = self._zoom / scale
        smoothed = ndimage.gaussian_filter(self._array, 0.45 * np.maximum(1 / zoom - 1, 0))
        factors = [_zoom(n, z) for n, z in zip(smoothed.shape, zoom, strict=True)]
        resampled: Floats = ndimage.zoom(smoothed, factors, order=1)
        return resampled


def cube_spacing(grids: Sequence[Grid]) -> float:
    """mm of a voxel of the cube: it holds nearly all of some scans, which are not made finer than they are."""
    longest = [max(np.multiply(grid.shape, grid.spacing)) for grid in grids]
    finest = min(min(grid.spacing) for grid in grids)
    return max(float(np.percentile(longest, _LONGEST)) / SIDE, finest)


def rounded(prepared: Prepared) -> Prepared:
    """With its detail as a file keeps it, so that what is read is what was compared."""
    return replace(prepared, detail=prepared.detail.astype(np.float16).astype(np.float32))


def _zoom(length: int, zoom: float) -> float:
    """To a whole number of voxels, at least one."""
    return max(1, round(length * zoom)) / length


def _pooled(array: NDArray[Any], steps: NDArray[np.intp]) -> Floats:
    """Means of so many voxels along each axis, without those that are left over at the borders."""
    for axis, step in enumerate(map(int, steps)):
        count = array.shape[axis] // step
        if step > 1:
            first = array.shape[axis] % step // 2
            array = array.take(range(first, first + count * step), axis=axis)
            split = (*array.shape[:axis], count, step, *array.shape[axis + 1 :])
            array = array.reshape(split).mean(axis=axis + 1, dtype=np.float32)
    return np.asarray(array, dtype=np.float32)


def _without_padding(array: Floats) -> Floats:
    """Without slices at the borders that are all but flat, as what fills a moved scan up is, even noisy or blurred."""
    least = _FLAT * float(array.std())
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        varies = np.flatnonzero(array.std(axis=others) > least)
        if array.shape[axis] > 1 and len(varies):
            array = array.take(range(varies[0], varies[-1] + 1), axis=axis)
    return array


def _detail(array: Floats) -> Floats:
    band = _smooth(array, _FINE) - _smooth(array, _COARSE)
    power = _smooth(band * band, _COARSE)
    even: Floats = band / (np.sqrt(np.maximum(power, 0)) + _EVEN * np.sqrt(power.mean()) + 1e-6)
    return even - even.mean()


def _smooth(array: Floats, sigma: float) -> Floats:
    smooth: Floats = ndimage.gaussian_filter(array, sigma, mode="nearest")
    return smooth


@cache
def _weight(lengths: tuple[int, int, int]) -> Floats:
    """How much each voxel of the cube counts, of a volume of so many: less towards its borders, and not beyond."""
    weight = np.ones(lengths, dtype=np.float32)
    for axis, length in enumerate(lengths):
        if length > 1:
            edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
            weight *= np.clip(edge / _TAPER, 0, 1).reshape([-1 if other == axis else 1 for other in range(3)])
    cube = _cube(weight, SIDE)
    cube.flags.writeable = False
    return cube


def _shape(array: Floats) -> Floats:
    """Grey values much coarser than detail, in a cube of their own."""
    zoom = SHAPE / SIDE
    smooth = _smooth(array, 0.5 / zoom)
    smooth = ndimage.zoom(smooth - smooth.mean(), [_zoom(n, zoom) for n in array.shape], order=1)
    return _cube(smooth, SHAPE)


def _cube(array: Floats, side: int) -> Floats:
    """The middle of an array in the middle of a cube, 0 around it."""
    cube = np.zeros((side,) * 3, dtype=np.float32)
    kept = [min(length, side) for length in array.shape]
    source = tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(array.shape, kept, strict=True))
    target = tuple(slice((side - k) // 2, (side - k) // 2 + k) for k in kept)
    cube[target] = array[source]
    return cube


_AXES = np.meshgrid(*[np.arange(-FREQUENCIES, FREQUENCIES + 1)] * 3, indexing="ij")
LENGTHS = np.sqrt(sum(np.square(axis, dtype=float) for axis in _AXES))
"""Of the frequencies of a spectrum, ``(25, 25, 25)``."""

_RADII = np.round(LENGTHS).astype(int)
