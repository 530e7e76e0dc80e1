"""One case: read to its last byte, checked, and written to the work folder in RAS+."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.datasets.checks import (
    AIR,
    PERCENTILES,
    Finding,
    as_float32,
    extent_findings,
    grid_findings,
    image_findings,
    label_counts,
    label_findings,
    likely_image_findings,
    spacing_findings,
)
from fibldm.datasets.masks import read_mask
from fibldm.datasets.source import Case, Mask
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Array, Grid, Volume, resample
from fibldm.volumes.scan import Covariate, Level, Scan
from fibldm.volumes.writer import write_nifti

Note = Callable[[Level, str], None]


@dataclass(frozen=True)
class Rules:
    """What is decided about the voxels of every case.

    Attributes:
        modality: ``ct``, ``mr`` or ``other``.
        limits: what becomes -1 and 1 of ``other``; ``None`` of the others.
        channels: names of the image channels.
        labels: values that have a name; empty where no name is known.
        spacing: mm, for files that state none; ``None`` where all do.
        remap: label values to change, as read to as written.
        ordered: whether several masks of a case come in an order of importance, so that they may overlap.
        resample_masks: whether a mask on another grid is brought to the image's (nearest voxel), else refused.
        derive: ``"lung"`` makes a lung mask of a CT without mask.
        bias_field: whether the bias field of MR is corrected (N4).
    """

    modality: str
    limits: tuple[float, float] | None = None
    channels: tuple[str, ...] = ("image",)
    labels: tuple[int, ...] = ()
    spacing: tuple[float, float, float] | None = None
    remap: Mapping[int, int] | None = None
    ordered: bool = False
    resample_masks: bool = False
    derive: str | None = None
    bias_field: bool = False

    @property
    def scanner(self) -> bool:
        """Whether files are a scanner's, which are in mm and in grey, or wrong."""
        return self.modality != "other"


