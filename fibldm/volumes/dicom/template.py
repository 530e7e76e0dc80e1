"""What a synthetic DICOM series may take from a real one: where the voxels lie, and how such images are acquired.

Only the tags listed here are ever taken; nothing that tells a patient, study, institution, device or date is among
them, nor private tags or free text but the kernel's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import pydicom
from highdicom.spatial import get_series_volume_positions
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from pydicom.valuerep import DSfloat, format_number_as_ds

from fibldm.errors import FibldmError
from fibldm.volumes.grid import LPS_TO_RAS, Grid

Modality = Literal["ct", "mr", "pt"]

TECHNICAL: dict[Modality, tuple[str, ...]] = {
    "ct": (
        *("PatientPosition", "SliceThickness", "ScanOptions", "KVP"),
        *("ConvolutionKernel", "FilterType", "ReconstructionDiameter", "DataCollectionDiameter"),
    ),
    "mr": (
        *("PatientPosition", "SliceThickness", "ScanOptions", "ScanningSequence"),
        *("SequenceVariant", "MRAcquisitionType", "MagneticFieldStrength", "RepetitionTime", "EchoTime"),
        *("InversionTime", "FlipAngle", "EchoTrainLength", "NumberOfAverages", "PixelBandwidth"),
    ),
    "pt": ("PatientPosition", "SliceThickness"),
}
"""The tags that are taken, where all slices agree."""

_MODALITIES: dict[str, Modality] = {
    CTImageStorage: "ct",
    MRImageStorage: "mr",
    PositronEmissionTomographyImageStorage: "pt",
}
_PLACE_TOLERANCE_MM = 1e-2


@dataclass(frozen=True)
class Template:
    """A real series as a template.

    Attributes:
        modality: "ct", "mr" or "pt".
        grid: where its voxels lie, in canonical (RAS+) order.
        tags: the values of `TECHNICAL` in which all slices agree, and nothing else.
    """

    modality: Modality
    grid: Grid
    tags: Dataset

    def check(self, modality: Modality, grid: Grid) -> None:
        """See that a volume, in any axis order, fits the template.

        Raises:
            FibldmError: another modality, or voxels that lie elsewhere; says what differs.
        """
        if modality != self.modality:
            raise FibldmError(
                f"the template must be of the modality {modality.upper()}; it is {self.modality.upper()}",
                "give a series of the run's modality as `template`",
            )
        differences = _differences(self.grid, grid.canonical())
        if differences:
            raise FibldmError(
                f"the mask must lie on the grid of the template series; {'; '.join(differences)}",
                "draw the mask on that series, or leave `template` out",
            )


def read_template(folder: Path) -> Template:
    """The template that a folder with one series gives.

    Raises:
        FibldmError: the folder does not hold exactly one CT, MR or PET series of single-frame images, regularly spaced
            and not sheared.
    """
    slices = _headers(folder)
    kinds = {(str(header.get("SeriesInstanceUID")), str(header.get("SOPClassUID"))) for header in slices}
    if len(kinds) != 1 or not set(_MODALITIES) & {kind for _, kind in kinds}:
        raise FibldmError(
            f"a template must be a folder with exactly one CT, MR or PET series of single-frame images; "
            f"it holds {len(kinds)} {'kind' if len(kinds) == 1 else 'kinds'} of images in {len(slices)} DICOM files",
            "put the files of one series into a folder of their own",
        )
    modality = _MODALITIES[slices[0].SOPClassUID]
    return Template(modality, _grid(slices), _shared_tags(slices, TECHNICAL[modality]))


def _headers(folder: Path) -> list[Dataset]:
    if not folder.is_dir():
        raise FibldmError("a template must be a folder with the files of a DICOM series; there is no such folder")
    headers: list[Dataset] = []
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        try:
            headers.append(pydicom.dcmread(file, stop_before_pixels=True))
        except InvalidDicomError:
            continue
        except OSError as error:
            raise FibldmError("every file of a template must be readable", error.strerror or "") from error
    return headers


def _grid(slices: Sequence[Dataset]) -> Grid:
    """The canonical grid of a series; DICOM's LPS mm turned to RAS+."""
    remedy = "give a regularly spaced series without gantry tilt as `template`"
    try:
        spacing, order = get_series_volume_positions(slices)
        places = {(tuple(map(float, header.ImageOrientationPatient)), *_in_plane(header)) for header in slices}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FibldmError("a template must say where its slices lie; some do not", remedy) from error
    if spacing is None or order is None or len(places) != 1:
        raise FibldmError("the slices of a template must be parallel, alike and regularly spaced", remedy)
    ordered = [header for _, header in sorted(zip(order, slices, strict=True), key=lambda pair: pair[0])]
    first, last = (np.array(header.ImagePositionPatient, dtype=float) for header in (ordered[0], ordered[-1]))
    orientation, (row_step, column_step), (rows, columns) = next(iter(places))
    along_row, along_column = np.reshape(orientation, (2, 3))
    step = (last - first) / (len(slices) - 1) if len(slices) > 1 else np.cross(along_row, along_column) * spacing
    matrix = np.column_stack([along_row * column_step, along_column * row_step, step])
    affine = LPS_TO_RAS @ nibabel.affines.from_matvec(matrix, first)
    return Grid((columns, rows, len(slices)), affine).canonical()


def _in_plane(header: Dataset) -> tuple[tuple[float, float], tuple[int, int]]:
    rows, columns = (float(step) for step in header.PixelSpacing)
    return (rows, columns), (int(header.Rows), int(header.Columns))


def _shared_tags(slices: Sequence[Dataset], keywords: Sequence[str]) -> Dataset:
    shared = Dataset()
    for keyword in keywords:
        values = [header.get(keyword) for header in slices]
        if values[0] not in (None, "") and all(value == values[0] for value in values):
            # a decimal in at most the 16 characters that DICOM allows, whatever the template had
            decimal = slices[0][keyword].VR == "DS"
            setattr(shared, keyword, DSfloat(format_number_as_ds(float(values[0]))) if decimal else values[0])
    return shared


def _differences(template: Grid, given: Grid) -> list[str]:
    found = []
    if template.shape != given.shape:
        found.append(f"size {_listed(given.shape)} instead of {_listed(template.shape)} voxels")
    if not np.allclose(template.spacing, given.spacing, rtol=1e-3):
        found.append(f"spacing {_listed(given.spacing)} instead of {_listed(template.spacing)} mm")
    if not found:
        off = float(np.linalg.norm(template.corners - given.corners, axis=1).max())
        if off > _PLACE_TOLERANCE_MM:
            found.append(f"position or direction up to {off:.2f} mm off")
    return found


def _listed(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)
