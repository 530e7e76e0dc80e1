"""DICOM files that the tests build: series of every layout that scanners and archives give, with a planted patient.

Coordinates are DICOM's: LPS mm, centres of voxels. Arrays are ``(slice, row, column)``.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import ArrayLike, NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes

Change = Callable[[Dataset, int], None]
"""Changes the dataset of a slice, given its index in space, before it is written."""

NAME = "Planted^Paula"
PATIENT = "PLANTED-4711"
BIRTH_DATE = "19560723"
DATE = "20190314"
PLANTED = (NAME, PATIENT, BIRTH_DATE, DATE)
"""What may be found in no output and no message, besides UIDs."""

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (
    0.8384361386, 0.5037832573, 0.2079116908, -0.5446384140, 0.7884052917, 0.2859826815,
)  # fmt: skip
SPACING = (0.75, 1.25, 2.5)
ORIGIN = (-20.5, 31.25, -120.75)

_CLASSES = {
    "CT": uid.CTImageStorage,
    "MR": uid.MRImageStorage,
    "PT": uid.PositronEmissionTomographyImageStorage,
}
_ENHANCED = {"CT": uid.EnhancedCTImageStorage, "MR": uid.EnhancedMRImageStorage}


def example(shape: tuple[int, int, int] = (6, 7, 9), *, seed: int = 0) -> NDArray[np.int16]:
    """HU ``(slice, row, column)`` without any symmetry: every voxel differs from its neighbours."""
    random = np.random.default_rng(seed)
    array: NDArray[np.int16] = random.integers(-1000, 2000, shape).astype(np.int16)
    return array


def new_uid(*names: object) -> str:
    """A UID that is the same for the same names."""
    return str(uid.generate_uid(entropy_srcs=[str(name) for name in names]))


def write_series(
    folder: Path,
    array: ArrayLike,
    *,
    spacing: Sequence[float] = SPACING,
    origin: Sequence[float] = ORIGIN,
    orientation: Sequence[float] = AXIAL,
    modality: str = "CT",
    series: str = "series",
    study: str = "study",
    patient: str = PATIENT,
    slope: float | Sequence[float] = 1.0,
    intercept: float = -1024.0,
    skip: Collection[int] = (),
    repeat: Collection[int] = (),
    reverse: bool = False,
    instance_numbers: Sequence[int] | None = (),
    tilt: float = 0.0,
    long_decimals: bool = False,
    transfer_syntax: str = uid.ExplicitVRLittleEndian,
    change: Change | None = None,
    start: int = 0,
) -> list[Path]:
    """Write a series, one file ``<number>.dcm`` per slice.

    Args:
        folder: made if absent.
        array: ``(slice, row, column)``, in the units after rescale.
        spacing: mm between columns, rows, slices.
        origin: LPS mm of voxel ``[0, 0, 0]``.
        orientation: LPS direction cosines along a row and along a column; slices follow their cross product.
        modality: "CT", "MR" (no rescale is written) or "PT".
        series: name that the series' UID is made of.
        study: name that the study's UID and the frame of reference are made of.
        patient: Patient ID.
        slope: Rescale Slope, one or one per slice.
        intercept: Rescale Intercept; CT only.
        skip: slices that are left out.
        repeat: slices that are written twice.
        reverse: number files and instances against the slices' direction.
        instance_numbers: one per slice; empty for the order of the files; ``None`` leaves Instance Number out.
        tilt: degrees that the gantry leans: slices shift along the columns as they follow each other.
        long_decimals: write positions and spacings with more than 16 characters.
        transfer_syntax: uncompressed, or one that pydicom encodes (RLE Lossless, JPEG-LS Lossless).
        change: of each slice's dataset, last.
        start: number of the first file, for a second series in a folder.

    Returns:
        The files, along the slices' direction; repeated ones last.
    """
    values = np.asarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    slopes = np.broadcast_to(np.asarray(slope, dtype=float), (len(values),))
    written = [index for index in range(len(values)) if index not in skip]
    files = []
    for place, index in enumerate((*written, *repeat)):
        number = start + (len(values) - place if reverse else place + 1)
        dataset = _slice(values[index], modality, float(slopes[index]), intercept)
        _identify(dataset, modality, study, series, patient, number)
        _instance_number(dataset, index, number, instance_numbers)
        _place(dataset, spacing, position(spacing, origin, orientation, index, tilt), orientation, long_decimals)
        if tilt:
            dataset.GantryDetectorTilt = tilt
        files.append(_write(folder / f"{number:04d}.dcm", dataset, transfer_syntax, change, index))
    return files


def write_scout(folder: Path, *, series: str = "series", study: str = "study", modality: str = "CT") -> Path:
    """Write a localizer that shares the UID of a series, as scanners do."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = _slice(example((1, 12, 10))[0], modality, 1.0, -1024.0)
    _identify(dataset, modality, study, series, PATIENT, 0)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.InstanceNumber = 0
    _place(dataset, (1.0, 1.0, 1.0), ORIGIN, CORONAL, False)
    return _write(folder / "scout.dcm", dataset, uid.ExplicitVRLittleEndian, None, 0)


