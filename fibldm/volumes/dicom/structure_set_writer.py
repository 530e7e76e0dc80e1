"""Writing the mask of a synthetic series as an RT structure set: closed planar contours on the slices of the series.

Implicit VR Little Endian, as with explicit VR no contour could have more than 65534 bytes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as ItemSequence
from pydicom.sr.coding import Code
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

from fibldm import __version__
from fibldm.files import atomic_path
from fibldm.volumes.dicom.label_codes import LabelCode
from fibldm.volumes.dicom.outlines import outlines
from fibldm.volumes.dicom.segmentation_writer import segment_values
from fibldm.volumes.dicom.writer import Identity, equipment, in_viewing_order, mark
from fibldm.volumes.grid import LPS_TO_RAS, Volume

_STUDY = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, by which structure sets refer to a study (PS3.3, C.8.8.5)."""
_FINEST = 1000
"""Steps of a voxel that a stored coordinate has at least."""
_OF_SERIES = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "FrameOfReferenceUID"),
    *("PositionReferenceIndicator", "SpecificCharacterSet"),
)


def write_structure_set(
    file: Path,
    labels: Volume,
    *,
    names: Mapping[int, str],
    meanings: Mapping[str, LabelCode],
    series: Sequence[Dataset],
    identity: Identity,
) -> None:
    """Write the mask of a series as an RT structure set that references it, slice by slice.

    Structures have the numbers, names, codes and colours of the segments that `write_segmentation` would write.
    Whoever fills the polygons on the slices of the series has the mask again, see `fibldm.volumes.dicom.outlines`.

    Args:
        file: ends in ``.dcm``.
        labels: on the grid that the series was made from.
        names: of the labels by value; they become the structures' names.
        meanings: coded, by name, from `fibldm.volumes.dicom.label_codes.LabelCodes.find`.
        series: what `make_series` gave for the same grid.
        identity: of the series.

    Raises:
        FibldmError: no label occurs, one has no name, or the file cannot be written.
    """
    turned = in_viewing_order(labels)
    values = segment_values(turned, names, "an RT structure set")
    found = [(number, names[value], value) for number, value in enumerate(values, start=1)]
    dataset = _header(series, identity)
    frame = series[0].FrameOfReferenceUID
    dataset.StructureSetROISequence = ItemSequence([_structure(number, name, frame) for number, name, _ in found])
    dataset.ROIContourSequence = ItemSequence()
    for number, name, value in found:
        drawn = Dataset()
        drawn.ROIDisplayColor = list(meanings[name].colour)
        drawn.ContourSequence = ItemSequence(_contours(turned, value, series))
        drawn.ReferencedROINumber = number
        dataset.ROIContourSequence.append(drawn)
    dataset.RTROIObservationsSequence = ItemSequence([_observed(number, meanings[name]) for number, name, _ in found])
    with atomic_path(file) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _header(series: Sequence[Dataset], identity: Identity) -> Dataset:
    """All but the structures."""
    dataset = Dataset()
    for keyword in _OF_SERIES:
        if keyword in series[0]:
            dataset[keyword] = series[0][keyword]
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = identity.uid("structure set")
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesInstanceUID = identity.uid("structure set", "series")
    dataset.SeriesNumber, dataset.InstanceNumber = 3, 1
    dataset.SeriesDescription = "SYNTHETIC mask"
    dataset.OperatorsName = None
    dataset.Manufacturer = dataset.ManufacturerModelName = "FibLDM"
    dataset.SoftwareVersions = dataset.DeviceSerialNumber = __version__
    dataset.ContributingEquipmentSequence = ItemSequence([equipment()])
    mark(dataset)
    dataset.StructureSetLabel = "SYNTHESIS_MASK"
    dataset.StructureSetDescription = "Label mask that the image was drawn from"
    dataset.StructureSetDate = dataset.StructureSetTime = None
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.ReferencedFrameOfReferenceSequence = ItemSequence([_referenced_frame(series)])
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def _referenced_frame(series: Sequence[Dataset]) -> Dataset:
    """The frame of reference, with study, series and all slices."""
    of_series = Dataset()
    of_series.SeriesInstanceUID = series[0].SeriesInstanceUID
    of_series.ContourImageSequence = ItemSequence([_image(item) for item in series])
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY, series[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = ItemSequence([of_series])
    frame = Dataset()
    frame.FrameOfReferenceUID = series[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = ItemSequence([study])
    return frame


def _image(item: Dataset) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = item.SOPClassUID, item.SOPInstanceUID
    return image


def _structure(number: int, name: str, frame_of_reference: str) -> Dataset:
    structure = Dataset()
    structure.ROINumber, structure.ROIName = number, name
    structure.ReferencedFrameOfReferenceUID = frame_of_reference
    structure.ROIGenerationAlgorithm = "AUTOMATIC"
    return structure


def _contours(turned: Volume, value: int, series: Sequence[Dataset]) -> Iterator[Dataset]:
    """The polygons of a label, slice after slice, LPS mm."""
    to_lps = LPS_TO_RAS @ turned.affine
    decimals = math.ceil(-math.log10(min(turned.grid.spacing) / _FINEST))
    number = 0
    for k, item in enumerate(series):
        for polygon in outlines(turned.array[:, :, k] == value):
            number += 1
            corners = np.column_stack([polygon, np.full(len(polygon), float(k))])
            yield _contour(number, nibabel.affines.apply_affine(to_lps, corners).round(decimals), item)


def _contour(number: int, corners: NDArray[np.float64], item: Dataset) -> Dataset:
    contour = Dataset()
    contour.ContourImageSequence = ItemSequence([_image(item)])
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(corners)
    contour.ContourNumber = number
    contour.ContourData = (corners.ravel() + 0.0).tolist()  # no negative zero
    return contour


def _observed(number: int, meaning: LabelCode) -> Dataset:
    """What a structure is: its codes; nothing is known of its part in a treatment."""
    observed = Dataset()
    observed.ObservationNumber = observed.ReferencedROINumber = number
    observed.SegmentedPropertyCategoryCodeSequence = ItemSequence([_code(meaning.category)])
    kind = _code(meaning.type)
    if meaning.modifier:
        kind.SegmentedPropertyTypeModifierCodeSequence = ItemSequence([_code(meaning.modifier)])
    observed.RTROIIdentificationCodeSequence = ItemSequence([kind])
    observed.RTROIInterpretedType = observed.ROIInterpreter = None
    return observed


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
