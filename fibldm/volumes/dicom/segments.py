"""Segments of a DICOM segmentation: their names, and the label map that they make.

Arrays are ``(slice, row, column)`` and coordinates DICOM's, LPS+ mm, of voxel centres.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.acquired import AcquiredSlices
from fibldm.volumes.grid import LPS_TO_RAS
from fibldm.volumes.scan import Scan

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from pydicom.dataset import Dataset

DAMAGED = (
    ArithmeticError, AttributeError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What pydicom and highdicom raise where an object is not what the standard says."""

_PARALLEL = 1e-2
_ON_SLICE = 0.05
_PRIORITY = "name labels in order of priority with `merge_masks`, which settles who wins"


def segment_labels(dataset: "Dataset") -> dict[int, str]:
    """Labels of the segments by number, without the background that a label map may describe.

    Raises:
        FibldmError: there is no segment, or one has no number or label.
    """
    try:
        background = int(dataset.get("PixelPaddingValue", 0))
        segments = {int(item.SegmentNumber): str(item.SegmentLabel).strip() for item in dataset.SegmentSequence}
    except DAMAGED:
        segments, background = {}, 0
    segments = {number: name for number, name in segments.items() if number not in (0, background)}
    if not segments or not all(segments.values()):
        message = "a DICOM segmentation must hold at least one segment, and each must have a label"
        raise FibldmError(message, "export it again")
    return segments


