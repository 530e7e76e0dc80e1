"""When similar is too similar: a threshold from scans that were held out, tried out on others of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from fibldm.errors import FibldmError

FEWEST = 4
"""Patients that must be held out, half of them for the threshold and half to try it out."""


@dataclass(frozen=True)
class Share:
    """How many of some volumes, with the exact 95 % interval of Clopper & Pearson 1934."""

    count: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; none where there is no volume."""
        if not self.of:
            return {"value": None, "low": None, "high": None, "count": 0, "of": 0}
        interval = stats.binomtest(self.count, self.of).proportion_ci(method="exact")
        ends = {"low": float(interval.low), "high": float(interval.high)}
        return {"value": self.count / self.of, **ends, "count": self.count, "of": self.of}


@dataclass(frozen=True)
class Calibration:
    """A threshold of similarity, above which a volume counts as a copy.

    Attributes:
        threshold: a copy lies less than half as far (1 - similarity) from a training scan as the closest of the scans
            that it was calibrated on, as Carlini et al. 2023, "Extracting training data from diffusion models",
            section 5, have it.
        calibrated_on: names of these scans.
        tried_on: names of the others.
        false: how many of the others it would name.
    """

    threshold: float
    calibrated_on: tuple[str, ...]
    tried_on: tuple[str, ...]
    false: Share

    @classmethod
    def of(cls, similarities: Mapping[str, float], subjects: Mapping[str, str]) -> "Calibration":
        """From scans that were held out, each patient's in one of the halves.

        Args:
            similarities: of each scan, by its name, with the training scan most similar to it.
            subjects: patient by name of the scan.

        Raises:
            FibldmError: they are of fewer than `FEWEST` patients.
        """
        patients = sorted(set(subjects.values()))
        if len(patients) < FEWEST:
            raise FibldmError(
                f"a threshold needs scans of at least {FEWEST} patients that were held out; got {len(patients)}"
            )
        shuffled = [patients[place] for place in np.random.default_rng(0).permutation(len(patients))]
        chosen = set(shuffled[: (len(patients) + 1) // 2])
        first = tuple(name for name in similarities if subjects[name] in chosen)
        second = tuple(name for name in similarities if subjects[name] not in chosen)
        threshold = 1 - (1 - max(similarities[name] for name in first)) / 2
        false = sum(similarities[name] > threshold for name in second)
        return cls(threshold, first, second, Share(false, len(second)))


def closer_to_training(training: Sequence[float], held_out: Sequence[float]) -> float:
    """How likely the most similar of all held-out scans and as many training scans is a training scan.

    Of every way to draw as many training scans as there are held-out ones, or the other way around where these are
    more: 0.5 on average where a volume is no closer to the one set than to the other.

    Args:
        training: similarities of a volume with each training scan.
        held_out: with each held-out scan.
    """
    train, other = np.asarray(training), np.asarray(held_out)
    if len(train) < len(other):
        return 1 - closer_to_training(held_out, training)
    above = int((train > other.max()).sum())
    none = stats.hypergeom(len(train), above, len(other)).pmf(0)
    return float(1 - none)
