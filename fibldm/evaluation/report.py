"""A report in one HTML file: pictures, loss curves and figures; nothing is fetched when it is opened."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import fibldm
from fibldm.evaluation.figures import Match
from fibldm.files import write_text
from fibldm.volumes.grid import Volume, read_volume

_LABEL_COLOURS = ("#00000000", "#4e79a7", "#76b7b2", "#edc948", "#f28e2b", "#e15759", "#b07aa1")
_PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Window:
    """What a picture shows: values from ``low`` (black) to ``high`` (white)."""

    low: float
    high: float


def write_report(
    path: Path,
    *,
    figures: Mapping[str, Any],
    matches: Sequence[Match],
    losses: Mapping[str, Path],
    labels: Mapping[str, str],
    window: Window,
    commands: Sequence[str],
) -> None:
    """Write the report of a run.

    Args:
        path: the HTML file.
        figures: content of ``metrics.json``.
        matches: what to show as pictures: mask, real and synthetic.
        losses: ``metrics.csv`` by stage.
        labels: names by label value.
        window: of the pictures.
        commands: what was run, one line each.
    """
    environment = Environment(loader=PackageLoader("fibldm.evaluation"), autoescape=select_autoescape())
    pictures = [(match, _embedded(montage(match, window))) for match in matches]
    legend = [(name, _LABEL_COLOURS[int(value) % len(_LABEL_COLOURS)]) for value, name in labels.items() if int(value)]
    html = environment.get_template("report.html.j2").render(
        version=fibldm.__version__,
        figures=figures,
        pictures=pictures,
        legend=legend,
        curves=_embedded(loss_curves(losses)),
        commands=commands,
    )
    write_text(path, html)


def montage(match: Match, window: Window) -> Figure:
    """Rows: mask over the real volume, real, synthetic; columns: axial, coronal, sagittal through the labels' centre.

    Axial and coronal pictures are shown as radiologists see them: the patient's right on the left.
    """
    mask, real, synthetic = (
        read_volume(str(file)).canonical() for file in (match.mask, match.real, match.synthetic[0])
    )
    found = np.argwhere(mask.array > 0)
    centre = [int(axis) for axis in (found.mean(axis=0) if len(found) else np.array(mask.array.shape) / 2)]
    figure = Figure(figsize=(9, 9), dpi=80, facecolor="black", layout="tight")
    axes = figure.subplots(3, 3)
    rows = (("mask", real), ("real", real), ("synthetic", synthetic))
    for row, (name, volume) in zip(axes, rows, strict=True):
        for plane, axis in enumerate(row):
            picture, aspect = _slice(volume, plane, centre)
            axis.imshow(
                picture, cmap="gray", vmin=window.low, vmax=window.high, origin="lower", aspect=aspect,
                interpolation="nearest",
            )
            if name == "mask":
                colours = ListedColormap(_LABEL_COLOURS)
                overlay = _slice(mask, plane, centre)[0]
                axis.imshow(overlay, cmap=colours, vmin=0, vmax=len(_LABEL_COLOURS) - 1, origin="lower",
                            aspect=aspect, alpha=0.6, interpolation="nearest")
            axis.set_title(f"{name}, {_PLANES[plane]}", color="white", fontsize=9)
            axis.axis("off")
    return figure


def loss_curves(losses: Mapping[str, Path]) -> Figure:
    """Training and validation loss of each stage by epoch."""
    figure = Figure(figsize=(4 * max(1, len(losses)), 3), dpi=80, layout="tight")
    for axis, (stage, file) in zip(np.atleast_1d(figure.subplots(1, len(losses))), losses.items(), strict=True):
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        axis.plot([int(row["epoch"]) for row in rows], [float(row["loss"]) for row in rows], label="training")
        validated = [row for row in rows if row["validation_loss"]]
        axis.plot(
            [int(row["epoch"]) for row in validated],
            [float(row["validation_loss"]) for row in validated],
            "o-", markersize=3, label="validation",
        )
        axis.set(title=stage, xlabel="epoch", ylabel="loss")
        axis.legend(fontsize=8)
    return figure


def _slice(volume: Volume, plane: int, centre: Sequence[int]) -> tuple[np.ndarray[Any, Any], float]:
    x, y, z = centre
    right, front, up = volume.grid.spacing
    views = (
        (volume.array[::-1, :, z].T, front / right),
        (volume.array[::-1, y, :].T, up / right),
        (volume.array[x, ::-1, :].T, up / front),
    )
    return views[plane]


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()
