"""What the training masks say of a label set: where a label may lie, how large it is, and how much patients differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, unknown_choice
from fibldm.mask_editing.regions import nearest_other
from fibldm.progress import track
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import as_labels
from fibldm.workers import Processes, Work

HOST_SHARE = 0.2
"""Of what surrounds a label in training masks; the labels that make up less are no place for it."""


@dataclass(frozen=True)
class Variation:
    """How much the patients of a training set differ, one standard deviation along R, A, S.

    Attributes:
        scale: of the logarithm of how far the labels spread.
        shift: mm, of the middle of a label from the middle of all; of the label that stays most in its place, as
            lesions are anywhere.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]


@dataclass(frozen=True)
class Anatomy:
    """Rules learned from training masks.

    Attributes:
        names: of the labels by value, background included.
        hosts: by label, the labels it may lie in: those that make up `HOST_SHARE` or more of what surrounds it.
        envelope: sizes in training.
        variation: how patients differ; None of fewer than two masks.
    """

    names: Mapping[int, str]
    hosts: Mapping[int, frozenset[int]]
    envelope: Envelope
    variation: Variation | None

    @classmethod
    def of_training(cls, work: Path | str, *, workers: int = 1) -> "Anatomy":
        """From the training cases of a work folder that have a mask.

        Raises:
            FibldmError: no training case has one, or a file cannot be read.
        """
        described = read_datalist(work)
        masks = [Path(case["label"]) for case in load_datalist(work, "training", masks=True) if "label" in case]
        calls = [(mask,) for mask in masks]
        bar = partial(track, what="training masks")
        facts = list(Processes(workers).each(Work(_facts, what="read a training mask"), calls, bar))
        names = {int(value): name for value, name in described["labels"].items()}
        return cls(names, _hosts(facts), Envelope.from_dict(described["envelope"]), _variation(facts))

    def label(self, text: str) -> int:
        """The value of a label by its name, in any case of letters, or its number.

        Raises:
            FibldmError: there is none.
        """
        by_name = {name.casefold(): value for value, name in self.names.items()}
        value = int(text) if text.isdigit() else by_name.get(text.casefold().replace("_", " "), by_name.get(text))
        if value not in self.names or not value:
            known = [f"{number} {name}" for number, name in self.names.items() if number]
            raise unknown_choice("a label", text, known)
        return value

    def host_values(self, label: int) -> frozenset[int]:
        """The labels that one may lie in.

        Raises:
            FibldmError: no training mask has it.
        """
        if label not in self.hosts:
            raise FibldmError(
                f"a label can be edited where training masks have it; none has {self.names[label]!r}",
                "say where it may lie: over=LABEL,LABEL",
            )
        return self.hosts[label]

    def listed(self, values: Sequence[int] | frozenset[int]) -> str:
        """Names of labels for a sentence."""
        return ", ".join(self.names.get(value, "unknown") for value in sorted(values)) or "nothing"


@dataclass(frozen=True)
class _Facts:
    """Of one mask: by label, the share of each label around it and its middle; the middle and spread of all, mm."""

    around: Mapping[int, Mapping[int, float]]
    centres: Mapping[int, NDArray[np.float64]]
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]


def _facts(file: Path) -> _Facts | None:
    mask = as_labels(read_volume(file)).canonical()
    labels = np.where(mask.array == UNKNOWN_LABEL, 0, mask.array)
    places = np.argwhere(labels)
    if not len(places):
        return None
    points = places @ mask.affine[:3, :3].T
    values = labels[tuple(places.T)]
    around: dict[int, Mapping[int, float]] = {}
    for value in np.unique(values).tolist():
        behind = nearest_other(Volume(labels, mask.affine), np.asarray(labels == value))
        counts = np.bincount(behind, minlength=1)
        around[value] = {int(other): float(count / counts.sum()) for other, count in enumerate(counts) if count}
    centres = {value: points[values == value].mean(0) for value in around}
    return _Facts(around, centres, points.mean(0), points.std(0))


def _hosts(facts: Sequence[_Facts | None]) -> dict[int, frozenset[int]]:
    known = [one for one in facts if one is not None]
    hosts = {}
    for label in sorted({label for one in known for label in one.around}):
        having = [one.around[label] for one in known if label in one.around]
        others = {other for shares in having for other in shares}
        mean = {other: np.mean([shares.get(other, 0.0) for shares in having]) for other in others}
        hosts[label] = frozenset(other for other, share in mean.items() if share >= HOST_SHARE)
    return hosts


def _variation(facts: Sequence[_Facts | None]) -> Variation | None:
    known = [one for one in facts if one is not None]
    if len(known) < 2:
        return None
    scale = np.log(np.maximum([one.spread for one in known], 1e-3)).std(0, ddof=1)
    labels = {label for one in known for label in one.centres}
    shifts = []
    for label in labels:
        off = [one.centres[label] - one.centre for one in known if label in one.centres]
        if len(off) > 1:
            shifts.append(np.std(off, axis=0, ddof=1))
    shift = np.min(shifts, axis=0) if shifts else np.zeros(3)
    return Variation(_triple(scale), _triple(shift))


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
