"""What lies in a tree of DICOM and is none: slices lost in transfer, compressed files, volumes of other formats.

Nothing is left out in silence. Names of files and folders may be patients', so folders are told by their numbers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fibldm.datasets.layouts.bids_names import NIFTI, is_nifti
from fibldm.datasets.layouts.entries import DICOM_SUFFIXES, SIDECARS
from fibldm.datasets.layouts.walk import places
from fibldm.volumes.dicom.files import holds_dicom
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES

_PACKED = tuple(f"{suffix}{packed}" for suffix in DICOM_SUFFIXES for packed in (".gz", ".bz2", ".xz", ".zst", ".zip"))
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_OTHER_VOLUMES = tuple(suffix for suffix in SUPPORTED_SUFFIXES if suffix not in (*NIFTI, *DICOM_SUFFIXES, ".png"))


def is_packed_dicom(file: Path) -> bool:
    """Whether the name is that of a compressed DICOM file."""
    return file.name.lower().endswith(_PACKED)


def unread_files(files: Sequence[Path]) -> list[Path]:
    """Those that are no DICOM, and not known by their names to be something else; none that are hidden."""
    known = (*NIFTI, *SIDECARS, *_OTHER_VOLUMES, *_ARCHIVES)
    unknown = (file for file in files if is_packed_dicom(file) or not _ends(file, known))
    return [file for file in unknown if not file.name.startswith(".") and not holds_dicom(file)]


def lost_files(source: Path, unread: Sequence[Path], images: Mapping[Path, str]) -> Iterator[str]:
    """What must not be passed over, as a series would be shorter than it was, or a patient gone.

    Args:
        source: the tree.
        unread: of `unread_files`.
        images: which image lies in a folder, in words.
    """
    beside = Counter(images[file.parent] for file in unread if _is_beside(file, images))
    yield from (f"{where}: {count} files beside its slices are empty or damaged" for where, count in beside.items())
    if alone := [file for file in unread if _is_alone(file, images)]:
        empty = sum(not file.stat().st_size for file in alone)
        yield (
            f"{len(alone)} files named as DICOM hold none, in {places(source, alone)} ({empty} are empty, the others "
            "damaged); transfer them again"
        )
    if packed := [file for file in unread if is_packed_dicom(file)]:
        yield f"{len(packed)} DICOM files are compressed, in {places(source, packed)}; unpack them (gunzip -r, unzip)"


def left_out_files(
    source: Path, files: Sequence[Path], unread: Sequence[Path], images: Mapping[Path, str], links: Sequence[Path]
) -> list[str]:
    """Notes on files that may hold volumes or patients and are read by nobody.

    Args:
        source: the tree.
        files: of the tree.
        unread: of `unread_files`.
        images: which image lies in a folder, in words.
        links: that lead nowhere.
    """
    shown = [file for file in files if not file.name.startswith(".")]
    others = [
        file
        for file in unread
        if (_named_as_slice(file) or not file.stat().st_size)
        and not (_is_beside(file, images) or _is_alone(file, images) or is_packed_dicom(file))
    ]
    found = {
        "files are archives and were left out; unpack them if patients or masks are inside": [
            file for file in shown if _ends(file, _ARCHIVES) and not is_nifti(file) and not is_packed_dicom(file)
        ],
        "volumes of other formats than DICOM and NIfTI were left out; masks may be converted to NIfTI": [
            file for file in shown if _ends(file, _OTHER_VOLUMES)
        ],
        "files are empty or have no known ending, hold no DICOM and were left out": others,
        "links lead to nothing that is there and were left out": links,
    }
    return [f"{len(listed)} {what} ({places(source, listed)})" for what, listed in found.items() if listed]


def _ends(file: Path, suffixes: tuple[str, ...]) -> bool:
    return file.name.lower().endswith(suffixes)


def _named_as_slice(file: Path) -> bool:
    return file.suffix.lower() in DICOM_SUFFIXES or not file.suffix[1:].isalpha()


def _is_beside(file: Path, images: Mapping[Path, str]) -> bool:
    return file.parent in images and _named_as_slice(file)


def _is_alone(file: Path, images: Mapping[Path, str]) -> bool:
    return file.parent not in images and _ends(file, DICOM_SUFFIXES)
