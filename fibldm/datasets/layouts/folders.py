"""Plain folders: images/ and labels/ with the same names, of any format."""

from collections import defaultdict
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.entries import case_name, collected, entry_key, is_dicom, path_shown, volume_entries
from fibldm.datasets.layouts.facts import Search, describe
from fibldm.datasets.layouts.segments import name_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError


def folders(search: Search) -> Source:
    """The volumes of images/, each with the one of the same stem in labels/ where there is one.

    A folder inside is a volume as well: the slices of a DICOM series or a PNG stack. Of masks whose segments have
    names, those of ``merge_masks`` are taken, the most important first.

    Raises:
        FibldmError: ``merge_masks`` does not fit; images/ is missing; a label has no image; a stem stands twice; or a
            file is of no supported format (all of them listed).
    """
    findings, order = search.findings, search.settings.merge_masks
    images, labels = (_by_stem(search.path / name, findings) for name in ("images", "labels"))
    lonely = [labels[name] for name in sorted(labels.keys() - images.keys())]
    hidden = sum(map(_is_hidden, lonely))
    for path in lonely:
        if not _is_hidden(path):
            findings.error(f"labels/{path.name} has no image")
    if hidden:
        findings.error(f"folders or DICOM files in labels/ without an image: {hidden}")
    cases = [
        _case(images[name], labels.get(name), findings, f"images/ number {number} by name: ")
        for number, name in enumerate(sorted(images), start=1)
    ]
    cases, segments = name_segments(cases, findings, order, search.label_names)
    if order and segments is None and not findings.listed:
        message = "`merge_masks` is for the layouts organs, csv and dicom; the layout is folders"
        raise FibldmError(message, "leave it out, or give masks whose segments have names")
    remedy = "an image and its label carry the same name in images/ and labels/"
    return describe("folders", search, cases, search.facts, remedy=remedy, labels=segments)


def _by_stem(folder: Path, findings: Findings) -> dict[str, Path]:
    if folder.name == "images" and not folder.is_dir():
        raise FibldmError(f"{folder} must be a folder", "put volumes under images/ and labels/, or choose `layout`")
    grouped = defaultdict(list)
    for path in volume_entries(folder):
        grouped[entry_key(path)].append(path)
    for paths in grouped.values():
        if len(paths) > 1:
            named = " and ".join("a folder" if _is_hidden(path) else path.name for path in paths)
            findings.error(f"{folder.name}/ has {named}; keep one of them")
    return {name: paths[0] for name, paths in grouped.items()}


def _is_hidden(path: Path) -> bool:
    """Whether the name must not be told, as it may be a patient's."""
    return path_shown(path) != str(path)


def _case(image: Path, label: Path | None, findings: Findings, where: str) -> Case:
    files = collected(image, findings, where)
    masks = () if label is None else (Mask(collected(label, findings, f"{where}its label: ")),)
    private = bool(files) and is_dicom(files[0])
    return Case(case_name(entry_key(image)), (files,), masks, f"images/{image.name}", private=private)
