"""Read one case to its last byte and say everything that is wrong with it."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.intensity import percentile_range
from fibldm.volumes.layouts import Case

Level = Literal["error", "warning"]
Modality = Literal["ct", "mr"]

AIR = -1024
"""HU of air: what lies below is padding and becomes air."""

GRID_TOLERANCE = 1e-3
"""How far the affines of image and label may differ, in voxels."""

_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, zlib.error, ImageFileError, HeaderDataError,
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case; an error forbids the dataset, a warning is recorded."""

    case: str
    level: Level
    message: str


@dataclass(frozen=True)
class NiftiVolume:
    """A NIfTI file as read, reoriented to RAS+ by axis flips and permutations only.

    Attributes:
        array: voxels ``(X, Y, Z)``, scaled as the header says.
        affine: voxel indices to RAS+ millimetres.
        original: the image before reorientation, for its header.
        sha256: hash of the file's bytes.
    """

    array: np.ndarray
    affine: np.ndarray
    original: nib.Nifti1Image
    sha256: str

    @property
    def spacing(self) -> np.ndarray:
        """Spacing in millimetres along the RAS+ axes."""
        return nib.affines.voxel_sizes(self.affine)


@dataclass(frozen=True)
class CaseFacts:
    """What a checked case is, on RAS+ axes.

    Attributes:
        shape: voxels.
        spacing: millimetres.
        label_ml: volume of every label that occurs, background left out, in ml.
        range: of the image in its units: the two percentiles for MR, least and greatest HU for CT.
        image_sha256: hash of the image file.
        label_sha256: hash of the label file.
        image_voxels: hash of the image's voxels as they will be written; equal for equal volumes.
        label_voxels: hash of the label's voxels as they will be written.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    label_ml: Mapping[int, float]
    range: tuple[float, float]
    image_sha256: str
    label_sha256: str
    image_voxels: str
    label_voxels: str


def read_nifti(path: Path) -> NiftiVolume:
    """A 3-D NIfTI volume, decompressed to its last byte and brought to RAS+.

    Raises:
        FibldmError: the file is damaged, is not NIfTI, is not 3-D, has no plain numbers or no invertible affine.
    """
    try:
        data = path.read_bytes()
        image = _parse(gzip.decompress(data) if path.name.endswith(".gz") else data)
        _check_header(image)
        canonical = nib.as_closest_canonical(image)
        array = np.asanyarray(canonical.dataobj)
    except _UNREADABLE as error:
        raise FibldmError(f"{path} cannot be read to its last byte: {error}", "copy or export it again") from error
    return NiftiVolume(array, canonical.affine, image, hashlib.sha256(data).hexdigest())


def check_case(
    case: Case, modality: Modality, percentiles: tuple[float, float]
) -> tuple[list[Finding], CaseFacts | None]:
    """Everything that is wrong with a case, and its facts if nothing forbids them.

    Args:
        case: the case.
        modality: ``ct`` or ``mr``.
        percentiles: the two percentiles of ``CaseFacts.range``.
    """
    findings: list[Finding] = []

    def note(level: Level, message: str) -> None:
        findings.append(Finding(case.name, level, message))

    image, label = _read(case.image, note), _read(case.label, note)
    if image is not None:
        _note_all(note, image_findings(image, modality, percentiles))
        _note_all(note, _geometry_findings(image, "image"))
    if label is not None:
        _note_all(note, label_findings(label))
    if image is not None and label is not None:
        _note_all(note, grid_findings(image, label))
    failed = image is None or label is None or any(finding.level == "error" for finding in findings)
    return findings, None if failed else _facts(image, label, modality, percentiles)  # type: ignore[arg-type]


def image_findings(
    image: NiftiVolume, modality: Modality, percentiles: tuple[float, float]
) -> Iterator[tuple[Level, str]]:
    """What is wrong with the voxels of an image."""
    wrong = image.array.size - np.count_nonzero(np.isfinite(_float32(image.array)))
    if wrong:
        yield "error", f"image must be finite; {wrong} of {image.array.size} voxels are NaN or infinite"
        return
    low, high = image.array.min(), image.array.max()
    if low == high:
        yield "error", f"image must not be constant; every voxel is {low:g}"
        return
    if modality == "ct":
        yield from _ct_findings(float(low), float(high))
        return
    try:
        percentile_range(_float32(image.array), *percentiles)
    except FibldmError as error:
        yield "error", str(error)


def label_findings(label: NiftiVolume) -> Iterator[tuple[Level, str]]:
    """What is wrong with the values of a label volume."""
    array = label.array
    if not np.isfinite(array).all() or (array.dtype.kind == "f" and not np.array_equal(array, np.rint(array))):
        yield "error", "labels must be whole numbers; the label volume has fractions or NaN"
    elif array.min() < 0 or array.max() >= UNKNOWN_LABEL:
        yield (
            "error",
            (
                f"labels must be within 0...{UNKNOWN_LABEL - 1} ({UNKNOWN_LABEL} is kept for unknown); "
                f"they run from {array.min():g} to {array.max():g}"
            ),
        )
    elif not array.any():
        yield "warning", "the label volume is all background"


def grid_findings(image: NiftiVolume, label: NiftiVolume) -> Iterator[tuple[Level, str]]:
    """Whether image and label lie on one grid, compared on RAS+ axes."""
    if image.array.shape != label.array.shape:
        yield (
            "error",
            (f"image and label must have one size; image {image.array.shape}, label {label.array.shape} voxels (RAS+)"),
        )
        return
    off = np.abs(np.linalg.solve(image.affine, label.affine) - np.eye(4)).max()
    if off > GRID_TOLERANCE:
        yield (
            "error",
            (f"image and label must have one affine; they differ by {off:.3g} voxels (at most {GRID_TOLERANCE:g})"),
        )


def stored_image(array: np.ndarray, modality: Modality) -> np.ndarray:
    """The voxels of an image as written: CT in int16 with padding as air (float32 if it has fractions), MR in float32.

    Args:
        array: voxels, CT in HU.
        modality: ``ct`` or ``mr``.
    """
    if modality == "mr":
        return _float32(array)
    padded = np.maximum(array if array.dtype.kind == "f" else array.astype(np.int32), AIR)
    if padded.dtype.kind == "f" and np.abs(padded - np.rint(padded)).max() > 1e-3:
        return padded.astype(np.float32)
    return np.rint(padded).astype(np.int16)


def stored_label(array: np.ndarray) -> np.ndarray:
    """The voxels of a label volume as written, in uint8."""
    return array.astype(np.uint8)


def _parse(data: bytes) -> nib.Nifti1Image:
    header_size = {int.from_bytes(data[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    if 540 in header_size:
        return nib.Nifti2Image.from_bytes(data)
    if 348 not in header_size or data[344:347] != b"n+1":
        raise ValueError("it has no NIfTI header")
    return nib.Nifti1Image.from_bytes(data)


def _check_header(image: nib.Nifti1Image) -> None:
    if len(image.shape) != 3 or min(image.shape) < 2:
        raise ValueError(f"it must be 3-D with at least 2 voxels along each axis, and has size {image.shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels must be plain numbers, and are {image.get_data_dtype()}")
    directions = image.affine[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    if not np.isfinite(image.affine).all() or not lengths.all() or abs(np.linalg.det(directions / lengths)) < 1e-3:
        raise ValueError(f"the affine must be finite and invertible, and is {image.affine.tolist()}")


def _read(path: Path, note: Callable[[Level, str], None]) -> NiftiVolume | None:
    try:
        return read_nifti(path)
    except FibldmError as error:
        note("error", error.message)
        return None


def _note_all(note: Callable[[Level, str], None], found: Iterator[tuple[Level, str]]) -> None:
    for level, message in found:
        note(level, message)


def _ct_findings(low: float, high: float) -> Iterator[tuple[Level, str]]:
    if low < -4096 or high > np.iinfo(np.int16).max or low >= -500:
        yield (
            "error",
            (
                f"a CT must have air (below -500 HU) and lie within [-4096, 32767] HU; it runs from {low:g} "
                f"to {high:g}; for a dataset of MR give --modality mr"
            ),
        )


def _geometry_findings(volume: NiftiVolume, what: str) -> Iterator[tuple[Level, str]]:
    header = volume.original.header
    units = header.get_xyzt_units()[0]
    if units not in ("mm", "unknown"):
        yield "error", f"{what} must be in mm; its header says {units}"
    directions = volume.affine[:3, :3] / volume.spacing
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > 0.01:
        yield "warning", f"{what} axes are not at right angles (cosine {shear:.3f}), as with a tilted gantry"
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        yield "warning", f"{what} header has no orientation (sform and qform codes are 0); left and right are a guess"
    yield from _form_findings(header, what, volume.original.shape)


def _form_findings(header: Any, what: str, shape: tuple[int, ...]) -> Iterator[tuple[Level, str]]:
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError) as error:
        yield "error", f"qform of the {what} must be a rotation; {error}"
        return
    if sform is None or qform is None:
        return
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in shape), [1]), axis=-1).reshape(-1, 4)
    off = np.abs(corners @ (np.linalg.solve(sform, qform) - np.eye(4)).T).max()
    if off > 0.5:
        yield "error", f"sform and qform of the {what} must agree; corners lie {off:.3g} voxels apart"
    elif off > 0.1:
        yield "warning", f"sform and qform of the {what} differ by {off:.2f} voxels at the corners; sform is used"


def _facts(image: NiftiVolume, label: NiftiVolume, modality: Modality, percentiles: tuple[float, float]) -> CaseFacts:
    stored, labels = stored_image(image.array, modality), stored_label(label.array)
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    counts = np.bincount(labels.ravel(), minlength=UNKNOWN_LABEL)
    low, high = np.percentile(stored, percentiles) if modality == "mr" else (stored.min(), stored.max())
    return CaseFacts(
        shape=stored.shape,
        spacing=tuple(float(value) for value in image.spacing),
        label_ml={int(value): float(counts[value] * voxel_ml) for value in np.flatnonzero(counts) if value},
        range=(float(low), float(high)),
        image_sha256=image.sha256,
        label_sha256=label.sha256,
        image_voxels=_hash_voxels(stored),
        label_voxels=_hash_voxels(labels),
    )


def _hash_voxels(array: np.ndarray) -> str:
    shape = str((array.shape, array.dtype.str)).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).hexdigest()


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
