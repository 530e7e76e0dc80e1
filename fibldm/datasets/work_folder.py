"""Write a work folder: volumes in RAS+, datalist, intensity and report, whole or not at all."""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fibldm import __version__
from fibldm.datasets.case import CaseFacts
from fibldm.datasets.checks import PERCENTILES
from fibldm.datasets.facts import IF_ASKED, SPACING
from fibldm.datasets.findings import Findings
from fibldm.datasets.plan import Plan, by_text
from fibldm.datasets.pseudonyms import SALT_FILE
from fibldm.datasets.second_image import about_second
from fibldm.datasets.source import Case
from fibldm.errors import FibldmError
from fibldm.files import hash_value, write_json
from fibldm.volumes.datalist import ANNOTATED, SECOND_IMAGE, SPLITS, UNKNOWN_VOXELS
from fibldm.volumes.intensity import Intensity, Kind
from fibldm.volumes.second_image import ABOUT
from fibldm.volumes.second_image import FOLDER as SECOND_IMAGES

WRITTEN = ("images", "labels", "intensity.json", "datalist.json", "report.json")
"""What a work folder holds, in the order of writing, beside the second images where there are some."""

BOXES = "boxes.csv"
"""What it holds if that is asked for, see `fibldm.datasets.boxes`."""

STAGING = ".preparing"


@dataclass(frozen=True)
class Checked:
    """What the check of all cases gave.

    Attributes:
        plan: the decisions.
        facts: facts of the sound cases, by case name.
        stats: size and time of the files of every case, by case name; see `file_stat`.
        findings: what is wrong with cases, and what has to be said about the dataset.
        partial: the labels that were annotated, by name of each case of which not all were.
    """

    plan: Plan
    facts: Mapping[str, CaseFacts]
    stats: Mapping[str, str]
    findings: Findings
    partial: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@contextmanager
def replaced(work: Path) -> Iterator[Path]:
    """The folder inside ``work`` whose content replaces that of ``work`` when the block ends without an error.

    The old report goes first and the new one comes last, so that a folder with a report is whole. Unlike
    that of `atomic_folder`, the folder stays where the block does not end well, so that the next run goes on with the
    cases that it holds.

    Raises:
        FibldmError: the disk is full or the folder cannot be written.
    """
    folder = work / STAGING
    try:
        for name in WRITTEN[:2]:
            (folder / name).mkdir(parents=True, exist_ok=True)
        yield folder
        for name in (BOXES, *reversed(WRITTEN), SECOND_IMAGES):
            _remove(work / name)
        if (folder / SECOND_IMAGES).exists():
            (folder / SECOND_IMAGES).rename(work / SECOND_IMAGES)
        for name in WRITTEN:
            (folder / name).rename(work / name)
        shutil.rmtree(folder)
    except OSError as error:
        raise FibldmError(f"cannot write {work}: {error.strerror}", "check the folder and the free space") from error


def write_lists(folder: Path, checked: Checked) -> None:
    """Write everything but the volumes of a work folder; the volumes of all cases that are split lie there.

    Raises:
        FibldmError: the disk is full.
    """
    plan = checked.plan
    facts = {name: about for name, about in checked.facts.items() if name in plan.splits}
    for path in (path for kind in (*WRITTEN[:2], SECOND_IMAGES) for path in (folder / kind).glob("*")):
        if path.name.removesuffix(".nii.gz") not in facts:
            path.unlink()
    if any(about.second_voxels is not None for about in facts.values()):
        write_json(folder / SECOND_IMAGES / ABOUT, about_second(plan.settings).to_dict())
    write_json(folder / "intensity.json", _intensity(plan, facts).to_dict())
    write_json(folder / "datalist.json", _datalist(plan, facts, checked.partial))
    write_json(folder / "report.json", report_dict(checked, ok=True))


