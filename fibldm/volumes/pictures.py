"""Slices of volumes in one picture, drawn while a stage runs or beside figures.

Volumes are ``(X, Y, Z)`` in RAS+ order. Axial and coronal slices show the patient's right on the left, sagittal ones
the front; the upper edge of an axial slice is the front, of the others the top. Slices go through the middle, but a
sagittal one right of it: the midline shows less than what is beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.files import atomic_path

PLANES = ("axial", "coronal", "sagittal")

_INCHES = 1.4
_PAIR_INCHES = 1.5
_PAIR_FONT = 8
_GRAY: dict[str, Any] = {"cmap": "gray", "vmin": -1.0, "vmax": 1.0}
_DIFFERENCE: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}


@dataclass(frozen=True)
class Panel:
    """One slice of a picture.

    Attributes:
        title: one line above it.
        volume: ``(X, Y, Z)``, RAS+; intensities from -1 (black) to 1 (white).
        plane: index into `PLANES`.
        difference: the volume is a difference, red where positive, with full colour at a quarter of the range.

    Raises:
        FibldmError: the volume is not 3-D.
    """

    title: str
    volume: Tensor
    plane: int
    difference: bool = False

    def __post_init__(self) -> None:
        if self.volume.ndim != 3:
            raise FibldmError(f"a picture shows 3-D volumes (X, Y, Z); got the shape {tuple(self.volume.shape)}")


@dataclass(frozen=True)
class Pair:
    """Two volumes to look at side by side.

    Attributes:
        title: one line above them.
        left: ``(X, Y, Z)``, RAS+; intensities from -1 (black) to 1 (white).
        right: of the same shape.
        spacing: mm along R, A, S.
        names: of left and right.

    Raises:
        FibldmError: the volumes are not 3-D or not of one shape.
    """

    title: str
    left: NDArray[Any]
    right: NDArray[Any]
    spacing: tuple[float, float, float]
    names: tuple[str, str] = ("real", "synthetic")

    def __post_init__(self) -> None:
        if self.left.ndim != 3 or self.left.shape != self.right.shape:
            raise FibldmError(
                f"a pair of pictures needs two 3-D volumes of one shape; got {self.left.shape} and {self.right.shape}",
                "resample one to the grid of the other",
            )


def planes_of(volume: Tensor | NDArray[Any]) -> range:
    """Indices into `PLANES` of what there is to see of ``(X, Y, Z)``: of a single slice, the axial one."""
    return range(len(PLANES) if volume.shape[2] > 1 else 1)


def compared(title: str, volume: Tensor, other: Tensor, names: tuple[str, str]) -> list[list[Panel]]:
    """A row for each channel of two images ``(C, X, Y, Z)``: the planes of each and of other minus volume."""
    rows = []
    for channel, (one, two) in enumerate(zip(volume, other, strict=True)):
        shown = title if len(volume) == 1 else f"{title}, channel {channel}"
        groups = [(names[0], one, False), (names[1], two, False), ("difference", two - one, True)]
        planes = planes_of(one)
        rows.append([Panel(f"{shown}\n{name}", part, plane, sign) for name, part, sign in groups for plane in planes])
    return rows


def render(rows: Sequence[Sequence[Panel]], spacing: Sequence[float]) -> NDArray[np.uint8]:
    """A picture ``(height, width, 3)`` of rows of as many panels each.

    Args:
        rows: from top to bottom, each from left to right.
        spacing: mm along R, A, S.

    Raises:
        FibldmError: there is nothing to show, or the rows are not of one length.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise FibldmError(f"a picture needs rows of as many panels each; got {[len(row) for row in rows]}")
    columns = lengths.pop()
    figure = Figure(figsize=(_INCHES * columns, (_INCHES + 0.3) * len(rows)), facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis, panel in zip(axes.ravel(), [panel for row in rows for panel in row], strict=True):
        _show(axis, panel, spacing)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def channel_pairs(
    title: str,
    left: NDArray[Any],
    right: NDArray[Any],
    *,
    spacing: tuple[float, float, float],
    names: tuple[str, str],
    channels: Sequence[str],
) -> list[Pair]:
    """A `Pair` of two images ``(X, Y, Z)``, or one for each channel of ``(C, X, Y, Z)`` with its name in the title."""
    if left.ndim == 3:
        return [Pair(title, left, right, spacing, names)]
    parts = zip(channels, left, right, strict=True)
    return [Pair(f"{title}, {channel}", one, other, spacing, names) for channel, one, other in parts]


def write_comparison(path: Path, pairs: Sequence[Pair]) -> None:
    """Write a PNG with a row for each pair, see `comparison`.

    Raises:
        FibldmError: there is no pair, or the file cannot be written.
    """
    if not pairs:
        raise FibldmError("a comparison needs at least one pair; got none")
    with atomic_path(Path(path)) as temporary:
        FigureCanvasAgg(comparison(pairs)).print_png(temporary)


def comparison(pairs: Sequence[Pair]) -> Figure:
    """A row for each pair: slices of left, of right, and of right minus left, red where right is brighter."""
    columns = 3 * max(len(planes_of(pair.left)) for pair in pairs)
    size = (_PAIR_INCHES * columns, (_PAIR_INCHES + 0.4) * len(pairs))
    figure = Figure(figsize=size, dpi=100, facecolor="black", layout="constrained")
    for row, pair in zip(figure.subfigures(len(pairs), 1, squeeze=False).ravel(), pairs, strict=True):
        row.set_facecolor("black")
        row.suptitle(pair.title, color="white", fontsize=_PAIR_FONT + 1)
        _draw_pair(row, pair)
    return figure


def _draw_pair(row: SubFigure, pair: Pair) -> None:
    change = pair.right.astype(np.float32) - pair.left.astype(np.float32)
    parts = [(pair.names[0], pair.left, _GRAY), (pair.names[1], pair.right, _GRAY)]
    parts.append((f"difference, ±{_DIFFERENCE['vmax']:g}", change, _DIFFERENCE))
    planes = len(planes_of(pair.left))
    axes = row.subplots(1, len(parts) * planes).reshape(len(parts), planes)
    for (name, volume, style), group in zip(parts, axes, strict=True):
        for plane, axis in enumerate(group):
            draw_plane(axis, volume, pair.spacing, plane, **style)
            _set_title(axis, f"{name}\n{PLANES[plane]}", _PAIR_FONT)


def preview_file(stage: Path, epoch: int) -> Path:
    """Where the preview of an epoch lies in the folder of a stage."""
    return stage / "previews" / f"epoch_{epoch:04d}.png"


def write_picture(file: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture ``(height, width, 3)`` as PNG, whole or not at all.

    Raises:
        FibldmError: the file cannot be written.
    """
    with atomic_path(file) as temporary:
        Image.fromarray(picture).save(temporary, format="png")


def middle(volume: NDArray[Any]) -> tuple[int, int, int]:
    """The voxel in the middle, but right of it: a sagittal slice through the midline shows less than one beside it."""
    x, y, z = volume.shape
    return 2 * x // 3, y // 2, z // 2


def slice_of(
    volume: NDArray[Any], spacing: Sequence[float], plane: int, centre: Sequence[int]
) -> tuple[NDArray[Any], float]:
    """One slice, its first row at the bottom, and the height of its pixels in terms of their width.

    Args:
        volume: ``(X, Y, Z)``, RAS+.
        spacing: mm along R, A, S.
        plane: index into `PLANES`.
        centre: voxel index ``(x, y, z)`` that the slice goes through.
    """
    x, y, z = centre
    right, front, up = spacing
    views = (
        (volume[::-1, :, z].T, front / right),
        (volume[::-1, y, :].T, up / right),
        (volume[x, ::-1, :].T, up / front),
    )
    return views[plane]


def draw_plane(
    axis: Axes,
    volume: NDArray[Any],
    spacing: Sequence[float],
    plane: int,
    centre: Sequence[int] | None = None,
    **style: Any,
) -> None:
    """Draw what `slice_of` gives, through the `middle` where ``centre`` is None; ``style`` is of ``imshow``."""
    picture, aspect = slice_of(volume, spacing, plane, centre or middle(volume))
    show(axis, picture, aspect, **style)


def show(axis: Axes, picture: NDArray[Any], aspect: float, **style: Any) -> None:
    """Draw what `slice_of` gave, without interpolation and without axes; ``style`` is of ``imshow``."""
    axis.imshow(picture, origin="lower", aspect=aspect, interpolation="nearest", **style)
    axis.axis("off")


def _show(axis: Axes, panel: Panel, spacing: Sequence[float]) -> None:
    volume = panel.volume.detach().float().cpu().numpy()
    style = _DIFFERENCE if panel.difference else _GRAY
    draw_plane(axis, volume, spacing, panel.plane, **style)
    _set_title(axis, panel.title, 7)


def _set_title(axis: Axes, title: str, size: int) -> None:
    """Above the slice, where matplotlib puts it; told where, it does not measure ticks, which there are none of."""
    axis.set_title(title, color="white", fontsize=size, y=1.0)