@dataclass(frozen=True)
class CaseFacts:
    """What a sound case is, on RAS+ axes.

    Attributes:
        shape: voxels.
        spacing: millimetres.
        label_ml: volume of every label that occurs, background left out, in ml; ``None`` without a mask.
        range: of each channel in its units: the two percentiles for MR, least and greatest value for others.
        image_sha256: hash of the bytes of each channel's files.
        label_sha256: hash of the bytes of each mask's files.
        image_voxels: hash of the image's voxels as written; equal for equal volumes.
        label_voxels: hash of the label's voxels as written; ``None`` without a mask.
        acquisition: what the files say of how the image was made.
        derived: whether the mask was derived from the image.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CaseFacts":
        """The facts whose ``asdict`` went through JSON."""
        ml = values["label_ml"]
        return cls(
            **dict(values)
            | {
                "shape": tuple(values["shape"]),
                "spacing": tuple(values["spacing"]),
                "label_ml": None if ml is None else {int(value): volume for value, volume in ml.items()},
                "range": tuple(tuple(ends) for ends in values["range"]),
                "image_sha256": tuple(values["image_sha256"]),
                "label_sha256": tuple(values["label_sha256"]),
            }
        )


@dataclass(frozen=True)
class Record:
    """What came of a case.

    Attributes:
        findings: what is wrong with it.
        facts: of a case without errors, else ``None``.
    """

    findings: tuple[Finding, ...]
    facts: CaseFacts | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """The record that `to_dict` gave."""
        facts = values["facts"]
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return cls(findings, None if facts is None else CaseFacts.from_dict(facts))


def prepare_case(case: Case, rules: Rules, folder: Path | None) -> Record:
    """Read and check a case and, where nothing forbids it, write ``images/`` and ``labels/CASE.nii.gz``.

    Args:
        case: under the name it is written by.
        rules: what is decided about every case.
        folder: to write to; ``None`` writes nothing.

    Raises:
        FibldmError: the folder cannot be written; what is wrong with the case is a finding.
    """
    findings: list[Finding] = []

    def note(level: Level, message: str) -> None:
        finding = Finding(case.name, level, _without_paths(message, case) if case.private else message)
        if finding not in findings:  # several masks of one file say the same
            findings.append(finding)

    image = _image(case, rules, note)
    label, derived = (None, False) if image is None else _label(case, image, rules, note)
    if image is None or any(finding.level == "error" for finding in findings):
        return Record(tuple(findings), None)
    stored = stored_image(image.array, rules.modality)
    if folder is not None:
        write_nifti(folder / f"images/{case.name}.nii.gz", stored, image.affine, space=image.space)
        if label is not None:
            write_nifti(folder / f"labels/{case.name}.nii.gz", label.array, image.affine, space=image.space)
    return Record(tuple(findings), _facts(image, stored, label, rules.modality, derived))


def stored_image(array: Array, modality: str) -> Array:
    """The voxels of an image as written: CT in int16 with padding as air (float32 if it has fractions), else float32.

    Args:
        array: voxels, CT in HU.
        modality: ``ct``, ``mr`` or ``other``.
    """
    if modality != "ct":
        return as_float32(array)
    if array.dtype.kind in "iu":
        signed = array.astype(np.int32) if array.dtype.kind == "u" or array.dtype == np.int8 else array
        return np.maximum(signed, AIR).astype(np.int16, copy=False)
    padded = np.maximum(array, AIR)
    whole = np.rint(padded)
    return as_float32(padded) if np.abs(padded - whole).max() > 1e-3 else whole.astype(np.int16)


def _image(case: Case, rules: Rules, note: Note) -> Scan | None:
    read = partial(read_scan, spacing=rules.spacing, item=case.item, scanner=rules.scanner)
    scans = [_read(partial(read, files), "image", note) for files in case.images]
    sound = [scan for scan in scans if scan is not None]
    if len(sound) < len(case.images):
        return None
    other = sorted({scan.modality for scan in sound} - {"", rules.modality.upper()})
    if other:
        note("error", f"every image must be {rules.modality.upper()}; the files of this one say {', '.join(other)}")
        return None
    before = note_all(note, (found for other in sound[1:] for found in grid_findings(sound[0], other, "channel")))
    if before:
        return None
    image = _joined(sound)
    if _channel_count(image) != len(rules.channels):
        note(
            "error",
            f"image must have the channels {', '.join(rules.channels)}; it has {_channel_count(image)} (name them with "
            "--channels)",
        )
        return None
    for name, channel in zip(rules.channels, _channels(image), strict=True):
        note_all(note, image_findings(channel, rules.modality, image.spacing, name, rules.limits))
    note_all(note, extent_findings(image.array.shape[:3], image.spacing, rules.modality))
    stacked = [length > 1 for length in image.array.shape[:3]]
    note_all(note, spacing_findings(image.spacing[stacked]))  # one slice is as thick as it is
    return _corrected(image, note) if rules.bias_field else image


def _joined(scans: Sequence[Scan]) -> Scan:
    """Channels of one grid as one scan ``(X, Y, Z)`` or ``(X, Y, Z, C)``; what the first file states goes before."""
    if len(scans) == 1 and scans[0].array.shape[3:] != (1,):
        return scans[0]
    facts = {key: value for scan in reversed(scans) for key, value in scan.facts.items()}
    array = np.concatenate([scan.array.reshape(*scan.array.shape[:3], -1) for scan in scans], axis=3)
    array = array[..., 0] if array.shape[3] == 1 else array
    return replace(scans[0], array=array, sha256="+".join(scan.sha256 for scan in scans), facts=facts, findings=())


def _channel_count(image: Scan) -> int:
    return 1 if image.array.ndim == 3 else image.array.shape[3]


def _channels(image: Scan) -> list[Array]:
    return [image.array] if image.array.ndim == 3 else list(np.moveaxis(image.array, 3, 0))


def _corrected(image: Scan, note: Note) -> Scan | None:
    from fibldm.datasets.bias_field import correct

    try:
        return replace(image, array=correct(image))
    except FibldmError as error:
        note("error", error.message)
        return None


def _label(case: Case, image: Scan, rules: Rules, note: Note) -> tuple[Scan | None, bool]:
    """The label map on the image's grid, in uint8, and whether it was derived from the image."""
    if not case.masks:
        return _derived(image, rules, note)
    masks = [_label_map(mask, image, rules, note) for mask in case.masks]
    sound = [mask for mask in masks if mask is not None]
    if len(sound) < len(masks):
        return None, False
    overlap = np.count_nonzero(np.sum([mask.array != 0 for mask in sound], axis=0) > 1) if len(sound) > 1 else 0
    if overlap and not rules.ordered:
        note("error", f"masks must not overlap; they do in {overlap} voxels (--merge-masks says which goes first)")
        return None, False
    merged = sound[-1].array
    for mask in reversed(sound[:-1]):  # an earlier one wins
        merged = np.where(mask.array != 0, mask.array, merged)
    merged = _remapped(merged, rules.remap or {})
    likely = likely_image_findings(merged, _channels(image)[0])
    if note_all(note, (*label_findings(merged, rules.labels), *likely)):
        return None, False
    hashes = "+".join(mask.sha256 for mask in sound)
    return Scan(merged.astype(np.uint8), image.affine, hashes), False


