"""Frames of DICOM images as their headers describe them, and whether they are one regular stack.

Coordinates are DICOM's here, LPS+ mm, of voxel centres. What is said of a frame holds no patient, date or UID.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.files import read_file

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Problem = tuple[str, str]
"""What came instead of a volume, and its remedy."""

MODALITIES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
}
"""Modality by SOP class, of the classes that hold images of CT, MR and PET: single, enhanced, legacy converted."""

PIXELS = (
    "SamplesPerPixel PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit "
    "PixelRepresentation"
).split()

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_ONE_OF = {
    "PatientID": "patients",
    "StudyInstanceUID": "studies",
    "SeriesInstanceUID": "series",
    "FrameOfReferenceUID": "frames of reference",
    "SOPClassUID": "kinds of image",
    "Rows": "numbers of rows",
    "Columns": "numbers of columns",
    "StackID": "stacks",
    "TemporalPositionIdentifier": "points in time",
    "TemporalPositionIndex": "points in time",
    "EchoTime": "echo times",
    "EffectiveEchoTime": "echo times",
    "EchoNumbers": "echoes",
    "InversionTime": "inversion times",
    "DiffusionBValue": "b-values",
    "ConvolutionKernel": "kernels",
    "Units": "units",
}
_TOLD_APART_BY = {
    "AcquisitionNumber": "acquisitions",
    "TriggerTime": "trigger times",
    "NominalPercentageOfCardiacPhase": "cardiac phases",
    "KVP": "tube voltages",
}
_GEOMETRY = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
_NAMES = {
    "ImagePositionPatient": "Image Position (Patient)",
    "ImageOrientationPatient": "Image Orientation (Patient)",
    "PixelSpacing": "Pixel Spacing",
}
_REST = (
    "ImageType FrameType Modality SliceThickness RescaleSlope RescaleIntercept RescaleType ModalityLUTSequence "
    "PixelPaddingValue PixelPaddingRangeLimit PixelPresentation RedPaletteColorLookupTableDescriptor "
    "LossyImageCompression MagneticFieldStrength RepetitionTime ContrastBolusAgent ContrastBolusAgentSequence "
    "SeriesDescription ProtocolName BodyPartExamined SUVType CorrectedImage DecayCorrection PatientWeight "
    "RadiopharmaceuticalInformationSequence SeriesDate SeriesTime AcquisitionDate AcquisitionTime FrameReferenceTime "
    "ActualFrameDuration"
).split()
_OF_PET = (0x70530010, 0x70531000, 0x70531009, 0x00090010, 0x0009100D)
"""Private factors of Philips and the scan's start of GE, each with the creator of its block; see `suv`."""
_HEADER: list[str | int] = [*PIXELS, *_ONE_OF, *_TOLD_APART_BY, *_GEOMETRY, *_REST, *_OF_PET, _SHARED, _PER_FRAME]
_SPLIT = "keep the files of one image series, or split it by the scanner's or archive's export"
_SAME_DIRECTION = 1e-3
_SAME_SPACING = 1e-3
_SAME_GRID = 1e-2


@dataclass(frozen=True)
class Frame:
    """One slice: where its voxels are stored, and what the header says of it.

    Attributes:
        file: that holds it.
        index: among the frames of the file.
        header: its attributes on one level, those of the frame's functional groups among them; no voxels.
        enhanced: whether the file is a multi-frame image.
    """

    file: Path
    index: int
    header: "Dataset"
    enhanced: bool = False

    @property
    def sop_class(self) -> str:
        """SOP class UID; of the file where the dataset leaves it empty."""
        return sop_class(self.header)

    @property
    def localizer(self) -> bool:
        """Whether it is a scout."""
        return is_localizer(self.header)

    def numbers(self, keyword: str, count: int = 1) -> tuple[float, ...] | None:
        """Values of an attribute; ``None`` where it is absent, or is not ``count`` finite numbers."""
        try:
            value = self.header.get(keyword)
            values = np.atleast_1d(np.asarray([] if value is None else value, dtype=np.float64))
        except (ValueError, TypeError, OverflowError):
            return None
        return tuple(values.tolist()) if values.shape == (count,) and np.isfinite(values).all() else None

    def text(self, keyword: str) -> str:
        """An attribute as text, several values joined by a space; empty where it is absent."""
        value = self.header.get(keyword)
        values = [] if value is None else [value] if isinstance(value, str) or not np.iterable(value) else value
        return " ".join(str(item).strip() for item in values).strip()


