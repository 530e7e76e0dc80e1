"""Synthetic volumes as DICOM: image series, their masks as objects that reference them, and the sidecars."""

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
from fibldm.volumes.dicom.structure_set_writer import write_structure_set
from fibldm.volumes.dicom.template import Modality, Template, read_template
from fibldm.volumes.dicom.writer import NOTICE, Identity, in_viewing_order, make_series, quantisation_step, write_series
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar

_MODALITY_BY_UNITS: dict[str, Modality] = {"HU": "ct", "SUV": "pt", "arbitrary": "mr"}

MASK_FORMATS = ("seg", "rtstruct", "both")
"""What a mask goes out as: a segmentation, an RT structure set, or both of them."""

MASKS, STRUCTURES = "masks", "structures"
"""Folders of segmentations and of RT structure sets, beside those of series."""


@dataclass(frozen=True)
class DicomOutput:
    """How synthetic volumes leave as DICOM; usually made by `read`.

    Attributes:
        codes: coded meanings of labels.
        template: gives technical tags, or ``None``.
        position: Patient Position, how a patient would lie in the scanner; no grid tells it. ``None`` takes that of the
            template, or leaves it empty.
        mask_format: one of `MASK_FORMATS`.

    Raises:
        FibldmError: an unknown position, or another one than the template's; or an unknown format of masks.
    """

    codes: LabelCodes
    template: Template | None = None
    position: str | None = None
    mask_format: str = "seg"

    def __post_init__(self) -> None:
        if self.mask_format not in MASK_FORMATS:
            raise unknown_choice("`mask_format`", self.mask_format, MASK_FORMATS)
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
        cls,
        template: Path | None = None,
        label_codes: Path | None = None,
        position: str | None = None,
        mask_format: str = "seg",
    ) -> "DicomOutput":
        """From the folder of a template series and a table of label codes; ``None`` does without.

        Raises:
            FibldmError: the series, the table, the position or the format of masks is refused, see `read_template`,
                `load_label_codes`.
        """
        read = read_template(template) if template is not None else None
        return cls(load_label_codes(label_codes), read, position, mask_format)

    def fingerprint(self, names: Mapping[int, str]) -> str:
        """SHA-256 of what decides the files besides the volume: the template's tags, labels' codes, position, objects.

        What is not asked for is no part of it, so that it is the same as before there was a choice.
        """
        tags = self.template.tags.to_json_dict() if self.template is not None else None
        decisive = [tags, sorted(names.items()), repr(self.codes.find(names.values()))]
        decisive += [self.position] if self.position else []
        return hash_value(decisive + ([f"masks as {self.mask_format}"] if self.mask_format != "seg" else []))

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
            FibldmError: slices or objects of the mask are gone.
        """
        slices = read_json(sidecar(folder))["dicom"]["slices"]
        there = len(list(folder.glob("*.dcm")))
        wanted = [_place(folder, kind) for kind in self._kinds]
        if there != slices or not all(file.is_file() for file in wanted):
            raise FibldmError(
                f"{folder} must hold {slices} slices, and {' and '.join(map(str, wanted))} its mask; {there} slices "
                "are there",
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
        """Write the series ``folder``, its mask beside it, and the sidecar.

        The mask is ``masks/<folder name>.dcm``, a segmentation, ``structures/<folder name>.dcm``, an RT structure set,
        or both. The series comes last and whole, so that none is ever without mask and sidecar.

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
            FibldmError: see `make_series`, `write_segmentation`, `write_structure_set`, `write_series`.
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
        for kind in self._kinds:
            _WRITERS[kind](
                _place(folder, kind),
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

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(_WRITERS) if self.mask_format == "both" else (self.mask_format,)


_WRITERS = {"seg": write_segmentation, "rtstruct": write_structure_set}
_FOLDERS = {"seg": MASKS, "rtstruct": STRUCTURES}


def mask_files(folder: Path) -> list[Path]:
    """The objects that lie there of the mask of a series, which is a folder: segmentation, then RT structure set."""
    return [file for file in (_place(folder, kind) for kind in _FOLDERS) if file.is_file()]


def _place(folder: Path, kind: str) -> Path:
    return folder.parent / _FOLDERS[kind] / f"{folder.name}.dcm"


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
