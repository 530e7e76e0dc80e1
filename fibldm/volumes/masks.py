"""The masks that volumes are drawn from: found among files and folders, read, and kept beside the volumes."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, some_of
from fibldm.files import hash_file, hash_value
from fibldm.volumes.formats.itk_images import files_of, read_itk
from fibldm.volumes.formats.nifti import read_nifti, read_volume
from fibldm.volumes.formats.raw_volume import straightened
from fibldm.volumes.formats.readers import read_scan, stem
from fibldm.volumes.formats.segment_nrrd import named_segments, segments_of
from fibldm.volumes.grid import Grid, Volume, turned_like
from fibldm.volumes.label_values import are_whole, fractions_shown, settled
from fibldm.volumes.scan import Remark
from fibldm.volumes.writer import sidecar, write_labels

_logger = logging.getLogger("fibldm")
_NIFTI = (".nii.gz", ".nii")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_DICOM = ".dcm"
_SHOWN = 10  # names in one message
_WHAT = (
    f"masks are files of NIfTI, NRRD or MetaImage ({', '.join((*_NIFTI, *_ITK))}) or DICOM segmentations "
    f"({_DICOM}, or without a suffix)"
)


def find_masks(sources: list[Path]) -> list[Path]:
    """The mask files that a list of files and folders names, in order of their names.

    Cases of letters do not matter. What else lies in a folder is left out, and named in the log, but for the sidecars
    of masks; files that begin with a dot are not, as they are unfinished or hold the attributes of another file.

    Raises:
        FibldmError: there is none, a file that is named by itself is none, or two have the same name.
    """
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FibldmError(f"masks must exist; {source} does not")
        files += _masks_in(source) if source.is_dir() else [source]
    wrong = [str(file) for file in files if mask_suffix(file) is None]
    if wrong or not files:
        raise FibldmError(
            f"{_WHAT}; got {', '.join(wrong) or 'none'}",
            "name files, or folders that hold them (folders inside of those are not searched)",
        )
    stems = [mask_stem(file) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise FibldmError(f"every mask needs a name of its own; given twice: {', '.join(twice)}", "rename them")
    return files


def mask_suffix(file: Path) -> str | None:
    """Which format of masks a file has, ``.dcm`` for DICOM under any name; ``None`` where it is no mask.

    A file named as a mask that cannot be read is one, to be refused when it is.
    """
    suffix = next((suffix for suffix in (*_NIFTI, *_ITK) if file.name.lower().endswith(suffix)), None)
    if suffix is not None or (file.suffix and not _has_dicom_name(file)):
        return suffix
    from fibldm.volumes.dicom.series import find_series

    try:
        series = find_series([file])
    except FibldmError:  # damaged
        return _DICOM
    damaged = not series and file.suffix.lower() == _DICOM
    return _DICOM if damaged or any(part.modality == "SEG" for part in series) else None


def parts_of(mask: Path, *, any_suffix: bool = False) -> list[Path]:
    """The further files of a mask whose header lies apart from its voxels (.nhdr, .mhd).

    Args:
        mask: the file.
        any_suffix: whether one is looked at whose suffix says that it has none (.nrrd, .mha).
    """
    if mask.suffix.lower() not in (_ITK if any_suffix else (".nhdr", ".mhd")):
        return []
    try:
        return list(files_of(mask)[1:])
    except (FibldmError, OSError):  # said when it is read
        return []


def hash_mask(mask: Path) -> str:
    """SHA-256 of the file; of a mask in several files, of all of them."""
    parts = parts_of(mask)
    return hash_value([hash_file(file) for file in (mask, *parts)]) if parts else hash_file(mask)


def volumes_in(folder: Path) -> list[Path]:
    """NIfTI files, but none that begins with a dot: those are unfinished, or hold the attributes of another file."""
    return sorted(file for file in folder.glob("[!.]*") if file.name.endswith(_NIFTI))


def _has_dicom_name(file: Path) -> bool:
    """``.dcm``, or a suffix of digits only: many archives name files by their UIDs."""
    return file.suffix.lower() == _DICOM or file.suffix[1:].isdigit()


def _masks_in(folder: Path) -> list[Path]:
    found = sorted(folder.glob("[!.]*"))
    masks = [file for file in found if file.is_file() and mask_suffix(file) is not None]
    taken = {*masks, *(sidecar(mask) for mask in masks), *(part for mask in masks for part in parts_of(mask))}
    left_out = [file.name for file in found if file not in taken]
    if left_out:
        named = some_of(left_out, _SHOWN)
        _logger.warning("%s: %d left out, as no masks: %s; %s", folder, len(left_out), named, _WHAT)
    return masks


def mask_stem(file: Path) -> str:
    """The file name without the suffixes that masks may have."""
    return stem(file)


def read_mask(file: Path, names: Mapping[int, str]) -> Volume:
    """A mask of any format, in the axis order of its file (RAS+ of DICOM); remarks on it go to the log.

    Args:
        file: one that `mask_suffix` knows.
        names: of the run's labels by value; named segments, of DICOM or 3D Slicer, get the values of their names.

    Raises:
        FibldmError: the file cannot be read, or a segment has no such name.
    """
    if not file.is_file():
        raise FibldmError(f"{file} must exist and be a file", "check the path")
    suffix = mask_suffix(file)
    if suffix == _DICOM:
        return _read_segmentation(file, names)
    if suffix in _ITK and (segments := segments_of(file)):
        return _read_named_segments(file, [segment.name for segment in segments], names)
    volume, remarks = (read_itk if suffix in _ITK else read_nifti)(file).volume(str(file))
    for remark in remarks:
        _say_once(file.name, remark)
    return _settled(volume, file.name)


def _read_named_segments(file: Path, found: Iterable[str], names: Mapping[int, str]) -> Volume:
    _check_names(file, found, names)
    scan = named_segments(read_scan((file,), key="label"), file, {name: value for value, name in names.items()})
    _say_findings(file, scan.findings)
    stored = read_itk(file)
    x, y, z = stored.array.shape[:3]
    own = Grid((x, y, z), straightened(Grid((x, y, z), stored.affine))[0])
    return turned_like(Volume(scan.array, scan.affine), own)


def _check_names(file: Path, found: Iterable[str], names: Mapping[int, str]) -> None:
    strange = sorted(set(found) - set(names.values()))
    if strange:
        raise FibldmError(
            f"every segment of {file.name} must have the name of a label of the run "
            f"({', '.join(names.values()) or 'it has none'}); got also {', '.join(strange)}",
            "rename or delete these segments",
        )


def _read_segmentation(file: Path, names: Mapping[int, str]) -> Volume:
    from fibldm.volumes.dicom import masks

    _check_names(file, masks.segment_names(file), names)
    scan = masks.read_segmentation(file, {name: value for value, name in names.items()})
    affine, squared = straightened(Volume(scan.array, scan.affine).grid)
    _say_findings(file, (*scan.findings, *squared))
    return Volume(scan.array, affine)


def _say_findings(file: Path, findings: Iterable[Remark]) -> None:
    for level, remark in findings:
        if level == "error":
            raise FibldmError(f"{file.name}: {remark}", "export the file again")
        _say_once(file.name, remark)


@cache  # a mask is read more than once
def _say_once(name: str, remark: str) -> None:
    _logger.warning("%s: %s", name, remark)


def as_labels(mask: Volume) -> Volume:
    """The mask as uint8; one that is uint8 comes back as it is.

    Raises:
        FibldmError: it holds fractions, or numbers that are no labels.
    """
    if mask.array.dtype == np.uint8:
        return mask
    mask = _settled(mask, "a mask")
    if not are_whole(mask.array):
        raise FibldmError(
            "a mask must hold whole numbers",
            f"is this a label map, and not an image or a probability? It holds {fractions_shown(mask.array)}",
        )
    if mask.array.min() < 0 or mask.array.max() > UNKNOWN_LABEL:
        raise FibldmError(f"mask labels must lie in 0..255; got {int(mask.array.min())}..{int(mask.array.max())}")
    return replace(mask, array=mask.array.astype(np.uint8))


def _settled(mask: Volume, name: str) -> Volume:
    array, changed = settled(mask.array)
    if changed:
        _say_once(name, "labels that are nearly whole numbers were rounded; save labels as integers")
    return replace(mask, array=array)


def keep_mask(path: Path, labels: Volume) -> None:
    """Write the mask as used, once for all volumes of it.

    Raises:
        FibldmError: another mask lies there.
    """
    if not path.exists():
        write_labels(path, labels)
        return
    there = read_volume(str(path))
    if not np.array_equal(there.array, labels.array) or not np.allclose(there.affine, labels.affine, atol=1e-4):
        raise FibldmError(f"{path} lies there already and is another mask", "choose another `out` folder")
