"""Write a work folder: volumes in RAS+, datalist, intensity and report, whole or not at all (B5, H13)."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.files import atomic_path, hash_value, write_json
from fibldm.volumes.case_checks import CaseFacts, Finding, NiftiVolume, read_nifti, stored_image, stored_label
from fibldm.volumes.datalist import SPLITS
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.layouts import Case
from fibldm.volumes.prepare_settings import Plan, by_text

WRITTEN = ("images", "labels", "intensity.json", "datalist.json", "report.json")
"""What a work folder holds, in the order of writing."""

STAGING = ".preparing"
PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Checked:
    """What the check of all cases gave.

    Attributes:
        facts: facts of the sound cases, by case name.
        findings: what is wrong with cases.
        notes: what has to be said about the dataset as a whole.
    """

    facts: Mapping[str, CaseFacts]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing forbids the dataset."""
        return all(finding.level != "error" for finding in self.findings)


@contextmanager
def staging(work: Path) -> Iterator[Path]:
    """A folder inside ``work`` whose content replaces that of ``work`` when the block ends without an error.

    The old report goes first and the new one comes last, so that a folder with a report is whole.

    Raises:
        FibldmError: the disk is full or the folder cannot be written.
    """
    folder = work / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        for name in reversed(WRITTEN):
            _remove(work / name)
        for name in WRITTEN:
            (folder / name).rename(work / name)
    except OSError as error:
        raise FibldmError(f"cannot write {work}: {error.strerror}", "check the folder and the free space") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_work(folder: Path, plan: Plan, checked: Checked, *, progress: bool) -> None:
    """Write everything a work folder holds into ``folder``; all cases must be sound.

    Raises:
        FibldmError: a source file changed since it was checked, or the disk is full.
    """
    facts = checked.facts
    for case in tracked(plan.source.cases, "Writing", progress):
        image, label = read_nifti(case.image), read_nifti(case.label)
        if (image.sha256, label.sha256) != (facts[case.name].image_sha256, facts[case.name].label_sha256):
            raise FibldmError(f"the files of {case.name} changed while they were prepared", "run fibldm prepare again")
        _save(stored_image(image.array, plan.modality), image, folder / f"images/{case.name}.nii.gz")
        _save(stored_label(label.array), image, folder / f"labels/{case.name}.nii.gz")
    write_json(folder / "intensity.json", _intensity(plan, facts).to_dict())
    write_json(folder / "datalist.json", _datalist(plan, facts))
    write_json(folder / "report.json", report_dict(plan, checked))


def _save(array: np.ndarray, grid: NiftiVolume, path: Path) -> None:
    image = nib.Nifti1Image(array, grid.affine)
    header = grid.original.header
    code = int(header["sform_code"]) or int(header["qform_code"]) or 1
    image.set_sform(grid.affine, code)
    image.set_qform(grid.affine, code)
    if not np.allclose(image.get_qform(), grid.affine, atol=1e-3):
        image.set_qform(None, 0)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _intensity(plan: Plan, facts: Mapping[str, CaseFacts]) -> Intensity:
    if plan.settings.window is not None:
        low, high = plan.settings.window
        return Intensity("window", low=float(low), high=float(high))
    ranges = [facts[name].range for name, split in plan.splits.items() if split == "training"]
    low, high = (float(value) for value in np.median(ranges, axis=0))
    return Intensity("percentile", lower=PERCENTILES[0], upper=PERCENTILES[1], output_low=low, output_high=high)


def _datalist(plan: Plan, facts: Mapping[str, CaseFacts]) -> dict[str, Any]:
    names = plan.label_names
    labels = {"0": "background", **{str(value): names.get(value, f"label {value}") for value in label_values(facts)}}
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for case in plan.source.cases:
        splits[plan.splits[case.name]].append(_entry(case, plan))
    voxels = {name: (about.spacing, about.image_voxels, about.label_voxels) for name, about in facts.items()}
    return {
        "name": plan.source.name,
        **plan.source.references,
        "licence": plan.source.licence,
        "modality": plan.modality,
        "labels": labels,
        "envelope": _envelope([facts[entry["case"]] for entry in splits["training"]], label_values(facts)),
        "content": hash_value({"voxels": voxels, "labels": labels, "modality": plan.modality, **splits}),
        **splits,
    }


def _entry(case: Case, plan: Plan) -> dict[str, Any]:
    return {
        **case.covariates,
        "image": f"images/{case.name}.nii.gz",
        "label": f"labels/{case.name}.nii.gz",
        "case": case.name,
        "subject": plan.subjects[case.name],
    }


def _envelope(training: list[CaseFacts], labels: Iterable[int]) -> dict[str, Any]:
    """What the training cases cover: spacing and field of view in mm by RAS+ axis, label volumes in ml."""
    spacing = np.array([about.spacing for about in training])
    view = spacing * np.array([about.shape for about in training])
    volumes = {str(value): [about.label_ml.get(value, 0.0) for about in training] for value in labels}
    return {
        "spacing_mm": {"min": spacing.min(axis=0).tolist(), "max": spacing.max(axis=0).tolist()},
        "field_of_view_mm": {"min": view.min(axis=0).tolist(), "max": view.max(axis=0).tolist()},
        "label_volume_ml": {value: {"min": min(ml), "max": max(ml)} for value, ml in volumes.items()},
    }


def report_dict(plan: Plan, checked: Checked) -> dict[str, Any]:
    """What ``report.json`` holds; ``cases`` is that of the sound ones."""
    decisions = plan.decisions()
    return {
        "ok": checked.sound,
        "fibldm": __version__,
        "settings_hash": hash_value(decisions),
        "settings": decisions["settings"],
        "dataset": decisions["dataset"],
        "patients": decisions["cases"],
        "counts": plan.counts,
        "findings": [asdict(finding) for finding in checked.findings],
        "notes": list(checked.notes),
        "cases": {
            case.name: _case_report(case, checked.facts[case.name])
            for case in plan.source.cases
            if case.name in checked.facts
        },
    }


def _case_report(case: Case, about: CaseFacts) -> dict[str, Any]:
    return {
        "image": {"path": case.path, "sha256": about.image_sha256, **file_stat(case.image)},
        "label": {"path": case.label.name, "sha256": about.label_sha256, **file_stat(case.label)},
        "shape": about.shape,
        "spacing_mm": about.spacing,
        "range": about.range,
        "label_volume_ml": by_text(about.label_ml),
    }


def label_values(facts: Mapping[str, CaseFacts]) -> list[int]:
    """The labels that occur in any case, background left out."""
    return sorted({value for about in facts.values() for value in about.label_ml})


def file_stat(path: Path) -> dict[str, int]:
    """Size and time of a file, by which an unchanged one is known without reading it."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def tracked(cases: Sequence[Case], what: str, progress: bool) -> Iterable[Case]:
    """The cases, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        return cases
    return track(cases, what, console=console, transient=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
