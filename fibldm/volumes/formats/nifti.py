"""NIfTI as read: to its last byte, with all that is wrong with its header."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from fibldm.errors import FibldmError
from fibldm.volumes.formats.raw_volume import RawVolume, check_affine, damaged, millimetres
from fibldm.volumes.grid import SCANNER, Grid, Volume
from fibldm.volumes.scan import Remark

_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, zlib.error, ImageFileError, HeaderDataError,
)  # fmt: skip
_GZIP = b"\x1f\x8b"
_SINGLE_FILE = {540: b"n+2", 348: b"n+1"}


def read_nifti(path: Path, *, any_unit: bool = False) -> RawVolume:
    """A NIfTI-1 or -2 file, decompressed and checked to its last byte; scaled as its header says.

    Args:
        path: of the file.
        any_unit: whether a file in metres or micrometres is brought to mm; otherwise that is one of the findings.

    Raises:
        FibldmError: the file is damaged, is no NIfTI, its name does not say whether it is compressed, or its header
            gives no usable spacing or rotation.
    """
    data = path.read_bytes()
    if not data:
        raise damaged(path, "it is empty")
    _check_name(path.name, data)
    try:
        content = gzip.decompress(data) if data.startswith(_GZIP) else data
        image = _parse(content)
        _check_length(image, len(content))
        array = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise damaged(path, str(error)) from error
    factor, said = millimetres(image.header.get_xyzt_units()[0], any_unit=any_unit)
    affine = np.diag([factor, factor, factor, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    check_affine(affine, path.name)
    # the code of the transform that nibabel takes; a file without one is taken as the scanner's
    space = int(image.header["sform_code"]) or int(image.header["qform_code"]) or SCANNER
    return RawVolume(array, affine, (*said, *_findings(image)), space)


def read_volume(path: str | Path) -> Volume:
    """One 3-D volume in the axis order of its file, integers as integers.

    Raises:
        FibldmError: the file is missing, `read_nifti` or `RawVolume.volume` refuses it.
    """
    file = Path(path)
    if not file.is_file():
        raise FibldmError(f"{path} must exist and be a file", "check the path")
    return read_nifti(file).volume(str(path))[0]


def read_grid(path: str | Path) -> Grid:
    """Where the voxels of a file lie, by its header alone; `read_volume` looks at the rest.

    Raises:
        FibldmError: the file is missing, or its header cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise FibldmError(f"{path} must exist and be a file", "check the path")
    try:
        image: Any = nibabel.load(file)
        x, y, z = (*image.shape, 1, 1, 1)[:3]
        factor, _ = millimetres(image.header.get_xyzt_units()[0], any_unit=False)
    except _UNREADABLE as error:
        raise damaged(file, str(error)) from error
    return Grid((x, y, z), np.diag([factor, factor, factor, 1.0]) @ np.asarray(image.affine, dtype=np.float64))


def _check_name(name: str, data: bytes) -> None:
    if name.lower().endswith(".gz") and not data.startswith(_GZIP):
        raise FibldmError(
            f"{name} must be compressed by gzip, as its name says, and is not", "rename it to end in .nii"
        )
    if not name.lower().endswith(".gz") and data.startswith(_GZIP):
        raise FibldmError(f"{name} must not be compressed, as its name says, and is", "rename it to end in .nii.gz")


def _parse(data: bytes) -> nibabel.Nifti1Image:
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    order = next((order for order in orders if int.from_bytes(data[:4], order) in _SINGLE_FILE), None)
    if order is None:
        raise ValueError("it has no NIfTI header")
    size = int.from_bytes(data[:4], order)
    magic = data[4:7] if size == 540 else data[344:347]
    if magic != _SINGLE_FILE[size]:
        raise ValueError("it has no NIfTI header")
    kind = nibabel.Nifti2Image if size == 540 else nibabel.Nifti1Image
    header = kind.header_class(data[:size], "<" if order == "little" else ">", check=False)
    _check_size(header)
    _check_spacing(header)
    if np.isinf(header["scl_slope"]):
        raise ValueError("the scaling (scl_slope) must be finite")  # nibabel would leave it out
    return kind.from_bytes(data)


def _check_size(header: Any) -> None:
    axes, *size = (int(length) for length in header["dim"])
    if not 1 <= axes <= 7 or min(size[:axes]) < 1:
        raise ValueError(f"its size (dim) must be 1 to 7 positive numbers, and is {[axes, *size]} (their number first)")


def _check_spacing(header: Any) -> None:
    """nibabel would take a spacing of 0 as 1 and drop a minus sign; where an sform places the voxels it is unused."""
    axes = min(int(header["dim"][0]), 3)
    spacing = header["pixdim"][1 : 1 + axes]
    if header["sform_code"] == 0 and not (spacing > 0).all():
        raise ValueError(f"spacing (pixdim) must be positive, and is {spacing.tolist()}")


def _check_length(image: Any, length: int) -> None:
    voxels = int(np.prod([int(size) for size in image.shape], dtype=object)) * image.get_data_dtype().itemsize
    needed = image.dataobj.offset + voxels
    if length < needed:
        raise ValueError(f"its header asks for {needed} bytes, and it has {length}")


def _findings(image: nibabel.Nifti1Image) -> Iterator[Remark]:
    header, shape = image.header, (*image.shape, 1)[:3]
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        yield "warning", "the header has no orientation (sform and qform codes are 0); left and right are a guess"
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError) as error:
        yield "error", f"the qform of the header must be a rotation; {error}"
        return
    if sform is None or qform is None:
        return
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in shape), [1]), axis=-1).reshape(-1, 4)
    off = np.abs(corners @ (np.linalg.solve(sform, qform) - np.eye(4)).T).max()
    if off > 0.5:
        yield "error", f"sform and qform of the header must agree; corners lie {off:.3g} voxels apart"
    elif off > 0.1:
        yield "warning", f"sform and qform of the header differ by {off:.2f} voxels at the corners; sform is used"
