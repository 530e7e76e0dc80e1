"""Writing the mask of a synthetic series as a DICOM segmentation that references it, with coded meanings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as ItemSequence
from pydicom.sr.codedict import codes

from fibldm import UNKNOWN_LABEL, __version__
from fibldm.errors import FibldmError
from fibldm.files import atomic_path
from fibldm.volumes.dicom.label_codes import LabelCode
from fibldm.volumes.dicom.writer import Identity, equipment, in_viewing_order, mark
from fibldm.volumes.grid import Volume


def write_segmentation(
    file: Path,
    labels: Volume,
    *,
    names: Mapping[int, str],
    meanings: Mapping[str, LabelCode],
    series: Sequence[Dataset],
    identity: Identity,
) -> None:
    """Write the mask of a series as a binary DICOM segmentation that references it.

    Background (0) and unknown (255) are no segments, nor are labels that do not occur.

    Args:
        file: ends in ``.dcm``.
        labels: on the grid that the series was made from.
        names: of the labels by value; they become the segments' labels.
        meanings: coded, by name, from `fibldm.volumes.dicom.label_codes.LabelCodes.find`.
        series: what `make_series` gave for the same grid.
        identity: of the series.

    Raises:
        FibldmError: no label occurs, one has no name, or the file cannot be written.
    """
    turned = in_viewing_order(labels)
    values = segment_values(turned, names, "a DICOM segmentation")
    found = [names[value] for value in values]
    segments = [_segment(number, name, meanings[name]) for number, name in enumerate(found, start=1)]
    segmentation = Segmentation(
        source_images=series,
        pixel_array=_numbered(turned.array, values).transpose(2, 1, 0),
        segmentation_type="BINARY",
        segment_descriptions=segments,
        omit_empty_frames=False,  # the file alone then gives the whole grid of the mask again
        series_instance_uid=identity.uid("segmentation", "series"),
        series_number=2,
        sop_instance_uid=identity.uid("segmentation"),
        instance_number=1,
        manufacturer="FibLDM",
        manufacturer_model_name="FibLDM",
        software_versions=__version__,
        device_serial_number=__version__,
        content_label="SYNTHESIS_MASK",
        content_description="Label mask that the image was drawn from",
        contributing_equipment=[equipment()],
        series_description="SYNTHETIC mask",
        content_qualification="RESEARCH",
    )
    _mark_segmentation(segmentation, identity)
    with atomic_path(file) as temporary:
        segmentation.save_as(temporary, enforce_file_format=True)


def segment_values(labels: Volume, names: Mapping[int, str], what: str) -> list[int]:
    """The labels that occur, but background (0) and unknown (255), in the order of their values.

    Args:
        labels: any.
        names: of the labels by value.
        what: how an error calls the object that is to be written.

    Raises:
        FibldmError: there is none, or one has no name.
    """
    values = [int(value) for value in np.unique(labels.array) if value not in (0, UNKNOWN_LABEL)]
    nameless = [str(value) for value in values if value not in names]
    if nameless or not values:
        raise FibldmError(
            f"{what} needs at least one label, and a name for each; "
            + (f"there is none for {', '.join(nameless)}" if nameless else "the mask is empty")
        )
    return values


def _mark_segmentation(segmentation: Segmentation, identity: Identity) -> None:
    """Mark it, and take out what highdicom adds: times of writing nobody asks for, a scanner, a UID by chance."""
    mark(segmentation)
    del segmentation.InstanceCreationDate, segmentation.InstanceCreationTime
    acquisition = codes.DCM.AcquisitionEquipment.value
    equipments: list[Dataset] = [
        item
        for item in segmentation.ContributingEquipmentSequence
        if item.PurposeOfReferenceCodeSequence[0].CodeValue != acquisition
    ]
    for item in equipments:
        item.pop("ContributionDateTime", None)
    segmentation["ContributingEquipmentSequence"].value = ItemSequence(equipments)
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = identity.uid("segmentation", "dimensions")


def _segment(number: int, name: str, meaning: LabelCode) -> SegmentDescription:
    description = SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=meaning.category,
        segmented_property_type=meaning.type,
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name="FibLDM, mask of a synthesis", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
        anatomic_regions=[meaning.region] if meaning.region else None,
        display_color=CIELabColor.from_rgb(*meaning.colour),
    )
    if meaning.modifier:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(meaning.modifier)]
    return description


def _numbered(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
    """Labels as segment numbers, 1 for the first of ``values``; 0 for all others."""
    numbers = np.zeros(UNKNOWN_LABEL + 1, dtype=np.uint8)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    numbered: NDArray[np.uint8] = numbers[labels]
    return numbered
