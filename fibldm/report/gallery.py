"""A user's own volumes in one picture: three planes of each, with the outlines of its mask over them.

Slices are turned as `fibldm.volumes.pictures` says, and go through the middle of the labels.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

import fibldm
from fibldm.errors import FibldmError
from fibldm.files import atomic_path, read_json, write_text
from fibldm.report.colours import drawn_labels, label_colour
from fibldm.report.planes import centre_of, outline
from fibldm.volumes.datalist import SPLITS, load_datalist, read_datalist
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Array
from fibldm.volumes.intensity import load_intensity
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.pictures import PLANES, draw_plane, planes_of, slice_of
from fibldm.volumes.writer import sidecar, volume_stem

_INCHES = 2.6
_FONT = 8
_PERCENTILES = (0.5, 99.5)
_SYNTHETIC = "SYNTHETIC, not a patient"


@dataclass(frozen=True)
class Shown:
    """A volume to look at.

    Attributes:
        name: said beside it.
        image: file of one or several channels.
        mask: label map on the same grid, or ``None``.
        window: values shown as black and as white; ``None`` takes percentiles of the volume.
        synthetic: whether it is marked so.
    """

    name: str
    image: Path
    mask: Path | None = None
    window: tuple[float, float] | None = None
    synthetic: bool = False


def volumes_of(source: Path, split: str | None = None) -> tuple[list[Shown], dict[int, str]]:
    """The volumes of a work folder, of an output of ``fibldm synthesize``, or of ``images/`` with ``labels/``.

    Returns:
        The volumes in order, and names of their labels as far as they are known.

    Raises:
        FibldmError: the folder holds no volume, an unknown split, or a split of what is no work folder.
    """
    if (source / "datalist.json").is_file():
        return _of_work(source, (split,) if split else SPLITS)
    if split is not None:
        raise FibldmError(f"--split is of a work folder; {source} holds no datalist.json", "leave it out")
    if found := volumes_in(source):
        return [as_drawn(file) for file in found], {}
    pairs = [(file, source / "labels" / file.name) for file in volumes_in(source / "images")]
    if not pairs:
        raise FibldmError(
            "pictures are of a work folder, of a folder of fibldm synthesize, or of images/ with labels/; "
            f"{source} has neither volumes (.nii, .nii.gz) nor a datalist.json",
            "check the path; a DICOM series is shown by any viewer",
        )
    return [Shown(volume_stem(file), file, mask if mask.is_file() else None) for file, mask in pairs], {}


def write_gallery(
    path: Path,
    volumes: Sequence[Shown],
    *,
    names: Mapping[int, str],
    window: tuple[float, float] | None = None,
    left_out: int = 0,
) -> None:
    """Write the pictures as one PNG, or as one HTML file that fetches nothing, with a PNG for each volume.

    Args:
        path: ends in ``.png`` or ``.html``.
        volumes: from top to bottom.
        names: of labels by value; others are told by their values.
        window: of all volumes, in place of their own.
        left_out: how many more there are.

    Raises:
        FibldmError: another suffix, a window that is empty, a file that cannot be read, or a mask on another grid.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise FibldmError(f"pictures are written to a .png or an .html file; got {path.name}", "change --out")
    if window is not None and not window[0] < window[1]:
        raise FibldmError(f"the window of a picture must end above its beginning; got {window}")
    if path.suffix.lower() == ".png":
        rows, values = _rows_of(volumes, window)
        figure = _drawn(rows, titles=True, legend=_legend(values, names))
        with atomic_path(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)
        return
    pictures, found = [], set[int]()
    for volume in volumes:
        rows, values = _rows_of([volume], window)
        found |= values
        pictures.append((volume, _embedded(_drawn(rows))))
    environment = Environment(loader=PackageLoader("fibldm.report"), autoescape=True)
    html = environment.get_template("gallery.html.j2").render(
        version=fibldm.__version__, pictures=pictures, legend=_legend(found, names), left_out=left_out
    )
    write_text(path, html)


@dataclass(frozen=True)
class _Row:
    title: str
    voxels: Array
    labels: NDArray[np.uint8] | None
    spacing: tuple[float, float, float]
    window: tuple[float, float]


def _of_work(work: Path, splits: Sequence[str]) -> tuple[list[Shown], dict[int, str]]:
    intensity = load_intensity(work / "intensity.json")
    window = (intensity.low, intensity.high) if intensity.kind in ("window", "suv") else None
    found = [
        Shown(entry["case"], Path(entry["image"]), Path(entry["label"]) if "label" in entry else None, window)
        for split in splits
        for entry in load_datalist(work, split)
    ]
    return found, {int(value): str(name) for value, name in read_datalist(work)["labels"].items()}


