"""The masks that volumes are drawn from: found among files and folders, read, and kept beside the volumes."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.formats.segment_nrrd import named_segments, segments_of
from fibldm.volumes.grid import Volume
from fibldm.volumes.label_values import are_whole, fractions_shown, settled
from fibldm.volumes.writer import volume_stem, write_labels

_logger = logging.getLogger("fibldm")
_NIFTI = (".nii", ".nii.gz")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_MASKS = (*_NIFTI, ".dcm")


def find_masks(sources: list[Path]) -> list[Path]:
    """The mask files that a list of files and folders names, in order of their names.

    Raises:
        FibldmError: there is none, one is neither NIfTI nor DICOM, or two have the same name.
    """
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FibldmError(f"masks must exist; {source} does not")
        files += _files_in(source, _MASKS) if source.is_dir() else [source]
    wrong = [str(file) for file in files if not file.name.endswith(_MASKS)]
    if wrong or not files:
        raise FibldmError(
            f"masks must be NIfTI files (.nii, .nii.gz) or DICOM segmentations (.dcm); "
            f"got {', '.join(wrong) or 'none'}",
            "name files, or folders that hold them (folders inside of those are not searched)",
        )
    stems = [mask_stem(file) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise FibldmError(f"every mask needs a name of its own; given twice: {', '.join(twice)}", "rename them")
    return files


def volumes_in(folder: Path) -> list[Path]:
    """NIfTI files, but none that begins with a dot: those are unfinished, or hold the attributes of another file."""
    return _files_in(folder, _NIFTI)


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*") if file.name.endswith(suffixes))


def mask_stem(file: Path) -> str:
    """The file name without the suffixes that masks may have."""
    return volume_stem(file).removesuffix(".dcm")


def read_mask(file: Path, names: Mapping[int, str]) -> Volume:
    """A mask of either format.

    Args:
        file: NIfTI, NRRD, MetaImage, or a DICOM segmentation.
        names: of the run's labels by value; the segments of a DICOM segmentation, or of one of 3D Slicer (NRRD), get
            the values of their names.

    Raises:
        FibldmError: the file cannot be read, or a segment has no such name.
    """
    if file.suffix in _ITK:
        return _itk_mask(file, names)
    if file.suffix != ".dcm":
        volume = read_volume(str(file))
        array, changed = settled(volume.array)
        if changed:
            _say_rounded(file.name)
        return Volume(array, volume.affine)
    from fibldm.volumes.dicom.masks import read_segmentation, segment_names

    _check_known(file, segment_names(file), names)
    scan = read_segmentation(file, {name: value for value, name in names.items()})
    return Volume(scan.array, scan.affine)


def _itk_mask(file: Path, names: Mapping[int, str]) -> Volume:
    scan = read_scan((file,), key="label")
    if segments := segments_of(file):
        _check_known(file, [segment.name for segment in segments], names)
        scan = named_segments(scan, file, {name: value for value, name in names.items()})
    wrong = [message for level, message in scan.findings if level == "error"]
    if wrong or scan.array.ndim != 3:
        raise FibldmError(f"{file}: {'; '.join(wrong) or 'a mask must be one label map'}", "export the file again")
    return Volume(scan.array, scan.affine)


def _check_known(file: Path, segments: list[str], names: Mapping[int, str]) -> None:
    strange = sorted(set(segments) - set(names.values()))
    if strange:
        raise FibldmError(
            f"every segment of {file.name} must have the name of a label of the run "
            f"({', '.join(names.values()) or 'it has none'}); got also {', '.join(strange)}",
            "rename or delete these segments",
        )


def as_labels(mask: Volume) -> Volume:
    """The mask as uint8; labels that a scale on disk left nearly whole are made whole, with a line in the log.

    Raises:
        FibldmError: it holds fractions, or numbers that are no labels.
    """
    array, changed = settled(mask.array)
    if not are_whole(array):
        raise FibldmError(
            "a mask must hold whole numbers",
            f"is this a label map, and not an image or a probability? It holds {fractions_shown(array)}",
        )
    if array.min() < 0 or array.max() > UNKNOWN_LABEL:
        raise FibldmError(f"mask labels must lie in 0..255; got {int(array.min())}..{int(array.max())}")
    if changed:
        _say_rounded("a mask")
    return Volume(array.astype(np.uint8), mask.affine)


@cache  # a mask is read more than once
def _say_rounded(name: str) -> None:
    _logger.warning("the labels of %s are nearly whole numbers and were rounded; save labels as integers", name)


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
        raise FibldmError(f"{path} lies there already and is another mask", "choose another --out folder")
