"""Masks from DICOM: segmentations, and RT structure sets rasterised on the grid of their image.

What is said of a file holds no patient, date, UID or path.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.volumes.dicom.acquired import AcquiredSlices
from fibldm.volumes.dicom.contours import (
    Contour,
    contour_of,
    filled,
    is_closed,
    slice_axis,
    structures_of,
    unclosed,
)
from fibldm.volumes.dicom.files import read_file
from fibldm.volumes.dicom.segments import mark, moved_to_plain, segment_labels, segmented
from fibldm.volumes.grid import LPS_TO_RAS, Grid, Volume
from fibldm.volumes.scan import Remark, Scan

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_STRUCTURES = ("1.2.840.10008.5.1.4.1.1.481.3",)

_COINCIDENT = 0.1


def segment_names(file: Path, frame_of_reference: str = "") -> list[str]:
    """Names of what a segmentation or RT structure set holds: segments, or structures with a closed planar contour.

    Args:
        file: one mask.
        frame_of_reference: UID; structures that state another one are left out. Empty: none are.

    Raises:
        FibldmError: the file is neither, is damaged, or a segment has no name.
    """
    dataset = _read(file, _SEGMENTATION + _STRUCTURES)
    if dataset.SOPClassUID in _SEGMENTATION:
        return list(dict.fromkeys(segment_labels(dataset).values()))
    structures = structures_of(dataset)
    foreign = {str(item.ROIName).strip() for item in _elsewhere(dataset, frame_of_reference)}
    drawn = [name for name, items in structures.items() if any(is_closed(item) for item in items)]
    return [name for name in drawn if name not in foreign]


def read_segmentation(
    file: Path, names: Mapping[str, int], image: Scan | None = None, *, elsewhere: Collection[str] = ()
) -> Scan:
    """A DICOM segmentation (binary, fractional or label map) as a uint8 label map in RAS+ order.

    A voxel of a fractional segment belongs to it from half of the maximum on. Slices that the file leaves out between
    others are background. Frames on slices that were brought to a regular grid are brought there with them.

    Args:
        file: one segmentation.
        names: label values by the segments' labels; other segments are left out.
        image: what it belongs to; gives the distance of slices that a file may leave open.
        elsewhere: segments that are read as other masks, of which nothing is said here.

    Raises:
        FibldmError: the file is damaged or no segmentation, holds none of the segments or no voxel, its frames are not
            one regular stack of known spacing, or segments of different values overlap.
    """
    dataset = _read(file, _SEGMENTATION)
    segments = segment_labels(dataset)
    values = {number: _value(names[name]) for number, name in segments.items() if name in names}
    _check_found(segments.values(), names)
    acquired = None if image is None else image.acquired
    acquired = acquired if acquired is not None and moved_to_plain(dataset, acquired) else None
    labels, affine = segmented(dataset, values, segments, image if acquired is None else _plain(acquired))
    volume = Volume(labels, LPS_TO_RAS @ affine).canonical()
    left_out = sorted({name for name in segments.values() if name not in names})
    findings = [*_left_out(left_out, elsewhere), *_empty(labels, complete=not left_out)]
    found = {values[number]: segments[number] for number in values}
    scan = Scan(volume.array, volume.affine, hash_file(file), findings=tuple(findings), names=found)
    return scan if acquired is None else _regular(scan, acquired)


def read_structures(
    file: Path,
    names: Mapping[str, int],
    image: Scan,
    *,
    frame_of_reference: str | None = None,
    elsewhere: Collection[str] = (),
) -> Scan:
    """Closed planar contours of an RT structure set as a uint8 label map on the grid of their image.

    A voxel belongs to a structure if its centre lies inside of it or on one of its contours; an inner contour is a
    hole, contours that touch are one; nothing is filled in between slices. Points and open contours are left out. On
    slices that were brought to a regular grid, contours are filled as they were drawn and brought there with them.

    Args:
        file: one RT structure set.
        names: label values by the structures' names; others are left out.
        image: what the structures were drawn on.
        frame_of_reference: UID of the image's; ``None`` where it does not state one.
        elsewhere: structures that are read as other masks, of which nothing is said here.

    Raises:
        FibldmError: the file is damaged or no structure set, holds none of the structures or no voxel centre inside of
            them, belongs to another frame of reference, contours do not lie on slices of the image, cross each other,
            or structures of different values overlap.
    """
    dataset = _read(file, _STRUCTURES)
    structures = structures_of(dataset)
    _check_found(structures, names)
    _check_frame_of_reference(dataset, names, frame_of_reference)
    wanted = {name: items for name, items in structures.items() if name in names}
    acquired = image.acquired
    drawn = {
        name: [_drawn(contour_of(item), acquired) for item in items if is_closed(item)]
        for name, items in wanted.items()
    }
    findings = list(_left_out(structures.keys() - wanted.keys(), elsewhere))
    findings += [finding for name, items in wanted.items() for finding in unclosed(name, items)]
    plain = image if acquired is None else _plain(acquired)
    labels, remarks = _rasterised(drawn, names, plain)
    findings += [*remarks, *_empty(labels, complete=len(wanted) == len(structures))]
    found = {_value(names[name]): name for name in wanted}
    scan = Scan(labels, plain.affine, hash_file(file), findings=tuple(findings), names=found)
    return scan if acquired is None else _regular(scan, acquired)


def on_grid_of(mask: Scan, image: Scan) -> Scan:
    """A mask whose voxels coincide with voxels of the image, cropped and padded to the image's grid; exact.

    Returns:
        The mask as it came where its voxels do not coincide with the image's, or lie outside of it altogether.
    """
    matrix = np.linalg.solve(image.affine, mask.affine)
    turn = orientations.io_orientation(matrix)
    array = orientations.apply_orientation(mask.array, turn)
    matrix = matrix @ orientations.inv_ornt_aff(turn, mask.array.shape)
    first = np.rint(matrix[:3, 3]).astype(int)
    shape = np.array(image.array.shape[:3])
    start, stop = np.maximum(first, 0), np.minimum(first + array.shape, shape)
    if not _coincides(matrix, array.shape) or (start >= stop).any():
        return mask
    padded = np.zeros(shape, dtype=array.dtype)
    inner = array[tuple(slice(a, b) for a, b in zip(start - first, stop - first, strict=True))]
    padded[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = inner
    lost = np.count_nonzero(array) - np.count_nonzero(inner)
    lines: tuple[Remark, ...] = (
        (("warning", f"{lost} labelled voxels lie outside of the image and were cut"),) if lost else ()
    )
    return Scan(padded, image.affine, mask.sha256, mask.facts, (*mask.findings, *lines), mask.names)


def _plain(acquired: AcquiredSlices) -> Scan:
    """An empty image of the slices as they were acquired, as if they were a regular stack."""
    rows, columns = acquired.shape
    voxels = np.broadcast_to(np.uint8(0), (columns, rows, len(acquired.positions)))
    return Scan(voxels, LPS_TO_RAS @ acquired.plain_affine, "")


def _drawn(contour: Contour, acquired: AcquiredSlices | None) -> Contour:
    if acquired is None:
        return contour
    turn = LPS_TO_RAS[:3, :3]
    return replace(contour, points=acquired.plain(contour.points @ turn) @ turn)


def _regular(mask: Scan, acquired: AcquiredSlices) -> Scan:
    """A mask of `_plain` on the regular grid of the slices' image."""
    plain = _plain(acquired)
    mask = on_grid_of(mask, plain)
    if mask.array.shape != plain.array.shape:
        raise FibldmError(
            "a mask of slices that are brought to a regular grid must lie on their pixels; it lies between them",
            "export it on the grid of its image",
        )
    labels = acquired.labels(mask.array.transpose(2, 1, 0)).transpose(2, 1, 0)
    volume = Volume(labels, LPS_TO_RAS @ acquired.affine).canonical()
    said: Remark = ("warning", "label was brought to the image's regular grid by its nearest voxels")
    return replace(mask, array=volume.array, affine=volume.affine, findings=(*mask.findings, said))


