"""Writing synthetic volumes as DICOM: a CT, MR or PET series, marked as synthetic.

Nothing is resampled: axes are flipped and swapped to DICOM's customary viewing order within the volume's own slices,
so that a reader finds the same voxels at the same places. UIDs follow from a key, so the same request gives the same
series again; patients are invented, and no date is written.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import ContributingEquipment
from nibabel import orientations
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as ItemSequence
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat, format_number_as_ds

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.files import atomic_folder, hash_value
from fibldm.volumes.dicom.patient_position import state_position
from fibldm.volumes.dicom.template import Modality, Template
from fibldm.volumes.grid import LPS_TO_RAS, Volume, shear

_VIEWING_ORDER = {"R": "PIR", "A": "LIP", "S": "LPS"}
"""By the anatomical axis of the slices: where columns, rows and slices run, as radiologists look at them."""
_SHEAR_TOLERANCE = 1e-4
_INT16 = np.iinfo(np.int16)
_UINT16 = np.iinfo(np.uint16)
NOTICE = "Synthetic image drawn from a label mask; no patient was imaged. The mask may carry a patient's anatomy."


@dataclass(frozen=True)
class Identity:
    """Whom and what a synthetic series is: invented, but the same whenever the same is asked for.

    Attributes:
        patient: any text; volumes of one mask share it, as they share its anatomy.
        key: any text; of everything that decides the volume. Equal keys give equal UIDs.
    """

    patient: str
    key: str

    @property
    def patient_id(self) -> str:
        """Twelve hexadecimal digits that say nothing of ``patient``."""
        return hash_value(["patient", self.patient])[:12]

    def uid(self, *names: str) -> UID:
        """A UID of this series for each list of names."""
        return generate_uid(entropy_srcs=["fibldm", self.key, *names])


def make_series(
    volume: Volume,
    *,
    modality: Modality,
    value_range: tuple[float, float],
    identity: Identity,
    template: Template | None = None,
    whole: bool = False,
    notice: str = NOTICE,
) -> list[Dataset]:
    """The slices of a synthetic series, in order along their normal, ready for `write_series`.

    Args:
        volume: CT in whole HU, stored as such; MR in arbitrary units and PET in SUV by body weight, stored in
            65536 steps of ``value_range``. Its third axis becomes that of the slices.
        modality: "ct", "mr" or "pt".
        value_range: smallest and largest value that the model can give; also the window shown at first.
        identity: decides patient and UIDs.
        template: gives technical tags; must fit, see `Template.check`.
        whole: MR is in whole numbers, and stored as such.
        notice: what the series says of how it was made.

    Raises:
        FibldmError: sheared axes, CT that is no whole HU, values outside the range, or a template that does not fit.
    """
    if template is not None:
        template.check(modality, volume.grid)
    turned = in_viewing_order(volume)
    stored, slope, intercept = _stored(turned.array, modality, value_range, whole=whole)
    shared = _shared(modality, identity, template)
    shared.DerivationDescription = shared.ImageComments = notice
    shared.update(_placed(turned, template))
    shared.RescaleSlope, shared.RescaleIntercept = _decimal(slope), _decimal(intercept)
    if modality != "pt":
        shared.RescaleType = "HU" if modality == "ct" else "US"
    shared.WindowCenter, shared.WindowWidth = _decimal(sum(value_range) / 2), _decimal(value_range[1] - value_range[0])
    if modality == "pt":
        shared.NumberOfSlices = stored.shape[2]
    slices = [_slice(shared, stored[:, :, k], k, turned, identity) for k in range(stored.shape[2])]
    for number, dataset in enumerate(slices if modality == "pt" else (), start=1):
        dataset.ImageIndex = number
    return slices


def quantisation_step(modality: Modality, value_range: tuple[float, float]) -> float:
    """Distance of neighbouring stored values: 1 HU, or 1/65535 of the range of MR or PET."""
    return 1.0 if modality == "ct" else float(_decimal((value_range[1] - value_range[0]) / _UINT16.max))


def write_series(folder: Path, slices: Sequence[Dataset]) -> None:
    """Write a series as ``0001.dcm`` and so on into a new folder, all of it or nothing.

    Raises:
        FibldmError: the folder holds something already, or cannot be written.
    """
    with atomic_folder(folder) as temporary:
        for number, dataset in enumerate(slices, start=1):
            with (temporary / f"{number:04d}.dcm").open("wb") as stream:
                dataset.save_as(stream, enforce_file_format=True)
                stream.flush()
                os.fsync(stream.fileno())


def in_viewing_order(volume: Volume) -> Volume:
    """The volume with columns, rows and slices as its axes; right-handed, so that slices run along their normal.

    Raises:
        FibldmError: the axes are not at right angles.
    """
    if (cosine := shear(volume.affine)) > _SHEAR_TOLERANCE:
        raise FibldmError(
            f"a DICOM series needs voxel axes at right angles; two of them are {np.degrees(np.arcsin(cosine)):.2f} "
            "degrees off",
            "resample the mask to a grid without shear, or write NIfTI",
        )
    own = orientations.io_orientation(volume.affine)
    slice_axis = "RAS"[int(own[2, 0])]
    turned = volume.turned(orientations.ornt_transform(own, orientations.axcodes2ornt(_VIEWING_ORDER[slice_axis])))
    # between two anatomical axes the closest order may mirror the grid
    if np.linalg.det(turned.affine[:3, :3]) < 0:
        return turned.turned(np.array([[0, 1], [1, 1], [2, -1]]))
    return turned


def _stored(
    array: NDArray[Any], modality: Modality, value_range: tuple[float, float], *, whole: bool
) -> tuple[NDArray[np.int16] | NDArray[np.uint16], float, float]:
    """Stored values, and slope and intercept that turn them back."""
    if modality == "ct" or whole:
        if not np.array_equal(np.rint(array), array) or array.min() < _INT16.min or array.max() > _INT16.max:
            units = "HU" if modality == "ct" else "numbers"
            raise FibldmError(
                f"{modality.upper()} must be whole {units} within [{_INT16.min}, {_INT16.max}] to be written as DICOM"
            )
        return array.astype(np.int16), 1.0, 0.0
    slope, intercept = quantisation_step(modality, value_range), float(_decimal(value_range[0]))
    if modality == "pt" and intercept:
        raise FibldmError(
            f"the window of PET must begin at 0 to be written as DICOM, which has no other; it begins at {intercept:g}",
            "write NIfTI: leave out `format`",
        )
    steps = np.rint((array.astype(np.float64) - intercept) / slope)
    if not (steps >= 0).all() or not (steps <= _UINT16.max).all():
        low, high = value_range
        raise FibldmError(
            f"{modality.upper()} must lie within its range [{low:g}, {high:g}] to be written as DICOM; "
            f"it reaches from {array.min():g} to {array.max():g}"
        )
    return steps.astype(np.uint16), slope, intercept


def _shared(modality: Modality, identity: Identity, template: Template | None) -> Dataset:
    """What all slices say: the type 1 and 2 attributes of CT or MR images, technical tags, and the marks."""
    shared = Dataset()
    for keyword in (*_EMPTY, *_EMPTY_OF[modality]):
        setattr(shared, keyword, None)
    shared.SpecificCharacterSet = "ISO_IR 192"
    shared.SOPClassUID = _CLASSES[modality]
    shared.Modality = modality.upper()
    shared.StudyInstanceUID, shared.SeriesInstanceUID = identity.uid("study"), identity.uid("series")
    shared.FrameOfReferenceUID = identity.uid("frame of reference")
    shared.PatientName = f"SYNTHETIC^{identity.patient_id}"
    shared.PatientID = f"SYNTHETIC-{identity.patient_id}"
    shared.SeriesNumber = 1
    if modality == "mr":
        # the terms for a research sequence and for none of the known variants
        shared.ScanningSequence, shared.SequenceVariant = "RM", "NONE"
    if modality == "pt":
        shared.update(_of_pet())
    if template is not None:
        shared.update(template.tags)
    if modality == "pt":
        state_position(shared, str(shared.get("PatientPosition") or ""))
    mark(shared)
    shared.ImageType = _IMAGE_TYPES[modality]
    shared.StudyDescription, shared.SeriesDescription = "SYNTHETIC", f"SYNTHETIC {modality.upper()}"
    shared.BurnedInAnnotation, shared.LossyImageCompression = "NO", "00"
    shared.Manufacturer = shared.ManufacturerModelName = "FibLDM"
    shared.SoftwareVersions = __version__
    shared.ContributingEquipmentSequence = ItemSequence([equipment()])
    return shared


_EMPTY = (
    *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
    *("ReferringPhysicianName", "Laterality", "PatientPosition", "PositionReferenceIndicator", "AcquisitionNumber"),
)
_EMPTY_OF: dict[Modality, tuple[str, ...]] = {
    "ct": ("KVP",),
    "mr": ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"),
    "pt": (
        *("CollimatorType", "CorrectedImage", "AcquisitionDate", "AcquisitionTime", "ActualFrameDuration"),
        "RadiopharmaceuticalInformationSequence",
    ),
}
"""Type 2 attributes: they must be there, and are empty where nothing is known."""


_CLASSES = {"ct": CTImageStorage, "mr": MRImageStorage, "pt": PositronEmissionTomographyImageStorage}
_IMAGE_TYPES = {
    "ct": ["DERIVED", "SECONDARY", "AXIAL"],
    "mr": ["DERIVED", "SECONDARY", "OTHER"],
    "pt": ["DERIVED", "PRIMARY"],
}
"""The standard knows no SECONDARY of PET."""
_NO_DATE, _NO_TIME = "19000101", "000000"


def _of_pet() -> Dataset:
    """What a PET series must say. Date and time may not be empty: they are the same in all, and tell nothing."""
    pet = Dataset()
    pet.SeriesDate, pet.SeriesTime, pet.FrameReferenceTime = _NO_DATE, _NO_TIME, 0
    pet.Units, pet.SUVType, pet.CountsSource = "GML", "BW", "EMISSION"
    pet.SeriesType, pet.DecayCorrection = ["STATIC", "IMAGE"], "NONE"
    return pet


def mark(dataset: Dataset) -> None:
    """Say that it is synthetic and not for care; there is no way to leave it out."""
    dataset.SyntheticData = "YES"
    dataset.ContentQualification = "RESEARCH"


def equipment() -> ContributingEquipment:
    """FibLDM as the equipment that synthesised."""
    return ContributingEquipment(
        "FibLDM",
        codes.DCM.SynthesizingEquipment,
        manufacturer_model_name="FibLDM",
        software_versions=__version__,
        contribution_description="3-D latent diffusion that follows a label mask",
    )


def _placed(turned: Volume, template: Template | None) -> Dataset:
    """Spacing and directions of all slices."""
    placed = Dataset()
    columns, rows, slices = turned.grid.spacing
    directions = (LPS_TO_RAS @ turned.affine)[:3, :2] / (columns, rows)
    placed.PixelSpacing = [_decimal(rows), _decimal(columns)]
    placed.ImageOrientationPatient = [_decimal(value) for value in directions.T.ravel()]
    placed.SpacingBetweenSlices = _decimal(slices)
    if template is None or "SliceThickness" not in template.tags:
        placed.SliceThickness = _decimal(slices)
    return placed


def _slice(shared: Dataset, stored: NDArray[Any], k: int, turned: Volume, identity: Identity) -> Dataset:
    """Slice ``k`` of stored values ``(columns, rows)``; its position is the centre of the first voxel, LPS mm."""
    dataset = Dataset()
    dataset.update(shared)
    dataset.InstanceNumber = k + 1
    dataset.SOPInstanceUID = identity.uid("slice", str(k))
    position = (LPS_TO_RAS @ turned.affine @ (0, 0, k, 1))[:3]
    dataset.ImagePositionPatient = [_decimal(value) for value in position]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.set_pixel_data(np.ascontiguousarray(stored.T), "MONOCHROME2", 16, generate_instance_uid=False)
    return dataset


def _decimal(value: float) -> DSfloat:
    """The value as it will be read: rounded to the 16 characters that DICOM allows."""
    return DSfloat(format_number_as_ds(float(value)))