def read_dataset(source: Any, keywords: Iterable[str | int], *, pixels: bool = False) -> "Dataset":
    """The named attributes of a DICOM file, and its voxels as stored if asked for.

    Values are not validated here: what is used is checked where it is used, and pydicom's warnings quote values.

    Raises:
        InvalidDicomError: it is no DICOM file.
        FibldmError: an attribute cannot be parsed.
    """
    import pydicom

    with pydicom.config.disable_value_validation():
        dataset = read_file(source, stop_before_pixels=not pixels, specific_tags=list(keywords))
        _parse(dataset.file_meta)
        _parse(dataset)
    return dataset


def _parse(dataset: "Dataset") -> None:
    """Parse all values now, as pydicom else does when they are used, and validates them then."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:
            from pydicom.datadict import keyword_for_tag

            message = f"the attributes of a DICOM file must be readable; its {keyword_for_tag(tag)} is not"
            raise FibldmError(message, "transfer the files again, or export the original ones") from None
        for item in element.value if element.VR == "SQ" else ():
            _parse(item)


def sop_class(header: "Dataset") -> str:
    """SOP class UID of a header that was read by `read_dataset`; of the file where the dataset leaves it empty."""
    stated = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    return str(stated or "")


def uid_name(value: object) -> str:
    """What the standard calls the kind of object or transfer syntax of a UID; ``unknown`` where it has none."""
    from pydicom.uid import UID_dictionary

    return UID_dictionary[str(value)][0] if str(value) in UID_dictionary else "unknown"


def is_localizer(header: "Dataset") -> bool:
    """Whether an image is a scout, which scanners store under the UID of the series it was planned for."""
    return "LOCALIZER" in (header.get("ImageType") or ())


def read_frames(files: Sequence[Path]) -> list[Frame]:
    """All frames of the files, without voxels.

    Raises:
        FibldmError: there is no file, or one cannot be read.
    """
    if not files:
        raise FibldmError("a DICOM series must hold at least one file; it holds none", "check the folder")
    frames: list[Frame] = []
    for number, file in enumerate(files, start=1):
        try:
            frames.extend(_frames(file))
        except FibldmError:
            raise
        except Exception as error:
            message = f"a DICOM series must be readable; file {number} of {len(files)} is not ({type(error).__name__})"
            raise FibldmError(message, "transfer the series again") from None
    return frames


def on_slices_of(mask: Path, image: Sequence[Path]) -> bool:
    """Whether every frame of a segmentation lies on a slice of a series, pixel on pixel.

    Raises:
        FibldmError: a file cannot be read.
    """
    grids = [[_grid(frame) for frame in read_frames(files)] for files in ((mask,), image)]
    if not all(grids) or any(grid is None for grid in (*grids[0], *grids[1])):
        return False
    frames, slices = (np.array(grid) for grid in grids)
    off = [np.abs(slices - frame).max(axis=1).min() for frame in frames]
    return max(off) < _SAME_GRID


def mixed(frames: Sequence[Frame]) -> Iterator[Problem]:
    """What keeps frames from being of one image: they differ in something that one volume has in common."""
    for keyword, name in _ONE_OF.items():
        if (count := len({frame.text(keyword) for frame in frames})) > 1:
            yield f"it mixes {count} {name}", _SPLIT
    if len({_kind(frame) for frame in frames}) > 1:
        yield "it mixes images of several types (Image Type)", _SPLIT
    if len({frame.file for frame in frames}) > 1 and any(frame.enhanced for frame in frames):
        yield "it holds several multi-frame images", "give one of them at a time"


def unplaced(frames: Sequence[Frame]) -> Iterator[Problem]:
    """What keeps frames from having a place: position, orientation or spacing absent, impossible, or several."""
    lacking = [[key for key, count in _GEOMETRY.items() if frame.numbers(key, count) is None] for frame in frames]
    if any(lacking):
        names = ", ".join(name for keyword, name in _NAMES.items() if any(keyword in some for some in lacking))
        reason = f"{sum(map(bool, lacking))} of {len(frames)} slices do not state their {names}"
        yield reason, "export the original series"
        return
    yield from _bad_orientation(np.array([frame.numbers("ImageOrientationPatient", 6) for frame in frames]))
    yield from _bad_spacing(np.array([frame.numbers("PixelSpacing", 2) for frame in frames]))


def in_plane(frame: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions ``(3, 2)`` along a row and along a column, and mm between columns and between rows."""
    orientation, spacing = frame.numbers("ImageOrientationPatient", 6), frame.numbers("PixelSpacing", 2)
    directions = np.array(orientation).reshape(2, 3).T
    return directions / np.linalg.norm(directions, axis=0), np.array(spacing)[::-1]


