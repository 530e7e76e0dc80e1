"""Synthetic volumes as DICOM: the image series, the mask as a segmentation that references it, and the sidecar."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fibldm import __version__
from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import hash_value, read_json, write_json
from fibldm.volumes.dicom.label_codes import LabelCodes, load_label_codes
from fibldm.volumes.dicom.patient_position import PATIENT_POSITIONS, state_position
from fibldm.volumes.dicom.segmentation_writer import write_segmentation
from fibldm.volumes.dicom.template import Modality, Template, read_template
from fibldm.volumes.dicom.writer import NOTICE, Identity, in_viewing_order, make_series, quantisation_step, write_series
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar

_MODALITY_BY_UNITS: dict[str, Modality] = {"HU": "ct", "SUV": "pt", "arbitrary": "mr"}


@dataclass(frozen=True)
class DicomOutput:
    """How synthetic volumes leave as DICOM; usually made by `read`.

    Attributes:
        codes: coded meanings of labels.
        template: gives technical tags, or ``None``.
        position: Patient Position, how a patient would lie in the scanner; no grid tells it. ``None`` takes that of the
            template, or leaves it empty.

    Raises:
        FibldmError: an unknown position, or another one than the template's.
    """

    codes: LabelCodes
    template: Template | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        if self.position is None:
            return
        if self.position not in PATIENT_POSITIONS:
            raise unknown_choice("`patient_position`", self.position, PATIENT_POSITIONS)
        stated = self.template.tags.get("PatientPosition") if self.template is not None else None
        if stated not in (None, "", self.position):
            raise FibldmError(
                f"`patient_position` must be that of the template, {stated}; got {self.position}", "leave it out"
            )

    @classmethod
    def read(
        cls, template: Path | None = None, label_codes: Path | None = None, position: str | None = None
    ) -> "DicomOutput":
        """From the folder of a template series and a table of label codes; ``None`` does without.

        Raises:
            FibldmError: the series, the table or the position is refused, see `read_template`, `load_label_codes`.
        """
        return cls(load_label_codes(label_codes), read_template(template) if template is not None else None, position)

    def fingerprint(self, names: Mapping[int, str]) -> str:
        """SHA-256 of what decides the files besides the volume: the template's tags, the labels' codes, position."""
        tags = self.template.tags.to_json_dict() if self.template is not None else None
        decisive = [tags, sorted(names.items()), repr(self.codes.find(names.values()))]
        return hash_value([*decisive, self.position] if self.position else decisive)

    def check(self, grid: Grid, names: Mapping[int, str], intensity: Intensity) -> None:
        """See that a volume can be written, before it is made.

        Raises:
            FibldmError: neither CT, MR nor PET, a label without coded meaning, several channels, sheared axes, or a
                template that does not fit.
        """
        self.codes.find(names.values())
        modality, _ = _modality(intensity), _value_range(intensity)
        in_viewing_order(Volume(np.broadcast_to(np.uint8(0), grid.shape), grid.affine))
        if self.template is not None:
            self.template.check(modality, grid)

    def check_whole(self, folder: Path) -> None:
        """See that a series written before is all there, with its mask.

        Raises:
            FibldmError: slices or the segmentation are gone.
        """
        slices = read_json(sidecar(folder))["dicom"]["slices"]
        there = len(list(folder.glob("*.dcm")))
        if there != slices or not _mask_file(folder).is_file():
            raise FibldmError(
                f"{folder} must hold {slices} slices, and {_mask_file(folder)} its mask; {there} slices are there",
                "remove the folder and its sidecar, and run the same command again",
            )

    def write(
        self,
        folder: Path,
        volume: Volume,
        labels: Volume,
        *,
        names: Mapping[int, str],
        intensity: Intensity,
        request: Mapping[str, Any],
        provenance: Mapping[str, Any],
        whole: bool = False,
        notice: str = NOTICE,
    ) -> None:
        """Write the series ``folder``, its mask ``masks/<folder name>.dcm`` beside it, and the sidecar.

        The series comes last and whole, so that none is ever without mask and sidecar.

        Args:
            folder: of the series; must not exist.
            volume: in the units of ``intensity``.
            labels: the mask it follows, on the same grid.
            names: of the labels by value.
            intensity: rule of the volume.
            request: everything that decides the files; the same request gives the same UIDs.
            provenance: JSON-able, for the sidecar.
            whole: see `make_series`.
            notice: see `make_series`.

        Raises:
            FibldmError: see `make_series`, `write_segmentation`, `write_series`.
        """
        modality, value_range = _modality(intensity), _value_range(intensity)
        identity = Identity(patient=str(request["mask_sha256"]), key=hash_value([__version__, request]))
        series = make_series(
            volume,
            modality=modality,
            value_range=value_range,
            identity=identity,
            template=self.template,
            whole=whole,
            notice=notice,
        )
        if self.position:
            for item in series:
                state_position(item, self.position)
        write_segmentation(
            _mask_file(folder),
            labels,
            names=names,
            meanings=self.codes.find(names.values()),
            series=series,
            identity=identity,
        )
        stored = {
            "quantisation_step": 1.0 if whole else quantisation_step(modality, value_range),
            "template": self.template is not None,
            "slices": len(series),
        }
        write_json(sidecar(folder), {"synthetic": True, **request, **provenance, "dicom": stored} | {"synthetic": True})
        write_series(folder, series)


def _mask_file(folder: Path) -> Path:
    return folder.parent / "masks" / f"{folder.name}.dcm"


def _modality(intensity: Intensity) -> Modality:
    if intensity.kind == "range":
        raise FibldmError(
            "DICOM output needs a run of CT, MR or PET; this one is of the modality other",
            "write NIfTI: leave out `format`",
        )
    return _MODALITY_BY_UNITS[intensity.units]


def _value_range(intensity: Intensity) -> tuple[float, float]:
    low, high = intensity.output_range
    if np.ndim(low) or np.ndim(high):
        raise FibldmError("a DICOM series holds one channel; this run gives several", "use `format` nifti")
    return float(low), float(high)  # type: ignore[arg-type]
