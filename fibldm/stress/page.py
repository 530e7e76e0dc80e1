"""A stress test as one HTML file: what is weak, curves with real scans beside them, and the worst cases in pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fibldm.evaluation.statistics import Estimate
from fibldm.report.curves import chart
from fibldm.report.gallery import range_of
from fibldm.report.page import Page
from fibldm.report.parts import Part, Picture, Table
from fibldm.report.planes import Row, centre_of, picture_of
from fibldm.stress.sweeps import Sweep
from fibldm.stress.trial import BASE, Trial
from fibldm.stress.weaknesses import Measured, mean_dice, of
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.masks import as_labels

_WORST = 4


def write_page(path: Path, trial: Trial, title: str) -> int:
    """Write the file; its size in bytes."""
    banner = (
        "Images marked synthetic are drawn by a generator from masks, and are no patients; what a segmenter does on "
        "them says as much of it as the generator is true.",
        "Pictures of real scans, where there are some, are of patients.",
    )
    parts = [_summary(trial), *(_part(trial, sweep) for sweep in trial.sweeps), *_pictures(trial)]
    if trial.left_out:
        parts.append(Part("What could not be tried", list(trial.left_out)))
    return Page(title, banner, parts).write(path)


def table_of(trial: Trial, sweep: Sweep, label: int) -> Table:
    """Dice of a label by the values of a sweep, the unchanged volumes first, with real scans beside them."""
    rows = [[BASE, *_cells(trial, "", BASE, label)]]
    rows += [[step.text, *_cells(trial, sweep.name, step.text, label)] for step in sweep.steps]
    return Table(f"{sweep.name}: Dice of {trial.names[label]}", [sweep.name, "synthetic", "n", "real", "n"], rows)


def _cells(trial: Trial, sweep: str, step: str, label: int) -> list[str]:
    cells = []
    for kind in ("synthetic", "real"):
        estimate = mean_dice(of(trial.measured, kind, sweep, step, label))
        cells += ["", ""] if estimate is None else [_text(estimate), str(estimate.n)]
    return cells


def _text(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f}{interval}"


def _summary(trial: Trial) -> Part:
    if not trial.weaknesses:
        return Part("Weaknesses", ["No value lowers Dice by more than chance does."])
    rows = [
        [f"{weak.sweep}: {weak.step}", trial.names[weak.label], f"{weak.dice:.2f}", f"{weak.base:.2f}", f"{weak.p:.2g}"]
        for weak in trial.weaknesses
    ]
    table = Table(
        "Values at which a label is found less well than in the same patients unchanged",
        ["value", "label", "Dice", "unchanged", "p, corrected"],
        rows,
    )
    lines = ["Small structures have a lower Dice than large ones at the same error of their border."]
    volumes = any(weak.sweep.startswith("volume ") for weak in trial.weaknesses)
    return Part("Weaknesses", lines if volumes else [], [table])


def _part(trial: Trial, sweep: Sweep) -> Part:
    tables, pictures = [], []
    for label in trial.names:
        if not any(row.label == label for row in trial.measured if row.sweep == sweep.name):
            continue
        tables.append(table_of(trial, sweep, label))
        lines = {}
        for kind in ("synthetic", "real"):
            means = {
                step.value: mean_dice(of(trial.measured, kind, sweep.name, step.text, label)) for step in sweep.steps
            }
            points = [(value, float(mean.value)) for value, mean in means.items() if mean and mean.value is not None]
            if points:
                lines[kind] = points
        if lines and all(np.isfinite(value) for points in lines.values() for value, _ in points):
            said = "; ".join(f"{kind} from {points[0][1]:.2f} to {points[-1][1]:.2f}" for kind, points in lines.items())
            alt = f"Dice of {trial.names[label]} by {sweep.name}: {said}"
            pictures.append(Picture(alt, f"{trial.names[label]}: Dice by {sweep.name}", svg=chart(lines, sweep.name)))
    return Part(sweep.name, _agreement(trial, sweep), tables, pictures)


def _agreement(trial: Trial, sweep: Sweep) -> list[str]:
    """How far the synthetic curve lies from that of real scans, where there are both."""
    gaps = []
    for label in trial.names:
        for step in sweep.steps:
            both = [mean_dice(of(trial.measured, kind, sweep.name, step.text, label)) for kind in ("synthetic", "real")]
            values = [mean.value for mean in both if mean is not None and mean.value is not None]
            if len(values) == 2:
                gaps.append(abs(values[0] - values[1]))
    if not gaps:
        return ["No real scan has any of these values."]
    return [f"Where there are both, synthetic and real Dice differ by {np.mean(gaps):.2f} in the mean."]


def _pictures(trial: Trial) -> list[Part]:
    """The case of the lowest Dice at each weakness; without one, of all synthetic volumes."""
    rows = [
        min(of(trial.measured, "synthetic", weak.sweep, weak.step, weak.label), key=lambda row: row.dice)
        for weak in sorted(trial.weaknesses, key=lambda weak: weak.dice)
    ]
    rows = rows or sorted((row for row in trial.measured if row.kind == "synthetic"), key=lambda row: row.dice)
    return [
        Part("Worst cases", ["Outlines: above, what was asked for; below, what was found."], (), _drawn(rows, trial))
    ]


def _drawn(rows: Sequence[Measured], trial: Trial) -> list[Picture]:
    pictures = []
    for row in rows[:_WORST]:
        image, mask, found = (read_volume(file).canonical() for file in (row.image, row.mask, row.found))
        low, high = range_of(image.array)
        voxels = np.clip((image.array - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        labels = [np.where(part.array == row.label, row.label, 0).astype(np.uint8) for part in (as_labels(mask), found)]
        centre = centre_of(voxels, labels[0])
        what = f"{row.sweep} {row.step}".strip()
        drawn = picture_of(
            [
                Row(title, voxels, part, image.affine, False, centre)
                for title, part in zip(("asked", "found"), labels, strict=True)
            ]
        )
        said = f"Dice of {trial.names[row.label]} {row.dice:.2f}"
        alt = f"{row.kind} volume of {row.case}, {what}, with the label as asked and as found: {said}"
        pictures.append(Picture(alt, f"{row.case}, {what}: {said}", drawn))
    return pictures
