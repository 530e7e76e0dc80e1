"""Who is compared with whom: a volume of each patient, the scans of the same masks, and scans of other patients."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case
from fibldm.volumes.writer import volume_stem

UNPAIRED = "The masks are of nobody in the work folder: real_vs_real is of scans with other masks."

_SEED = 0


class Sets(NamedTuple):
    """What is compared: lists of one length, a volume per patient.

    Attributes:
        synthetic: the volumes in question.
        real: the scans that their masks were drawn on, in the same order; where the masks are of nobody in the work
            folder, scans of test patients.
        reference: scans of other patients than those of ``real``.
        paired: whether ``real`` are the scans of the very masks.
    """

    synthetic: list[Case]
    real: list[Case]
    reference: list[Case]
    paired: bool

    def notes(self, synthetic: Sequence[Case]) -> list[str]:
        """What a reader of the figures must know of the choice among ``synthetic``."""
        left_out = {case.subject for case in synthetic} - {case.subject for case in self.synthetic}
        smallest = f"Synthetic volumes of {len(left_out)} patients were left out: sets are as large as the smallest."
        return [*([] if self.paired else [UNPAIRED]), *([smallest] if left_out else [])]


def choose_sets(real: Sequence[Case], synthetic: Sequence[Case], what: str = "realism") -> Sets:
    """Who is compared with whom; where there are more patients than needed, a seeded choice.

    Args:
        real: all cases of the work folder.
        synthetic: volumes with masks. Where some masks are of patients of the work folder, only their volumes count.
        what: is measured, for messages.

    Raises:
        FibldmError: fewer than two patients on a side.
    """
    scans = {case.name: case for case in real}
    known = [case for case in synthetic if mask_name(case) in scans]
    volumes = _first_of_each(known or synthetic)
    test = [case for case in real if case.split == "test"]
    targets = [scans[mask_name(case)] for case in volumes] if known else _first_of_each(test)
    taken = {case.subject for case in targets}
    others = _first_of_each(case for case in real if case.subject not in taken)
    n = min(len(volumes), len(targets), len(others))
    if n < 2:
        raise FibldmError(
            f"{what} needs synthetic volumes of at least two patients, scans of their masks (or of the test split) and "
            f"scans of two other patients; got {len(volumes)}, {len(targets)} and {len(others)}",
            "synthesize from masks of more patients of the test split, but not of all patients",
        )
    return Sets(choose(volumes, n), choose(targets, n), choose(others, n), bool(known))


def mask_name(case: Case) -> str:
    """The name of the mask of a volume that has one."""
    return volume_stem(cast(Path, case.label))  # `need_masks` saw to it


def _first_of_each(cases: Iterable[Case]) -> list[Case]:
    """The first case by name of every patient, by name as well: pseudonyms differ between preparations."""
    first: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.name):
        first.setdefault(case.subject, case)
    return list(first.values())


def choose(cases: Sequence[Case], n: int) -> list[Case]:
    """The same places of all lists of one length, by a seeded choice."""
    return [cases[index] for index in seeded_places(len(cases), n)]


def seeded_places(length: int, n: int) -> NDArray[np.intp]:
    """``n`` of the places of a list, sorted; the same for every list of this length."""
    return np.sort(np.random.default_rng(_SEED).permutation(length)[:n])
