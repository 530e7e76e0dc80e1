"""A dataset whose cases stand in a CSV or TSV manifest."""

from pathlib import Path

from fibldm.datasets.layouts.binary_masks import binary_masks, check_order
from fibldm.datasets.layouts.entries import case_name, collected, is_dicom, visible
from fibldm.datasets.layouts.facts import IGNORE, Search, describe, with_unknown
from fibldm.datasets.layouts.manifest import LABEL, SECOND_IMAGE, Row, is_manifest, read_manifest, split_name
from fibldm.datasets.layouts.segments import name_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES


def manifests(folder: Path) -> list[Path]:
    """The manifests in ``folder``."""
    return [path for path in visible(folder) if path.suffix.lower() in (".csv", ".tsv") and is_manifest(path)]


def table(search: Search) -> Source:
    """The cases of the manifest that is looked for, or of the only one in the folder.

    Paths are relative to the manifest. An image may be a folder with the slices of a DICOM series or a PNG stack; a
    label may be one too, or a folder of binary masks; of these, or of the named segments of the labels, those of
    ``merge_masks`` are taken, the most important first.

    Raises:
        FibldmError: there is not one manifest, ``merge_masks`` does not fit, or files or rows are wrong (all listed).
    """
    path = search.path if search.path.is_file() else _only_manifest(search.path)
    findings, order = search.findings, search.settings.merge_masks
    channels, rows = read_manifest(path, findings)
    labels = [path.parent / label for row in rows if (label := row.values.get(LABEL))]
    binary = [label for label in labels if _is_binary(label)]
    if binary:
        check_order(order, binary)
    cases = [_case(path.parent, row, search) for row in rows]
    if binary and len(binary) < len(labels):
        findings.error(f"labels must all be folders of binary masks or none; {len(binary)} of {len(labels)} are")
    cases, names = name_segments(cases, findings, () if binary else order, search.label_names)
    if order and not binary and names is None and not findings.listed:
        message = "`merge_masks` is for folders of binary masks; the manifest has none"
        raise FibldmError(message, "leave it out, or give masks whose segments have names")
    known = search.label_names
    if (unknown := next((value for value, name in known.items() if name == IGNORE), None)) is not None and not binary:
        cases = with_unknown(search, cases, unknown)
    facts = search.facts | {"labels": {value: name for value, name in known.items() if value != unknown}}
    return describe(
        "csv",
        search,
        cases,
        {"name": path.stem, **facts},
        remedy=f"correct {path.name}; a column 'case' gives names of your own",
        channels=channels if len(channels) > 1 else None,
        labels=dict(enumerate(order, start=1)) if binary else names,
    )


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


def _case(folder: Path, row: Row, search: Search) -> Case:
    findings = search.findings
    where, label, split = f"line {row.line}: ", row.values.get(LABEL), row.values.get("split")
    images = tuple(collected(folder / image, findings, where) for image in row.images)
    second = collected(folder / path, findings, where) if (path := row.values.get(SECOND_IMAGE)) else ()
    return Case(
        name=case_name(row.case),
        images=images,
        masks=_masks(folder / label, search, where) if label else (),
        path=row.images[0].as_posix(),
        subject=row.values.get("subject"),
        split=split_name(split) if split else None,
        covariates=row.covariates,
        private="case" not in row.values and any(is_dicom(files[0]) for files in (*images, second) if files),
        second=second,
    )


def _masks(label: Path, search: Search, where: str) -> tuple[Mask, ...]:
    settings, findings = search.settings, search.findings
    if _is_binary(label):
        folder = f"{where}the folder of binary masks"
        return binary_masks(label, settings.merge_masks, findings, folder, may_lack=settings.missing_is_unknown)
    return (Mask(collected(label, findings, where)),)