def as_drawn(file: Path) -> Shown:
    """A volume with the mask and the sidecar that lie beside it, where they do."""
    facts: dict[str, Any] = read_json(sidecar(file)) if sidecar(file).is_file() else {}
    intensity = facts.get("intensity", {})
    window = (intensity["low"], intensity["high"]) if intensity.get("kind") in ("window", "suv") else None
    stem, _, number = volume_stem(file).rpartition("_")
    origins = [stem] if stem and number.isdigit() else []
    masks = [file.parent / "masks" / f"{name}.nii.gz" for name in (*origins, volume_stem(file))]
    mask = next((mask for mask in masks if mask.is_file()), None)
    return Shown(volume_stem(file), file, mask, window, bool(facts.get("synthetic")))


def _rows_of(volumes: Sequence[Shown], window: tuple[float, float] | None) -> tuple[list[_Row], set[int]]:
    """A row for each channel, and all labels that occur."""
    rows: list[_Row] = []
    values: set[int] = set()
    for shown in volumes:
        scan = read_scan((shown.image,))
        labels = None if shown.mask is None else labels_of(shown, scan.array.shape[:3], scan.affine)
        if labels is not None:
            values |= {int(value) for value in np.unique(labels[drawn_labels(labels)])}
        right, front, up = (float(step) for step in scan.spacing)
        channels = [scan.array] if scan.array.ndim == 3 else list(np.moveaxis(scan.array, 3, 0))
        for number, voxels in enumerate(channels):
            title = shown.name if len(channels) == 1 else f"{shown.name}, channel {number}"
            title += f", {_SYNTHETIC}" if shown.synthetic else ""
            rows.append(_Row(title, voxels, labels, (right, front, up), window or shown.window or range_of(voxels)))
    return rows, values


def labels_of(shown: Shown, shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The labels of a volume that has a mask, which must lie on its grid.

    Raises:
        FibldmError: it does not.
    """
    mask = read_scan((shown.mask,))  # type: ignore[arg-type]
    if mask.array.shape != shape or not np.allclose(mask.affine, affine, atol=1e-2):
        raise FibldmError(f"{shown.image} must lie on the grid of its mask {shown.mask}; it does not")
    labels: NDArray[np.uint8] = np.clip(np.rint(mask.array), 0, 255).astype(np.uint8)
    return labels


def range_of(voxels: Array) -> tuple[float, float]:
    """What is shown as black and as white where nobody says it: percentiles."""
    low, high = np.percentile(voxels[np.isfinite(voxels)], _PERCENTILES)
    return (float(low), float(high)) if low < high else (float(low), float(low) + 1)


def _drawn(rows: Sequence[_Row], *, titles: bool = False, legend: Sequence[tuple[str, str]] = ()) -> Figure:
    planes = max(len(planes_of(row.voxels)) for row in rows)
    width, height = _INCHES * planes, _INCHES + 0.3
    across = max(1, round(math.sqrt(len(rows) * height / width)))  # about as wide as high
    down = math.ceil(len(rows) / across)
    figure = Figure(figsize=(width * across, height * down + 0.3), dpi=100, layout="constrained")
    figure.set_facecolor("black")
    for part, row in zip(figure.subfigures(down, across, squeeze=False).ravel(), rows, strict=False):
        part.set_facecolor("black")
        if titles:
            part.suptitle(_plain(row.title), color="white", fontsize=_FONT + 1, parse_math=False)
        for plane, axis in zip(planes_of(row.voxels), np.atleast_1d(part.subplots(1, planes)), strict=False):
            _draw_plane(axis, row, plane)
    if legend:
        handles = [Patch(color=colour, label=_plain(name)) for name, colour in legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=_FONT)
    return figure


def _draw_plane(axis: Axes, row: _Row, plane: int) -> None:
    centre = centre_of(row.voxels, row.labels)
    draw_plane(axis, row.voxels, row.spacing, plane, centre, cmap="gray", vmin=row.window[0], vmax=row.window[1])
    axis.set_title(PLANES[plane], color="white", fontsize=_FONT)
    if row.labels is not None:
        outline(axis, slice_of(row.labels, row.spacing, plane, centre)[0])


def _legend(values: set[int], names: Mapping[int, str]) -> list[tuple[str, str]]:
    return [(names.get(value, f"label {value}"), label_colour(value)) for value in sorted(values)]


def _plain(text: str) -> str:
    """What the picture's own font can show; HTML has the names as they are."""
    return "".join(letter if ord(letter) < 0x500 else "?" for letter in text)


def _embedded(figure: Figure) -> str:
    """A figure as PNG in base64."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()
