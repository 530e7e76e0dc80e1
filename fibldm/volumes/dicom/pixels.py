"""Voxels of DICOM frames: decoded, in their units, padding made air."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.frames import PIXELS, Frame, Problem, read_dataset, uid_name
from fibldm.volumes.scan import Remark

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array = NDArray[Any]

AIR_HU = -1024

_STORED = [*PIXELS, "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
_DECODERS = ("pydicom", "pyjpegls", "pillow", "gdcm", "pylibjpeg")
"""In this order, so that a library that is installed later decodes nothing otherwise than before."""
_CODECS = "pip install 'fibldm[dicom-codecs]'"
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Voxels:
    """Voxels of a series.

    Attributes:
        array: ``(slice, row, column)``.
        sha256: of its files in that order.
        findings: what was found in them.
        background: value where there is nothing: air in CT, 0 in PET, else the lowest value.
    """

    array: Array
    sha256: str
    findings: tuple[Remark, ...]
    background: float

    def scaled(self, factors: Sequence[float]) -> "Voxels":
        """PET with the values of each slice multiplied by its own factor, in float32; nothing is 0."""
        scaled = self.array * np.asarray(factors, dtype=np.float64)[:, None, None]
        return replace(self, array=scaled.astype(np.float32), background=0.0)


def unreadable(frames: Sequence[Frame], modality: str) -> Iterator[Problem]:
    """What keeps voxels from being plain numbers of known units: colour, tiles, other units, no rescale, bad bits."""
    headers = [frame.header for frame in frames]
    if any(_coloured(frame) for frame in frames):
        yield "its pixels are colours or indices of a palette", "export the grey values"
    if any("MOSAIC" in (header.get("ImageType") or ()) for header in headers):
        yield "its slices are tiles of a mosaic", "convert the series with dcm2niix and give the NIfTI file"
    if any(header.get("ModalityLUTSequence") for header in headers):
        yield "its values need a modality lookup table", "export it with Rescale Slope and Intercept"
    elif lacking := sum(_rescale(frame, modality) is None for frame in frames):
        yield f"{lacking} of {len(frames)} slices state no usable Rescale Slope and Intercept", "export it again"
    if modality == "CT" and {frame.text("RescaleType").upper() for frame in frames} - {"", "HU"}:
        yield "its values are not in HU (Rescale Type)", "export the original CT series"
    if not all(_plain_bits(header) for header in headers):
        yield "its stored bits are not 8, 16 or 32 with the high bit on top", "export it again"
    elif not all(_padding_fits(frame) for frame in frames):
        yield "its Pixel Padding Value is none that its pixels can have", "export it again"


def read_voxels(frames: Sequence[Frame], modality: str) -> Voxels:
    """Decode frames, one at a time, and rescale each by its own slope and intercept.

    Args:
        frames: in the order of the slices.
        modality: "CT", "MR" or "PT". Pixel padding becomes air (-1024 HU) in CT, 0 in PET, else the lowest value
            that is none.

    Returns:
        The voxels, in int16 where that is exact, else in float32.

    Raises:
        FibldmError: a slice has no voxels, fewer than its header says, ones that no installed library decodes, or there
            is nothing but padding.
    """
    array: Array = np.empty(0, np.int16)
    digest = hashlib.sha256()
    padding: dict[int, NDArray[np.bool_]] = {}
    lowest = np.inf
    for place, stored in enumerate(_stored(frames, digest)):
        values = _rescaled(stored, *(_rescale(frames[place], modality) or (1.0, 0.0)))
        if not array.size:
            array = np.empty((len(frames), *values.shape), np.int16)
        if values.dtype == np.float32 and array.dtype == np.int16:
            array = array.astype(np.float32)
        array[place] = values
        padded = _padded(frames[place], stored)
        if padded.any():
            padding[place] = padded
        if not padded.all():
            lowest = min(lowest, float(values[~padded].min()))
    if not np.isfinite(lowest):
        raise FibldmError("a DICOM series must hold an image; it holds nothing but padding", "export it again")
    background = {"CT": float(AIR_HU), "PT": min(lowest, 0.0)}.get(modality, lowest)
    findings = list(_filled(array, padding, background))
    if any(frame.text("LossyImageCompression") == "01" for frame in frames):
        findings.insert(0, ("warning", "the image was compressed with loss"))
    return Voxels(array, digest.hexdigest(), tuple(findings), background)


def _coloured(frame: Frame) -> bool:
    grey = frame.text("PhotometricInterpretation") == "MONOCHROME2" and frame.text("SamplesPerPixel") == "1"
    palette = "RedPaletteColorLookupTableDescriptor" in frame.header
    return not grey or palette or frame.text("PixelPresentation") in ("COLOR", "MIXED", "TRUE_COLOR")


def _plain_bits(header: "Dataset") -> bool:
    allocated, stored, high = (header.get(name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    return allocated in (8, 16, 32) and isinstance(stored, int) and 0 < stored <= allocated and high == stored - 1


def _padding_fits(frame: Frame) -> bool:
    value, bits = frame.numbers("PixelPaddingValue"), int(frame.header.BitsStored)
    if value is None:
        return not frame.text("PixelPaddingValue")
    if bits == frame.header.BitsAllocated:
        return True
    signed = frame.header.get("PixelRepresentation") == 1
    return -(2 ** (bits - 1)) <= value[0] < 2 ** (bits - 1) if signed else 0 <= value[0] < 2**bits


def _rescale(frame: Frame, modality: str) -> tuple[float, float] | None:
    """Slope and intercept; those of MR may be absent."""
    if modality == "MR" and "RescaleSlope" not in frame.header and "RescaleIntercept" not in frame.header:
        return 1.0, 0.0
    slope, intercept = frame.numbers("RescaleSlope"), frame.numbers("RescaleIntercept")
    return (slope[0], intercept[0]) if slope and intercept and slope[0] else None


def _stored(frames: Sequence[Frame], digest: "hashlib._Hash") -> Iterator[Array]:
    """The stored values ``(row, column)`` of every frame; the files' bytes go into the digest."""
    place = 0
    for file, group in itertools.groupby(frames, key=lambda frame: frame.file):
        content = file.read_bytes()
        digest.update(content)
        dataset = _pixels(content)
        del content
        for frame in group:
            place += 1
            yield _decoded(dataset, frame, f"slice {place} of {len(frames)}")


