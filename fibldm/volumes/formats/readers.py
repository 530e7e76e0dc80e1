"""One image or mask from its files, whatever the format: the right volume or an error, never a guess."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.files import holds_dicom
from fibldm.volumes.formats.itk_images import files_of, read_itk
from fibldm.volumes.formats.nifti import read_nifti
from fibldm.volumes.formats.plain_arrays import Key, read_array, read_item, read_slices
from fibldm.volumes.formats.segment_nrrd import named_segments
from fibldm.volumes.formats.stored import Findings, Stored, straightened
from fibldm.volumes.grid import Grid
from fibldm.volumes.label_values import settled
from fibldm.volumes.scan import Files, Level, Mask, Scan

Spacing = tuple[float, float, float]

_NIFTI = (".nii.gz", ".nii")
_ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
_ARRAYS = (".h5", ".hdf5", ".mat", ".npz", ".npy")
_PNG = ".png"
_DICOM = ".dcm"
WITHOUT_GEOMETRY = (*_ARRAYS, _PNG)
NEARLY: tuple[Level, str] = (
    "warning",
    "labels are nearly whole numbers and were rounded: the file was saved with a scale; save labels as integers",
)
SUPPORTED_SUFFIXES = (*_NIFTI, *_ITK, *WITHOUT_GEOMETRY, _DICOM)


def read_scan(
    files: Files,
    *,
    spacing: Spacing | None = None,
    key: Key = "image",
    item: str | None = None,
    scanner: bool = True,
) -> Scan:
    """An image or mask in RAS+ order.

    Args:
        files: one file, the slices of a DICOM series, or PNG slices.
        spacing: mm along R, A, S of a format that holds no geometry (HDF5, MATLAB, NumPy, PNG; `plain_arrays` says how
            their axes are taken); ``None`` for the others.
        key: which array of an HDF5, MATLAB or NumPy file.
        item: which image of an HDF5 pack; ``None`` where a file holds one.
        scanner: whether other units than mm and colours are refused, as no scanner writes them; else lengths are
            brought to mm, and colours are three channels.

    Raises:
        FibldmError: a file is missing, damaged or not what its name says; its format is not supported; its voxels or
            geometry are not usable; or ``spacing`` is missing, not positive, or given beside a geometry.
    """
    scan = _as_stored(files, spacing, key, item, scanner)
    x, y, z = scan.array.shape[:3]
    affine, found = straightened(Grid((x, y, z), scan.affine))
    return replace(scan, affine=affine, findings=(*scan.findings, *found))


def _as_stored(files: Files, spacing: Spacing | None, key: Key, item: str | None, scanner: bool) -> Scan:
    for file in files:
        _check_readable(file)
    if _is_dicom(files):
        from fibldm.volumes.dicom.series import read_series

        _check_spacing("DICOM", spacing, needed=False)
        return read_series(files)
    suffix = _common_suffix(files)
    _check_spacing(suffix, spacing, needed=suffix in WITHOUT_GEOMETRY)
    if suffix in _NIFTI:
        return read_nifti(files[0], any_unit=not scanner).scan(files[0].name, _sha256(files))
    if suffix in _ITK:
        return read_itk(files[0], any_unit=not scanner).scan(files[0].name, _sha256(files_of(files[0])))
    findings: Findings = (("warning", f"orientation is not stated by {suffix} files; left and right are a guess"),)
    if item is not None:
        array = read_item(files[0], key, item)
        sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()  # of a pack, each its own part
    else:
        array = read_slices(files, colours=not scanner) if suffix == _PNG else read_array(files[0], key)
        sha256 = _sha256(files)
    return Stored(array, np.diag([*(spacing or ()), 1.0]), findings).scan(files[0].name, sha256)


def read_mask(mask: Mask, image: Scan, *, spacing: Spacing | None = None, scanner: bool = True) -> Scan:
    """A mask as its files hold it, in RAS+ order; `Mask.value` of a binary mask is left to whoever merges them.

    Args:
        mask: its files; with names, a DICOM segmentation or RT structure set, or a segmentation of 3D Slicer.
        image: what it belongs to; a mask with names that covers a part of its grid is padded to all of it.
        spacing: as in `read_scan`, as is ``scanner``.
        scanner: see there.

    Raises:
        FibldmError: as in `read_scan`, or the mask has several channels.
    """
    if mask.names and _suffix(mask.files[0]) not in _ITK:
        return _dicom_mask(mask, image)
    scan = read_scan(mask.files, spacing=spacing, key="label", item=mask.item, scanner=scanner)
    if mask.names:
        from fibldm.volumes.dicom.masks import on_grid_of

        return on_grid_of(named_segments(scan, mask.files[0], mask.names), image)
    if scan.array.ndim != 3:
        raise FibldmError(
            f"a mask must be one label map (X, Y, Z); {mask.files[0].name} has {scan.array.shape[3]} channels",
            "merge them into one label map",
        )
    array, changed = settled(scan.array)
    return replace(scan, array=array, findings=(*scan.findings, NEARLY)) if changed else scan


def stem(path: Path) -> str:
    """The file name without its suffix, of which ``.nii.gz`` is one; without a supported suffix, the whole name."""
    suffix = _suffix(path)
    return path.name[: -len(suffix)] if suffix else path.name


def _dicom_mask(mask: Mask, image: Scan) -> Scan:
    from fibldm.volumes.dicom.masks import on_grid_of, read_segmentation, read_structures
    from fibldm.volumes.dicom.series import find_series

    kinds = {series.modality for series in find_series(mask.files)}
    if len(mask.files) != 1 or kinds not in ({"SEG"}, {"RTSTRUCT"}):
        raise FibldmError("a DICOM mask must be one file, a segmentation or an RT structure set", "name one of them")
    file = mask.files[0]
    read = read_segmentation if kinds == {"SEG"} else read_structures
    return on_grid_of(read(file, mask.names, image, elsewhere=mask.elsewhere), image)


def _check_readable(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise FibldmError(f"a file must be readable; {error.strerror}", "check the path and its permissions") from error


def _is_dicom(files: Files) -> bool:
    suffixes = {_suffix(file) for file in files}
    if len(files) > 1:
        return suffixes <= {_DICOM, ""}
    return suffixes == {_DICOM} or (suffixes == {""} and holds_dicom(files[0]))


def _common_suffix(files: Files) -> str:
    suffixes = {_suffix(file) for file in files}
    if len(suffixes) == 1 and "" not in suffixes and (len(files) == 1 or suffixes == {_PNG}):
        return suffixes.pop()
    endings = ", ".join(sorted(_suffix(file) or "another suffix" for file in files)[:3]) or "nothing"
    raise FibldmError(
        f"an image or mask must be one file ending in {', '.join(SUPPORTED_SUFFIXES)}, or the slices of a DICOM series "
        f"or PNG stack; got {len(files)} files ending in {endings}",
        "convert it to NIfTI",
    )


def _check_spacing(kind: str, spacing: Spacing | None, *, needed: bool) -> None:
    if needed and spacing is None:
        raise FibldmError(f"{kind} files hold no spacing, and it must be known", "give --spacing X,Y,Z in mm")
    if not needed and spacing is not None:
        raise FibldmError(f"{kind} files state their own spacing, and no other may be given", "leave out --spacing")
    if spacing is not None and not all(0 < step < float("inf") for step in spacing):
        raise FibldmError(f"spacing must be positive, in mm; got {spacing}")


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)), "")


def _sha256(files: Files) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
