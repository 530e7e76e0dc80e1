"""What the readers give and the layouts find: one image or mask as read, and the files of a case."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm.volumes.grid import SCANNER

if TYPE_CHECKING:
    from fibldm.volumes.dicom.acquired import AcquiredSlices

Level = Literal["error", "warning"]
Remark = tuple[Level, str]
"""What there is to say of a file, a volume or a case; an error forbids it, a warning is recorded."""
Covariate = str | float | None
Files = tuple[Path, ...]
"""The files of one image or mask: one file, or the slices of one series in any order."""

ACQUISITION = (
    "kernel",
    "slice_thickness_mm",
    "contrast",
    "tube_voltage_kv",
    "respiration",
    "field_strength_t",
    "repetition_time_ms",
    "echo_time_ms",
    "body_part",
)
"""What a reader may say of how an image was made: numbers in the unit of the name; contrast is "yes" or "no",
respiration "inspiration" or "expiration", the part of the body as the file words it, in capitals. What a file does not
state is left out, never guessed."""


_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")


def as_body_part(text: str) -> str:
    """What a file says of the part of the body, in capitals; empty where it is no code, as text may tell anything."""
    part = text.strip().upper()
    return part if _CODE.fullmatch(part) else ""


@dataclass(frozen=True)
class Scan:
    """An image or mask as read, its axes brought to RAS+ order by flips and permutations only.

    Attributes:
        array: voxels ``(X, Y, Z)``, or ``(X, Y, Z, C)`` of a file that holds several channels; CT in HU.
        affine: ``(4, 4)``, voxel index (of the centre) to RAS+ mm.
        sha256: of the files' bytes.
        facts: of `ACQUISITION`, what the files state.
        findings: what is wrong but does not keep it from being read, for the report.
        names: of a mask, label names by value, where the file says them.
        modality: "CT", "MR" or "PT" where the files state it, else empty.
        space: NIfTI's code of what the affine is measured in, see `fibldm.volumes.grid.SCANNER`.
        frame_of_reference: UID of the coordinate system, where the files state it, else empty.
        acquired: of a series that was brought to a regular grid, where its slices lay; else ``None``.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    sha256: str
    facts: Mapping[str, Covariate] = field(default_factory=dict)
    findings: tuple[Remark, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    modality: str = ""
    space: int = SCANNER
    frame_of_reference: str = ""
    acquired: "AcquiredSlices | None" = None

    @property
    def spacing(self) -> NDArray[np.float64]:
        """mm along the RAS+ axes."""
        return nibabel.affines.voxel_sizes(self.affine)
