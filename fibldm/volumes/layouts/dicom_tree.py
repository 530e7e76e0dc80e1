"""A tree of DICOM studies: image series of CT or MR, with segmentations, RT structure sets or NIfTI files as masks.

IDs and UIDs link series, cases and patients in memory; what is said of them counts studies and series in their order.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.dicom.masks import segment_names
from fibldm.volumes.dicom.series import Series, find_series
from fibldm.volumes.scan import Case, Mask, Source

_IMAGES = ("CT", "MR")
_MASKS = ("SEG", "RTSTRUCT")
_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".ima", ".dicom")


@dataclass(frozen=True)
class _Found:
    """A series, or one file of a series of masks, and where it stands, in words."""

    series: Series
    where: str


@dataclass(frozen=True)
class _Masked:
    """An image, the segments' names by file of its DICOM masks, and the NIfTI files beside it."""

    image: _Found
    dicom: Mapping[Path, Sequence[str]]
    nifti: Sequence[Path]


def dicom_tree(source: Path, merge_masks: Sequence[str] = ()) -> Source:
    """Every CT or MR series under a folder, with the masks that belong to it.

    A segmentation or structure set belongs to the series that it refers to, or, where it refers to none, to the one
    series of its study in its frame of reference. A NIfTI file beside the files of one series, or beside the folder of
    one, is its label map. Values of segments are 1, 2, ... in the order of all their names, sorted.

    Args:
        source: a folder.
        merge_masks: names of the segments to take, most important first, in place of all; they may overlap.

    Raises:
        FibldmError: there is no image series, DICOM files cannot be read, or masks are damaged, ambiguous, of both
            kinds, or in another frame of reference; all findings are listed.
    """
    paths = (Path(folder) / name for folder, _, names in os.walk(source) for name in names)
    files = sorted(path for path in paths if path.is_file())
    found = list(_placed(find_series(files)))
    images = [item for item in found if item.series.image and item.series.modality in _IMAGES]
    problems = list(_damaged(files, images))
    masked = _masked(images, found, files, problems)
    labels = _labels(masked, merge_masks, problems)
    merge = bool(merge_masks)
    _raise(len(images), len(found), [*problems, *_conflicts(masked, merge)])
    modalities = {item.series.modality for item in images}
    return Source(
        layout="dicom",
        name="DICOM",
        cases=tuple(sorted((_case(item, labels, merge) for item in masked), key=lambda case: case.name)),
        modality=modalities.pop() if len(modalities) == 1 else None,
        labels={value: name for name, value in labels.items()},
        notes=tuple(_notes(found, masked, files)),
    )


def _placed(series: Sequence[Series]) -> Iterator[_Found]:
    """Every series; of masks every file on its own, as each may belong to another image."""
    studies = [list(group) for _, group in groupby(series, key=lambda item: (item.patient_id, item.study_uid))]
    for study, members in enumerate(studies, start=1):
        for number, member in enumerate(members, start=1):
            where = f"study {study} of {len(studies)}, series {number} of {len(members)}"
            several = member.modality in _MASKS and len(member.files) > 1
            parts = [part for file in member.files for part in find_series([file])] if several else [member]
            yield from (_Found(part, where) for part in parts)


def _masked(
    images: Sequence[_Found], found: Sequence[_Found], files: Sequence[Path], problems: list[str]
) -> list[_Masked]:
    dicom: dict[str, dict[Path, Sequence[str]]] = {image.series.uid: {} for image in images}
    nifti: dict[str, list[Path]] = {image.series.uid: [] for image in images}
    for mask in found:
        linked = _images_of(mask, images, problems) if mask.series.modality in _MASKS else []
        names = _names(mask, problems) if linked else []
        for image in linked:
            dicom[image.series.uid][mask.series.files[0]] = names
    folders = {image.series.uid: {path.parent for path in image.series.files} for image in images}
    for file in filter(_is_nifti, files):
        beside = [image for image in images if _is_beside(file, folders[image.series.uid])]
        if len(beside) > 1:
            problems.append(f"{beside[0].where}: a NIfTI file lies beside it and beside others, {len(beside)} in all")
        for image in beside:
            nifti[image.series.uid].append(file)
    return [_Masked(image, dicom[image.series.uid], nifti[image.series.uid]) for image in images]


def _images_of(mask: _Found, images: Sequence[_Found], problems: list[str]) -> list[_Found]:
    """The images that a DICOM mask belongs to; what is wrong goes to ``problems``."""
    place, study = mask.series.frame_of_reference, mask.series.study_uid
    if mask.series.referenced_series:
        linked = [image for image in images if image.series.uid in mask.series.referenced_series]
    else:
        near = [image for image in images if study and image.series.study_uid == study]
        linked = [image for image in near if place and image.series.frame_of_reference == place]
        if len(linked) > 1:
            problems.append(f"{mask.where}: the mask refers to no series, and {len(linked)} images are in its place")
            return []
    for image in linked:
        if place and image.series.frame_of_reference not in ("", place):
            problems.append(f"{mask.where}: the mask is in another frame of reference than its image, {image.where}")
    return linked


