"""Axial slices of the volumes of a work folder, as a dataset of their own: networks in two dimensions train on them."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.layouts.facts import IGNORE, REFERENCE_KEYS
from fibldm.errors import FibldmError
from fibldm.files import write_json, write_text
from fibldm.locks import alone, beside
from fibldm.progress import track
from fibldm.volumes.datalist import ANNOTATED, SECOND_IMAGE, SPLITS, UNKNOWN_VOXELS, annotated_of, read_datalist
from fibldm.volumes.grid import SCANNER
from fibldm.volumes.writer import write_nifti

MANIFEST = "cases.csv"
POSITION = "position"
"""The column of a slice's place in its volume, which may be a covariate."""

_FILES = {"image": "slices", "label": "masks"}


def write_slices(work: Path, out: Path, *, every: float) -> int:
    """Write slices of every case as NIfTI of one voxel along Z, where they lie in the patient, and a CSV of them.

    A slice keeps the patient, the split and the covariates of its volume, so that none of a patient's slices comes into
    another split, and has its place in the volume as one more, `POSITION`. Cases with a mask are cut where it has
    labels, the others from end to end.

    Args:
        work: folder of ``fibldm prepare``, RAS+.
        out: folder to write ``cases.csv``, ``dataset.json``, ``slices/`` and ``masks/`` to.
        every: mm from one slice to the next, at least the distance of the volume's own.

    Returns:
        The number of slices.

    Raises:
        FibldmError: ``every`` is not above 0, ``work`` is no work folder, ``out`` is not empty, cannot be written or is
            written by another process.
    """
    if not every > 0:
        raise FibldmError(f"`every` must be a length above 0 in mm; got {every:g}")
    with alone(beside(out), str(out), "wait until that has ended, or choose another folder"):
        return _write_all(work, out, every)


def _write_all(work: Path, out: Path, every: float) -> int:
    if out.exists() and any(out.iterdir()):
        raise FibldmError(f"the folder must be empty or absent; {out} is not", "choose another folder")
    datalist = read_datalist(work)
    cases = [(split, entry) for split in SPLITS for entry in datalist[split]]
    rows, unknown = list[dict[str, Any]](), False
    for split, entry in track(cases, "slices"):
        of_case, leaves_unknown = _cut({**entry, "split": split}, out, every)
        rows, unknown = rows + of_case, unknown or leaves_unknown
    write_text(out / MANIFEST, _table(rows))
    write_json(out / "dataset.json", _facts(datalist, unknown))
    return len(rows)


def heights(spacing: float, count: int, every: float, label: NDArray[Any] | None = None) -> list[int]:
    """Indices of slices ``every`` mm apart, as far from the first as from the last that may be taken.

    Args:
        spacing: mm between neighbouring slices of the volume.
        count: slices of the volume.
        every: mm.
        label: ``(X, Y, Z)``; where it has labels, only slices from its lowest to its highest are taken.
    """
    drawn = np.zeros(count, dtype=bool) if label is None else ((label > 0) & (label != UNKNOWN_LABEL)).any(axis=(0, 1))
    labelled = np.flatnonzero(drawn)
    first, last = (labelled[0], labelled[-1]) if labelled.size else (0, count - 1)
    step = max(1.0, every / spacing)
    start = first + (last - first) % step / 2
    return sorted({int(index) for index in np.floor(np.arange(start, last + 1e-6, step) + 1e-6)})


def relative_position(index: int, count: int) -> float:
    """Where a slice lies among those of its volume: 0 is the lowest (towards the feet), 1 the highest."""
    return round(index / (count - 1), 4) if count > 1 else 0.5


def _cut(entry: Mapping[str, Any], out: Path, every: float) -> tuple[list[dict[str, Any]], bool]:
    """Write the slices of a case; a row of the manifest for each, and whether masks have voxels that are unknown."""
    volumes = {key: nibabel.Nifti1Image.from_filename(entry[key]) for key in _FILES if key in entry}
    label = np.asarray(volumes["label"].dataobj) if "label" in volumes else None
    count, spacing = volumes["image"].shape[2], float(nibabel.affines.voxel_sizes(volumes["image"].affine)[2])
    chosen = heights(spacing, count, every, label)
    rows = [_write(entry, volumes, index, out, digits=len(str(count))) for index in chosen]
    return rows, label is not None and not annotated_of(entry) and bool((label == UNKNOWN_LABEL).any())


def _write(
    entry: Mapping[str, Any], volumes: Mapping[str, nibabel.Nifti1Image], index: int, out: Path, *, digits: int
) -> dict[str, Any]:
    case = f"{entry['case']}_z{index:0{digits}d}"
    files = {key: f"{_FILES[key]}/{case}.nii.gz" for key in volumes}
    for key, volume in volumes.items():
        part = volume.slicer[:, :, index : index + 1]
        space = int(part.header["sform_code"]) or SCANNER
        voxels = np.asarray(part.dataobj)
        if key == "label" and annotated_of(entry):
            voxels = np.where(voxels == UNKNOWN_LABEL, 0, voxels)  # as it was; the column says the rest
        write_nifti(out / files[key], voxels, part.affine, space=space)
    left_out = (SECOND_IMAGE, UNKNOWN_VOXELS, ANNOTATED)  # second images are not cut
    about = {name: value for name, value in entry.items() if name not in left_out}
    if entry.get(ANNOTATED):
        about[ANNOTATED] = ";".join(map(str, entry[ANNOTATED]))
    return {**about, **files, "case": case, POSITION: relative_position(index, volumes["image"].shape[2])}


def _table(rows: list[dict[str, Any]]) -> str:
    """CSV with all columns that occur; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _facts(datalist: Mapping[str, Any], unknown: bool) -> dict[str, Any]:
    kept = {key: datalist[key] for key in ("name", "licence", *REFERENCE_KEYS) if datalist.get(key)}
    channels = {str(index): name for index, name in enumerate(datalist["channels"])}
    ignored = {str(UNKNOWN_LABEL): IGNORE} if unknown else {}
    return {**kept, "modality": channels, "labels": datalist["labels"] | ignored}