def _read(file: Path, classes: tuple[str, ...]) -> "Dataset":
    """The whole file; values are checked where they are used, as pydicom's own warnings would quote them."""
    import pydicom

    try:
        with pydicom.config.disable_value_validation():
            dataset = read_file(file)
            sop_class = str(dataset.get("SOPClassUID", ""))
            for _ in dataset.iterall():  # elements are parsed at first sight
                pass
    except Exception as error:
        message = f"a DICOM mask must be a readable DICOM file; it is not ({type(error).__name__})"
        raise FibldmError(message, "transfer it again") from None
    if sop_class not in classes:
        kinds = {_SEGMENTATION: "a DICOM segmentation", _STRUCTURES: "an RT structure set"}
        expected = kinds.get(classes, "a DICOM segmentation or an RT structure set")
        raise FibldmError(f"a DICOM mask must be {expected}; it holds another kind of object", "name the right file")
    return dataset


def _value(value: int) -> int:
    if not 0 < value < UNKNOWN_LABEL:
        raise FibldmError(f"label values must be within 1...{UNKNOWN_LABEL - 1}; got {value}")
    return value


def _check_found(found: Any, names: Mapping[str, int]) -> None:
    if not set(found) & set(names):
        listed = ", ".join(sorted(set(found)))
        raise FibldmError(
            f"a DICOM mask must hold at least one of {', '.join(names)}; it holds {listed}",
            "check the labels, or name them as the file does",
        )


