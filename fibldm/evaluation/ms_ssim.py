"""How alike the volumes of a set are: MS-SSIM among pairs, which rises where a generator repeats itself."""

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import each_channel
from fibldm.volumes.grid import long_axes

_KERNEL = 7
_SIGMA = 1.5
_DATA_RANGE = 2.0
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def scale_weights(shape: Sequence[int]) -> tuple[float, ...]:
    """Weights of as many scales as fit into a volume, at most the five of Wang et al. 2003, scaled to sum to 1.

    Each scale halves the volume, and the window of 7 voxels must fit into the last.

    Raises:
        FibldmError: the window does not fit into the volume.
    """
    shortest = min(shape[axis] for axis in long_axes(shape))
    fitting = [scales for scales in range(1, len(_WEIGHTS) + 1) if _fits(shortest, scales)]
    if not fitting:
        raise FibldmError(f"MS-SSIM needs at least {_KERNEL} voxels along every axis; got {tuple(shape)}")
    weights = np.array(_WEIGHTS[: fitting[-1]])
    return tuple(float(weight) for weight in weights / weights.sum())


def ms_ssim(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Multi-scale structural similarity of two volumes; at most 1, which equal volumes reach.

    Wang, Simoncelli & Bovik 2003, "Multiscale structural similarity for image quality assessment", equation 7, by
    MONAI, with a Gaussian of 1.5 voxels in a window of 7 instead of 11: a quarter of the work, and a scale more on 64
    voxels. Values depend on the number of scales, and compare only between volumes of one size.

    Args:
        first: ``(X, Y, Z)``, in ``[-1, 1]``; a slice ``(X, Y, 1)`` is compared in two dimensions.
        second: the same shape.

    Raises:
        FibldmError: the shapes differ, or are too small.
    """
    if first.shape != second.shape:
        raise FibldmError(f"MS-SSIM needs two volumes of one size; got {first.shape} and {second.shape}")
    a, b = (torch.as_tensor(volume.squeeze(), dtype=torch.float32)[None, None] for volume in (first, second))
    weights, axes = scale_weights(first.shape), a.ndim - 2
    similarity = compute_ms_ssim(a, b, axes, _DATA_RANGE, kernel_size=_KERNEL, kernel_sigma=_SIGMA, weights=weights)
    return float(similarity)


def channel_similarity(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """`ms_ssim` of volumes ``(X, Y, Z)``, or its mean over the channels of ``(C, X, Y, Z)``.

    Raises:
        FibldmError: the shapes differ, or are too small.
    """
    pairs = zip(each_channel(first), each_channel(second), strict=True)
    return float(np.mean([ms_ssim(one, other) for one, other in pairs]))


def spread_pairs(n: int, at_most: int) -> list[tuple[int, int]]:
    """About ``at_most`` pairs of different members of 0..n-1 (never fewer than n), in which each is equally often.

    Members are thought of in a circle; each is paired with its next, its next but one, ...

    Raises:
        FibldmError: there are fewer than two members.
    """
    if n < 2:
        raise FibldmError(f"pairs need at least two volumes; got {n}")
    steps = range(1, 1 + min(n // 2, max(1, at_most // n)))
    return sorted({(min(i, j), max(i, j)) for step in steps for i in range(n) for j in [(i + step) % n]})


def _fits(length: int, scales: int) -> bool:
    """The second is MONAI's own demand."""
    return length >> (scales - 1) >= _KERNEL and length // max(1, scales - 1) ** 2 >= _KERNEL
