"""What was annotated of each case, and what follows: labels that nobody drew are unknown there, and never background.

A voxel outside of all annotated labels is background or a label that was not annotated. The work folder's mask says
unknown there (255), so that whoever reads it learns nothing from it; ``annotated_labels`` of the datalist says more: it
is none of those labels. That is what the marginal loss of the segmenter and an overlap need (Shi et al. 2021, "Marginal
loss and exclusion loss for partially supervised multi-organ segmentation"; Fidon et al. 2021, "Label-set loss functions
for partial supervision").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.case import CaseFacts
from fibldm.datasets.source import Case
from fibldm.errors import FibldmError, shown, some_of
from fibldm.files import read_json
from fibldm.volumes.datalist import ANNOTATED
from fibldm.volumes.formats.readers import stem
from fibldm.volumes.writer import write_nifti

_SEPARATORS = re.compile(r"[,;|]")
_SHOWN = 5


def with_annotated(cases: Sequence[Case], names: Mapping[int, str], remap: Mapping[int, int]) -> list[Case]:
    """The cases with the labels that were annotated, by value, where the dataset says it.

    It says so in a column ``annotated_labels`` of its table, under that key of an entry of ``dataset.json``, or in the
    JSON file beside a mask: names or values, as a list or a text separated by commas, semicolons or ``|``. Nothing
    (``None``, an empty cell) means all.

    Args:
        cases: as found; one that has `Case.annotated` already keeps it.
        names: of the labels as they are written, by value.
        remap: label values that are changed; values of the dataset are as read, names as written.

    Raises:
        FibldmError: something else stands there, or a label that there is not (all of them listed).
    """
    told, wrong = [], []
    for case in cases:
        said, others = _said(case)
        try:
            labels = None if said is None else _values(said, names, remap)
        except FibldmError as error:
            wrong.append(f"{'a DICOM case' if case.private else case.name}: {error.message}")
            labels = None
        told.append(replace(case, covariates=others, annotated=case.annotated if labels is None else labels))
    if wrong:
        raise FibldmError(
            f"{ANNOTATED} must name labels of the dataset; {some_of(wrong, _SHOWN)}",
            'names or values, such as "1;2" or ["liver", "spleen"]; leave it empty where all labels were annotated',
        )
    return told


def partly_annotated(
    cases: Iterable[Case], facts: Mapping[str, CaseFacts], labels: Sequence[int], *, missing_is_unknown: bool
) -> dict[str, tuple[int, ...]]:
    """The annotated labels of each case with a mask of which not all ``labels`` were annotated, by case name.

    Args:
        cases: with what was annotated.
        facts: of the sound cases.
        labels: that occur in the dataset.
        missing_is_unknown: whether a label that a case does not have was not annotated, where the case does not say.
    """
    known: dict[str, tuple[int, ...]] = {}
    for case in cases:
        volumes = facts[case.name].label_ml if case.name in facts else None
        if volumes is None:
            continue
        said = tuple(volumes) if case.annotated is None and missing_is_unknown else case.annotated
        if said is not None and not set(labels) <= set(said):
            known[case.name] = tuple(value for value in labels if value in said)
    return known


def notes_on_annotated(
    partial: Mapping[str, Sequence[int]], labels: Sequence[int], names: Mapping[int, str], masked: int
) -> list[str]:
    """How many cases lack which label, a sentence for each label; none where all were annotated everywhere."""
    lacking = {value: sum(value not in annotated for annotated in partial.values()) for value in labels}
    return [
        f"label {names.get(value, value)} was not annotated in {count} of {masked} cases with a mask: what is not "
        "annotated there is unknown, not background"
        for value, count in lacking.items()
        if count
    ]


def hide_background(file: Path) -> None:
    """Write a mask again with its background unknown.

    Raises:
        FibldmError: the disk is full.
    """
    image = nibabel.Nifti1Image.from_filename(file)
    labels = np.asanyarray(image.dataobj).astype(np.uint8)
    space = int(image.header["sform_code"])
    write_nifti(file, np.where(labels == 0, np.uint8(UNKNOWN_LABEL), labels), image.affine, space=space)


def _said(case: Case) -> tuple[Any, dict[str, Any]]:
    """What is said of a case, ``None`` for nothing, and its other covariates."""
    column = [name for name in case.covariates if name.lower() == ANNOTATED]
    others = {name: value for name, value in case.covariates.items() if name not in column}
    values = [case.covariates[name] for name in column if case.covariates[name] is not None]
    return (values[0] if values else _beside(case)), others


def _beside(case: Case) -> Any:
    for mask in case.masks:
        sidecar = mask.files[0].parent / f"{stem(mask.files[0])}.json" if mask.files else None
        if sidecar is not None and sidecar.is_file():
            content = read_json(sidecar)
            if isinstance(content, dict) and content.get(ANNOTATED) is not None:
                return content[ANNOTATED]
    return None


def _values(said: Any, names: Mapping[int, str], remap: Mapping[int, int]) -> tuple[int, ...]:
    entries = said if isinstance(said, list) else _SEPARATORS.split(said) if isinstance(said, str) else [said]
    by_name = {name.casefold(): value for value, name in names.items()}
    read: set[int] = set()
    written: set[int] = set()
    for entry in entries:
        text = entry.strip() if isinstance(entry, str) else entry
        if isinstance(text, str) and text.casefold() in by_name:
            written.add(by_name[text.casefold()])
        elif (value := _whole(text)) is not None:
            read.add(value)
        else:
            listed = ", ".join(names.values()) or "the labels, which have no name"
            raise FibldmError(f"{shown(text)} is none of {listed}")
    # a label that several values become was annotated only if all of them were
    halved = {new for old, new in remap.items() if old not in read} if read else set()
    values = written | ({remap.get(value, value) for value in read} - halved) - {0}
    if strange := sorted(value for value in values if names and value not in names):
        raise FibldmError(f"{', '.join(map(str, strange))} is no label of {', '.join(map(str, names))}")
    return tuple(sorted(values))


def _whole(entry: Any) -> int | None:
    """A label value, from a number or a text."""
    if isinstance(entry, bool):
        return None
    if isinstance(entry, str):
        entry = int(entry) if entry.isdecimal() else None
    whole = isinstance(entry, int | float) and float(entry).is_integer() and 0 < entry < UNKNOWN_LABEL
    return int(entry) if whole else None
