"""All volumes of a stress test are made, segmented and measured; what is there already is kept."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.evaluation.segmentation_metrics import dice_by_label
from fibldm.files import hash_value, read_json, write_json, write_text
from fibldm.locks import alone
from fibldm.mask_editing import Anatomy, edit_masks
from fibldm.progress import track
from fibldm.stress.images import ImageChange, changed
from fibldm.stress.segmenter import Segmenter
from fibldm.stress.sweeps import Step, Sweep, read_sweeps
from fibldm.stress.weaknesses import Measured, Weakness, weaknesses
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.masks import as_labels, keep_mask
from fibldm.volumes.writer import volume_stem, write_nifti, write_synthetic

LOCK = ".stress.lock"
BASE = "as it is"

Generator = Callable[[Sequence[Path], Path], list[Path]]
"""Synthetic volumes of masks, one of each in their order, written to a folder; those that are there are kept."""


@dataclass(frozen=True)
class StressSettings:
    """What is tried.

    Attributes:
        sweeps: see `fibldm.stress.sweeps.read_sweeps`.
        split: of the work folder, whose masks are taken, and whose scans are laid beside.
        cases: at most; None takes all.
        labels: values of the segmenter by the names of labels that are measured; empty measures all, by the values that
            they have in the work folder.
        drop: of mean Dice, from which a value can be called a weakness.
        seed: of edits, volumes and changes.
        allow_extrapolation: whether sizes outside of the training masks are taken.
        real: whether real scans are segmented, too.

    Raises:
        FibldmError: a number is out of range.
    """

    sweeps: Sequence[str]
    split: str = "test"
    cases: int | None = None
    labels: dict[str, int] = field(default_factory=dict)
    drop: float = 0.1
    seed: int = 0
    allow_extrapolation: bool = False
    real: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1:
            raise FibldmError(f"drop must lie between 0 and 1; got {self.drop}")
        if self.cases is not None and self.cases < 1:
            raise FibldmError(f"cases must be at least 1; got {self.cases}")


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        sweeps: what changed.
        measured: Dice of every label in every volume.
        weaknesses: what is called so.
        left_out: cases that a value could not be tried on, and why.
        names: of the labels that were measured, by value.
        modality: of the images.
    """

    sweeps: Sequence[Sweep]
    measured: Sequence[Measured]
    weaknesses: Sequence[Weakness]
    left_out: Sequence[str]
    names: dict[int, str]
    modality: str


@dataclass(frozen=True)
class _Tried:
    """Cases with one thing changed: images, their masks, and where they belong."""

    kind: str
    sweep: str
    step: str
    cases: Sequence[dict[str, Any]]
    masks: Sequence[Path]
    images: Sequence[Path]

    @property
    def folder(self) -> str:
        return _slug(" ".join(part for part in (self.kind, self.sweep, self.step) if part))


def stress(
    out: Path | str, work: Path | str, segmenter: Segmenter, generator: Generator, settings: StressSettings
) -> Trial:
    """Run a segmenter on volumes of which one thing changes at a time, and measure it.

    Of each mask of the split a volume is made as it is, and one for every value of every sweep, with the same noise.
    Real scans of the split are segmented as they are and with every change of the image.

    Args:
        out: folder of everything; a trial of other settings may not lie there.
        work: folder of ``fibldm prepare``.
        segmenter: what is tried.
        generator: makes volumes.
        settings: what is tried on it.

    Writes ``stress.json`` and ``stress.csv``, with every volume, its mask and what was found in it by their paths.

    Raises:
        FibldmError: as `read_sweeps`, `edit_masks`, `Segmenter.segment`; images have several channels, a label is
            unknown, or ``out`` holds another trial.
    """
    out, described = Path(out), read_datalist(work)
    if len(described["channels"]) != 1:
        raise FibldmError("a stress test is of images of one channel; these have several")
    anatomy = Anatomy.of_training(work)
    sweeps = read_sweeps(settings.sweeps, anatomy, described["modality"])
    found_as = {anatomy.label(name): value for name, value in settings.labels.items()}
    found_as = found_as or {value: value for value in anatomy.names if value}
    cases = [case for case in load_datalist(work, settings.split, masks=True) if "label" in case][: settings.cases]
    left_out: list[str] = []
    with alone(out / LOCK, str(out), "wait until that has ended, or choose another output folder"):
        _check_key(out, work, segmenter, settings)
        tried = [*_synthetic(out, work, cases, sweeps, anatomy, generator, settings, left_out)]
        if settings.real:
            tried += _real(out, cases, sweeps, settings.seed)
        measured = [
            one
            for part in track(tried, "segment")
            for one in _measured(part, segmenter.segment(part.images, out / "found" / part.folder), found_as)
        ]
        measured = [*measured, *_laid_beside(measured, sweeps)]
        names = {label: anatomy.names[label] for label in found_as}
        weak = weaknesses(measured, sweeps, settings.drop)
        trial = Trial(sweeps, measured, weak, left_out, names, described["modality"])
        _write(out, trial, segmenter, settings)
    return trial


