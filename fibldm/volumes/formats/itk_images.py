"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): decoded by SimpleITK, once header and voxels are known to be whole.

SimpleITK alone gives wrong voxels without a word where compressed voxels are damaged, and takes a spacing of 1 mm where
the header has none.
"""

import bz2
import gzip
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fibldm.errors import FibldmError
from fibldm.volumes.formats.raw_volume import RawVolume, damaged, millimetres
from fibldm.volumes.grid import LPS_TO_RAS
from fibldm.volumes.scan import Remark

_SPACES = {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las"}
_READERS = {True: "MetaImageIO", False: "NrrdImageIO"}
"""Named, as ITK knows MetaImage by a suffix in small letters only."""
_DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "raw": bytes, "zlib": zlib.decompress, "gzip": gzip.decompress, "gz": gzip.decompress,
    "bzip2": bz2.decompress, "bz2": bz2.decompress,
}  # fmt: skip


@dataclass(frozen=True)
class _Header:
    """Fields by lower-case name; where voxels that follow begin; the name of the file that holds them otherwise."""

    fields: Mapping[str, str]
    end: int
    detached: str | None


def read_itk(path: Path, *, any_unit: bool = False) -> RawVolume:
    """A MetaImage or NRRD volume; its LPS coordinates become RAS+; pixels of several components are channels.

    Args:
        path: of the file, or of its detached header.
        any_unit: whether a file in another unit than mm is brought to mm; otherwise that is one of the findings.

    Raises:
        FibldmError: the file is damaged or is neither, its voxels lie in several files or as text, it is in colour, or
            the header does not give spacing or a coordinate system that is known.
    """
    import SimpleITK

    header = _header(path)
    findings = _check(header, path)
    unit = _unit(header.fields, path, any_unit=any_unit)
    payload = _payload(header, path)
    try:
        image = SimpleITK.ReadImage(str(path), imageIO=_READERS["elementdatafile" in header.fields])
    except RuntimeError as error:
        raise damaged(path, "SimpleITK refuses it") from error
    if image.GetDimension() != 3:
        raise FibldmError(
            f"a MetaImage or NRRD file must hold a 3-D volume; {path.name} has {image.GetDimension()} axes",
            "save a slice as a volume with its thickness, and channels as pixels of several components",
        )
    voxels = SimpleITK.GetArrayFromImage(image)
    if len(payload) < voxels.nbytes:
        raise damaged(path, f"its header asks for {voxels.nbytes} bytes of voxels, and it has {len(payload)}")
    factor, said = millimetres(unit, any_unit=any_unit)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing() * factor
    affine[:3, 3] = np.array(image.GetOrigin()) * factor
    return RawVolume(np.moveaxis(voxels, (0, 1, 2), (2, 1, 0)), LPS_TO_RAS @ affine, (*said, *findings))


def nrrd_fields(path: Path) -> Mapping[str, str]:
    """The fields of a NRRD header by lower-case name, of which SimpleITK interprets few; its voxels are not read.

    None where the file is no NRRD: who reads it says so.

    Raises:
        FibldmError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            lines: list[bytes] = []
            while (line := stream.readline()).strip():
                lines.append(line)
            head = b"".join(lines)
    except OSError as error:
        raise FibldmError(f"a file must be readable; {error.strerror}", "check the path and its permissions") from error
    return _nrrd_header(head, path).fields if head.startswith(b"NRRD000") else {}


def files_of(path: Path) -> tuple[Path, ...]:
    """The file and, where it is a detached header, the file of its voxels.

    Raises:
        FibldmError: it is no MetaImage or NRRD, or its voxels lie in several files.
    """
    detached = _header(path).detached
    return (path,) if detached is None else (path, path.parent / detached)


def _header(path: Path) -> _Header:
    data = path.read_bytes()
    if data.startswith(b"NRRD000"):
        return _nrrd_header(data, path)
    if path.suffix.lower() in (".mha", ".mhd"):
        return _meta_header(data, path)
    raise FibldmError(f"{path.name} must be NRRD, as its name says, and is not", "export it again, or rename it")


