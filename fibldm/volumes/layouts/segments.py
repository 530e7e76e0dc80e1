"""DICOM masks beside images of any layout: label values for the names of their segments."""

from collections.abc import Sequence
from dataclasses import replace

from fibldm.errors import FibldmError
from fibldm.volumes.layouts.entries import is_dicom
from fibldm.volumes.scan import Case, Mask


def name_segments(cases: Sequence[Case], problems: list[str]) -> tuple[list[Case], dict[int, str] | None]:
    """The cases with values for the segments of their DICOM masks, and the names by value.

    The values are 1, 2, ... in the order of the names of all masks, sorted. Without DICOM masks the cases come back as
    they are, and ``None``. What is wrong goes to ``problems``.
    """
    masked = [case for case in cases if case.masks]
    dicom = [case for case in masked if _is_dicom_mask(case)]
    if not dicom:
        return list(cases), None
    if len(dicom) < len(masked):
        problems.append("masks must all be DICOM or all label maps; found both")
        return list(cases), None
    found = [_segment_names(case, f"DICOM mask {number}: ", problems) for number, case in enumerate(dicom, start=1)]
    names = sorted({name for listed in found for name in listed})
    values = {name: value for value, name in enumerate(names, start=1)}
    named = [replace(case, masks=tuple(Mask(mask.files, names=values) for mask in case.masks)) for case in cases]
    return named, dict(enumerate(names, start=1))


def _is_dicom_mask(case: Case) -> bool:
    return any(is_dicom(file) for mask in case.masks for file in mask.files[:1])


def _segment_names(case: Case, where: str, problems: list[str]) -> list[str]:
    from fibldm.volumes.dicom.masks import segment_names

    try:
        return [name for mask in case.masks for file in mask.files for name in segment_names(file)]
    except FibldmError as error:
        problems.append(f"{where}{error.message}")
        return []
