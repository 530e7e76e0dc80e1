"""Files of DICOM: known by the mark after their preamble, or by their first element where an export left both out.

Scanners, planning systems and archives write such files (ACR-NEMA did), most of them without a transfer syntax too.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_START = 132
_MARK = b"DICM"
_FIRST_GROUPS = (2, 8)
_FIRST_VALUE_REPRESENTATIONS = (b"AE", b"CS", b"DA", b"DT", b"LO", b"OB", b"SH", b"TM", b"UI", b"UL", b"UT")
_LAST_FIRST_ELEMENT = 0x60
_LONGEST_FIRST_VALUE = 128
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"


def holds_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM does.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        start = stream.read(_START)
    return start[128:] == _MARK or _is_bare(start)


def read_file(source: Path | BinaryIO, **options: Any) -> "Dataset":
    """What ``pydicom.dcmread`` reads, and a file without preamble where its first element is one of DICOM.

    Its uncompressed encoding becomes the transfer syntax where the file states none; compressed voxels then stay of
    unknown syntax.

    Raises:
        InvalidDicomError: it is no DICOM file.
    """
    import pydicom
    from pydicom.uid import UID

    if isinstance(source, Path):
        with source.open("rb") as stream:
            return read_file(stream, **options)
    start = source.read(_START)
    source.seek(0)
    dataset = pydicom.dcmread(source, force=_is_bare(start), **options)
    compressed = "PixelData" in dataset and dataset["PixelData"].is_undefined_length
    if "TransferSyntaxUID" not in dataset.file_meta and not compressed:
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = UID(IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN)
    return dataset


def _is_bare(start: bytes) -> bool:
    """Whether bytes are the first element of a data set: one of group 2 or 8 with a short value."""
    if len(start) < 8 or start[128:] == _MARK:
        return False
    explicit = start[4:6] in _FIRST_VALUE_REPRESENTATIONS
    order = "little" if start[1] == 0 else "big"
    group, element = (int.from_bytes(start[at : at + 2], order) for at in (0, 2))  # type: ignore[arg-type]
    if group not in _FIRST_GROUPS or element > _LAST_FIRST_ELEMENT:
        return False
    length = int.from_bytes(start[4:8], "little")
    return explicit or (order == "little" and length <= _LONGEST_FIRST_VALUE and length % 2 == 0)
