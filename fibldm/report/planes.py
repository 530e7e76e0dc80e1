"""Slices of volumes with the letters of their sides: L R A P S I, as the affine has them.

Axial and coronal slices show the patient's right on the left, as radiologists look; sagittal ones the front.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from fibldm.report.colours import drawn_labels, label_colour
from fibldm.volumes.grid import Affine, Array
from fibldm.volumes.pictures import PLANES, middle, planes_of, show, slice_of

CONVENTION = (
    "Radiological: the patient's right is on the left of axial and coronal slices; sagittal ones have the front on the "
    "left. The letters come from the affine of each file."
)

_INCHES = 2.9
_DPI = 80
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
_ACROSS_AND_UP = ((0, 1), (0, 2), (1, 2))
"""Array axes of each plane: across the screen, whose high end is on the left, and up."""


class Letters(NamedTuple):
    """What lies at the edges of a slice."""

    left: str
    right: str
    top: str
    bottom: str


class Row(NamedTuple):
    """A volume in a picture.

    Attributes:
        title: beside it.
        voxels: ``(X, Y, Z)``, from 0 (black) to 255 (white).
        labels: on the same grid; None shows none.
        affine: voxel index to RAS+ mm.
        filled: whether labels are coloured areas, or outlines.
        centre: the voxel that slices go through.
    """

    title: str
    voxels: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None
    affine: Affine
    filled: bool
    centre: tuple[int, int, int]


def letters_of(affine: Affine, plane: int) -> Letters:
    """The sides of a slice as `slice_of` draws it, whatever way the axes of the array go.

    Args:
        affine: of the array, voxel index to RAS+ mm; of oblique axes, the nearest direction counts.
        plane: index into `PLANES`.
    """
    codes = nibabel.orientations.aff2axcodes(affine)
    across, up = (str(codes[axis]) for axis in _ACROSS_AND_UP[plane])
    return Letters(across, _OPPOSITE[across], up, _OPPOSITE[up])


def degrees_off(affine: Affine) -> float:
    """How far the axis that is most oblique lies from the direction that its letter names."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0), 0, 1))).max())


def centre_of(voxels: Array, labels: NDArray[np.uint8] | None) -> tuple[int, int, int]:
    """The slices of most labelled voxels; without labels, the middle."""
    found = None if labels is None else drawn_labels(labels)
    if found is None or not found.any():
        return middle(voxels)
    x, y, z = (int(found.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))
    return x, y, z


def picture_of(rows: Sequence[Row]) -> bytes:
    """A PNG with a row for each volume and a column for each plane."""
    planes = max(len(planes_of(row.voxels)) for row in rows)
    figure = Figure(figsize=(_INCHES * planes, _INCHES * len(rows)), dpi=_DPI, facecolor="black", layout="tight")
    for row, axes in zip(rows, figure.subplots(len(rows), planes, squeeze=False), strict=True):
        for plane, axis in enumerate(axes):
            if plane in planes_of(row.voxels):
                draw(axis, row, plane)
            else:
                axis.axis("off")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def draw(axis: Axes, row: Row, plane: int) -> None:
    """One slice with its letters."""
    spacing = nibabel.affines.voxel_sizes(row.affine)
    voxels, aspect = slice_of(row.voxels, spacing, plane, row.centre)
    show(axis, voxels, aspect, cmap="gray", vmin=0, vmax=255)
    if row.labels is not None:
        labels, _ = slice_of(row.labels, spacing, plane, row.centre)
        if row.filled:
            show(axis, _coloured(labels), aspect)
        else:
            outline(axis, labels)
    title = "".join(letter if ord(letter) < 0x500 else "?" for letter in f"{row.title}, {PLANES[plane]}")
    axis.set_title(title, color="white", fontsize=8, parse_math=False)
    letters = letters_of(row.affine, plane)
    rim = [withStroke(linewidth=2.5, foreground="black")]
    places = {"left": (0.02, 0.5), "right": (0.98, 0.5), "top": (0.5, 0.98), "bottom": (0.5, 0.02)}
    for side, (x, y) in places.items():
        across = side if side in ("left", "right") else "center"
        up = side if side in ("top", "bottom") else "center"
        style: dict[str, Any] = {"color": "#ffe08a", "fontsize": 10, "fontweight": "bold", "path_effects": rim}
        axis.text(x, y, getattr(letters, side), ha=across, va=up, transform=axis.transAxes, **style)


def outline(axis: Axes, labels: Array) -> None:
    """Lines around every label of a slice; a rim of background closes them at the picture's edge."""
    padded = np.pad(labels, 1)
    y, x = (np.arange(length) - 1 for length in padded.shape)
    for value in np.unique(padded[drawn_labels(padded)]):
        axis.contour(
            x, y, (padded == value).astype(float), levels=[0.5], colors=[label_colour(int(value))], linewidths=1.0
        )
    axis.set(xlim=(-0.5, labels.shape[1] - 0.5), ylim=(-0.5, labels.shape[0] - 0.5))


def _coloured(labels: Array) -> NDArray[np.float64]:
    """RGBA of a slice of labels; background and unknown are clear."""
    picture = np.zeros((*labels.shape, 4))
    for value in np.unique(labels[drawn_labels(labels)]):
        picture[labels == value] = to_rgba(label_colour(int(value)))
    return picture
