"""A tree of DICOM studies: image series of CT or MR, with segmentations, RT structure sets or NIfTI files as masks.

PET is taken where it is asked for (``modality`` pt), or where there is nothing else.

IDs and UIDs link series, cases and patients in memory; what is said of them counts studies and series in their order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.bids_names import is_nifti
from fibldm.datasets.layouts.dicom_files import left_out_files, lost_files, unread_files
from fibldm.datasets.layouts.dicom_links import MASKS, Found, Links, linked, with_places
from fibldm.datasets.layouts.facts import Search
from fibldm.datasets.layouts.segments import numbered
from fibldm.datasets.layouts.walk import files_below, places
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.dicom.series import find_series

_IMAGES = ("CT", "MR")
_PET = ("PT",)
_LISTED = 3


@dataclass(frozen=True)
class _Masked:
    """An image, the segments' names by file of its DICOM masks, and the NIfTI files beside it."""

    image: Found
    dicom: Mapping[Path, Sequence[str]]
    nifti: Sequence[Path]


def dicom_tree(search: Search) -> Source:
    """Every CT or MR series under a folder, with the masks that belong to it; links to folders are followed.

    A segmentation or structure set belongs to the series that it refers to, or, where none of these is there, to the
    one series of its study in its frame of reference (`dicom_links`). A NIfTI file beside the files of one series, or
    beside the folder of one, is its label map. Values of segments are 1, 2, ... in the order of all their names, or of
    ``merge_masks``, which may overlap.

    Raises:
        FibldmError: there is no image series, DICOM files cannot be read, or are empty, damaged or compressed, or masks
            are damaged, of no image, ambiguous, of both kinds, or in another frame of reference; all findings are
            listed.
    """
    source, findings, order = search.path, search.findings, search.settings.merge_masks
    paths = sorted(files_below(source))
    files = [path for path in paths if path.is_file()]
    found = list(with_places(find_series(files)))
    modalities = _PET if search.settings.modality == "pt" else _IMAGES
    images = [item for item in found if _is_image(item, modalities)]
    if not images and search.settings.modality is None:
        images = [item for item in found if _is_image(item, modalities := _PET)]
    folders = {file.parent: item.where for item in images for file in item.series.files}
    unread = unread_files(files)
    for problem in lost_files(source, unread, folders):
        findings.error(problem)
    if not images:
        came = f"none of {len(found)} series is one{findings.lines()}"
        raise FibldmError(
            f"a tree of DICOM studies must hold a series of {_named(modalities)}; {came}",
            "check the folder, or name the layout with `layout`",
        )
    links = linked(found, images, source, findings)
    masked = _masked(images, links.masks, files, findings)
    present = {name for item in masked for names in item.dicom.values() for name in names}
    labels = numbered(present, order, findings)
    _check_masks(masked, bool(order), findings)
    if findings.listed:
        raise FibldmError(
            "every DICOM series must be whole and have masks that are its own, and of one kind; "
            f"{len(findings.listed)} findings:{findings.lines()}",
            "transfer again what is lost, export masks together with the series they were drawn on, take out those "
            "that do not belong, or name files and masks in a CSV",
        )
    stated = {item.series.modality for item in images}
    gone = [path for path in paths if path.is_symlink() and not path.exists()]
    findings.notes += _notes(source, found, masked, files, modalities)
    findings.notes += _notes_on_masks(links, labels, modalities)
    findings.notes += left_out_files(source, files, unread, folders, gone)
    return Source(
        layout="dicom",
        name="DICOM",
        cases=tuple(sorted((_case(item, labels, bool(order)) for item in masked), key=lambda case: case.name)),
        modality=stated.pop() if len(stated) == 1 else None,
        labels={value: name for name, value in labels.items()},
        notes=tuple(findings.notes),
    )


def _masked(
    images: Sequence[Found],
    masks: Mapping[str, Mapping[Path, Sequence[str]]],
    files: Sequence[Path],
    findings: Findings,
) -> list[_Masked]:
    nifti: dict[str, list[Path]] = {image.series.uid: [] for image in images}
    folders = {image.series.uid: {path.parent for path in image.series.files} for image in images}
    for file in filter(is_nifti, files):
        beside = [image for image in images if _is_beside(file, folders[image.series.uid])]
        if len(beside) > 1:
            findings.error(f"{beside[0].where}: a NIfTI file lies beside it and beside others, {len(beside)} in all")
        for image in beside:
            nifti[image.series.uid].append(file)
    return [_Masked(image, masks[image.series.uid], nifti[image.series.uid]) for image in images]


def _is_beside(file: Path, folders: set[Path]) -> bool:
    """Whether a file lies in one of the folders, or next to it."""
    return any(file.parent in (folder, folder.parent) for folder in folders)