def _nrrd_header(data: bytes, path: Path) -> _Header:
    blank = re.search(rb"\r?\n\r?\n", data)
    text, end = (data[: blank.start()], blank.end()) if blank else (data, len(data))
    lines = [line for line in text.decode("utf-8", "replace").splitlines()[1:] if not line.startswith("#")]
    fields = {key.strip().lower(): value.strip(" =") for key, _, value in (line.partition(":") for line in lines)}
    return _Header(fields, end, _single(fields.get("data file", fields.get("datafile")), path))


def _meta_header(data: bytes, path: Path) -> _Header:
    fields: dict[str, str] = {}
    end = 0
    while "elementdatafile" not in fields:
        line, newline, _ = data[end : end + 4096].partition(b"\n")
        key, equals, value = line.decode("utf-8", "replace").partition("=")
        if not (newline or equals) or not equals:
            raise FibldmError(f"{path.name} must be MetaImage, as its name says, and is not", "export it again")
        fields[key.strip().lower()] = value.strip()
        end += len(line) + len(newline)
    file = fields["elementdatafile"]
    return _Header(fields, end, None if file.lower() == "local" else _single(file, path))


def _single(file: str | None, path: Path) -> str | None:
    if file is not None and (file.upper().startswith("LIST") or "%" in file):
        raise FibldmError(f"voxels must lie in one file; those of {path.name} lie in several", "save it as one file")
    return file


def _check(header: _Header, path: Path) -> tuple[Remark, ...]:
    fields = set(header.fields)
    if "elementdatafile" in fields:
        spacing, oriented = "elementspacing" in fields, fields & {"transformmatrix", "orientation", "rotation"}
    else:
        spacing, oriented = bool(fields & {"space directions", "spacings"}), fields & {"space"}
        _check_nrrd(header.fields, path)
    if not spacing:
        raise FibldmError(f"the header must give the spacing; that of {path.name} does not", "export it again")
    return () if oriented else (("warning", "the header has no orientation; left and right are a guess"),)


def _check_nrrd(fields: Mapping[str, str], path: Path) -> None:
    space = fields.get("space", "lps").lower()
    if space not in _SPACES:
        raise FibldmError(
            f"the space of a NRRD must be one of {', '.join(sorted(_SPACES))}; that of {path.name} is {space}",
            "export it again with anatomical directions",
        )
    if "color" in fields.get("kinds", "").lower():
        raise FibldmError(f"voxels must be plain numbers; in {path.name} they are colours", "export grey values")


def _unit(fields: Mapping[str, str], path: Path, *, any_unit: bool) -> str:
    """Of lengths, as the header says; empty where it does not."""
    units = fields.get("space units", fields.get("distanceunits", "")).replace('"', " ").split()
    if len(set(units)) > 1 or (set(units) - {"mm", "?"} and not any_unit):
        raise FibldmError(f"the space units must be mm; in {path.name} they are {' '.join(units)}", "export it in mm")
    return units[0] if units else ""


def _payload(header: _Header, path: Path) -> bytes:
    try:
        data = path.read_bytes()[header.end :] if header.detached is None else files_of(path)[1].read_bytes()
        return _DECODERS[_encoding(header.fields)](data)
    except KeyError as error:
        raise FibldmError(
            f"voxels must be stored raw or compressed; those of {path.name} are {error.args[0]}", "export it again"
        ) from error
    except FileNotFoundError as error:
        raise damaged(path, "the file of its voxels is missing") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(path, str(error)) from error


def _encoding(fields: Mapping[str, str]) -> str:
    if "elementdatafile" not in fields:
        return fields.get("encoding", "unknown").lower()
    if fields.get("binarydata", "true").lower() != "true":
        return "text"
    return "zlib" if fields.get("compresseddata", "false").lower() == "true" else "raw"
