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
from fibldm.volumes.formats.raw_volume import RawVolume, straightened
from fibldm.volumes.grid import Grid
from fibldm.volumes.scan import Files, Remark, Scan

Spacing = tuple[float, float, float]

_NIFTI = (".nii.gz", ".nii")
ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
_ARRAYS = (".h5", ".hdf5", ".mat", ".npz", ".npy")
_PNG = ".png"
_DICOM = ".dcm"
WITHOUT_GEOMETRY = (*_ARRAYS, _PNG)
SUPPORTED_SUFFIXES = (*_NIFTI, *ITK, *WITHOUT_GEOMETRY, _DICOM)


def read_scan(
    files: Files,
    *,
    spacing: Spacing | None = None,
    key: Key = "image",
    item: str | None = None,
    scanner: bool = True,
    resample_tilt: bool = False,
    suv: bool = False,
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
        resample_tilt: as in `fibldm.volumes.dicom.series.read_series`, as is ``suv``; of DICOM only.
        suv: see there.

    Raises:
        FibldmError: a file is missing, damaged or not what its name says; its format is not supported; its voxels or
            geometry are not usable; or ``spacing`` is missing, not positive, or given beside a geometry.
    """
    if _readable_dicom(files):
        from fibldm.volumes.dicom.series import read_series

        _check_spacing("DICOM", spacing, needed=False)
        scan = read_series(files, resample_tilt=resample_tilt, suv=suv)
    else:
        scan = _as_stored(files, spacing, key, item, scanner)
    x, y, z = scan.array.shape[:3]
    affine, found = straightened(Grid((x, y, z), scan.affine))
    return replace(scan, affine=affine, findings=(*scan.findings, *found))


def _readable_dicom(files: Files) -> bool:
    for file in files:
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            message = f"a file must be readable; {error.strerror}"
            raise FibldmError(message, "check the path and its permissions") from error
    return _is_dicom(files)


def _as_stored(files: Files, spacing: Spacing | None, key: Key, item: str | None, scanner: bool) -> Scan:
    suffix = _common_suffix(files)
    _check_spacing(suffix, spacing, needed=suffix in WITHOUT_GEOMETRY)
    if suffix in _NIFTI:
        return read_nifti(files[0], any_unit=not scanner).scan(files[0].name, _sha256(files))
    if suffix in ITK:
        return read_itk(files[0], any_unit=not scanner).scan(files[0].name, _sha256(files_of(files[0])))
    guess: Remark = ("warning", f"orientation is not stated by {suffix} files; left and right are a guess")
    if item is not None:
        array = read_item(files[0], key, item)
        sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()  # of a pack, each its own part
    else:
        array = read_slices(files, colours=not scanner) if suffix == _PNG else read_array(files[0], key)
        sha256 = _sha256(files)
    return RawVolume(array, np.diag([*(spacing or ()), 1.0]), (guess,)).scan(files[0].name, sha256)


def stem(path: Path) -> str:
    """The file name without its suffix, of which ``.nii.gz`` is one; without a supported suffix, the whole name."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def _is_dicom(files: Files) -> bool:
    suffixes = {suffix_of(file) for file in files}
    if len(files) > 1:
        return suffixes <= {_DICOM, ""}
    return suffixes == {_DICOM} or (suffixes == {""} and holds_dicom(files[0]))


def _common_suffix(files: Files) -> str:
    suffixes = {suffix_of(file) for file in files}
    if len(suffixes) == 1 and "" not in suffixes and (len(files) == 1 or suffixes == {_PNG}):
        return suffixes.pop()
    endings = ", ".join(sorted(suffix_of(file) or "another suffix" for file in files)[:3]) or "nothing"
    raise FibldmError(
        f"an image or mask must be one file ending in {', '.join(SUPPORTED_SUFFIXES)}, or the slices of a DICOM series "
        f"or PNG stack; got {len(files)} files ending in {endings}",
        "convert it to NIfTI",
    )


def _check_spacing(kind: str, spacing: Spacing | None, *, needed: bool) -> None:
    if needed and spacing is None:
        raise FibldmError(f"{kind} files hold no spacing, and it must be known", "give `spacing` X,Y,Z in mm")
    if not needed and spacing is not None:
        raise FibldmError(f"{kind} files state their own spacing, and no other may be given", "leave out `spacing`")
    if spacing is not None and not all(0 < step < float("inf") for step in spacing):
        raise FibldmError(f"spacing must be positive, in mm; got {spacing}")


def suffix_of(path: Path) -> str:
    """The supported suffix that a file name ends in, in lower case; empty without one."""
    name = path.name.lower()
    return next((suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)), "")


def _sha256(files: Files) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
