"""What came must not grow when it is read: its kind by its content, its size as stated and as inflated.

The readers check what a file says and look at all of it; they take it whole, which here must not be left to whoever
sends it. What is damaged passes, as they say why they refuse it.
"""

import bz2
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

from fibldm.errors import FibldmError
from fibldm.serving.studio.limits import Limits
from fibldm.volumes.dicom.files import holds_dicom, read_file
from fibldm.volumes.formats.itk_images import nrrd_fields

_GZIP, _NRRD = b"\x1f\x8b", b"NRRD000"
_NIFTI_SIZES = (348, 540)
_CHUNK = 2**20
_LONGEST_HEADER = 2**20
_META = 132  # bytes before the first element of DICOM
_DEFLATED, _RUN_LENGTHS = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_RUN_LENGTH_RATIO = 64  # two bytes may say 128
_DAMAGED = (OSError, EOFError, ValueError, zlib.error)
_OPENERS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream), "gz": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": bz2.BZ2File, "bz2": bz2.BZ2File,
}  # fmt: skip


def suffix_of(file: Path) -> str:
    """The suffix that the content of a file asks for, whatever somebody called it.

    Raises:
        FibldmError: it is none of the kinds that may be sent.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(_GZIP):
        return ".nii.gz"
    if start.startswith(_NRRD):
        return ".nrrd"
    if any(int.from_bytes(start[:4], order) in _NIFTI_SIZES for order in ("little", "big")):  # type: ignore[arg-type]
        return ".nii"
    if holds_dicom(file):
        return ".dcm"
    raise FibldmError("a file must be NIfTI, NRRD or DICOM by its content; this one is none of them", "export it again")


def check_bounds(file: Path, limits: Limits) -> None:
    """Refuse what would become too large when it is read.

    Args:
        file: with the suffix of its content, see `suffix_of`.
        limits: of a file.

    Raises:
        FibldmError: it states or has too much, names another file, or is compressed in a way that has no bound.
    """
    check = {".gz": _check_nifti, ".nii": _check_nifti, ".nrrd": _check_nrrd, ".dcm": _check_dicom}[file.suffix]
    check(file, limits)


def _check_nifti(file: Path, limits: Limits) -> None:
    with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw as stream:
        try:
            start = stream.read(_NIFTI_SIZES[1])
            _check_voxels(_nifti_shape(start), limits)
            _check_inflated(_chunks(stream), limits.inflated - len(start))
        except _DAMAGED:
            return


def _nifti_shape(start: bytes) -> list[int]:
    """As the header states it; empty where it is none."""
    for order in ("little", "big"):
        size = int.from_bytes(start[:4], order)  # type: ignore[arg-type]
        if size in _NIFTI_SIZES and len(start) >= size:
            width, at = (2, 40) if size == _NIFTI_SIZES[0] else (8, 16)
            fields = [start[at + width * axis : at + width * (axis + 1)] for axis in range(8)]
            axes, *shape = (int.from_bytes(part, order, signed=True) for part in fields)  # type: ignore[arg-type]
            return shape[: max(0, min(axes, 7))]
    return []


def _check_nrrd(file: Path, limits: Limits) -> None:
    with file.open("rb") as stream:
        blank = re.search(rb"\r?\n\r?\n", stream.read(_LONGEST_HEADER))
        if blank is None:
            raise FibldmError(
                f"the header of a NRRD must end within {_LONGEST_HEADER} bytes; this one does not", "export it again"
            )
        fields = nrrd_fields(file)
        if {"data file", "datafile"} & fields.keys():
            raise FibldmError("a NRRD must hold its voxels; this one names another file", "save it as one file (.nrrd)")
        try:
            _check_voxels([int(size) for size in fields.get("sizes", "").split()], limits)
            stream.seek(blank.end())
            encoding = fields.get("encoding", "raw").lower()
            if encoding in _OPENERS:
                _check_inflated(_chunks(_OPENERS[encoding](stream)), limits.inflated)
        except _DAMAGED:
            return


def _check_dicom(file: Path, limits: Limits) -> None:
    """Its voxels must be native or by run lengths, as how much other codecs make of it is up to the file."""
    if file.stat().st_size > limits.dicom:
        raise _too_much(f"a DICOM file must have at most {limits.dicom} bytes; this one has more")
    syntax, start = _transfer_syntax(file)
    if syntax == _DEFLATED:
        _check_inflated(_inflated(file, start), limits.dicom)
    elif syntax == _RUN_LENGTHS:
        if file.stat().st_size * _RUN_LENGTH_RATIO > limits.inflated:
            raise _too_much(
                f"a DICOM file of run lengths must have at most {limits.inflated // _RUN_LENGTH_RATIO} bytes"
            )
    elif syntax and syntax not in _NATIVE:
        raise FibldmError("the voxels of a DICOM file must not be compressed here; these are", "export it uncompressed")
    try:
        header: Any = read_file(file, stop_before_pixels=True)
        counts = [header.get(name) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
        _check_voxels([int(count) for count in counts if count is not None], limits)
    except FibldmError:
        raise
    except Exception:  # pydicom raises whatever it meets; who reads the file says why it is refused
        return


def _transfer_syntax(file: Path) -> tuple[str, int]:
    """And where the data set begins; both are empty of a file without such a header."""
    from pydicom.filereader import read_file_meta_info

    try:
        meta = read_file_meta_info(file)
        return str(meta.get("TransferSyntaxUID", "")), _META + 12 + int(meta.get("FileMetaInformationGroupLength", 0))
    except Exception:  # see `_check_dicom`
        return "", 0


def _inflated(file: Path, start: int) -> Iterator[int]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    with file.open("rb") as stream:
        stream.seek(start)
        rest = stream.read(_CHUNK)
        while rest and not inflate.eof:
            yield len(inflate.decompress(rest, _CHUNK))
            rest = inflate.unconsumed_tail or stream.read(_CHUNK)


def _chunks(stream: Any) -> Iterator[int]:
    while length := len(stream.read(_CHUNK)):
        yield length


def _check_inflated(lengths: Iterator[int], most: int) -> None:
    whole = 0
    for length in lengths:
        whole += length
        if whole > most:
            raise _too_much(f"a file must have at most {most} bytes once it is decompressed; this one has more")


def _check_voxels(shape: list[int], limits: Limits) -> None:
    if (voxels := prod(max(length, 1) for length in shape)) > limits.voxels:
        raise _too_much(f"a volume must have at most {limits.voxels} voxels; this one states {voxels}")


def _too_much(message: str) -> FibldmError:
    return FibldmError(message, "crop it, or resample it")
