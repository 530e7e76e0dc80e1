"""Masks of BIDS: which files under derivatives/ they are, and what their labels are called."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.bids_names import entities, entity, inherited, is_nifti, suffix
from fibldm.datasets.layouts.manifest import read_records
from fibldm.datasets.layouts.walk import files_below
from fibldm.errors import FibldmError

FOLDER = "derivatives"
_LABEL_MAP, _BINARY = "dseg", "mask"
_REMEDY = 'choose with `bids_mask` a pattern, for example "*_label-lesion_mask.nii.gz"'


def find_masks(source: Path, pattern: str | None) -> list[Path]:
    """The masks under derivatives/: those whose name or path below it fits ``pattern``, else the only kind there is.

    Raises:
        FibldmError: ``pattern`` fits no file, or without one there are masks of several kinds.
    """
    root = source / FOLDER
    files = _images_below(root)
    if pattern is not None:
        found = [file for file in files if _fits(file, root, pattern)]
        if not found:
            raise FibldmError(f"`bids_mask` must fit files under {FOLDER}/; none of {len(files)} fits {pattern!r}")
        return found
    masks = [file for file in files if suffix(file) in (_LABEL_MAP, _BINARY)]
    kinds = sorted({_kind(file, root) for file in masks})
    if len(kinds) > 1:
        raise FibldmError(f"{source} must have one kind of mask; found {', '.join(kinds)}", _REMEDY)
    return masks


def masks_of(source: Path, masks: Sequence[Path], subject: str, session: str | None) -> list[Path]:
    """Those of one patient and session, by the names of the file and of its folders."""
    wanted = {part for part in (subject, session) if part is not None}
    return [file for file in masks if _whose(file.relative_to(source)) == wanted]


def is_binary(mask: Path) -> bool:
    """Whether a file is a binary mask, no label map."""
    return suffix(mask) == _BINARY


def label_names_of(source: Path, masks: Sequence[Path], findings: Findings) -> dict[int, str]:
    """Names by value: of label maps from their ``dseg.tsv``, of a binary mask from its entity label or desc."""
    if len({is_binary(file) for file in masks}) > 1:
        findings.error("masks must all be label maps (_dseg) or all binary (_mask); found both")
    names: dict[int, str] = {}
    for table in sorted({table for file in masks for table in _tables(source, file)}):
        _add(names, _read_names(table, findings), table.name, findings)
    for file in filter(is_binary, masks):
        _add(names, {1: entity(file, "label") or entity(file, "desc") or "mask"}, file.name, findings)
    return names


def _images_below(root: Path) -> list[Path]:
    """NIfTI files below ``root``, also where links lead."""
    return sorted(path for path in files_below(root) if is_nifti(path))


def _fits(file: Path, root: Path, pattern: str) -> bool:
    return fnmatchcase(file.name, pattern) or fnmatchcase(file.relative_to(root).as_posix(), pattern)


def _kind(file: Path, root: Path) -> str:
    """What two masks of one protocol have in common: the pipeline, and the name without patient, session and run."""
    parts = sorted(part for part in entities(file) if not part.startswith(("sub-", "ses-", "run-")))
    pipeline = next(iter(file.relative_to(root).parent.parts), "")
    return f"{pipeline}/*_{'_'.join([*parts, suffix(file)])}"


def _whose(file: Path) -> set[str]:
    return {part for part in (*file.parts, *entities(file)) if part.startswith(("sub-", "ses-")) and "." not in part}


def _tables(source: Path, file: Path) -> list[Path]:
    return [] if is_binary(file) else list(inherited(file, source / FOLDER, ".tsv"))


def _read_names(path: Path, findings: Findings) -> dict[int, str]:
    columns, records = read_records(path, "index")
    if "name" not in columns or not all(record["index"].isdecimal() for record in records):
        findings.error(f"{path.name} must have the columns index (whole numbers) and name")
        return {}
    return {int(record["index"]): record["name"] for record in records if int(record["index"]) != 0}


def _add(names: dict[int, str], more: dict[int, str], file: str, findings: Findings) -> None:
    for value, name in more.items():
        if names.setdefault(value, name) != name:
            findings.error(f"label {value} must have one name; it is {names[value]!r}, and {name!r} by {file}")