def _pixels(content: bytes) -> "Dataset | None":
    try:
        return read_dataset(BytesIO(content), _STORED, pixels=True)
    except Exception:
        return None


def _decoded(dataset: "Dataset | None", frame: Frame, name: str) -> Array:
    from pydicom.pixels import get_decoder

    message = f"{name} of a DICOM series must hold all its voxels, as its header says; it does not, or is damaged"
    damaged = FibldmError(message, "transfer the series again")
    syntax = None if dataset is None else dataset.file_meta.get("TransferSyntaxUID")
    if dataset is None or not dataset.get("PixelData"):
        raise damaged
    if syntax is None:
        message = f"{name} of a DICOM series must state how its voxels are compressed; it has no transfer syntax"
        raise FibldmError(message, "export the series again, as DICOM files with a preamble")
    try:
        decoder = get_decoder(str(syntax)) if uid_name(syntax) != "unknown" else None
    except NotImplementedError:
        decoder = None
    if decoder is None:
        raise _no_decoder(syntax)
    plugins = (
        [plugin for plugin in _DECODERS if plugin in decoder.available_plugins] if syntax.is_encapsulated else [""]
    )
    if not plugins:
        raise _no_decoder(syntax)
    for plugin in plugins:
        try:
            array, _ = decoder.as_array(dataset, index=frame.index, raw=True, decoding_plugin=plugin)
        except Exception:
            continue
        if array.shape == (dataset.Rows, dataset.Columns):
            return array
    if syntax.is_encapsulated and "gdcm" not in plugins:
        damaged.remedy += f"; if it is whole, {_CODECS} may decode it"
    raise damaged


def _no_decoder(syntax: object) -> FibldmError:
    message = (
        f"a DICOM series must be stored in a way that can be decoded; no installed library decodes {uid_name(syntax)}"
    )
    return FibldmError(message, f"{_CODECS}, or decompress the series before")


def _rescaled(stored: Array, slope: float, intercept: float) -> Array:
    """Values in int16 where that is exact, else in float32."""
    if slope.is_integer() and intercept.is_integer():
        ends = [int(end) * slope + intercept for end in (stored.min(), stored.max())]
        if _INT16.min <= min(ends) and max(ends) <= _INT16.max:
            return (stored.astype(np.int64) * int(slope) + int(intercept)).astype(np.int16)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def _padded(frame: Frame, stored: Array) -> NDArray[np.bool_]:
    """Where the stored values are padding."""
    value = frame.numbers("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    ends = np.array([value, frame.numbers("PixelPaddingRangeLimit") or value], dtype=np.int64)
    # a signed value may be written as unsigned and the other way round
    low, high = np.sort(ends.ravel().astype(stored.dtype))
    padded: NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return padded


def _filled(array: Array, padding: Mapping[int, NDArray[np.bool_]], value: float) -> Iterator[Remark]:
    """Fill padding with a value, and say so where that changes voxels."""
    changed = 0
    for place, padded in padding.items():
        changed += bool((array[place][padded] != value).any())
        array[place][padded] = value
    if changed:
        yield "warning", f"pixel padding in {changed} of {len(array)} slices became {value:g}"