def _check_masks(masked: Sequence[_Masked], merge: bool, findings: Findings) -> None:
    for item in masked:
        counts = Counter(name for names in item.dicom.values() for name in set(names))
        several = sorted(name for name, count in counts.items() if count > 1)
        if several and not merge:
            findings.error(
                f"{item.image.where}: several masks hold {', '.join(several)} (`merge_masks` takes them as one)"
            )
        if len(item.nifti) > 1:
            count = f"{len(item.nifti)} NIfTI files"
            findings.error(f"{item.image.where}: {count} lie beside it, and one may be its label map")
    if any(item.dicom for item in masked) and any(item.nifti for item in masked):
        findings.error("masks must all be DICOM or all NIfTI; both were found")
    uids = Counter(item.image.series.uid for item in masked)
    if repeated := sum(count > 1 for count in uids.values()):
        findings.error(f"series must have UIDs of their own; {repeated} UIDs stand for several series")


def _case(item: _Masked, labels: Mapping[str, int], merge: bool) -> Case:
    series = item.image.series
    return Case(
        name=series.uid,
        images=(series.files,),
        masks=(*_segments(item.dicom, labels, merge), *(Mask((file,)) for file in item.nifti)),
        path="",
        subject=_patient(item.image),
        private=True,
    )


def _segments(files: Mapping[Path, Sequence[str]], labels: Mapping[str, int], merge: bool) -> list[Mask]:
    """One mask per file, whose labels must not overlap; to merge them, one per label, the most important first."""
    held = sorted(files.items())
    if not merge:
        return [Mask((file,), names={name: labels[name] for name in names}) for file, names in held]
    return [
        Mask((file,), names={name: value}, elsewhere=tuple(other for other in labels if other != name))
        for name, value in labels.items()
        for file, names in held
        if name in names
    ]


def _notes(
    source: Path, found: Sequence[Found], masked: Sequence[_Masked], files: Sequence[Path], modalities: Sequence[str]
) -> Iterator[str]:
    images = [item.image for item in masked]
    others = [item for item in found if item.series.modality not in MASKS and not _is_image(item, modalities)]
    if others:
        kinds = Counter("scout" if item.series.localizer else item.series.modality or "unknown" for item in others)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        yield f"{len(others)} series are no volumes of {_named(modalities)} and were left out ({listed})"
    with_images = {_patient(item) for item in images}
    used = {file for item in masked for file in item.nifti}
    stray = [file for file in files if is_nifti(file) and file not in used]
    if stray:
        yield f"{len(stray)} NIfTI files lie beside no series and were left out ({places(source, stray)})"
    for what, items in {
        f"patients have no series of {_named(modalities)} and were left out": list(
            {_patient(item): item for item in others if _patient(item) not in with_images}.values()
        ),
        "series have no mask": [item.image for item in masked if not item.dicom and not item.nifti],
        "series state no Patient ID; each of their studies counts as a patient": [
            item for item in images if not item.series.patient_id
        ],
    }.items():
        if items:
            yield f"{len(items)} {what} ({_where(items)})"
    counts = Counter(item.series.modality for item in images)
    if len(counts) > 1:
        yield " and ".join(f"{count} {name}" for name, count in sorted(counts.items())) + " series are mixed"


def _notes_on_masks(links: Links, labels: Mapping[str, int], modalities: Sequence[str]) -> Iterator[str]:
    held = [{name for names in files.values() for name in names} for files in links.masks.values() if files]
    if others := [names for names in held if not names & labels.keys()]:
        listed = sorted(set().union(*others))
        more = ", ..." if len(listed) > _LISTED else ""
        yield (
            f"{len(others)} series have masks that hold none of {', '.join(labels)}, and count as without a mask; they "
            f"hold {', '.join(listed[:_LISTED])}{more}"
        )
    if links.placed:
        yield (
            f"{len(links.placed)} DICOM masks name no series that is there, and were taken for the only image in their "
            f"place ({_where(links.placed)})"
        )
    if links.elsewhere:
        yield (
            f"{len(links.elsewhere)} DICOM masks belong to series that are no volumes of {_named(modalities)} and were "
            "left out "
            f"({_where(links.elsewhere)})"
        )


def _is_image(item: Found, modalities: Sequence[str]) -> bool:
    return item.series.image and item.series.modality in modalities


def _named(modalities: Sequence[str]) -> str:
    return "PET" if modalities == _PET else " or ".join(modalities)


def _patient(item: Found) -> str:
    return item.series.patient_id or item.series.study_uid or item.series.uid


def _where(items: Sequence[Found]) -> str:
    more = [f"{len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return "; ".join([*(item.where for item in items[:_LISTED]), *more])
