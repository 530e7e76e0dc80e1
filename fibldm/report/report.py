"""A report in one HTML file: pictures, loss curves and figures; nothing is fetched when it is opened."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

import fibldm
from fibldm import UNKNOWN_LABEL
from fibldm.evaluation.results import Section
from fibldm.files import write_text
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Array
from fibldm.volumes.pictures import PLANES, draw_plane, show, slice_of

_LABEL_COLOURS = ("#4e79a7", "#76b7b2", "#edc948", "#f28e2b", "#e15759", "#b07aa1")
_OVERLAY_ALPHA = 0.6


@dataclass(frozen=True)
class Match:
    """One synthetic volume, its mask, and the real volume that the mask was drawn on; all files.

    Attributes:
        case: name of the mask.
        subject: whose mask it is.
        mask: label file.
        real: image file on the mask's grid.
        synthetic: image files on the mask's grid; more than one are of other seeds.
    """

    case: str
    subject: str
    mask: Path
    real: Path
    synthetic: Sequence[Path]


def write_report(
    path: Path,
    *,
    figures: Mapping[str, Any],
    matches: Sequence[Match],
    sections: Mapping[str, Section],
    evaluation: Path,
    losses: Mapping[str, Path],
    labels: Mapping[str, str],
    window: tuple[float, float],
    commands: Sequence[str],
) -> None:
    """Write the report of a run.

    Args:
        path: the HTML file.
        figures: content of ``metrics.json``.
        matches: what to show as pictures: mask, real and synthetic.
        sections: what `fibldm evaluate` measured, by name.
        evaluation: folder of the pictures that the sections name.
        losses: ``metrics.csv`` by stage.
        labels: names by label value.
        window: values shown as black and as white.
        commands: what was run, one line each.
    """
    environment = Environment(loader=PackageLoader("fibldm.report"), autoescape=True)
    pictures = [(match, embedded(montage(match, window))) for match in matches]
    legend = [(name, label_colour(int(value))) for value, name in labels.items() if int(value)]
    html = environment.get_template("report.html.j2").render(
        version=fibldm.__version__,
        figures=figures,
        pictures=pictures,
        sections=[(name, section, _picture(section, evaluation)) for name, section in sections.items()],
        legend=legend,
        curves=embedded(loss_curves(losses)),
        commands=commands,
    )
    write_text(path, html)


def montage(match: Match, window: tuple[float, float]) -> Figure:
    """Rows: mask over the real volume, real, synthetic; columns: axial, coronal, sagittal through the labels."""
    mask, real, synthetic = (
        read_volume(str(file)).canonical() for file in (match.mask, match.real, match.synthetic[0])
    )
    found = np.argwhere(drawn_labels(mask.array))
    centre = [int(axis) for axis in (found.mean(axis=0) if len(found) else np.array(mask.array.shape) // 2)]
    if len(found):
        centre[0] = int(np.quantile(found[:, 0], 0.75))  # sagittal through the right lung, not the mediastinum
    figure = Figure(figsize=(9, 9), dpi=80, facecolor="black", layout="tight")
    rows = (("mask", real), ("real", real), ("synthetic", synthetic))
    for row, (name, volume) in zip(figure.subplots(3, 3), rows, strict=True):
        for plane, axis in enumerate(row):
            style = {"cmap": "gray", "vmin": window[0], "vmax": window[1]}
            draw_plane(axis, volume.array, volume.grid.spacing, plane, centre, **style)
            if name == "mask":
                labels, aspect = slice_of(mask.array, mask.grid.spacing, plane, centre)
                show(axis, _coloured(labels), aspect)
            axis.set_title(f"{name}, {PLANES[plane]}", color="white", fontsize=9)
    return figure


def loss_curves(losses: Mapping[str, Path]) -> Figure:
    """Training and validation loss of each stage by epoch."""
    figure = Figure(figsize=(4 * len(losses), 3), dpi=80, layout="tight")
    for axis, (stage, file) in zip(np.atleast_1d(figure.subplots(1, len(losses))), losses.items(), strict=True):
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        for column, name, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
            known = [row for row in rows if row[column]]
            epochs, values = [int(row["epoch"]) for row in known], [float(row[column]) for row in known]
            axis.plot(epochs, values, style, markersize=3, label=name)
        axis.set(title=stage, xlabel="epoch", ylabel="loss")
        axis.legend(fontsize=8)
    return figure


def _picture(section: Section, folder: Path) -> str | None:
    name = section.facts.get("picture")
    return base64.b64encode((folder / name).read_bytes()).decode() if name else None


def label_colour(label: int) -> str:
    """Colour of a label in every picture."""
    return _LABEL_COLOURS[(label - 1) % len(_LABEL_COLOURS)]


def drawn_labels(labels: Array) -> NDArray[np.bool_]:
    """Where a picture shows a label: neither background nor unknown."""
    return (labels != 0) & (labels != UNKNOWN_LABEL)


def _coloured(labels: Array) -> NDArray[np.float64]:
    """RGBA of a slice of labels; background and unknown are clear."""
    picture = np.zeros((*labels.shape, 4))
    for value in np.unique(labels[drawn_labels(labels)]):
        picture[labels == value] = to_rgba(label_colour(int(value)), alpha=_OVERLAY_ALPHA)
    return picture


def embedded(figure: Figure) -> str:
    """A figure as PNG in base64, for an HTML file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()