def _intensity(plan: Plan, facts: Mapping[str, CaseFacts]) -> Intensity:
    window, limits = plan.settings.window, plan.settings.range
    if window is not None:
        kind: Kind = "suv" if plan.modality == "pt" else "window"
        return Intensity(kind, low=float(window[0]), high=float(window[1]))
    if limits is not None:
        return Intensity("range", low=float(limits[0]), high=float(limits[1]))
    ranges = [facts[name].range for name, split in plan.splits.items() if split == "training"]
    lows, highs = (tuple(float(value) for value in ends) for ends in np.median(ranges, axis=0).T)
    single = len(plan.source.channels) == 1
    return Intensity(
        "percentile",
        lower=PERCENTILES[0],
        upper=PERCENTILES[1],
        output_low=lows[0] if single else lows,
        output_high=highs[0] if single else highs,
    )


def _datalist(plan: Plan, facts: Mapping[str, CaseFacts], partial: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = plan.label_names
    labels = {"0": "background", **{str(value): names.get(value, f"label {value}") for value in label_values(facts)}}
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for case in plan.source.cases:
        if case.name in plan.splits:
            about = facts[case.name]
            splits[plan.splits[case.name]].append({**_entry(case, plan, about), **_annotated(case, about, partial)})
    return {
        "name": plan.source.name,
        **plan.source.references,
        "licence": plan.source.licence,
        "modality": plan.modality,
        "channels": list(plan.source.channels),
        "labels": labels,
        "envelope": _envelope(
            [facts[entry["case"]] for entry in splits["training"]],
            [entry.get(ANNOTATED) for entry in splits["training"]],
            label_values(facts),
        ),
        "content": _content_hash(plan, facts, labels, splits),
        **splits,
    }


def _content_hash(
    plan: Plan, facts: Mapping[str, CaseFacts], labels: Mapping[str, str], splits: Mapping[str, list[dict[str, Any]]]
) -> str:
    """Of all that training sees; cases and patients count by their voxels, as their names may depend on the salt."""
    voxels = {name: hash_value([a.spacing, *a.voxels]) for name, a in facts.items()}
    first: dict[str, str] = {}
    for name in sorted(facts, key=voxels.__getitem__):
        first.setdefault(plan.subjects[name], voxels[name])
    about = {"labels": labels, "modality": plan.modality, "channels": list(plan.source.channels)}
    if any(a.second_voxels is not None for a in facts.values()):
        about[SECOND_IMAGES] = about_second(plan.settings).to_dict()
    entries = {
        split: sorted(
            (voxels[entry["case"]], hash_value(_unnamed(entry) | {"subject": first[entry["subject"]]}))
            for entry in listed
        )
        for split, listed in splits.items()
    }
    return hash_value({**about, **entries})


def _unnamed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the datalist without the names of case and files."""
    second = {SECOND_IMAGE: ""} if SECOND_IMAGE in entry else {}
    return {**entry, "case": "", "image": "", "label": "", **second}


def _entry(case: Case, plan: Plan, about: CaseFacts) -> dict[str, Any]:
    label = {} if about.label_ml is None else {"label": f"labels/{case.name}.nii.gz"}
    second = {} if about.second_voxels is None else {SECOND_IMAGE: f"{SECOND_IMAGES}/{case.name}.nii.gz"}
    spacing = zip(("spacing_x_mm", "spacing_y_mm", "spacing_z_mm"), about.spacing, strict=True)
    asked = plan.settings.facts
    return {
        **{name: value for name, value in about.acquisition.items() if name in asked or name not in IF_ASKED},
        **(dict(spacing) if SPACING in asked else {}),
        **case.covariates,
        "image": f"images/{case.name}.nii.gz",
        **label,
        **second,
        "case": case.name,
        "subject": plan.subjects[case.name],
    }


def _annotated(case: Case, about: CaseFacts, partial: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if case.name not in partial:
        return {}
    return {ANNOTATED: list(partial[case.name]), **({UNKNOWN_VOXELS: True} if about.unknown else {})}


def _envelope(
    training: list[CaseFacts], annotated: Sequence[Collection[int] | None], labels: Iterable[int]
) -> dict[str, Any]:
    """What the training cases with masks cover: spacing and field of view in mm by RAS+ axis, label volumes in ml.

    The volume of a label is that of the cases in which it was annotated.
    """
    masked = [about for about in training if about.label_ml is not None] or training
    spacing = np.array([about.spacing for about in masked])
    view = spacing * np.array([about.shape for about in masked])
    volumes = {str(value): _volumes(value, training, annotated) for value in labels}
    return {
        "spacing_mm": {"min": spacing.min(axis=0).tolist(), "max": spacing.max(axis=0).tolist()},
        "field_of_view_mm": {"min": view.min(axis=0).tolist(), "max": view.max(axis=0).tolist()},
        "label_volume_ml": {value: {"min": min(ml), "max": max(ml)} for value, ml in volumes.items()},
    }


def _volumes(value: int, training: list[CaseFacts], annotated: Sequence[Collection[int] | None]) -> list[float]:
    """Volumes of a label in ml, of the cases with a mask in which it was annotated; 0 where there is none."""
    known = [
        about.label_ml.get(value, 0.0)
        for about, labels in zip(training, annotated, strict=True)
        if about.label_ml is not None and (labels is None or value in labels)
    ]
    return known or [0.0]


def report_dict(checked: Checked, *, ok: bool) -> dict[str, Any]:
    """What ``report.json`` holds; ``cases`` is that of the sound ones."""
    decisions, findings = checked.plan.decisions(), checked.findings
    return {
        "ok": ok,
        "fibldm": __version__,
        "settings_hash": hash_value(decisions),
        "settings": decisions["settings"],
        "dataset": decisions["dataset"],
        "patients": decisions["cases"],
        "counts": checked.plan.counts,
        "left_out": findings.bad if ok else [],
        "findings": [asdict(finding) for finding in findings.listed],
        "notes": findings.notes,
        "cases": {name: _case_report(about, checked.stats[name]) for name, about in checked.facts.items()},
    }


def _case_report(about: CaseFacts, stat: str) -> dict[str, Any]:
    return {
        "files": stat,
        "image_sha256": list(about.image_sha256),
        "label_sha256": list(about.label_sha256),
        **({"second_sha256": list(about.second_sha256)} if about.second_sha256 else {}),
        "voxels": about.voxels,
        "shape": about.shape,
        "spacing_mm": about.spacing,
        "range": about.range,
        "label_volume_ml": None if about.label_ml is None else by_text(about.label_ml),
        "label_derived": about.derived,
        "acquisition": dict(about.acquisition),
        **({"resampled": dict(about.resampled)} if about.resampled is not None else {}),
    }


def label_values(facts: Mapping[str, CaseFacts]) -> list[int]:
    """The labels that occur in any case, background left out."""
    return sorted({value for about in facts.values() for value in about.label_ml or ()})


def file_stat(case: Case) -> str:
    """Hash of the places, sizes and times of a case's files, by which unchanged ones are known without reading them.

    Raises:
        FibldmError: a file is gone.
    """
    try:
        stats = [(str(path.resolve()), path.stat()) for path in case.files]
    except OSError as error:
        raise FibldmError(f"a file of {case.name} is gone: {error.strerror}", "run fibldm prepare again") from error
    return hash_value([[path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats])


def foreign_files(work: Path, *, ours: bool, complete: bool) -> list[str]:
    """What lies in a folder that no preparation wrote.

    Args:
        work: the folder.
        ours: whether its report is one of a preparation.
        complete: whether that preparation ended well.
    """
    written = (*WRITTEN, SECOND_IMAGES, BOXES) if complete else WRITTEN[-1:]
    allowed = (*(written if ours else ()), STAGING, SALT_FILE)
    return sorted(path.name for path in work.glob("*") if path.name not in allowed)


def half_moved(work: Path) -> bool:
    """Whether a preparation was stopped after all was written and before all of it was moved to its place."""
    return (work / STAGING / WRITTEN[-1]).is_file()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
