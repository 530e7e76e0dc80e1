"""One case: read to its last byte, checked, and written to the work folder in RAS+."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.checks import (
    PERCENTILES,
    extent_findings,
    grid_findings,
    image_findings,
    label_counts,
    label_findings,
    likely_image_findings,
    spacing_findings,
    undrawn_findings,
)
from fibldm.datasets.findings import Finding, Findings
from fibldm.datasets.masks import read_mask
from fibldm.datasets.second_image import second_image
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Mask
from fibldm.datasets.stored_image import stored_image
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Array, Grid, Volume, resample
from fibldm.volumes.scan import Covariate, Scan
from fibldm.volumes.second_image import FOLDER as SECOND_IMAGES
from fibldm.volumes.writer import write_nifti


@dataclass(frozen=True)
class CaseFacts:
    """What a sound case is, on RAS+ axes.

    Attributes:
        shape: voxels.
        spacing: millimetres.
        label_ml: volume of every label that occurs, without background and unknown, in ml; ``None`` without a mask.
        range: of each channel in its units: the two percentiles for MR, least and greatest value for others.
        image_sha256: hash of the bytes of each channel's files.
        label_sha256: hash of the bytes of each mask's files.
        image_voxels: hash of the image's voxels as written; equal for equal volumes.
        label_voxels: hash of the label's voxels as read, on RAS+ axes; ``None`` without a mask.
        acquisition: what the files say of how the image was made.
        derived: whether the mask was derived from the image.
        second_sha256: hash of the bytes of the second image's files, where there is one.
        second_voxels: hash of its voxels and grid as written; ``None`` without one.
        resampled: what was done to slices that were no regular stack, see `AcquiredSlices.to_dict`; else ``None``.
        unknown: whether some voxels of the mask are unknown by themselves.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    label_ml: Mapping[int, float] | None
    range: tuple[tuple[float, float], ...]
    image_sha256: tuple[str, ...]
    label_sha256: tuple[str, ...]
    image_voxels: str
    label_voxels: str | None
    acquisition: Mapping[str, Covariate]
    derived: bool = False
    second_sha256: tuple[str, ...] = ()
    second_voxels: str | None = None
    resampled: Mapping[str, Any] | None = None
    unknown: bool = False

    @property
    def voxels(self) -> list[str | None]:
        """Hashes of all voxels as written."""
        second = [] if self.second_voxels is None else [self.second_voxels]
        return [self.image_voxels, self.label_voxels, *second]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CaseFacts":
        """The facts whose ``asdict`` went through JSON."""
        ml, tuples = values["label_ml"], {key: _tuples(value) for key, value in values.items()}
        return cls(**tuples | {"label_ml": None if ml is None else {int(value): ml[value] for value in ml}})


@dataclass(frozen=True)
class Record:
    """What came of a case.

    Attributes:
        findings: what is wrong with it.
        facts: of a case without errors, else ``None``.
    """

    findings: tuple[Finding, ...]
    facts: CaseFacts | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """The record whose ``asdict`` went through JSON."""
        facts = values["facts"]
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return cls(findings, None if facts is None else CaseFacts.from_dict(facts))


def prepare_case(case: Case, settings: PrepareSettings, folder: Path | None) -> Record:
    """Read and check a case and, where nothing forbids it, write ``images/`` and ``labels/CASE.nii.gz``, and
    ``second_images/`` where there is one.

    Args:
        case: under the name it is written by.
        settings: with modality, and channels and labels as the dataset has them (`Plan.case_settings`).
        folder: to write to; ``None`` writes nothing.

    Raises:
        FibldmError: the folder cannot be written; what is wrong with the case is a finding.
    """
    findings = Findings(case.name, case.files if case.private else ())
    image, label, second = None, None, None
    with findings.collecting():
        image = _image(case, settings, findings)
        label = None if image is None else _label(case, image, settings, findings)
        second = None if image is None else second_image(case, image, settings, findings)
    if image is None or findings.bad:
        return Record(tuple(findings.listed), None)
    modality = str(settings.modality)
    stored = stored_image(image.array, modality)
    if folder is not None:
        write_nifti(folder / f"images/{case.name}.nii.gz", stored, image.affine, space=image.space)
        if label is not None:
            write_nifti(folder / f"labels/{case.name}.nii.gz", label.array, image.affine, space=image.space)
        if second is not None:
            file = folder / SECOND_IMAGES / f"{case.name}.nii.gz"
            write_nifti(file, second.array, second.affine, space=second.space)
    derived = label is not None and not case.masks
    facts = _facts(image, stored, label, modality, derived)
    return Record(tuple(findings.listed), facts if second is None else _with_second(facts, second))