def _check_key(out: Path, work: Path | str, segmenter: Segmenter, settings: StressSettings) -> None:
    """All but the list of sweeps must stay; more of them can be asked for later."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in ("sweeps", "drop", "real", "cases")}
    key = hash_value([fixed, segmenter.command, segmenter.suffix, read_datalist(work).get("content")])
    file = out / "stress.key.json"
    if file.exists() and read_json(file) != {"key": key}:
        raise FibldmError(
            f"{out} holds the stress test of another segmenter or of other settings", "choose another output folder"
        )
    write_json(file, {"key": key})


def _synthetic(
    out: Path,
    work: Path | str,
    cases: Sequence[dict[str, Any]],
    sweeps: Sequence[Sweep],
    anatomy: Anatomy,
    generator: Generator,
    settings: StressSettings,
    left_out: list[str],
) -> list[_Tried]:
    masks = []
    for case in cases:
        masks.append(out / "masks" / "base" / f"{case['case']}_000.nii.gz")  # as an edited mask is named: its noise
        keep_mask(masks[-1], as_labels(read_volume(case["label"])))
    base = _Tried("synthetic", "", BASE, cases, masks, generator(masks, out / "images" / "base"))
    tried = [base]
    for sweep in sweeps:
        for step in sweep.steps:
            if step.change is not None:
                tried.append(_with_change(out, base, sweep, step, step.change, settings.seed))
                continue
            edited = _edited(out, work, cases, sweep, step, anatomy, settings, left_out)
            if edited:
                kept, files = zip(*edited, strict=True)
                images = generator(files, out / "images" / _slug(f"{sweep.name} {step.text}"))
                tried.append(_Tried("synthetic", sweep.name, step.text, kept, files, images))
    return tried


def _edited(
    out: Path,
    work: Path | str,
    cases: Sequence[dict[str, Any]],
    sweep: Sweep,
    step: Step,
    anatomy: Anatomy,
    settings: StressSettings,
    left_out: list[str],
) -> list[tuple[dict[str, Any], Path]]:
    """The cases on which the edit can be done."""
    edited = []
    for case in cases:
        try:
            (file,) = edit_masks(
                [case["label"]],
                out / "masks" / _slug(f"{sweep.name} {step.text}"),
                work=work,
                edits=[str(step.edit)],
                seed=settings.seed,
                allow_extrapolation=settings.allow_extrapolation,
                workers=1,
                anatomy=anatomy,
            )
        except FibldmError as error:
            left_out.append(f"{case['case']}, {sweep.name} {step.text}: {error.message}")
            continue
        edited.append((case, file))
    return edited


def _real(out: Path, cases: Sequence[dict[str, Any]], sweeps: Sequence[Sweep], seed: int) -> list[_Tried]:
    masks, images = ([Path(case[key]) for case in cases] for key in ("label", "image"))
    base = _Tried("real", "", BASE, cases, masks, images)
    changes = [(sweep, step, step.change) for sweep in sweeps for step in sweep.steps if step.change is not None]
    return [base, *(_with_change(out, base, sweep, step, change, seed) for sweep, step, change in changes)]


def _with_change(out: Path, base: _Tried, sweep: Sweep, step: Step, change: ImageChange, seed: int) -> _Tried:
    tried = _Tried(base.kind, sweep.name, step.text, base.cases, base.masks, [])
    files = []
    for case, mask, image in zip(base.cases, base.masks, base.images, strict=True):
        files.append(out / "images" / tried.folder / f"{volume_stem(image)}.nii.gz")
        if files[-1].exists():
            continue
        rng = np.random.default_rng([seed, *case["case"].encode(), *f"{sweep.name} {step.text}".encode()])
        result = changed(read_volume(image), as_labels(read_volume(mask)), change, rng)
        said = {"from": image.name, "change": f"{sweep.name}: {step.text}", "seed": seed}
        if base.kind == "synthetic":
            write_synthetic(files[-1], result, said)
        else:
            write_nifti(files[-1], result.array, result.affine, f"changed: {sweep.name} {step.text}", result.space)
    return _Tried(base.kind, sweep.name, step.text, base.cases, base.masks, files)


def _measured(tried: _Tried, found: Sequence[Path], found_as: dict[int, int]) -> list[Measured]:
    rows = []
    for case, mask, image, file in zip(tried.cases, tried.masks, tried.images, found, strict=True):
        wanted, labels = as_labels(read_volume(mask)), read_volume(file).array
        by_our_values = np.zeros_like(labels)
        for label, value in found_as.items():
            by_our_values[labels == value] = label
        for label, dice in dice_by_label(by_our_values, wanted.array, found_as).items():
            rows.append(
                Measured(
                    tried.kind, tried.sweep, tried.step, case["case"], case["subject"], label, dice, image, mask, file
                )
            )
    return rows


def _laid_beside(measured: Sequence[Measured], sweeps: Sequence[Sweep]) -> list[Measured]:
    """Real scans as they are, once more at the value of each sweep that their own mask comes closest to."""
    rows = []
    for sweep in sweeps:
        if sweep.own is None:
            continue
        for row in measured:
            if row.kind == "real" and row.step == BASE:
                step = sweep.nearest(sweep.own(as_labels(read_volume(row.mask))))
                if step is not None:
                    rows.append(row.at(sweep.name, step.text))
    return rows


def _write(out: Path, trial: Trial, segmenter: Segmenter, settings: StressSettings) -> None:
    rows = [
        {**asdict(row), **{key: _relative(getattr(row, key), out) for key in ("image", "mask", "found")}}
        for row in trial.measured
    ]
    for row in rows:
        row["label"] = trial.names[row["label"]]
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["case"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(out / "stress.csv", text.getvalue())
    write_json(
        out / "stress.json",
        {
            "segmenter": segmenter.command,
            "settings": asdict(settings),
            "weaknesses": [{**asdict(weak), "label": trial.names[weak.label]} for weak in trial.weaknesses],
            "left_out": list(trial.left_out),
            "volumes": rows,
        },
    )


def _relative(path: Path, out: Path) -> str:
    """Below the output folder; of real scans the name alone, as the work folder may lie anywhere."""
    return str(path.relative_to(out)) if path.is_relative_to(out) else path.name


def _slug(text: str) -> str:
    return re.sub(r"[^\w.,+=-]+", "_", text).strip("_") or "base"
