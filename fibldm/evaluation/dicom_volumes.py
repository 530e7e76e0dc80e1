"""Synthetic volumes that were written as DICOM series, as the NIfTI files that every measurement reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json
from fibldm.volumes.dicom.masks import read_structures, segment_names
from fibldm.volumes.dicom.output import MASKS, STRUCTURES, mask_files
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import as_labels, read_mask
from fibldm.volumes.scan import Scan
from fibldm.volumes.writer import sidecar, write_labels, write_synthetic

_SLICES = "*.dcm"


def series_in(folder: Path) -> list[Path]:
    """The folders of DICOM series in a folder of `fibldm synthesize --format dicom`, one for each volume."""
    found = [part for part in sorted(folder.glob("[!.]*")) if part.is_dir() and part.name not in (MASKS, STRUCTURES)]
    return [part for part in found if next(part.glob(_SLICES), None) is not None]


def as_nifti(series: Path, mask_name: str, names: Mapping[int, str], folder: Path) -> Path:
    """A series and its mask as NIfTI, as `fibldm synthesize` would have written them; what lies there is kept.

    Voxels are those of the series, with the grey values that it stores. A segmentation or structure set tells nothing
    of voxels that are unknown: they become background.

    Args:
        series: folder of the slices, its mask beside it where there is one (`mask_files`), of which a segmentation goes
            before a structure set.
        mask_name: of the mask that the volume was made from.
        names: of the labels by value, without background.
        folder: gets ``<content>/<name of the series>.nii.gz``, its sidecar, and ``<content>/masks/<mask_name>.nii.gz``.

    Raises:
        FibldmError: slices are missing, a file is damaged, or a segment or structure has the name of no label.
    """
    slices, masks = sorted(series.glob(_SLICES)), mask_files(series)[:1]
    facts = _facts(series, len(slices))
    content: list[Any] = [*map(hash_file, [*slices, *masks]), facts, dict(names)]
    target = folder / hash_value(content)[:32]
    volume = target / f"{series.name}.nii.gz"
    if not volume.exists():
        scan = read_series(slices)
        for mask in masks:
            labels = read_mask(mask, names) if mask.parent.name == MASKS else _structures(mask, names, scan)
            write_labels(target / MASKS / f"{mask_name}.nii.gz", as_labels(labels))
        write_synthetic(volume, Volume(scan.array, scan.affine), facts)
    return volume


def _structures(file: Path, names: Mapping[int, str], scan: Scan) -> Volume:
    if strange := sorted(set(segment_names(file)) - set(names.values())):
        raise FibldmError(
            f"every structure of {file.name} must have the name of a label of the run ({', '.join(names.values())}); "
            f"got also {', '.join(strange)}",
            "rename or delete these structures",
        )
    read = read_structures(file, {name: value for value, name in names.items()}, scan)
    return Volume(read.array, read.affine)


def _facts(series: Path, there: int) -> dict[str, Any]:
    """What the sidecar says; empty without one."""
    facts = read_json(sidecar(series)) if sidecar(series).exists() else {}
    written = facts.get("dicom", {}).get("slices", there)
    if written != there:
        raise FibldmError(
            f"{series} must hold the {written} slices that its sidecar tells of; {there} are there",
            "copy the series again, whole",
        )
    return facts
