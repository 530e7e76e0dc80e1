"""Masks whose segments have names (DICOM, 3D Slicer's NRRD): label values for the names, alike in all files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.layouts.entries import is_dicom
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.segment_nrrd import segments_of


def name_segments(
    cases: Sequence[Case], problems: list[str], order: Sequence[str] = (), known: Mapping[int, str] | None = None
) -> tuple[list[Case], dict[int, str] | None]:
    """The cases with values for the segments of their masks, and the names by value.

    The values are 1, 2, ... in the order of the names of all masks, sorted, or those of ``known`` where all names are
    among these. Without such masks the cases come back as they are, and ``None``. What is wrong goes to ``problems``.

    Args:
        cases: of a layout.
        problems: what is wrong is added to.
        order: names of the segments to take, most important first, in place of all; they may overlap.
        known: names by value that the dataset gives.
    """
    masked = [case for case in cases if case.masks]
    found = [_segment_names(case, number, problems) for number, case in enumerate(masked, start=1)]
    named = [names for names in found if names is not None]
    if not named:
        return list(cases), None
    if len(named) < len(masked):
        problems.append("masks must all be DICOM or all label maps; found both (3D Slicer's .seg.nrrd are as DICOM)")
        return list(cases), None
    present = sorted({name for listed in named for name in listed})
    if missing := [name for name in order if name not in present]:
        problems.append(f"--merge-masks asks for {', '.join(missing)}; the masks hold {', '.join(present)}")
    if len(present) >= UNKNOWN_LABEL and not order:
        problems.append(f"there are {len(present)} segments, and at most {UNKNOWN_LABEL - 1} labels (--merge-masks)")
    values = _values(tuple(dict.fromkeys(order)) or present, known or {})
    return [_named(case, values, bool(order)) for case in cases], {value: name for name, value in values.items()}


def known_segments(
    cases: Sequence[Case], known: Mapping[int, str], problems: list[str]
) -> tuple[list[Case], dict[int, str] | None]:
    """As `name_segments`, of a dataset that says which values its names have; a segment with another name is wrong."""
    named, segments = name_segments(cases, problems, known=known)
    strange = sorted(set((segments or {}).values()) - set(known.values())) if known else []
    if strange:
        problems.append(f"segments of the masks have names that dataset.json does not give: {', '.join(strange)}")
    return named, segments


def numbered_as_asked(source: Source, asked: Mapping[int, str]) -> Source:
    """A dataset whose masks have named segments, with the values that ``asked`` gives to these names.

    Segments that it does not name get the values that are left, in their order. Other datasets come back as they are.

    Raises:
        FibldmError: no mask has a segment of that name.
    """
    named = {name for case in source.cases for mask in case.masks for name in mask.names}
    if not named or not asked:
        return source
    if strange := [name for name in asked.values() if name not in named]:
        raise FibldmError(
            f"--labels must call segments as the masks do; they have no {', '.join(strange)}, but "
            f"{', '.join(sorted(named))}",
            "give the names of the masks, or leave --labels out",
        )
    free = (value for value in range(1, UNKNOWN_LABEL) if value not in asked)
    values = {name: value for value, name in asked.items()}
    values |= {name: next(free) for _, name in sorted(source.labels.items()) if name not in values}
    cases = [
        replace(case, masks=tuple(replace(mask, names={n: values[n] for n in mask.names}) for mask in case.masks))
        for case in source.cases
    ]
    return replace(source, cases=tuple(cases), labels={value: name for name, value in sorted(values.items())})


def _values(names: Sequence[str], known: Mapping[int, str]) -> dict[str, int]:
    given = {name: value for value, name in known.items()}
    if all(name in given for name in names):
        return {name: given[name] for name in names}
    return {name: value for value, name in enumerate(names, start=1)}


def _named(case: Case, values: Mapping[str, int], ordered: bool) -> Case:
    """One mask a file, whose labels must not overlap; to merge them, one a label, the most important first."""
    if not ordered:
        return replace(case, masks=tuple(Mask(mask.files, names=values) for mask in case.masks))
    held = [(mask, set(_names_in(mask))) for mask in case.masks]
    masks = (
        Mask(mask.files, names={name: value}) for name, value in values.items() for mask, names in held if name in names
    )
    return replace(case, masks=tuple(masks))


def _segment_names(case: Case, number: int, problems: list[str]) -> list[str] | None:
    """Of a case's masks; ``None`` where none of them names its segments."""
    try:
        names = [name for mask in case.masks for name in _names_in(mask)]
    except FibldmError as error:
        kind = "DICOM mask" if any(is_dicom(file) for mask in case.masks for file in mask.files[:1]) else "mask"
        problems.append(f"{kind} {number}: {error.message}")
        return []
    return names or None


def _names_in(mask: Mask) -> list[str]:
    if mask.value is not None:
        return []
    if any(is_dicom(file) for file in mask.files[:1]):
        from fibldm.volumes.dicom.masks import segment_names

        return [name for file in mask.files for name in segment_names(file)]
    return [segment.name for file in mask.files for segment in segments_of(file)]
