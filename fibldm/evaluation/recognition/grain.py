"""What is random about neighbouring voxels, made even: of one strength everywhere, and white."""

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Grain = NDArray[np.float32]

_NEAR = 3  # voxels whose mean is no grain
_AROUND = 5  # voxels that tell how strong it is, and frequencies that tell how much power there is
_LIMIT = 2.0  # of the local strength; what exceeds it is an edge
_FLOOR = 1e-3  # of the usual strength; below, there is no grain
_POWER_FLOOR = 1e-6


def grain(volume: NDArray[np.float32]) -> Grain:
    """The grain of a volume ``(X, Y, Z)``, of which nothing is left of contrast, level, slow change or blur.

    A voxel that is not finite counts as the mean of the others.
    """
    finite = np.isfinite(volume)
    values = volume if finite.all() else np.where(finite, volume, volume[finite].mean() if finite.any() else 0)
    made = values - ndimage.uniform_filter(values, _NEAR)
    for _ in range(2):
        made = _white(_even(made))
    return made


def _even(values: Grain) -> Grain:
    """With a local strength of 1, clipped; 0 where there is hardly any."""
    strength = np.sqrt(np.maximum(ndimage.uniform_filter(values * values, _AROUND), 0))
    some = strength[strength > 0]
    if not some.size:
        return np.zeros_like(values)
    floor = _FLOOR * float(np.median(some))
    even = np.divide(values, strength, out=np.zeros_like(values), where=strength > floor)
    return even.clip(-_LIMIT, _LIMIT)


def _white(values: Grain) -> Grain:
    """With as much power at every frequency as at any other."""
    spectrum = fft.rfftn(values)
    power = np.abs(spectrum) ** 2
    around = ndimage.uniform_filter(
        power, [min(_AROUND, size) for size in power.shape], mode=["wrap", "wrap", "mirror"]
    )
    floor = _POWER_FLOOR * float(around.mean())
    if floor == 0:
        return np.zeros_like(values)
    white: Grain = fft.irfftn(spectrum / np.sqrt(around + floor), s=values.shape)
    return white.astype(np.float32)