def _names(mask: _Found, problems: list[str]) -> list[str]:
    try:
        return segment_names(mask.series.files[0])
    except FibldmError as error:
        problems.append(f"{mask.where}: {error.message}")
        return []


def _is_nifti(file: Path) -> bool:
    return file.name.lower().endswith(_NIFTI) and not file.name.startswith(".")


def _is_beside(file: Path, folders: set[Path]) -> bool:
    """Whether a file lies in one of the folders, or next to it."""
    return any(file.parent in (folder, folder.parent) for folder in folders)


def _labels(masked: Sequence[_Masked], merge_masks: Sequence[str], problems: list[str]) -> dict[str, int]:
    present = {name for item in masked for names in item.dicom.values() for name in names}
    if missing := [name for name in merge_masks if name not in present]:
        held = ", ".join(sorted(present)) or "no segments"
        problems.append(f"--merge-masks asks for {', '.join(missing)}; the masks hold {held}")
    if len(present) >= UNKNOWN_LABEL and not merge_masks:
        problems.append(f"there are {len(present)} segments, and at most {UNKNOWN_LABEL - 1} labels (--merge-masks)")
    wanted = tuple(dict.fromkeys(merge_masks)) or sorted(present)
    return {name: value for value, name in enumerate(wanted, start=1)}


def _damaged(files: Sequence[Path], images: Sequence[_Found]) -> Iterator[str]:
    """Slices that hold no DICOM any more would be passed over, and the series be shorter than it was."""
    folders = {file.parent: item for item in images for file in item.series.files}
    lost = Counter(
        folders[file.parent].where
        for file in files
        if file.parent in folders and file.is_file() and _named_as_slice(file) and not _is_marked(file)
    )
    yield from (f"{where}: {count} files beside its slices are empty or damaged" for where, count in lost.items())


def _named_as_slice(file: Path) -> bool:
    return file.suffix.lower() in _DICOM or not file.suffix[1:].isalpha()


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _conflicts(masked: Sequence[_Masked], merge: bool) -> Iterator[str]:
    for item in masked:
        counts = Counter(name for names in item.dicom.values() for name in set(names))
        several = sorted(name for name, count in counts.items() if count > 1)
        if several and not merge:
            yield f"{item.image.where}: several masks hold {', '.join(several)} (--merge-masks takes them as one)"
        if len(item.nifti) > 1:
            yield f"{item.image.where}: {len(item.nifti)} NIfTI files lie beside it, and one may be its label map"
    if any(item.dicom for item in masked) and any(item.nifti for item in masked):
        yield "masks must all be DICOM or all NIfTI; both were found"
    uids = Counter(item.image.series.uid for item in masked)
    if repeated := sum(count > 1 for count in uids.values()):
        yield f"series must have UIDs of their own; {repeated} UIDs stand for several series"


def _raise(images: int, found: int, problems: Sequence[str]) -> None:
    if not images:
        raise FibldmError(
            f"a tree of DICOM studies must hold a series of CT or MR; none of {found} series is one",
            "check the folder, or name the layout with --layout",
        )
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise FibldmError(
            f"every DICOM series must have masks that are its own, and of one kind; {len(problems)} findings:{listed}",
            "take out the masks that do not belong, or name files and masks in a CSV",
        )


def _case(item: _Masked, labels: Mapping[str, int], merge: bool) -> Case:
    series = item.image.series
    return Case(
        name=series.uid,
        images=(series.files,),
        masks=(*_segments(item.dicom, labels, merge), *(Mask((file,)) for file in item.nifti)),
        path="",
        subject=series.patient_id or series.study_uid or series.uid,
        private=True,
    )


def _segments(files: Mapping[Path, Sequence[str]], labels: Mapping[str, int], merge: bool) -> Iterator[Mask]:
    """One mask per file, whose labels must not overlap; to merge them, one per label, the most important first."""
    if not merge:
        yield from (
            Mask((file,), names={name: labels[name] for name in names}) for file, names in sorted(files.items())
        )
    for name, value in labels.items() if merge else ():
        yield from (Mask((file,), names={name: value}) for file, names in sorted(files.items()) if name in names)


def _notes(found: Sequence[_Found], masked: Sequence[_Masked], files: Sequence[Path]) -> Iterator[str]:
    used = {file for item in masked for file in item.dicom} | {file for item in masked for file in item.nifti}
    masks = [item for item in found if item.series.modality in _MASKS]
    counts = {
        "series are no volumes of CT or MR and were left out": len(found) - len(masks) - len(masked),
        "DICOM masks belong to no series found and were left out": sum(not used & {*m.series.files} for m in masks),
        "NIfTI files lie beside no series and were left out": sum(
            _is_nifti(file) and file not in used for file in files
        ),
        "series have no mask": sum(not item.dicom and not item.nifti for item in masked),
        "series state no Patient ID; each of their studies counts as a patient": sum(
            not item.image.series.patient_id for item in masked
        ),
    }
    yield from (f"{count} {what}" for what, count in counts.items() if count)
    modalities = Counter(item.image.series.modality for item in masked)
    if len(modalities) > 1:
        yield " and ".join(f"{count} {name}" for name, count in sorted(modalities.items())) + " series are mixed"
