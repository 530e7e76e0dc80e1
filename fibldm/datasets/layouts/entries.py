"""What an entry of a dataset is: a volume file, or a folder with the slices of one series."""

import re
import unicodedata
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.errors import FibldmError
from fibldm.volumes.dicom.files import holds_dicom
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES, stem
from fibldm.volumes.scan import Files

SIDECARS = (".json", ".txt", ".md", ".csv", ".tsv")
_RAW = (".raw", ".zraw", ".raw.gz", ".img")
_HEADERS = (".mhd", ".nhdr")
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_FORMATS = ", ".join(SUPPORTED_SUFFIXES)


def visible(folder: Path) -> list[Path]:
    """Files and folders in ``folder`` by name, without hidden ones; none where it is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def volume_entries(folder: Path) -> list[Path]:
    """What may be a volume in ``folder``: all but side files and the voxels that belong to a detached header."""
    paths = visible(folder)
    detached = any(path.name.lower().endswith(_HEADERS) for path in paths)
    ignored = (*SIDECARS, *_RAW) if detached else SIDECARS
    return [path for path in paths if path.is_dir() or not path.name.lower().endswith(ignored)]


def entry_key(path: Path) -> str:
    """The name under which an image and its mask are paired: the stem, composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", path.name if path.is_dir() else stem(path))


def case_name(text: str) -> str:
    """``text`` with letters, digits, ``.``, ``_`` and ``-`` only, the first a letter or digit."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return name if name[:1].isalnum() else f"case{name}"


def entry_files(path: Path) -> Files:
    """The files of the image or mask at ``path``, a volume file or a folder of slices.

    Raises:
        FibldmError: it does not exist, has no supported format, or the folder holds no slices or several kinds of them.
    """
    if path.is_dir():
        return _slices(path)
    if not path.exists():
        raise FibldmError(f"{path_shown(path)} does not exist")
    if not path.is_file() or not (path.name.lower().endswith(SUPPORTED_SUFFIXES) or is_dicom(path)):
        raise FibldmError(f"{path_shown(path)} is of no supported format ({_FORMATS})")
    return (path,)


def collected(path: Path, findings: Findings, where: str = "") -> Files:
    """As `entry_files`, but what is wrong goes to ``findings``, after ``where``."""
    with findings.collecting(where):
        return entry_files(path)
    return ()


def path_shown(path: Path) -> str:
    """``path`` for a message, unless it may be DICOM, whose paths may tell the patient."""
    named = re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) and path.suffix.lower() not in DICOM_SUFFIXES
    return str(path) if named else "a DICOM file or a folder"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or by how it begins."""
    name = path.name.lower()
    if name.endswith(DICOM_SUFFIXES):
        return True
    if name.endswith((*SUPPORTED_SUFFIXES, *SIDECARS)):
        return False
    return holds_dicom(path)


def _slices(folder: Path) -> Files:
    paths = [path for path in visible(folder) if path.name != "DICOMDIR"]
    files = [path for path in paths if path.is_file()]
    kinds = {
        "PNG": tuple(path for path in files if path.name.lower().endswith(".png")),
        "DICOM": tuple(path for path in files if is_dicom(path)),
    }
    present = [kind for kind, members in kinds.items() if members]
    others = len(paths) - sum(map(len, kinds.values())) - sum(path.name.lower().endswith(SIDECARS) for path in files)
    if len(present) != 1 or others:
        held = ", ".join(f"{len(members)} {kind}" for kind, members in kinds.items())
        raise FibldmError(
            f"a folder must hold the slices of one series, DICOM or PNG; it holds {held}, {others} others"
        )
    return kinds[present[0]]