def _label_map(mask: Mask, image: Scan, rules: Rules, note: Note) -> Scan | None:
    read = _read(partial(read_mask, mask, image, spacing=rules.spacing, scanner=rules.scanner), "label", note)
    if read is None or read.array.ndim != 3:
        if read is not None:
            note("error", f"label must hold one 3-D volume; its shape is {read.array.shape}")
        return None
    off = list(grid_findings(image, read))
    if off and not rules.resample_masks:
        note("error", f"{off[0][1]}; --resample-masks brings it to the image's grid")
        return None
    array = _on_grid(read, image, note) if off else read.array
    if array is None:
        return None
    if mask.value is None:
        return Scan(array, image.affine, read.sha256)
    wrong = sorted(set(np.unique(array).tolist()) - {0, 1, 255})
    if wrong:
        note("error", f"a binary mask must hold 0 and 1; it holds {', '.join(f'{value:g}' for value in wrong[:5])}")
        return None
    return Scan(np.where(array != 0, np.uint8(mask.value), np.uint8(0)), image.affine, read.sha256)


def _on_grid(mask: Scan, image: Scan, note: Note) -> Array | None:
    """A mask on the image's grid by its nearest voxels; refused where half of it lies outside of the image."""
    x, y, z = image.array.shape[:3]
    moved = resample(Volume(mask.array, mask.affine), Grid((x, y, z), image.affine), kind="label", fill=0).array
    before = np.count_nonzero(mask.array) * abs(np.linalg.det(mask.affine[:3, :3]))
    after = np.count_nonzero(moved) * abs(np.linalg.det(image.affine[:3, :3]))
    if after < before / 2:
        note("error", f"label must lie inside of the image; only {100 * after / before:.0f} % of it does")
        return None
    note("warning", "label lies on another grid and was brought to the image's by its nearest voxels")
    return moved


def _derived(image: Scan, rules: Rules, note: Note) -> tuple[Scan | None, bool]:
    if rules.derive != "lung":
        return None, False
    from fibldm.datasets.lung import lung_mask

    try:
        array = lung_mask(image)
    except FibldmError as error:
        note("error", error.message)
        return None, False
    note("warning", "label was derived from HU: no ground truth, and dense disease may be missing from it")
    return Scan(array, image.affine, ""), True


def _remapped(array: Array, remap: Mapping[int, int]) -> Array:
    changed = array.copy() if remap else array
    for value, new in remap.items():
        changed[array == value] = new
    return changed


def _read(read: Callable[[], Scan], what: str, note: Note) -> Scan | None:
    try:
        scan = read()
    except FibldmError as error:
        note("error", f"{what}: {error}")
        return None
    return None if note_all(note, ((level, f"{what}: {message}") for level, message in scan.findings)) else scan


def note_all(note: Note, found: Any) -> bool:
    """Note what was found; whether an error is among it."""
    listed = list(found)
    for level, message in listed:
        note(level, message)
    return any(level == "error" for level, _ in listed)


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
    )


def _without_paths(message: str, case: Case) -> str:
    for file in case.files:
        message = message.replace(str(file), "a file").replace(file.name, "a file")
    return message


def _hash_voxels(array: Array) -> str:
    shape = str((array.shape, array.dtype.str)).encode()
    digest = hashlib.sha256(shape)
    digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]
    return digest.hexdigest()
