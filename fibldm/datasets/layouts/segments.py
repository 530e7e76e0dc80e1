"""Masks whose segments have names (DICOM, 3D Slicer's NRRD): label values for the names, alike in all files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.entries import is_dicom
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.segment_nrrd import segments_of


def name_segments(
    cases: Sequence[Case], findings: Findings, order: Sequence[str] = (), known: Mapping[int, str] | None = None
) -> tuple[list[Case], dict[int, str] | None]:
    """The cases with values for the segments of their masks, and the names by value.

    The values are 1, 2, ... in the order of the names of all masks, sorted, or those of ``known`` where all names are
    among these. Without such masks the cases come back as they are, and ``None``. What is wrong goes to ``findings``.

    Args:
        cases: of a layout.
        findings: gets what is wrong.
        order: names of the segments to take, most important first, in place of all; they may overlap.
        known: names by value that the dataset gives.
    """
    masked = [case for case in cases if case.masks]
    found = [_segment_names(case, number, findings) for number, case in enumerate(masked, start=1)]
    named = [names for names in found if names is not None]
    if not named:
        return list(cases), None
    if len(named) < len(masked):
        findings.error("masks must all be DICOM or all label maps; found both (3D Slicer's .seg.nrrd are as DICOM)")
        return list(cases), None
    present = {name for listed in named for name in listed}
    values = numbered(present, order, findings)
    given = {name: value for value, name in (known or {}).items()}
    if all(name in given for name in values):
        values = {name: given[name] for name in values}
    return [_named(case, values, bool(order)) for case in cases], {value: name for name, value in values.items()}


def numbered(present: Collection[str], order: Sequence[str], findings: Findings) -> dict[str, int]:
    """The values 1, 2, ... of segments by name: of those in ``order``, else of all that are present, sorted."""
    if missing := [name for name in order if name not in present]:
        held = ", ".join(sorted(present)) or "no segments"
        findings.error(f"`merge_masks` asks for {', '.join(missing)}; the masks hold {held}")
    if len(present) >= UNKNOWN_LABEL and not order:
        findings.error(f"there are {len(present)} segments, and at most {UNKNOWN_LABEL - 1} labels (`merge_masks`)")
    return {name: value for value, name in enumerate(tuple(dict.fromkeys(order)) or sorted(present), start=1)}


def known_segments(
    cases: Sequence[Case], known: Mapping[int, str], findings: Findings
) -> tuple[list[Case], dict[int, str] | None]:
    """As `name_segments`, of a dataset that says which values its names have; a segment with another name is wrong."""
    named, segments = name_segments(cases, findings, known=known)
    strange = sorted(set((segments or {}).values()) - set(known.values())) if known else []
    if strange:
        findings.error(f"segments of the masks have names that dataset.json does not give: {', '.join(strange)}")
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
            f"`labels` must call segments as the masks do; they have no {', '.join(strange)}, but "
            f"{', '.join(sorted(named))}",
            "give the names of the masks, or leave `labels` out",
        )
    free = (value for value in range(1, UNKNOWN_LABEL) if value not in asked)
    values = {name: value for value, name in asked.items()}
    values |= {name: next(free) for _, name in sorted(source.labels.items()) if name not in values}
    cases = [
        replace(case, masks=tuple(replace(mask, names={n: values[n] for n in mask.names}) for mask in case.masks))
        for case in source.cases
    ]
    return replace(source, cases=tuple(cases), labels={value: name for name, value in sorted(values.items())})


def _named(case: Case, values: Mapping[str, int], ordered: bool) -> Case:
    """One mask a file, whose labels must not overlap; to merge them, one a label, the most important first."""
    if not ordered:
        return replace(case, masks=tuple(Mask(mask.files, names=values) for mask in case.masks))
    held = [(mask, set(_names_in(mask))) for mask in case.masks]
    masks = (
        Mask(mask.files, names={name: value}, elsewhere=tuple(other for other in values if other != name))
        for name, value in values.items()
        for mask, names in held
        if name in names
    )
    return replace(case, masks=tuple(masks))


def _segment_names(case: Case, number: int, findings: Findings) -> list[str] | None:
    """Of a case's masks; ``None`` where none of them names its segments."""
    kind = "DICOM mask" if any(is_dicom(file) for mask in case.masks for file in mask.files[:1]) else "mask"
    with findings.collecting(f"{kind} {number}: "):
        return [name for mask in case.masks for name in _names_in(mask)] or None
    return []


def _names_in(mask: Mask) -> list[str]:
    if mask.value is not None:
        return []
    if any(is_dicom(file) for file in mask.files[:1]):
        from fibldm.volumes.dicom.masks import segment_names

        return [name for file in mask.files for name in segment_names(file)]
    return [segment.name for file in mask.files for segment in segments_of(file)]
