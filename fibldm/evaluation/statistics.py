"""Figures with their uncertainty: the patient is the unit, intervals come from subsamples without replacement.

A subsample of half the patients spreads about its mean as much as the figure of all of them does about the truth: for b
of n patients drawn without replacement the variance of a mean is ``s^2 (n - b) / (b n)``, so deviations are scaled by
``sqrt(b / (n - b))``, which is 1 for halves (Shao & Wu 1989, "A general theory for jackknife variance estimation";
Politis, Romano & Wolf 1999, "Subsampling", section 2.3). No patient is ever counted twice, as a bootstrap would, which
distances between sets mistake for a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError

FEWEST_PATIENTS = 8
TOO_FEW = "too few to say"

_DRAWS = 200
_QUANTILES = (0.025, 0.975)

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Estimate:
    """One measured number.

    Attributes:
        value: the figure; None where it cannot be computed.
        low: lower end of its 95 % interval; None where there are too few patients to say.
        high: upper end.
        n: patients it comes from.
        real_vs_real: the same figure of real scans, or of two disjoint groups of real patients; None where that has no
            meaning.
        note: what a reader must know, such as "too few to say".
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    real_vs_real: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What ``metrics.json`` holds; an empty note is left out."""
        return {key: value for key, value in asdict(self).items() if key != "note" or value}


def estimate(statistic: Callable[[Indices], float], n: int, *, real_vs_real: float | None = None) -> Estimate:
    """A statistic over ``n`` patients with its interval.

    Args:
        statistic: of the patients with these indices (sorted, distinct, in 0..n-1).
        n: number of patients.
        real_vs_real: see `Estimate`.

    Raises:
        FibldmError: there is no patient.
    """
    if n < 1:
        raise FibldmError("a figure needs at least one patient; got none")
    value = float(statistic(np.arange(n)))
    if n < FEWEST_PATIENTS:
        return Estimate(value, None, None, n, real_vs_real, TOO_FEW)
    low, high = value + _deviations(statistic, n)
    return Estimate(value, float(low), float(high), n, real_vs_real)


def mean_estimate(values: Mapping[str, Sequence[float]], *, real_vs_real: float | None = None) -> Estimate:
    """The mean over patients of the mean over each patient's volumes.

    Raises:
        FibldmError: there is no patient, or one without a value.
    """
    empty = sorted(patient for patient, measured in values.items() if not len(measured))
    if empty:
        raise FibldmError(f"every patient needs at least one value; {', '.join(empty)} came without")
    means = np.array([np.mean(measured) for measured in values.values()], dtype=np.float64)
    return estimate(lambda chosen: float(means[chosen].mean()), len(means), real_vs_real=real_vs_real)


def by_patient(subjects: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    """The values of every patient, in the order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for subject, value in zip(subjects, values, strict=True):
        grouped.setdefault(subject, []).append(value)
    return grouped


def _deviations(statistic: Callable[[Indices], float], n: int) -> NDArray[np.float64]:
    """Quantiles of how far subsamples of half the patients lie from their mean; the draws are the same every time."""
    generator, half = np.random.default_rng(n), n // 2
    values = [statistic(np.sort(generator.permutation(n)[:half])) for _ in range(_DRAWS)]
    scale = np.sqrt(half / (n - half))
    return np.asarray(np.quantile(values, _QUANTILES) - np.mean(values)) * scale