def told_apart(frames: Sequence[Frame]) -> str:
    """What differs between frames in one place, in words; empty where nothing does."""
    counts = {name: len({frame.text(keyword) for frame in frames}) for keyword, name in _TOLD_APART_BY.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count > 1)


def _frames(file: Path) -> list[Frame]:
    header = read_dataset(file, _HEADER)
    count = int(header.get("NumberOfFrames") or 1)
    if count == 1 and _PER_FRAME not in header:
        return [Frame(file, 0, header)]
    shared = list(header.get(_SHARED) or [])
    groups = list(header.get(_PER_FRAME) or [])
    if groups and len(groups) != count:
        raise ValueError("as many functional groups as frames")
    groups = groups or [None] * count
    return [Frame(file, index, _flat(header, [*shared, group]), True) for index, group in enumerate(groups)]


def _flat(header: "Dataset", groups: Iterable["Dataset | None"]) -> "Dataset":
    from pydicom.dataset import Dataset

    flat = Dataset()
    flat.update({element.tag: element for element in header if element.keyword not in (_SHARED, _PER_FRAME)})
    flat.file_meta = header.file_meta
    for group in groups:
        for element in group or ():
            if element.VR == "SQ" and not element.tag.is_private and len(element.value) == 1:
                flat.update(element.value[0])
    return flat


def _kind(frame: Frame) -> tuple[str, ...]:
    """The values of Image Type that tell magnitude from phase, water from fat, axial slices from projections.

    Of CT only the third: what manufacturers append differs from slice to slice.
    """
    values = frame.header.get("FrameType") or frame.header.get("ImageType") or ()
    values = (values,) if isinstance(values, str) else tuple(values)
    return values[2:3] if MODALITIES.get(frame.sop_class) == "CT" else values[2:4]


def _grid(frame: Frame) -> list[float] | None:
    """Rows, columns, spacing, orientation and position."""
    stated = [frame.numbers(keyword, count) for keyword, count in (("Rows", 1), ("Columns", 1), *_GEOMETRY.items())]
    return None if None in stated else [value for values in stated if values for value in values]


def _bad_orientation(stated: NDArray[np.float64]) -> Iterator[Problem]:
    if np.abs(stated - stated[0]).max() > _SAME_DIRECTION:
        yield "it mixes slices of several orientations", _SPLIT
    rows, columns = stated[:, :3], stated[:, 3:]
    products = [(rows * rows).sum(1) - 1, (columns * columns).sum(1) - 1, (rows * columns).sum(1)]
    if np.abs(products).max() > _SAME_DIRECTION:
        yield "its Image Orientation (Patient) is not two perpendicular directions", "export the original series"


def _bad_spacing(stated: NDArray[np.float64]) -> Iterator[Problem]:
    if stated.min() <= 0:
        yield f"its Pixel Spacing of {stated.min():g} mm is not positive", "export the original series"
    elif np.abs(stated / stated[0] - 1).max() > _SAME_SPACING:
        yield "it mixes slices of several pixel spacings", _SPLIT
