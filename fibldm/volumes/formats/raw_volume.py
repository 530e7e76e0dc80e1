"""An image or mask as its file holds it: what every format must satisfy, and the turn to RAS+."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.grid import RIGHT_ANGLES, SCANNER, Grid, Volume, shear, squared_up
from fibldm.volumes.scan import Remark, Scan

_MM = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "m": 1000.0, "meter": 1000.0, "cm": 10.0,
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns"), 1e-3), "nm": 1e-6,
}  # fmt: skip
"""Units of length as headers call them; both signs for micro."""

_SMALLEST_DETERMINANT = 1e-3
_SHEAR = 0.01


@dataclass(frozen=True)
class RawVolume:
    """A file's voxels in its own axis order.

    Attributes:
        array: ``(X, Y)``, ``(X, Y, Z)``, ``(X, Y, Z, C)`` or ``(X, Y, Z, 1, C)``.
        affine: ``(4, 4)``, voxel index (of the centre) to RAS+ mm.
        findings: what is wrong but does not keep it from being read.
        space: NIfTI's code of what the affine is measured in.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    findings: tuple[Remark, ...] = ()
    space: int = SCANNER

    def scan(self, name: str, sha256: str) -> Scan:
        """The same voxels at the same places with their axes in the closest RAS+ order.

        Raises:
            FibldmError: the voxels are no plain numbers, the size fits neither a slice nor a volume, or the affine is
                not invertible.
        """
        array = _sized(_plain(self.array, name), name)
        check_affine(self.affine, name)
        turn = orientations.io_orientation(self.affine)
        turned = orientations.apply_orientation(array, turn)
        affine = self.affine @ orientations.inv_ornt_aff(turn, array.shape[:3])
        return Scan(turned, affine, sha256, findings=self.findings, space=self.space)

    def volume(self, name: str) -> tuple[Volume, list[str]]:
        """The only volume of the file in the file's axis order, and what there is to say of it.

        Raises:
            FibldmError: it is not 3-D, not in mm, or its axes are not at right angles or have two directions that
                disagree.
        """
        array = self.array[..., 0] if self.array.shape[3:] == (1,) else self.array
        three = (*array.shape, 1, 1, 1)[:3]
        affine, squared = straightened(Grid(three, self.affine))
        found = (*self.findings, *squared)
        wrong = [text for level, text in found if level == "error"]
        if array.ndim != 3 or not array.size or array.dtype.kind not in "iuf":
            wrong.append(f"it must hold one 3-D volume of plain numbers; it holds {array.dtype} of shape {array.shape}")
        if wrong:
            raise FibldmError(f"{name}: {'; '.join(wrong)}", "export the file again")
        return Volume(array, affine, self.space), [text for _, text in found]


def check_affine(affine: NDArray[np.float64], name: str) -> None:
    """Refuse an affine that does not place every voxel somewhere else.

    Raises:
        FibldmError: it is not finite or not invertible.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.isfinite(affine).all() and lengths.all():
        determinant = abs(np.linalg.det(affine[:3, :3] / lengths))
        if determinant >= _SMALLEST_DETERMINANT:
            return
    raise FibldmError(
        f"the affine must be finite and invertible; in {name} it is {np.asarray(affine).tolist()}",
        "export the file again with its spacing and directions",
    )


def millimetres(unit: str, *, any_unit: bool) -> tuple[float, tuple[Remark, ...]]:
    """How many mm a unit of length has, and what is said of it.

    Args:
        unit: as a header calls it; empty, "unknown" or "?" is taken for mm.
        any_unit: whether other units than mm may be brought to mm; they are an error otherwise, as scanners' files are
            in mm, and a header that says otherwise is as likely wrong.
    """
    if unit.lower() in ("", "unknown", "?", "mm"):
        return 1.0, ()
    factor = _MM.get(unit.lower())
    if factor is None or not any_unit:
        return 1.0, (("error", f"the file must be in mm; its header says {unit}"),)
    return factor, (("warning", f"lengths in {unit}, as the header says, were brought to mm"),)


def damaged(path: Path, why: str) -> FibldmError:
    """The error for a file that is not whole; names the file but no folder."""
    reason = " ".join(why.replace(str(path), path.name).split())
    return FibldmError(f"{path.name} cannot be read to its last byte: {reason}", "copy or export it again")


def _plain(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Numbers in the byte order of this machine; truth values become 0 and 1."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise FibldmError(f"voxels must be plain numbers; in {name} they are {array.dtype}", "export grey values")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _sized(array: NDArray[Any], name: str) -> NDArray[Any]:
    """``(X, Y, Z)``, or ``(X, Y, Z, C)`` of several channels."""
    volume = array[..., None] if array.ndim == 2 else array
    if volume.ndim == 5 and volume.shape[3] == 1:
        volume = volume[:, :, :, 0]
    if volume.ndim == 4 and volume.shape[3] == 1:
        volume = volume[..., 0]
    if volume.ndim not in (3, 4) or not volume.size or sum(length > 1 for length in volume.shape[:3]) < 2:
        raise FibldmError(
            f"an image or mask must be a slice (X, Y), a volume (X, Y, Z) or a volume of channels (X, Y, Z, C) with at "
            f"least 2 voxels along two of its axes; {name} has size {array.shape}",
            "export one slice or volume",
        )
    return volume


def straightened(grid: Grid) -> tuple[NDArray[np.float64], tuple[Remark, ...]]:
    """The affine of a grid with its axes at right angles, and what was done to that end.

    Many programs, ITK's among them, open no file with other axes. A small shear is squared up, and said; a larger one
    is an error.
    """
    cosine = shear(grid.affine)
    if cosine <= RIGHT_ANGLES:
        return grid.affine, ()
    if cosine > _SHEAR:
        lines = f"the axes must be at right angles; their cosine is {cosine:.3f}, as with a tilted gantry"
        return grid.affine, (("error", lines),)
    straight, moved = squared_up(grid)
    off = np.degrees(np.arcsin(cosine))
    lines = f"the axes were {off:.2g} degrees off right angles and were squared up, by {moved:.2g} mm at the corners"
    return straight.affine, (("warning", lines),)
