"""The power spectrum of volumes: what a generator blurs, rings or makes up shows there.

Frequencies are in cycles/mm, so volumes of other spacings compare.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.signal.windows import hann

from fibldm.errors import FibldmError
from fibldm.volumes.grid import long_axes

_SMALLEST_POWER = 1e-12

Spectrum = NDArray[np.float64]


def frequency_edges(shape: Sequence[int], spacing: Sequence[float]) -> Spectrum:
    """Edges of the bins, cycles/mm, ``(K + 1,)``; the bins are centred on 2, 3, ... cycles per field of view.

    The shortest side counts, so that no bin is empty; of a slice, that of the two in its plane. One cycle is left out:
    the Hann window mixes it with the mean, which is removed. The last bin ends below the Nyquist frequency of the
    coarsest axis, so that every direction is in every bin.

    Args:
        shape: voxels along each axis.
        spacing: mm along each axis.

    Raises:
        FibldmError: the volume is too thin for a single bin.
    """
    axes = long_axes(shape)
    shortest = min(shape[axis] * spacing[axis] for axis in axes)
    last = int(shortest / (2 * max(spacing[axis] for axis in axes)) - 0.5)
    if last < 2:
        raise FibldmError(
            f"a spectrum needs a volume whose shortest side is at least five voxels of its coarsest axis; got size "
            f"{tuple(shape)} at {tuple(spacing)} mm",
            "give thicker volumes",
        )
    return np.asarray(np.arange(1.5, last + 1) / shortest, dtype=np.float64)


def radial_spectrum(
    image: NDArray[Any], spacing: Sequence[float], *, edges: NDArray[np.floating[Any]] | None = None
) -> Spectrum:
    """Log10 of the power density per bin of radial frequency, ``(K,)``.

    The power density is ``|F|^2 * voxel volume / sum(w^2)`` with the Hann window ``w`` (Welch 1967, "The use of fast
    Fourier transform for the estimation of power spectra"), averaged over the frequencies of each bin; white noise of
    variance v on voxels of u mm^3 has ``v u`` everywhere. Power below 1e-12 counts as 1e-12.

    Args:
        image: ``(X, Y, Z)``.
        spacing: mm along each axis.
        edges: of the bins, cycles/mm, ``(K + 1,)``; `frequency_edges` where None. Give one for all volumes of a set
            whose spacings differ.

    Raises:
        FibldmError: the volume is too thin, or a bin holds none of its frequencies.
    """
    edges = frequency_edges(image.shape, spacing) if edges is None else np.asarray(edges, dtype=np.float64)
    power = _power(image, spacing)
    bins = np.digitize(_radial_frequency(image.shape, spacing), edges).ravel()
    counts = np.bincount(bins, minlength=len(edges) + 1)[1 : len(edges)]
    if not counts.all():
        raise FibldmError(
            f"every bin of a spectrum must hold frequencies of the volume; size {image.shape} at {tuple(spacing)} mm "
            f"leaves {int((counts == 0).sum())} of {len(counts)} empty",
            "give edges made for this volume",
        )
    total = np.bincount(bins, weights=power.ravel(), minlength=len(edges) + 1)[1 : len(edges)]
    return np.log10(np.maximum(total / counts, _SMALLEST_POWER))


def channel_spectra(image: NDArray[Any], spacing: Sequence[float], *, edges: NDArray[np.floating[Any]]) -> Spectrum:
    """`radial_spectrum` of each channel of an image ``(X, Y, Z)`` or ``(C, X, Y, Z)``, one after the other, ``(C K,)``.

    Raises:
        FibldmError: as `radial_spectrum`.
    """
    channels = image.reshape(-1, *image.shape[-3:])
    return np.concatenate([radial_spectrum(channel, spacing, edges=edges) for channel in channels])


def spectrum_distance(a: Spectrum, b: Spectrum) -> float:
    """Mean over the bins of the absolute difference between the mean log spectra of two sets, dB.

    Args:
        a: ``(n, K)``, of `radial_spectrum`.
        b: ``(m, K)``, over the same bins.

    Raises:
        FibldmError: a set is empty, or the two have other bins.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise FibldmError(f"sets of spectra must have the same bins, as (n, K) and (m, K); got {a.shape}, {b.shape}")
    return float(10 * np.abs(a.mean(axis=0) - b.mean(axis=0)).mean())


def _power(image: NDArray[Any], spacing: Sequence[float]) -> NDArray[np.float64]:
    window = reduce(np.multiply.outer, (hann(length, sym=False) for length in image.shape))
    # the mean under the window, so that none of it leaks out of frequency zero
    centred = image - (image * window).sum() / window.sum()
    scale = np.prod(spacing) / np.square(window).sum()
    return np.asarray(np.square(np.abs(fft.fftn(centred * window))) * scale)


def _radial_frequency(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    axes = (np.square(fft.fftfreq(length, step)) for length, step in zip(shape, spacing, strict=True))
    return np.sqrt(reduce(np.add.outer, axes))
