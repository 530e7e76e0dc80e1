"""Which image of a tree of DICOM a segmentation or structure set belongs to: by its references, else by its place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.walk import places
from fibldm.volumes.dicom.frames import on_slices_of
from fibldm.volumes.dicom.masks import segment_names
from fibldm.volumes.dicom.series import Series, find_series

MASKS = ("SEG", "RTSTRUCT")
_LISTED = 3


@dataclass(frozen=True)
class Found:
    """A series, or one file of a series of masks, and where it stands, in words."""

    series: Series
    where: str


@dataclass(frozen=True)
class Links:
    """What belongs together.

    Attributes:
        masks: names of the segments by file of the DICOM masks of every image, by the image's Series Instance UID.
        placed: masks whose references name no series at hand, and that their place gives to one.
        elsewhere: masks of series that are no images of CT or MR.
    """

    masks: Mapping[str, dict[Path, Sequence[str]]]
    placed: Sequence[Found]
    elsewhere: Sequence[Found]


def with_places(series: Sequence[Series]) -> Iterator[Found]:
    """Every series; of masks every file on its own, as each may belong to another image."""
    studies = [list(group) for _, group in groupby(series, key=lambda item: (item.patient_id, item.study_uid))]
    for study, members in enumerate(studies, start=1):
        for number, member in enumerate(members, start=1):
            where = f"study {study} of {len(studies)}, series {number} of {len(members)}"
            several = member.modality in MASKS and len(member.files) > 1
            parts = [part for file in member.files for part in find_series([file])] if several else [member]
            yield from (Found(part, where) for part in parts)


def linked(found: Sequence[Found], images: Sequence[Found], source: Path, findings: Findings) -> Links:
    """Every DICOM mask with the images it belongs to.

    A mask belongs to the series that it refers to. Where none of them is there, as anonymisers renew UIDs, it belongs
    to the only image of its study in its frame of reference, a segmentation also to the only one of these whose slices
    it lies on. Of a structure set with several frames of reference, an image gets the structures in its own.

    Args:
        found: all series.
        images: those of them that may be read.
        source: the tree.
        findings: gets what is wrong.
    """
    masks: dict[str, dict[Path, Sequence[str]]] = {image.series.uid: {} for image in images}
    placed, elsewhere = list[Found](), list[Found]()
    present = {item.series.uid for item in found}
    for mask in (item for item in found if item.series.modality in MASKS):
        refers = set(mask.series.referenced_series)
        belongs = [image for image in images if image.series.uid in refers]
        if not belongs and refers & present:
            elsewhere.append(mask)
            continue
        file, names = mask.series.files[0], None
        with findings.collecting(f"{mask.where}: "):
            names = segment_names(file)
        if not belongs and names is not None:
            belongs = _in_place(mask, images, _titled(mask, names, source), findings)
            placed += [mask] * len(belongs)
        _check_frames(mask, belongs, findings)
        several = len(mask.series.frames_of_reference) > 1 and names is not None
        inside = {
            image.series.uid: segment_names(file, image.series.frame_of_reference) if several else names or []
            for image in belongs
        }
        for uid, held in inside.items():
            if held or not any(inside.values()):
                masks[uid][file] = held or names or []
    return Links(masks, placed, elsewhere)


def _in_place(mask: Found, images: Sequence[Found], title: str, findings: Findings) -> list[Found]:
    place, study = mask.series.frames_of_reference, mask.series.study_uid
    near = [image for image in images if study and image.series.study_uid == study]
    same = [image for image in near if image.series.frame_of_reference in place]
    if len(same) > 1 and mask.series.modality == "SEG":
        same = [image for image in same if on_slices_of(mask.series.files[0], image.series.files)] or same
    if len(same) == 1:
        return same
    refers = "a series that is not there" if mask.series.referenced_series else "no series"
    if same:
        why = f"{len(same)} images are in its place"
    elif not near:
        why = "its study has no image of CT or MR"
    elif not place:
        why = "it states no frame of reference"
    else:
        why = f"none of the {len(near)} images of its study is in its frame of reference"
    findings.error(f"{mask.where}: {title} refers to {refers}, and {why}")
    return []


def _titled(mask: Found, names: Sequence[str], source: Path) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    held = f" of {', '.join(names[:_LISTED])}{more}" if names else ""
    return f"the mask{held} in {places(source, mask.series.files)}"


def _check_frames(mask: Found, images: Sequence[Found], findings: Findings) -> None:
    place = mask.series.frames_of_reference
    for image in images:
        if place and image.series.frame_of_reference not in ("", *place):
            findings.error(f"{mask.where}: the mask is in another frame of reference than its image, {image.where}")
