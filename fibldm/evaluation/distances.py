"""Distances between two sets of volumes, each given by its features: arrays ``(n, d)``."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from fibldm.errors import FibldmError

Features = NDArray[np.floating[Any]]
Kernel = Callable[[Features, Features], NDArray[np.float64]]


def squared_mmd(x: Features, y: Features, kernel: Kernel) -> float:
    """Unbiased squared maximum mean discrepancy; around 0, and so at times below it, for sets of one distribution.

    Gretton et al. 2012, "A kernel two-sample test", equation 3. With `polynomial_kernel` it is the kernel Inception
    distance (KID) over all features at once.

    Raises:
        FibldmError: a set has fewer than two members, or the two have other features.
    """
    x, y = _two_sets(x, y)
    return _mean_of_others(kernel(x, x)) + _mean_of_others(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def polynomial_kernel(x: Features, y: Features) -> NDArray[np.float64]:
    """``(x . y / d + 1)^3``; Binkowski et al. 2018, "Demystifying MMD GANs", section 3."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3, dtype=np.float64)


def gaussian_kernel(bandwidth: float) -> Kernel:
    """The kernel ``exp(-|x - y|^2 / (2 bandwidth^2))``."""

    def kernel(x: Features, y: Features) -> NDArray[np.float64]:
        return np.asarray(np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2)))

    return kernel


def median_bandwidth(real: Features) -> float:
    """The median distance between two members of a set of reals (Gretton et al. 2012, section 8).

    Never of the synthetic volumes: a ruler must not stretch with what it measures.

    Raises:
        FibldmError: half of the pairs or more are equal.
    """
    bandwidth = float(np.median(pdist(real))) if len(real) > 1 else 0.0
    if not bandwidth > 0:
        raise FibldmError(
            f"the median distance between real volumes must be above 0; that of these {len(real)} is {bandwidth:g}",
            "look for copies among the real volumes",
        )
    return bandwidth


def frechet_distance(x: Features, y: Features) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets.

    ``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``; Dowson & Landau 1982, "The Fréchet distance between
    multivariate normal distributions", equation 4; Heusel et al. 2017, section 3. With ``C_x = A'A`` and ``C_y = B'B``
    the eigenvalues of the root are the singular values of ``AB'``, which holds for singular covariances too.

    Biased upwards, and the more so the smaller the sets: not to be compared between sets of other sizes, and without
    meaning where ``n <= d``.

    Raises:
        FibldmError: a set has fewer than two members, or the two have other features.
    """
    x, y = _two_sets(x, y)
    a, b = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    moved = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(moved + np.square(a).sum() + np.square(b).sum() - 2 * shared)


def precision(x: Features, y: Features, *, neighbours: int = 3) -> float:
    """The share of ``x`` that lies among ``y``: in the sphere of a member of ``y`` up to its k-th neighbour in ``y``.

    Of synthetic volumes among real ones it is their precision; of real volumes among synthetic ones, the recall
    (Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models", equations 1
    and 2).

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        neighbours: k, the authors' 3 by default; of a smaller set all others.

    Raises:
        FibldmError: a set has fewer than two members, or the two have other features.
    """
    inside, _ = _in_spheres(x, y, neighbours)
    return float(inside.any(axis=1).mean())


def density(x: Features, y: Features, *, neighbours: int = 5) -> float:
    """The number of spheres of members of ``y`` in which a member of ``x`` lies, over the k that are expected.

    Of synthetic volumes among real ones; around 1 for sets of one distribution, and above it where volumes crowd among
    typical scans. One outlier of the scans, whose sphere is large, counts once here; in `precision` it is enough by
    itself (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", section 3).

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        neighbours: k, the authors' 5 by default; of a smaller set all others.

    Raises:
        FibldmError: a set has fewer than two members, or the two have other features.
    """
    inside, nearest = _in_spheres(x, y, neighbours)
    return float(inside.sum(axis=1).mean() / nearest)


def coverage(x: Features, y: Features, *, neighbours: int = 5) -> float:
    """The share of ``y`` whose sphere holds a member of ``x``: of scans, those that some synthetic volume is like.

    For sets of one distribution it is ``1 - (m-1)...(m-k) / ((n+m-1)...(n+m-k))`` on average, whatever the distribution
    (Naeem et al. 2020, lemma 2): 0.97 of two large sets, 0.99 of two sets of ten.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        neighbours: k, the authors' 5 by default; of a smaller set all others.

    Raises:
        FibldmError: a set has fewer than two members, or the two have other features.
    """
    inside, _ = _in_spheres(x, y, neighbours)
    return float(inside.any(axis=0).mean())


def _in_spheres(x: Features, y: Features, neighbours: int) -> tuple[NDArray[np.bool_], int]:
    """Whether each of ``x`` lies in the sphere of each of ``y``, ``(n, m)``; and k."""
    x, y = _two_sets(x, y)
    nearest = min(neighbours, len(y) - 1)
    radii = np.sort(cdist(y, y), axis=1)[:, nearest]  # the first is the member itself
    return cdist(x, y) <= radii, nearest


def _mean_of_others(gram: NDArray[np.float64]) -> float:
    n = len(gram)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1)))


def _two_sets(x: Features, y: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise FibldmError(f"two sets must have the same features, as (n, d) and (m, d); got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise FibldmError(
            f"a distance between sets needs at least two members of each; got {len(x)} and {len(y)}",
            "give more patients",
        )
    return x.astype(np.float64), y.astype(np.float64)