def write_enhanced(
    file: Path,
    array: ArrayLike,
    *,
    spacing: Sequence[float] = SPACING,
    origin: Sequence[float] = ORIGIN,
    orientation: Sequence[float] = AXIAL,
    modality: str = "CT",
    order: Sequence[int] = (),
    distances: Sequence[float] = (),
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Write an enhanced multi-frame image, in one file.

    Args:
        file: to be written.
        array: ``(slice, row, column)``, in HU for CT.
        spacing: mm between columns, rows, slices.
        origin: LPS mm of voxel ``[0, 0, 0]``.
        orientation: LPS direction cosines along a row and along a column; slices follow their cross product.
        modality: "CT" or "MR" (no rescale is written).
        order: slice that each frame holds; empty for the slices' order.
        distances: of each slice from the first, in slices; empty for even ones.
        change: of the whole dataset, last.
    """
    values = np.asarray(array)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset = _slice(values[0], modality, 1.0, -1024.0)
    _identify(dataset, modality, "study", f"enhanced {file.name}", PATIENT, 1)
    dataset.SOPClassUID = _ENHANCED[modality]
    dataset.NumberOfFrames = len(values)
    order = tuple(order) or tuple(range(len(values)))
    stored = np.stack([values[index] for index in order]) + (1024 if modality == "CT" else 0)
    dataset.PixelData = stored.astype("<u2").tobytes()
    shared, steps = Dataset(), tuple(distances) or tuple(range(len(values)))
    shared.PixelMeasuresSequence = [_measures(spacing)]
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [float(value) for value in orientation]
    if modality == "CT":
        shared.PixelValueTransformationSequence = [Dataset()]
        transformation = shared.PixelValueTransformationSequence[0]
        transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = 1, -1024, "HU"
        del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [
        _frame(position(spacing, origin, orientation, steps[index])) for index in order
    ]
    return _write(
        file, dataset, uid.ExplicitVRLittleEndian, None if change is None else lambda item, _: change(item), 0
    )


def complete(dataset: Dataset, index: int) -> None:
    """What highdicom copies into a segmentation."""
    dataset.PatientSex = dataset.AccessionNumber = dataset.StudyID = dataset.StudyTime = ""


def write_segmentation(
    file: Path,
    series: Sequence[Dataset],
    pixels: NDArray[Any],
    kind: str = "BINARY",
    names: Sequence[str] = ("Lung", "Honeycombing"),
    change: Callable[[Dataset], None] | None = None,
    **options: Any,
) -> Path:
    """Write ``pixels`` ``(slice, row, column[, segment])`` by highdicom."""
    segmentation = Segmentation(
        source_images=list(series),
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=[
            SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Lung, "MANUAL")
            for number, name in enumerate(names, start=1)
        ],
        series_instance_uid=new_uid(file, "series"),
        series_number=9,
        sop_instance_uid=new_uid(file),
        instance_number=1,
        manufacturer="Maker",
        manufacturer_model_name="Model",
        software_versions="1",
        device_serial_number="1",
        **options,
    )
    if change is not None:
        change(segmentation)
    segmentation.save_as(file)
    return file


def position(
    spacing: Sequence[float], origin: Sequence[float], orientation: Sequence[float], index: float, tilt: float = 0.0
) -> NDArray[np.float64]:
    """LPS mm of the first voxel of a slice."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    lean: NDArray[np.float64] = np.tan(np.radians(tilt)) * column
    return np.array(origin, dtype=float) + index * spacing[2] * (np.cross(row, column) + lean)


def expected(
    array: ArrayLike,
    *,
    spacing: Sequence[float] = SPACING,
    origin: Sequence[float] = ORIGIN,
    orientation: Sequence[float] = AXIAL,
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """What a reader must give: voxels ``(X, Y, Z)`` and affine, in the closest RAS+ order; by nibabel alone."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    directions = np.stack([row, column, np.cross(row, column)], axis=1) * np.array(spacing)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nibabel.affines.from_matvec(directions, np.array(origin))
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(array).transpose(2, 1, 0), affine))
    return np.asanyarray(image.dataobj), np.asarray(image.affine)


def _slice(values: NDArray[np.generic], modality: str, slope: float, intercept: float) -> Dataset:
    dataset = Dataset()
    dataset.Modality = modality
    dataset.SOPClassUID = _CLASSES[modality]
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    if modality == "CT":
        dataset.KVP, dataset.ConvolutionKernel, dataset.RescaleType = 120, "B40f", "HU"
    if modality == "MR":
        dataset.MagneticFieldStrength, dataset.RepetitionTime, dataset.EchoTime = 3, 2300, 2.98
    if modality == "PT":
        dataset.Units, intercept = "BQML", 0.0
    if modality == "MR":
        slope, intercept = 1.0, 0.0
    else:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = values.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    stored = np.round((values.astype(np.float64) - intercept) / slope)
    dataset.add_new("PixelData", "OW", stored.astype("<u2").tobytes())
    return dataset


def _identify(dataset: Dataset, modality: str, study: str, series: str, patient: str, number: int) -> None:
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, patient, BIRTH_DATE
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = DATE
    dataset.StudyInstanceUID = new_uid(study)
    dataset.FrameOfReferenceUID = new_uid(study, "frame of reference")
    dataset.SeriesInstanceUID = new_uid(study, series)
    dataset.SOPInstanceUID = new_uid(study, series, modality, number)


def _instance_number(dataset: Dataset, index: int, number: int, numbers: Sequence[int] | None) -> None:
    if numbers is not None:
        dataset.InstanceNumber = numbers[index] if numbers else number


def _place(
    dataset: Dataset,
    spacing: Sequence[float],
    corner: ArrayLike,
    orientation: Sequence[float],
    long_decimals: bool,
) -> None:
    columns, rows, slices = (float(value) for value in spacing)
    decimals = {
        "PixelSpacing": [rows, columns],
        "ImagePositionPatient": np.asarray(corner, dtype=float).tolist(),
        "ImageOrientationPatient": [float(value) for value in orientation],
        "SliceThickness": [slices],
    }
    for keyword, values in decimals.items():
        texts = [f"{value:.18f}" if long_decimals else _decimal(value) for value in values]
        tag = pydicom.tag.Tag(keyword)
        dataset[tag] = pydicom.DataElement(tag, "DS", texts, validation_mode=pydicom.config.IGNORE)


def _decimal(value: float) -> str:
    return str(pydicom.valuerep.DSfloat(value, auto_format=True))


def _measures(spacing: Sequence[float]) -> Dataset:
    columns, rows, slices = (float(value) for value in spacing)
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [rows, columns], slices
    return measures


def _frame(corner: NDArray[np.float64]) -> Dataset:
    frame = Dataset()
    frame.PlanePositionSequence = [Dataset()]
    frame.PlanePositionSequence[0].ImagePositionPatient = [_decimal(value) for value in corner]
    return frame


def _write(file: Path, dataset: Dataset, transfer_syntax: str, change: Change | None, index: int) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    whole = FileDataset(str(file), dataset, file_meta=meta, preamble=bytes(128))
    if transfer_syntax != uid.ExplicitVRLittleEndian:
        whole.compress(transfer_syntax, generate_instance_uid=False)
    if change is not None:
        change(whole, index)
    whole.save_as(file, enforce_file_format=True)
    return file


def write_structures(
    file: Path,
    structures: dict[str, list[Any]],
    *,
    kind: str = "CLOSED_PLANAR",
    series: str = "series",
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Write an RT structure set: contours by name, each of points ``(N, 3)``, LPS mm."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.Modality = uid.RTStructureSetStorage, "RTSTRUCT"
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = new_uid(file), new_uid(file, "series")
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.StudyDate = PLANTED
    dataset.StudyInstanceUID = new_uid("study")
    dataset.ReferencedFrameOfReferenceSequence = [frame_of_reference(series)]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = new_uid("study", "frame of reference")
        drawn.ReferencedROINumber = number
        drawn.ContourSequence = [contour(points, kind) for points in contours]
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    if change is not None:
        change(dataset)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    FileDataset(str(file), dataset, file_meta=meta, preamble=bytes(128)).save_as(file, enforce_file_format=True)
    return file


def frame_of_reference(series: str) -> Dataset:
    item, study, referenced = Dataset(), Dataset(), Dataset()
    item.FrameOfReferenceUID = new_uid("study", "frame of reference")
    referenced.SeriesInstanceUID = new_uid("study", series)
    study.RTReferencedSeriesSequence = [referenced]
    item.RTReferencedStudySequence = [study]
    return item


def contour(points: Any, kind: str) -> Dataset:
    item = Dataset()
    item.ContourGeometricType = kind
    item.NumberOfContourPoints = len(points)
    item.ContourData = [f"{value:.6f}" for value in np.ravel(points)]
    return item


def in_space(points: Any, orientation: Sequence[float] = OBLIQUE) -> NDArray[np.float64]:
    """``(column, row, slice)`` of points to LPS mm."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    directions = np.stack([row, column, np.cross(row, column)], axis=1) * np.array(SPACING)
    lps: NDArray[np.float64] = np.asarray(points) @ directions.T + np.array(ORIGIN)
    return lps


def box(columns: tuple[float, float], rows: tuple[float, float], place: float) -> NDArray[np.float64]:
    (left, right), (top, bottom) = columns, rows
    return np.array([[left, top, place], [right, top, place], [right, bottom, place], [left, bottom, place]])


BOX = box((0.5, 4.5), (0.5, 2.5), 2)


def box_structures(
    file: Path, images: list[Path], origin: Sequence[float] = (-95.0, -110.0, -600.0), label: str = "left lung"
) -> Path:
    """A structure set of a box on slices 3 to 5, of voxels of 10 mm."""
    headers = [pydicom.dcmread(image) for image in images]
    x, y, z = (np.array(origin) + 10.0 * np.array((12, 4, 3))).tolist()
    box = [(x, y), (x + 40, y), (x + 40, y + 40), (x, y + 40)]
    contours = [[(*corner, z + 10 * k) for corner in box] for k in range(3)]

    def refer(dataset: Dataset) -> None:
        frame = dataset.ReferencedFrameOfReferenceSequence[0]
        series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
        series.SeriesInstanceUID, series.ContourImageSequence = headers[0].SeriesInstanceUID, []
        for header in headers:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
            series.ContourImageSequence.append(item)
        frame.FrameOfReferenceUID = headers[0].FrameOfReferenceUID
        dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = headers[0].FrameOfReferenceUID

    return write_structures(file, {label: contours}, change=refer)