def _image(case: Case, settings: PrepareSettings, findings: Findings) -> Scan | None:
    """All channels of a case; ``None`` where no mask can be looked at beside them."""
    modality, names = str(settings.modality), settings.channels or ("image",)
    read = partial(
        read_scan,
        spacing=settings.spacing,
        item=case.item,
        scanner=settings.scanner,
        resample_tilt=settings.resample_tilt,
        suv=modality == "pt",
    )
    scans = [_read(partial(read, files), "image", findings) for files in case.images]
    sound = [scan for scan in scans if scan is not None]
    if len(sound) < len(scans):
        return None
    other = sorted({scan.modality for scan in sound} - {"", modality.upper()})
    if other:
        raise FibldmError(f"every image must be {modality.upper()}; the files of this one say {', '.join(other)}")
    findings.add(found for other in sound[1:] for found in grid_findings(sound[0], other, "channel"))
    if findings.bad:
        return None
    image = _joined(sound)
    channels = _channels(image)
    if len(channels) != len(names):
        came = f"it has {len(channels)} (name them with --channels)"
        raise FibldmError(f"image must have the channels {', '.join(names)}; {came}")
    for name, channel in zip(names, channels, strict=True):
        findings.add(image_findings(channel, modality, image.spacing, name, settings.range))
    findings.add(extent_findings(image.array.shape[:3], image.spacing, modality))
    stacked = [length > 1 for length in image.array.shape[:3]]
    findings.add(spacing_findings(image.spacing[stacked]))  # one slice is as thick as it is
    if not settings.bias_field:
        return image
    from fibldm.datasets.bias_field import correct

    return replace(image, array=correct(image))


def _read(read: Callable[[], Scan], what: str, findings: Findings) -> Scan | None:
    with findings.collecting(f"{what}: "):
        scan = read()
        findings.add(scan.findings, f"{what}: ")
        return None if any(level == "error" for level, _ in scan.findings) else scan
    return None


def _joined(scans: Sequence[Scan]) -> Scan:
    """Channels of one grid as one scan ``(X, Y, Z)`` or ``(X, Y, Z, C)``; what the first file states goes before."""
    if len(scans) == 1 and scans[0].array.shape[3:] != (1,):
        return scans[0]
    facts = {key: value for scan in reversed(scans) for key, value in scan.facts.items()}
    array = np.concatenate([scan.array.reshape(*scan.array.shape[:3], -1) for scan in scans], axis=3)
    array = array[..., 0] if array.shape[3] == 1 else array
    return replace(scans[0], array=array, sha256="+".join(scan.sha256 for scan in scans), facts=facts, findings=())


def _channels(image: Scan) -> list[Array]:
    return [image.array] if image.array.ndim == 3 else list(np.moveaxis(image.array, 3, 0))


def _label(case: Case, image: Scan, settings: PrepareSettings, findings: Findings) -> Scan | None:
    """The label map on the image's grid, in uint8; ``None`` of a case without one."""
    if not case.masks:
        return _lungs(image, findings) if settings.derive == "lung" else None
    masks = []
    for mask in case.masks:
        with findings.collecting():
            masks.append(_label_map(mask, image, settings, findings))
    sound = [mask for mask in masks if mask is not None]
    if len(sound) < len(case.masks):
        return None
    overlap = np.count_nonzero(np.sum([mask.array != 0 for mask in sound], axis=0) > 1) if len(sound) > 1 else 0
    if overlap and not settings.merge_masks:
        raise FibldmError(f"masks must not overlap; they do in {overlap} voxels (`merge_masks` says which goes first)")
    merged = sound[-1].array
    for earlier in reversed(sound[:-1]):  # which wins
        merged = np.where(earlier.array != 0, earlier.array, merged)
    read, merged = merged, merged.copy()
    for value, new in settings.remap.items():
        merged[read == value] = new
    known = merged
    if any(mask.unknown is not None for mask in case.masks):
        known = np.where(merged == UNKNOWN_LABEL, 0, merged)
    findings.add(label_findings(known, settings.labels))
    findings.add(likely_image_findings(known, _channels(image)[0]))
    if case.annotated is not None:
        findings.add(undrawn_findings(known, case.annotated, settings.labels))
    if findings.bad:
        return None
    return Scan(merged.astype(np.uint8), image.affine, "+".join(mask.sha256 for mask in sound))


