"""Which values of a sweep lower Dice by more than chance does: paired within patients, corrected for their number.

Of each value and label, the drop of Dice from the same patient's unchanged volume is averaged over patients. A paired
t-test asks whether it is above 0, with Holm's correction over all values and labels (Holm 1979, "A simple sequentially
rejective multiple test procedure").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from fibldm.evaluation.statistics import Estimate, by_patient, mean_estimate
from fibldm.stress.sweeps import Sweep

FEWEST = 3
"""Patients of a paired test."""
LEVEL = 0.05


@dataclass(frozen=True)
class Measured:
    """Dice of a label in a volume.

    Attributes:
        kind: ``synthetic`` or ``real``.
        sweep: name of what changed; empty where nothing did.
        step: the value, as it was written.
        case: name of the case.
        subject: its patient.
        label: value in the work folder.
        dice: in ``[0, 1]``.
        image: file of the volume.
        mask: file of its mask.
        found: file of what the segmenter made of it.
    """

    kind: str
    sweep: str
    step: str
    case: str
    subject: str
    label: int
    dice: float
    image: Path
    mask: Path
    found: Path

    def at(self, sweep: str, step: str) -> "Measured":
        """The same at a value of a sweep."""
        return replace(self, sweep=sweep, step=step)


@dataclass(frozen=True)
class Weakness:
    """A value at which a label is found less well.

    Attributes:
        sweep: name of what changed.
        step: the value, as it was written.
        label: value in the work folder.
        dice: mean over patients.
        base: mean of the same patients, unchanged.
        p: of the paired test, corrected.
        patients: how many.
        worst: case of the lowest Dice.
    """

    sweep: str
    step: str
    label: int
    dice: float
    base: float
    p: float
    patients: int
    worst: str


def mean_dice(rows: Sequence[Measured]) -> Estimate | None:
    """Mean over patients; None of no rows."""
    return mean_estimate(by_patient([row.subject for row in rows], [row.dice for row in rows])) if rows else None


def of(measured: Sequence[Measured], kind: str, sweep: str, step: str, label: int) -> list[Measured]:
    """The rows of one value and label."""
    wanted = (kind, sweep, step, label)
    return [row for row in measured if (row.kind, row.sweep, row.step, row.label) == wanted]


def weaknesses(measured: Sequence[Measured], sweeps: Sequence[Sweep], drop: float) -> list[Weakness]:
    """Values of synthetic volumes whose mean drop of Dice is ``drop`` or more, and none of chance."""
    base = {(row.case, row.label): row.dice for row in measured if row.kind == "synthetic" and not row.sweep}
    tried: list[tuple[Weakness, float]] = []
    for sweep in sweeps:
        for step in sweep.steps:
            for label in sorted({label for _, label in base}):
                rows = [
                    row for row in of(measured, "synthetic", sweep.name, step.text, label) if (row.case, label) in base
                ]
                before = by_patient([row.subject for row in rows], [base[row.case, label] for row in rows])
                after = by_patient([row.subject for row in rows], [row.dice for row in rows])
                if len(after) < FEWEST:
                    continue
                means = np.array([[np.mean(part[who]) for who in after] for part in (before, after)])
                worst = min(rows, key=lambda row: row.dice).case
                dice, was = float(means[1].mean()), float(means[0].mean())
                found = Weakness(sweep.name, step.text, label, dice, was, 1.0, len(after), worst)
                tried.append((found, _p(means[0] - means[1])))
    corrected = _holm([p for _, p in tried])
    return [
        replace(found, p=p)
        for (found, _), p in zip(tried, corrected, strict=True)
        if found.base - found.dice >= drop and p < LEVEL
    ]


def _p(drops: np.ndarray) -> float:
    """One-sided, of the mean being above 0."""
    if np.ptp(drops) < 1e-12:
        return 0.0 if drops.mean() > 0 else 1.0
    return float(stats.ttest_1samp(drops, 0.0, alternative="greater").pvalue)


def _holm(values: Sequence[float]) -> list[float]:
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected
