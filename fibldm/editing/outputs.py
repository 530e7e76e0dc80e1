"""A scan's file, a mask's file and a region in; edited scans out, marked, in the format of the scan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fibldm.editing.editor import NOTICE, Editor, EditRequest, EditSettings
from fibldm.editing.region import Region, check_same_grid, grown
from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json
from fibldm.locks import alone
from fibldm.progress import track
from fibldm.synthesis import OutputConflict, SynthesisSettings, Synthesizer
from fibldm.synthesis.asked import together
from fibldm.synthesis.outputs import tell_unmarked
from fibldm.volumes.dicom.series import Series, find_series, read_series
from fibldm.volumes.formats.itk_images import read_itk
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.formats.readers import ITK, suffix_of
from fibldm.volumes.grid import Volume
from fibldm.volumes.label_values import are_whole
from fibldm.volumes.masks import as_labels, hash_mask, keep_mask, mask_stem, read_mask
from fibldm.volumes.writer import sidecar, write_synthetic

EVERYWHERE = "everywhere"
"""The region that is the whole scan."""

_NOT_OF_EDITS = ("format", "template", "batch_size", "conditions_table", "own_conditions", "adapters", "check")


@dataclass(frozen=True)
class _Source:
    """A scan that is to be edited.

    Attributes:
        name: of its file or folder, without suffix.
        volume: in its own axis order, RAS+ of DICOM.
        sha256: of its files.
        series: its folder, where it is DICOM.
    """

    name: str
    volume: Volume
    sha256: str
    series: Path | None = None


def edit_files(
    scan: str | Path,
    mask: str | Path,
    out: str | Path,
    *,
    run: str | Path | None = None,
    bundle: str | Path | None = None,
    region: str | Path | None = None,
    before: str | Path | None = None,
    margin: float = 0.0,
    edit: EditSettings | None = None,
    trust: bool = False,
    device: str | torch.device | None = None,
    **options: Any,
) -> list[Path]:
    """Write edits of a scan: ``<scan>_<number:03d>`` as NIfTI or as a DICOM series, whichever the scan is.

    Args:
        scan: a file of NIfTI, NRRD or MetaImage, or the folder of a DICOM series.
        mask: what the edited scan is to show, on its voxels.
        out: folder to write to; also gets the mask as used, in ``masks/``.
        run: a finished run; None where there is a ``bundle``.
        bundle: see `Synthesizer.from_bundle`.
        region: what is drawn anew: names or numbers of labels of ``mask``, with commas between them, a file of a mask
            (all that is not 0), or "everywhere"; None is all that differs between ``before`` and ``mask``.
        before: mask of the scan as it is.
        margin: mm by which the region is grown.
        edit: how the region is drawn.
        trust: see `Synthesizer.from_bundle`.
        device: None takes CUDA where there is one.
        **options: of `SynthesisSettings` by their names, but for ``format`` and ``template``, which are those of the
            scan, ``batch_size``, adapters, a check, and conditions of several masks.

    Returns:
        The files, or the folders of series.

    Raises:
        FibldmError: a file cannot be read, mask or region do not lie on the scan or name labels that there are not, the
            region is empty or not said, the generator is refused, an option is unknown, another edit lies there, or
            another process writes to ``out``.
    """
    if (run is None) == (bundle is None):
        raise FibldmError(f"either a run or a bundle must be given; got {run} and {bundle}", "give one of them")
    if region is None and before is None:
        raise FibldmError(
            "a region must be given, or the mask of the scan before the edit; neither was",
            "give --region LABELS, FILE or everywhere, or --before MASK",
        )
    if not 0 <= margin < np.inf:
        raise FibldmError(f"margin must be mm of at least 0; got {margin}")
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = (
        Synthesizer.from_run(run, device=on)
        if run is not None
        else Synthesizer.from_bundle(str(bundle), trust=trust, device=on)
    )
    editor, source = Editor(made), _read(Path(scan))
    asked, edit = SynthesisSettings.of(made.sampling, **_of_scan(source, options)), edit or EditSettings()
    new = as_labels(read_mask(Path(mask), made.names))
    old = None if before is None else as_labels(read_mask(Path(before), made.names))
    inside = _region(source.volume, new, old, region, made.names, margin)
    beside = together(asked.covariates, asked.conditions)
    request = EditRequest(source.volume, new, inside, source.name, 0, beside)
    changed = {
        "scan": Path(scan).name,
        "scan_sha256": source.sha256,
        "voxels_of_labels": _counts(new, old, made),
    }
    decisive = [made.source, asked.sampling.to_dict(), vars(edit), _hash(inside), beside]
    decisive += [source.sha256]
    facts = {"mask": Path(mask).name, "mask_sha256": hash_mask(Path(mask)), **changed}
    tell_unmarked(made, asked.sampling)
    written = []
    with alone(Path(out) / ".edit.lock", str(out), "wait until that has ended, or choose another --out"):
        for number in track(range(asked.count), "edit"):
            path = Path(out) / (f"{source.name}_{number:03d}" + ("" if source.series else ".nii.gz"))
            own: dict[str, Any] = {**facts, "request": hash_value([*decisive, facts["mask_sha256"], number])}
            if not _is_there(path, own["request"]):
                result = editor(
                    replace(request, number=number),
                    settings=asked.sampling,
                    edit=edit,
                    allow_extrapolation=asked.allow_extrapolation,
                )
                _write(path, source, result.volume, new, own | result.provenance, made, asked)
            written.append(path)
    return written


def _read(scan: Path) -> _Source:
    if not scan.exists():
        raise FibldmError(f"the scan must exist; {scan} does not", "check the path")
    if scan.is_dir():
        series = _only_series(scan)
        read = read_series(series.files)
        if read.array.ndim != 3:
            raise FibldmError(f"{scan} must hold one series of one channel; it has several", "edit one channel")
        array = read.array.astype(np.int32) if are_whole(read.array) else read.array
        return _Source(scan.name, Volume(array, read.affine, read.space), read.sha256, scan)
    is_itk = suffix_of(scan) in ITK
    volume = read_itk(scan).volume(str(scan))[0] if is_itk else read_volume(scan)
    return _Source(mask_stem(scan), volume, hash_file(scan))


def _only_series(folder: Path) -> Series:
    found = [part for part in find_series(sorted(folder.rglob("[!.]*"))) if part.modality not in ("SEG", "RTSTRUCT")]
    if len(found) != 1:
        raise FibldmError(
            f"the scan must be the folder of one DICOM series; {folder} holds {len(found)}",
            "give a file, or the folder of the series",
        )
    return found[0]


def _of_scan(source: _Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the format of the scan, and for DICOM its technical tags."""
    if taken := [name for name in _NOT_OF_EDITS if name in options]:
        remedy = "leave it out" + (": the format is that of the scan" if "format" in taken else "")
        raise FibldmError(f"an edit takes no {' and no '.join(taken)}", remedy)
    return {**options, "format": "dicom", "template": source.series} if source.series else dict(options)


def _region(
    scan: Volume,
    new: Volume,
    old: Volume | None,
    region: str | Path | None,
    names: Mapping[int, str],
    margin: float,
) -> Volume:
    """What is drawn anew, in canonical order, uint8."""
    canonical, labels = scan.canonical(), new.canonical()
    check_same_grid(labels, canonical.grid, "the mask")
    if region is None and old is not None:
        earlier = old.canonical()
        check_same_grid(earlier, canonical.grid, "the mask of before")
        inside: Region = earlier.array != labels.array
    elif str(region) == EVERYWHERE:
        inside = np.ones(canonical.grid.shape, dtype=bool)
    elif Path(str(region)).is_file():
        drawn = read_mask(Path(str(region)), names).canonical()
        check_same_grid(drawn, canonical.grid, "the region")
        inside = drawn.array != 0
    else:
        inside = np.isin(labels.array, _values(str(region), names))
    return replace(canonical, array=grown(inside, margin, canonical.grid.spacing).astype(np.uint8))


def _values(labels: str, names: Mapping[int, str]) -> list[int]:
    by_name = {name: value for value, name in names.items()}
    wanted = [text.strip() for text in labels.split(",")]
    values = [by_name.get(text, int(text) if text.isdigit() else -1) for text in wanted]
    if strange := [text for text, value in zip(wanted, values, strict=True) if value not in {0, *names}]:
        known = ", ".join(f"{value} {name}" for value, name in names.items())
        raise FibldmError(
            f"a region must be labels of the run ({known}), a file or {EVERYWHERE!r}; got {', '.join(strange)}",
            "check the names, or the path",
        )
    return values


def _counts(new: Volume, old: Volume | None, made: Synthesizer) -> dict[str, Any]:
    """Voxels of each label, before and after; before is null where it is not known."""
    after = np.bincount(new.array.ravel(), minlength=256)
    before = None if old is None else np.bincount(old.array.ravel(), minlength=256)
    return {
        name: [None if before is None else int(before[value]), int(after[value])] for value, name in made.names.items()
    }


def _hash(region: Volume) -> str:
    return hash_value([region.array.shape, np.packbits(region.array).tobytes().hex()])


def _is_there(path: Path, request: str) -> bool:
    if not path.exists():
        return False
    if read_json(sidecar(path)).get("request") != request:
        raise OutputConflict(f"{path} lies there already and is another edit", "choose another --out folder")
    return True


def _write(
    path: Path,
    source: _Source,
    edited: Volume,
    mask: Volume,
    facts: dict[str, Any],
    made: Synthesizer,
    asked: SynthesisSettings,
) -> None:
    dicom = asked.files.dicom
    if dicom is None:
        keep_mask(path.parent / "masks" / f"{source.name}.nii.gz", mask)
        write_synthetic(path, edited, facts, "SYNTHETIC in part by FibLDM: an edited scan of a patient")
        return
    if not are_whole(edited.array):
        raise FibldmError(f"{source.name} must hold whole numbers to be written as DICOM", "convert it to NIfTI first")
    dicom.write(
        path,
        edited,
        mask.canonical(),
        names=made.names,
        intensity=made.intensity,
        request={key: facts[key] for key in ("mask", "mask_sha256", "scan", "scan_sha256", "request")},
        provenance=facts,
        whole=True,
        notice=NOTICE[0].upper() + NOTICE[1:] + ".",
    )