def segmented(
    dataset: "Dataset", values: Mapping[int, int], segments: Mapping[int, str], image: Scan | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Labels ``(slice, row, column)`` in uint8, and their affine to LPS+ mm.

    Args:
        dataset: of the segmentation; it may be changed.
        values: of the labels by segment number.
        segments: labels by segment number.
        image: what it belongs to, or ``None``.

    Raises:
        FibldmError: frames cannot be read or are not one regular stack of known spacing, or segments overlap.
    """
    from highdicom.seg import Segmentation

    try:
        stated = _settle_slice_spacing(dataset, image)
        segmentation = Segmentation.from_dataset(dataset, copy=False)
        geometry = segmentation.get_volume_geometry(allow_missing_positions=stated)
        if geometry is not None and geometry.coordinate_system.value == "PATIENT" and (stated or geometry.shape[0] > 1):
            read = _label_map if segmentation.SegmentationType == "LABELMAP" else _stacked
            return read(segmentation, values, segments, stated), np.asarray(geometry.affine)
    except DAMAGED as error:
        message = f"a DICOM segmentation must be readable to its last frame; it is not ({type(error).__name__})"
        raise FibldmError(message, "export it again") from None
    raise FibldmError(
        "frames of a DICOM segmentation must be one regular stack of known slice spacing; "
        + ("its frames are not" if stated else "the file does not state the spacing, and its frames do not show it"),
        "export it again, on the grid of its image",
    )


def moved_to_plain(dataset: "Dataset", acquired: AcquiredSlices) -> bool:
    """Move frames that lie on slices of an irregular stack to where `AcquiredSlices.plain_affine` has these.

    Args:
        dataset: of a segmentation; it is changed.
        acquired: the slices of its image.

    Returns:
        Whether they lie there; where one does not, nothing is changed.

    Raises:
        FibldmError: the file does not say where its frames lie.
    """
    try:
        groups = [dataset.SharedFunctionalGroupsSequence[0], *dataset.PerFrameFunctionalGroupsSequence]
        planes = [group.PlanePositionSequence[0] for group in groups if "PlanePositionSequence" in group]
        turns = [group.PlaneOrientationSequence[0] for group in groups if "PlaneOrientationSequence" in group]
        rows, columns = np.array(turns[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
        points = np.array([plane.ImagePositionPatient for plane in planes], dtype=float).reshape(-1, 3)
    except DAMAGED as error:
        message = f"a DICOM segmentation must say where its frames lie; it does not ({type(error).__name__})"
        raise FibldmError(message, "export it again") from None
    numbers = acquired.numbers(points)
    off = np.abs(numbers - np.clip(np.rint(numbers), 0, len(acquired.positions) - 1))
    if 1 - abs(np.cross(rows, columns) @ acquired.normal) > _PARALLEL or off.max() > _ON_SLICE:
        return False
    for plane, point in zip(planes, acquired.plain(points), strict=True):
        plane.ImagePositionPatient = [f"{value:.6f}" for value in point]
    step = float(np.linalg.norm(acquired.plain_affine[:3, 2]))
    for group in groups:
        if "PixelMeasuresSequence" in group:
            group.PixelMeasuresSequence[0].SpacingBetweenSlices = f"{step:.8f}"
    return True


def _settle_slice_spacing(dataset: "Dataset", image: Scan | None) -> bool:
    """Whether the slice spacing is known, from the file or else from the image, which is then written into it."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    groups = [shared, *dataset.PerFrameFunctionalGroupsSequence]
    measures = [group.PixelMeasuresSequence[0] for group in groups if "PixelMeasuresSequence" in group]
    if all(item.get("SpacingBetweenSlices") for item in measures):
        return True
    planes = [group.PlaneOrientationSequence[0] for group in groups if "PlaneOrientationSequence" in group]
    rows, columns = np.array(planes[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    spacing = None if image is None else _spacing_along(LPS_TO_RAS[:3, :3] @ np.cross(rows, columns), image)
    for item in measures if spacing else ():
        item.SpacingBetweenSlices = spacing
    return spacing is not None


def _spacing_along(normal: NDArray[np.float64], image: Scan) -> float | None:
    """mm between voxels of the image along an axis that is parallel to ``normal``; ``None`` where none is."""
    cosines = np.abs(normal @ (image.affine[:3, :3] / image.spacing))
    axis = int(np.argmax(cosines))
    return round(float(image.spacing[axis]), 6) if 1 - cosines[axis] < _PARALLEL else None


def _label_map(
    segmentation: "Segmentation", values: Mapping[int, int], segments: Mapping[int, str], stated: bool
) -> NDArray[np.uint8]:
    volume = segmentation.get_volume(combine_segments=True, dtype=np.uint16, allow_missing_positions=stated)
    table = np.zeros(np.iinfo(np.uint16).max + 1, dtype=np.uint8)
    table[list(values)] = list(values.values())
    labels: NDArray[np.uint8] = table[volume.array]
    return labels


def _stacked(
    segmentation: "Segmentation", values: Mapping[int, int], segments: Mapping[int, str], stated: bool
) -> NDArray[np.uint8]:
    """Segments one after the other, as there may be many and each is a volume."""
    fractional = segmentation.SegmentationType == "FRACTIONAL"
    half = segmentation.MaximumFractionalValue / 2 if fractional else 0.5
    names = {value: segments[number] for number, value in values.items()}
    labels: NDArray[np.uint8] | None = None
    for number, value in values.items():
        volume = segmentation.get_volume(
            segment_numbers=[number], rescale_fractional=False, allow_missing_positions=stated
        )
        stored = volume.array[..., 0]
        labels = np.zeros(stored.shape, dtype=np.uint8) if labels is None else labels
        mark(labels, stored >= max(half, 0.5), value, names)
    if labels is None:
        raise ValueError("a segment")
    return labels


def mark(labels: NDArray[np.uint8], inside: NDArray[np.bool_], value: int, names: Mapping[int, str]) -> None:
    """Give the voxels inside a value.

    Raises:
        FibldmError: one has another value already.
    """
    taken = sorted(set(np.unique(labels[inside]).tolist()) - {0, value})
    if taken:
        others = ", ".join(names[other] for other in taken)
        raise FibldmError(f"labels of a DICOM mask must not overlap; {names[value]} does with {others}", _PRIORITY)
    labels[inside] = value
