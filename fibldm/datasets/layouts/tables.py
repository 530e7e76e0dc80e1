"""A dataset whose cases stand in a CSV or TSV manifest."""

from pathlib import Path

from fibldm.datasets.layouts.binary_masks import binary_masks, check_order
from fibldm.datasets.layouts.entries import case_name, collected, is_dicom, visible
from fibldm.datasets.layouts.facts import beside, check_cases, describe, label_names
from fibldm.datasets.layouts.manifest import Row, is_manifest, read_manifest
from fibldm.datasets.layouts.segments import name_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES

_REMEDY = "correct the manifest; a column 'case' gives names of your own"


def manifests(folder: Path) -> list[Path]:
    """The manifests in ``folder``."""
    return [path for path in visible(folder) if path.suffix.lower() in (".csv", ".tsv") and is_manifest(path)]


def table(source: Path, merge_masks: tuple[str, ...]) -> Source:
    """The cases of the manifest ``source``, or of the only one in the folder ``source``.

    Paths are relative to the manifest. An image may be a folder with the slices of a DICOM series or a PNG stack; a
    label may be one too, or a folder of binary masks; of these, or of the named segments of the labels, ``merge_masks``
    are taken, the most important first.

    Raises:
        FibldmError: there is not one manifest, ``merge_masks`` does not fit, or files or rows are wrong (all listed).
    """
    path = source if source.is_file() else _only_manifest(source)
    manifest = read_manifest(path)
    folders = [path.parent / row.label for row in manifest.rows if row.label and _is_binary(path.parent / row.label)]
    if folders:
        check_order(merge_masks, folders)
    problems = list(manifest.problems)
    cases = [_case(path.parent, row, merge_masks, problems) for row in manifest.rows]
    labelled = sum(bool(row.label) for row in manifest.rows)
    if folders and len(folders) < labelled:
        problems.append(f"labels must all be folders of binary masks or none; {len(folders)} of {labelled} are")
    facts = {"name": path.stem, **beside(path.parent)}
    order, known = () if folders else merge_masks, label_names(facts.get("labels") or {})
    cases, segments = name_segments(cases, problems, order, known)
    if order and segments is None and not problems:
        message = "--merge-masks is for folders of binary masks; the manifest has none"
        raise FibldmError(message, "leave it out, or give masks whose segments have names")
    check_cases(cases, problems, path, _REMEDY)
    channels = manifest.channels if len(manifest.channels) > 1 else None
    labels = dict(enumerate(merge_masks, start=1)) if folders else segments
    return describe("csv", path, cases, facts, notes=manifest.notes, channels=channels, labels=labels)


def _only_manifest(source: Path) -> Path:
    found = manifests(source)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FibldmError(
            f"{source} must hold one CSV with the columns image and label; found {names}", "give the CSV file itself"
        )
    return found[0]


def _is_binary(path: Path) -> bool:
    """Whether a label is a folder of volumes, not of slices."""
    volumes = tuple(suffix for suffix in SUPPORTED_SUFFIXES if suffix not in (".png", ".dcm"))
    return path.is_dir() and any(entry.name.lower().endswith(volumes) for entry in visible(path))


def _case(folder: Path, row: Row, order: tuple[str, ...], problems: list[str]) -> Case:
    where = f"line {row.line}: "
    images = tuple(collected(folder / image, problems, where) for image in row.images)
    return Case(
        name=case_name(row.case),
        images=images,
        masks=_masks(folder / row.label, order, problems, where) if row.label else (),
        path=row.images[0].as_posix(),
        subject=row.subject,
        split=row.split,
        covariates=row.covariates,
        private=not row.named and any(is_dicom(files[0]) for files in images if files),
    )


def _masks(label: Path, order: tuple[str, ...], problems: list[str], where: str) -> tuple[Mask, ...]:
    if _is_binary(label):
        return binary_masks(label, order, problems, f"{where}the folder of binary masks")
    return (Mask(collected(label, problems, where)),)
