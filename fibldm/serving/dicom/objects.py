"""What comes by C-STORE or STOW-RS: kept as it is encoded, and read in the little that the node must know of it."""

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fibldm.volumes.dicom.frames import read_dataset
from fibldm.volumes.dicom.output import mask_files
from fibldm.volumes.dicom.segments import segment_labels

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileMetaDataset

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage."""
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
IMAGES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4")
"""CT and MR Image Storage."""
STORED = (*SEGMENTATIONS, STRUCTURE_SET, *IMAGES)
SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
"""Explicit and Implicit VR Little Endian, uncompressed: what is decoded is no larger than what was counted."""

_IMPLEMENTATION = "1.2.826.0.1.3680043.8.498.11509158844129203835191377603633433609"
_READ = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID Manufacturer SyntheticData SegmentSequence PixelPaddingValue "
    "ReferencedFrameOfReferenceSequence"
).split()


class Unwanted(Exception):
    """An object that is not taken: a status of C-STORE (PS3.4, B.2.3), and why, in at most 64 characters."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status, self.comment = status, comment


def keep(source: Path, place: Path) -> None:
    """Write an object to a file whose content follows from the object and its transfer syntax alone.

    What programs write of themselves before an object differs, and names of volumes and UIDs follow from the file.

    Args:
        source: in the DICOM file format.
        place: the new file; it is on the disk when this returns.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import UID

    came, offset = split(source)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = came.MediaStorageSOPClassUID
    meta.MediaStorageSOPInstanceUID = came.MediaStorageSOPInstanceUID
    meta.TransferSyntaxUID = came.TransferSyntaxUID
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID(_IMPLEMENTATION), "FIBLDM"
    with place.open("xb") as out, source.open("rb") as stream:
        out.write(bytes(128) + b"DICM")
        write_file_meta_info(out, meta)  # type: ignore[arg-type]
        stream.seek(offset)
        shutil.copyfileobj(stream, out, 2**20)
        out.flush()
        os.fsync(out.fileno())


def split(file: Path) -> "tuple[FileMetaDataset, int]":
    """What a file says before its object, and where the object begins.

    Raises:
        Exception: of many kinds, where the file is not one of the DICOM file format.
    """
    from pydicom.filereader import _read_file_meta_info, read_preamble

    with file.open("rb") as stream:
        read_preamble(stream, force=False)
        return _read_file_meta_info(stream), stream.tell()


def header(file: Path, sop_class: str, sop_instance: str) -> "Dataset":
    """What the node must know of an object.

    Args:
        file: as it came.
        sop_class: that it was announced with, as is ``sop_instance``.

    Raises:
        Unwanted: it cannot be read, or is another one than was announced.
    """
    try:
        dataset = read_dataset(file, _READ)
        stated = (str(dataset.get("SOPClassUID")), str(dataset.get("SOPInstanceUID")))
    except Exception:  # of any kind, as anything may come
        raise Unwanted(0xC000, "the object cannot be read") from None
    if stated != (sop_class, sop_instance):
        raise Unwanted(0xA900, "the object is another one than was announced")
    return dataset


def check_segments(dataset: "Dataset", names: Collection[str]) -> None:
    """See that the generator can follow a segmentation, as far as its header tells.

    Raises:
        Unwanted: a segment is no label, or see `check_foreign`.
    """
    check_foreign(dataset)
    try:
        found = set(segment_labels(dataset).values())
    except Exception:
        raise Unwanted(0xA900, "segments must have numbers and labels") from None
    if found - set(names):
        raise Unwanted(0xA900, "segments must be labelled as the generator's labels are")


def check_foreign(dataset: "Dataset") -> None:
    """See that a mask is none that FibLDM sent: results must not come round.

    Raises:
        Unwanted: it is one.
    """
    if str(dataset.get("Manufacturer", "")) == "FibLDM" and str(dataset.get("SyntheticData", "")) == "YES":
        raise Unwanted(0xA900, "it is a result of FibLDM, not a mask")


def results_of(root: Path, outputs: Iterable[str]) -> list[Path]:
    """The files of a job's results: each series in order, and its mask; none of volumes in another format.

    Args:
        root: folder of the results.
        outputs: of its outcome.
    """
    return [
        file
        for folder in map(root.joinpath, outputs)
        if folder.is_dir()
        for file in (*sorted(folder.glob("*.dcm")), *mask_files(folder))
    ]
