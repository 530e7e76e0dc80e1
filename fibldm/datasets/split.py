"""Tell the patients of a dataset apart, and split it by patient, once."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fibldm.datasets.findings import Findings
from fibldm.datasets.source import Case
from fibldm.errors import FibldmError
from fibldm.volumes.datalist import SPLITS

ADD_PATIENTS = "add patients, or tell the patients apart with a subject column or `subject_pattern`"


_BIDS_SUBJECT = re.compile(r"(?<![A-Za-z0-9])sub-[A-Za-z0-9]+")


def find_subjects(cases: Sequence[Case], findings: Findings, pattern: str | None = None) -> list[Case]:
    """The cases, each with its patient; what has to be said about it goes to ``findings``.

    The dataset's own word comes first, then ``sub-XX`` in the path, then the first group of ``pattern``, then the case
    name.

    Raises:
        FibldmError: ``pattern`` is no regular expression with a group, or does not match where it is needed.
    """
    known = {case.name: case.subject or next(iter(_BIDS_SUBJECT.findall(case.path)), None) for case in cases}
    unknown = [case for case in cases if known[case.name] is None]
    if pattern is not None:
        found = _match_subjects(unknown, pattern)
        notes = [] if unknown else ["--subject-pattern is not used: every case names its patient already"]
    else:
        found = {case.name: case.name for case in unknown}
        notes = [_fallback_note(unknown)] if unknown else []
    findings.notes += notes
    return [replace(case, subject=known[case.name] or found[case.name]) for case in cases]


def too_few(patients: int) -> str:
    """What is said where there are not enough patients for a split."""
    return f"a split into training, validation and test needs at least {len(SPLITS)} patients; got {patients}"


def split_subjects(subjects: Iterable[str], seed: int = 0) -> dict[str, str]:
    """The split of every patient, 70/10/20 and at least one each, by the order of a hash keyed by ``seed``.

    Args:
        subjects: patients, in any order and with repetitions.
        seed: which of the possible splits.

    Raises:
        FibldmError: fewer than three patients.
    """
    ordered = sorted(set(subjects), key=lambda subject: hashlib.sha256(f"{seed}/{subject}".encode()).digest())
    total = len(ordered)
    if total < len(SPLITS):
        raise FibldmError(too_few(total), ADD_PATIENTS)
    validation, test = max(1, (total + 5) // 10), max(1, (2 * total + 5) // 10)
    names = ["validation"] * validation + ["test"] * test + ["training"] * (total - validation - test)
    return dict(zip(ordered, names, strict=True))


def patients_to_split(cases: Sequence[Case]) -> set[str]:
    """Those with a mask, as nothing could be measured on the others; all where no case has one."""
    masked = {str(case.subject) for case in cases if case.masks}
    return masked or {str(case.subject) for case in cases}


def split_cases(cases: Sequence[Case], seed: int = 0) -> dict[str, str]:
    """The split of every case, by case name: the dataset's own where it has one, else drawn by patient.

    Patients without any mask go to training. Empty where there are too few patients for a split.

    Args:
        cases: all cases, with their patients.
        seed: seed of a drawn split.

    Raises:
        FibldmError: see `given_split`.
    """
    given, patients = given_split(cases), patients_to_split(cases)
    if given or len(patients) < len(SPLITS):
        return given
    drawn = split_subjects(patients, seed)
    return {case.name: drawn.get(str(case.subject), SPLITS[0]) for case in cases}


def given_split(cases: Sequence[Case]) -> dict[str, str]:
    """The dataset's own split by case name, without the cases it leaves out; empty where there is none.

    Raises:
        FibldmError: a patient is in two splits, or one of the splits is empty.
    """
    given = {case.name: case.split for case in cases if case.split is not None}
    by_subject = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.name):
        if case.name in given:
            by_subject[case.subject].append(case.name)
    torn = [names for names in by_subject.values() if len({given[name] for name in names}) > 1]
    if torn:
        listed = "; ".join(", ".join(f"{name} in {given[name]}" for name in names) for names in torn)
        raise FibldmError(
            f"every patient must be in one split only; the split given tears cases of one patient apart: {listed}",
            "correct the split, or leave the column out to have one drawn",
        )
    missing = [split for split in SPLITS if split not in given.values()]
    if given and missing:
        raise FibldmError(
            f"the column split must fill training, validation and test; {' and '.join(missing)} came empty",
            "fill them, or leave the column out to have a split drawn",
        )
    return given


def _match_subjects(cases: Sequence[Case], pattern: str) -> dict[str, str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FibldmError(f"`subject_pattern` must be a regular expression; {pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise FibldmError(
            f"`subject_pattern` must have a group around the patient; got {pattern!r}", "for example '(p[0-9]+)_'"
        )
    found = {case.name: compiled.search(case.path) for case in cases}
    missing = [case for case in cases if not (match := found[case.name]) or not match.group(1)]
    if missing:
        hidden = sum(case.private for case in missing)
        named = [*(case.path for case in missing if not case.private), *([f"{hidden} cases"] if hidden else [])]
        raise FibldmError(
            f"`subject_pattern` {pattern!r} must match every image; it does not match {', '.join(named)}",
            "widen the pattern, or give a CSV manifest with a subject column",
        )
    return {name: match.group(1) for name, match in found.items() if match}


def _fallback_note(cases: Sequence[Case]) -> str:
    return (
        f"{len(cases)} cases name no patient; each counts as a patient of its own, so scans or crops of one patient "
        "may fall into different splits (give a subject column or --subject-pattern)"
    )
