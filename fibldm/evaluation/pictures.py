"""Volumes side by side in one picture; slices are turned as `fibldm.volumes.pictures` says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from fibldm.errors import FibldmError
from fibldm.files import atomic_path
from fibldm.volumes.grid import Array
from fibldm.volumes.pictures import PLANES, draw_plane, planes_of

_INCHES = 1.5
_FONT = 8


@dataclass(frozen=True)
class Pair:
    """Two volumes to look at side by side.

    Attributes:
        title: one line above them.
        left: ``(X, Y, Z)``, RAS+.
        right: of the same shape.
        spacing: mm along R, A, S.
        names: of left and right.

    Raises:
        FibldmError: the volumes are not 3-D or not of one shape.
    """

    title: str
    left: Array
    right: Array
    spacing: tuple[float, float, float]
    names: tuple[str, str] = ("real", "synthetic")

    def __post_init__(self) -> None:
        if self.left.ndim != 3 or self.left.shape != self.right.shape:
            raise FibldmError(
                f"a pair of pictures needs two 3-D volumes of one shape; got {self.left.shape} and {self.right.shape}",
                "resample one to the grid of the other",
            )


def channel_pairs(
    title: str,
    left: Array,
    right: Array,
    *,
    spacing: tuple[float, float, float],
    names: tuple[str, str],
    channels: Sequence[str],
) -> list[Pair]:
    """A pair of two images ``(X, Y, Z)``, or a pair for each channel of ``(C, X, Y, Z)`` with its name in the title.

    Args:
        title: one line above them.
        left: image.
        right: of the same shape.
        spacing: mm along R, A, S.
        names: of left and right.
        channels: names of the channels.
    """
    if left.ndim == 3:
        return [Pair(title, left, right, spacing, names)]
    parts = zip(channels, left, right, strict=True)
    return [Pair(f"{title}, {channel}", one, other, spacing, names) for channel, one, other in parts]


def write_comparison(
    path: Path, pairs: Sequence[Pair], *, window: tuple[float, float] = (-1.0, 1.0), difference: bool = True
) -> None:
    """Write a PNG with a row for each pair: slices of left, of right, and of right minus left.

    Args:
        path: the file.
        pairs: from top to bottom.
        window: values shown as black and as white; a difference has its full colour at a quarter of this range.
        difference: whether to show it, red where right is brighter and blue where it is darker.

    Raises:
        FibldmError: there is no pair, the window is empty, or the file cannot be written.
    """
    low, high = window
    if not pairs:
        raise FibldmError("a comparison needs at least one pair; got none")
    if not low < high:
        raise FibldmError(f"the window of a picture must end above its beginning; got {window}")
    figure = comparison(pairs, window, difference)
    with atomic_path(Path(path)) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def comparison(pairs: Sequence[Pair], window: tuple[float, float], difference: bool) -> Figure:
    """The picture that `write_comparison` writes."""
    columns = max(len(planes_of(pair.left)) for pair in pairs) * (3 if difference else 2)
    size = (_INCHES * columns, (_INCHES + 0.4) * len(pairs))
    figure = Figure(figsize=size, dpi=100, facecolor="black", layout="constrained")
    for row, pair in zip(figure.subfigures(len(pairs), 1, squeeze=False).ravel(), pairs, strict=True):
        row.set_facecolor("black")
        row.suptitle(pair.title, color="white", fontsize=_FONT + 1)
        _draw_pair(row, pair, window, difference)
    return figure


def _draw_pair(row: SubFigure, pair: Pair, window: tuple[float, float], difference: bool) -> None:
    gray: dict[str, Any] = {"cmap": "gray", "vmin": window[0], "vmax": window[1]}
    limit = (window[1] - window[0]) / 4
    volumes = [(pair.names[0], pair.left, gray), (pair.names[1], pair.right, gray)]
    if difference:
        change = pair.right.astype(np.float32) - pair.left.astype(np.float32)
        volumes.append((f"difference, ±{limit:g}", change, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}))
    planes = len(planes_of(pair.left))
    axes = row.subplots(1, len(volumes) * planes).reshape(len(volumes), planes)
    for (name, volume, style), group in zip(volumes, axes, strict=True):
        for plane, axis in enumerate(group):
            draw_plane(axis, volume, pair.spacing, plane, **style)
            axis.set_title(f"{name}\n{PLANES[plane]}", color="white", fontsize=_FONT)