def _left_out(names: Collection[str], elsewhere: Collection[str]) -> Iterator[Remark]:
    if others := sorted(set(names).difference(elsewhere)):
        yield "warning", f"left out, as not asked for: {', '.join(others)}"


def _empty(labels: NDArray[np.uint8], *, complete: bool) -> Iterator[Remark]:
    if labels.any():
        return
    if complete:
        raise FibldmError("a DICOM mask must mark at least one voxel; it marks none", "leave the file out")
    yield "warning", "none of its labels marks a voxel"


def _check_frame_of_reference(dataset: "Dataset", names: Mapping[str, int], expected: str | None) -> None:
    for item in _elsewhere(dataset, expected or ""):
        if str(item.ROIName).strip() in names:
            raise FibldmError(
                f"structures must be drawn in the image's frame of reference; {item.ROIName} is in another",
                "register them to the image first",
            )


def _elsewhere(dataset: "Dataset", expected: str) -> Iterator["Dataset"]:
    """The structures that state another frame of reference."""
    for item in dataset.get("StructureSetROISequence") or () if expected else ():
        if item.get("ReferencedFrameOfReferenceUID") not in (None, "", expected):
            yield item


def _rasterised(
    structures: Mapping[str, list[Contour]], names: Mapping[str, int], image: Scan
) -> tuple[NDArray[np.uint8], list[Remark]]:
    x, y, z = image.array.shape[:3]
    labels = np.zeros((x, y, z), dtype=np.uint8)
    remarks: list[Remark] = []
    contours = [contour for drawn in structures.values() for contour in drawn]
    axis = slice_axis(contours, image.affine) if contours else 0
    for name, drawn in structures.items():
        if drawn:
            inside, found = filled(drawn, image.affine, labels.shape, axis, name)
            mark(labels, inside, _value(names[name]), {value: key for key, value in names.items()})
            remarks += found
    return labels, remarks


def _coincides(matrix: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether voxel centres lie on those of another grid: the axes match, and so do the outermost voxels."""
    x, y, z = shape
    straight = nibabel.affines.from_matvec(np.eye(3), np.rint(matrix[:3, 3]))
    off = np.abs(Grid((x, y, z), matrix).corners - Grid((x, y, z), straight).corners).max()
    return bool(off < _COINCIDENT) and bool(np.abs(matrix[:3, :3] - np.eye(3)).max() < _COINCIDENT)