def _label_map(mask: Mask, image: Scan, settings: PrepareSettings, findings: Findings) -> Scan | None:
    read = partial(read_mask, mask, image, spacing=settings.spacing, scanner=settings.scanner)
    scan = _read(read, "label", findings)
    if scan is None:
        return None
    off = next(grid_findings(image, scan), None)
    if off and not settings.resample_masks:
        raise FibldmError(f"{off[1]}; --resample-masks brings it to the image's grid")
    array = _on_grid(scan, image, findings) if off else scan.array
    if mask.value is not None:
        wrong = sorted(set(np.unique(array).tolist()) - {0, 1, 255})
        if wrong:
            held = ", ".join(f"{value:g}" for value in wrong[:5])
            raise FibldmError(f"a binary mask must hold 0 and 1; it holds {held}")
        array = np.where(array != 0, np.uint8(mask.value), np.uint8(0))
    if mask.unknown is not None:
        if mask.unknown != UNKNOWN_LABEL and (array == UNKNOWN_LABEL).any():
            raise FibldmError(
                f"labels must be within 0...{UNKNOWN_LABEL - 1} beside the value {mask.unknown} of voxels that were "
                f"not annotated; {UNKNOWN_LABEL} occurs, too"
            )
        array = np.where(array == mask.unknown, UNKNOWN_LABEL, array)
    if mask.legend:
        array = _in_legend(array, mask)
    return Scan(array, image.affine, scan.sha256)


def _in_legend(read: Array, mask: Mask) -> Array:
    kept = [0, *([UNKNOWN_LABEL] if mask.unknown is not None else [])]
    if strange := sorted(set(np.unique(read).tolist()) - {*kept, *mask.legend}):
        listed = ", ".join(f"{value:g}" for value in strange[:5])
        raise FibldmError(
            f"every label must have a name in the dataset's own legend, as it is matched by that; {listed} has none"
        )
    written = read.copy()
    for value, new in mask.legend.items():
        written[read == value] = new
    return written


def _on_grid(mask: Scan, image: Scan, findings: Findings) -> Array:
    """A mask on the image's grid by its nearest voxels; refused where half of it lies outside of the image."""
    x, y, z = image.array.shape[:3]
    moved = resample(Volume(mask.array, mask.affine), Grid((x, y, z), image.affine), kind="label", fill=0).array
    before = np.count_nonzero(mask.array) * abs(np.linalg.det(mask.affine[:3, :3]))
    after = np.count_nonzero(moved) * abs(np.linalg.det(image.affine[:3, :3]))
    if after < before / 2:
        raise FibldmError(f"label must lie inside of the image; only {100 * after / before:.0f} % of it does")
    findings.add([("warning", "label lies on another grid and was brought to the image's by its nearest voxels")])
    return moved


def _lungs(image: Scan, findings: Findings) -> Scan:
    from fibldm.datasets.lung import lung_mask

    label = Scan(lung_mask(image), image.affine, "")
    said = "label was derived from HU: no ground truth, and dense disease may be missing from it"
    findings.add([("warning", said)])
    return label


def _facts(image: Scan, stored: Array, label: Scan | None, modality: str, derived: bool) -> CaseFacts:
    x, y, z = stored.shape[:3]
    right, front, up = (float(length) for length in image.spacing)
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    channels = _channels(Scan(stored, image.affine, ""))
    ends = [np.percentile(c, PERCENTILES) if modality == "mr" else (c.min(), c.max()) for c in channels]
    counts = None if label is None else label_counts(label.array)
    return CaseFacts(
        shape=(x, y, z),
        spacing=(right, front, up),
        label_ml=None if counts is None else {value: count * voxel_ml for value, count in counts.items()},
        range=tuple((float(low), float(high)) for low, high in ends),
        image_sha256=tuple(image.sha256.split("+")),
        label_sha256=() if label is None or derived else tuple(label.sha256.split("+")),
        image_voxels=_hash_voxels(stored),
        label_voxels=None if label is None else _hash_voxels(label.array),
        acquisition=dict(image.facts),
        derived=derived,
        resampled=None if image.acquired is None else image.acquired.to_dict(),
        unknown=label is not None and bool((label.array == UNKNOWN_LABEL).any()),
    )


def _with_second(facts: CaseFacts, second: Scan) -> CaseFacts:
    place = hashlib.sha256(f"{_hash_voxels(second.array)} {np.round(second.affine, 6).tolist()}".encode())
    return replace(facts, second_sha256=tuple(second.sha256.split("+")), second_voxels=place.hexdigest())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _hash_voxels(array: Array) -> str:
    shape = str((array.shape, array.dtype.str)).encode()
    digest = hashlib.sha256(shape)
    digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]
    return digest.hexdigest()
