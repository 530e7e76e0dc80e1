"""Boxes as a condition: where things of a class are and how large, in any number, without their outlines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.conditions.box_cells import Span, coverage, spans_of
from fibldm.models.conditions.box_texts import MM, NONE, VOXELS, Box, Point, read_boxes
from fibldm.models.conditions.condition import Case, Condition

_ROUNDING = 0.05  # voxels by which a box that is written in mm may end behind its volume


class Frame(NamedTuple):
    """A grid in plain values: ``shape`` and ``affine``, as `fibldm.volumes.grid.Grid` has them."""

    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, grid: Any) -> "Frame":
        rows = np.asarray(grid.affine, dtype=float).tolist()
        return cls(tuple(int(length) for length in grid.shape), tuple(map(tuple, rows)))

    @property
    def spacing(self) -> NDArray[np.float64]:
        """mm along the axes."""
        return np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)

    def to_mm(self, voxels: ArrayLike) -> NDArray[np.float64]:
        """From voxels, counted from the outer face of the first, to RAS+ mm."""
        affine = np.array(self.affine)
        made: NDArray[np.float64] = affine[:3, :3] @ (np.asarray(voxels) - 0.5) + affine[:3, 3]
        return made

    def to_voxels(self, mm: ArrayLike) -> NDArray[np.float64]:
        """The inverse of `to_mm`."""
        affine = np.array(self.affine)
        made: NDArray[np.float64] = np.linalg.solve(affine[:3, :3], np.asarray(mm) - affine[:3, 3]) + 0.5
        return made

    def span(self, box: Box) -> Span:
        """Where a box in mm lies in voxels."""
        centre, half = self.to_voxels(box.centre), np.array(box.size) / self.spacing / 2
        return Span(tuple(centre - half), tuple(centre + half))

    def box(self, name: str, span: Span) -> Box:
        """The inverse of `span`."""
        low, high = np.array(span.low), np.array(span.high)
        return Box(name, _point(self.to_mm((low + high) / 2)), _point((high - low) * self.spacing))


@dataclass(frozen=True)
class Layout:
    """All boxes that are asked for; what is not among them is asked to be absent.

    Attributes:
        boxes: in any order; None where nothing is said of boxes.
        field: of the volume that people get, once that is known; boxes are in mm then. Nothing is asked outside of it.
        grid: the model grid, once that is known.
    """

    boxes: tuple[Box, ...] | None
    field: Frame | None = None
    grid: Frame | None = None


@dataclass(frozen=True)
class BoxClass:
    """A class of boxes, as the training cases have it.

    Attributes:
        value: of its label.
        low: smallest extent along each axis, mm.
        high: largest extent along each axis, mm.
        most: boxes of it in one case, at most.
    """

    value: int
    low: Point
    high: Point
    most: int

    def facts(self) -> dict[str, Any]:
        return {"label": self.value, "smallest_mm": self.low, "largest_mm": self.high, "most": self.most}


@dataclass(frozen=True)
class BoxEncoding(Condition):
    """Boxes at the latent's size: of each class how much of a cell lies in its boxes, and how much is unknown.

    A value is a `Layout`. Encoded, ``(B, 2 C, x, y, z)``, the coverage of all classes comes first. Boxes of one class
    that overlap count once, those of two classes each in their own channel, so that their order says nothing. What
    lies where a mask is unknown, or outside of it, is unknown; a class that is dropped is so everywhere.

    In training, boxes are those of the connected components of labels on the model grid, in augmented views as well.

    Attributes:
        classes: by name.
        compression: voxels per latent cell along each axis.
        spacing: of the model grid in mm.
        smallest: voxels that a component has at least to have a box.
    """

    classes: Mapping[str, BoxClass]
    compression: Sequence[int]
    spacing: Sequence[float]
    smallest: int = 8

    what = "boxes"
    kept_as = torch.float16

    @classmethod
    def fit(
        cls,
        labels: Iterable[Tensor],
        *,
        names: Mapping[Any, str],
        compression: Sequence[int],
        spacing: Sequence[float],
        classes: Sequence[str | int] | None = None,
        smallest: int = 8,
    ) -> "BoxEncoding":
        """As the training cases have them.

        Args:
            labels: masks of the training cases on the model grid, ``(1, X, Y, Z)``.
            names: of the labels by value, background 0 among them.
            compression: see `BoxEncoding`, as are ``spacing`` and ``smallest``.
            classes: labels that have boxes, by name or value; None: all that any training case has, but background.

        Raises:
            FibldmError: a class is none of the labels or has no box in any training case, or there is none at all.
        """
        if smallest < 1:
            raise FibldmError(f"the smallest component with a box must have at least 1 voxel; got {smallest}")
        chosen = _chosen({int(value): str(name) for value, name in names.items()}, classes)
        extents: dict[str, list[NDArray[np.float64]]] = {name: [] for name in chosen}
        most = dict.fromkeys(chosen, 0)
        for mask in labels:
            voxels = mask[0].cpu().numpy()
            for name, value in chosen.items():
                spans = spans_of(voxels, value, smallest)
                extents[name] += [(np.array(span.high) - span.low) * spacing for span in spans]
                most[name] = max(most[name], len(spans))
        absent = [name for name in chosen if not extents[name]]
        if len(absent) == len(chosen) or (absent and classes is not None):
            raise FibldmError(
                f"every class of boxes must occur in a training case with at least {smallest} voxels in one piece; "
                f"{', '.join(absent) or 'no label'} does not",
                "name other classes (box_classes), or allow smaller ones (box_smallest)",
            )
        return cls(
            {
                name: BoxClass(value, _point(np.min(extents[name], axis=0)), _point(np.max(extents[name], axis=0)), n)
                for (name, value), n in zip(chosen.items(), most.values(), strict=True)
                if n
            },
            tuple(int(factor) for factor in compression),
            tuple(float(length) for length in spacing),
            smallest,
        )

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.classes)

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (2 * len(self.classes), *cells)

    def read(self, asked: Any) -> Layout | None:
        """The boxes that a text, a list or a `Layout` says, see `box_texts.read_boxes`; classes by name or value.

        Raises:
            FibldmError: one is no box, or of a class that training did not have; lists all.
        """
        if asked is None or isinstance(asked, Layout):
            return asked
        names = {str(kind.value): name for name, kind in self.classes.items()}
        names |= {name.lower(): name for name in self.classes} | {name: name for name in self.classes}
        boxes = [(box, names.get(box.name) or names.get(box.name.lower())) for box in read_boxes(asked)]
        if wrong := [box.name for box, name in boxes if name is None]:
            raise FibldmError(
                f"boxes must be of the classes of training ({', '.join(self.classes)}); "
                f"got {', '.join(dict.fromkeys(wrong))}"
            )
        return Layout(tuple(replace(box, name=name) for box, name in boxes if name is not None))

    def own(self, known: Mapping[str, object]) -> Any:
        """None: where a mask is given, it says more than the boxes around its labels."""
        return None

    def within(self, value: Layout | None, grid: Any) -> Layout | None:
        """The same boxes in mm.

        Raises:
            FibldmError: some reach out of the volume; lists them.
        """
        if value is None or value.boxes is None or value.field is not None:
            return value
        field = Frame.of(grid)
        boxes = tuple(_in_mm(box, field) for box in value.boxes)
        pairs = zip(value.boxes, boxes, strict=True)
        if outside := [str(box) for box, placed in pairs if not _lies_in(field.span(placed), field.shape)]:
            low, high = (", ".join(f"{end:.5g}" for end in field.to_mm(corner)) for corner in ((0, 0, 0), field.shape))
            size = " x ".join(f"{length:.5g}" for length in np.array(field.shape) * field.spacing)
            raise FibldmError(
                f"boxes must lie inside the volume, {size} mm from ({low}) to ({high}) mm; {'; '.join(outside)} does "
                "not, with its faces half its size from its centre",
                "move it, or make it smaller",
            )
        return Layout(boxes, field)

    def place(self, value: Layout | None, grid: Any) -> Layout:
        asked = self.within(value, grid) or Layout(None)
        return replace(asked, grid=Frame.of(grid))

    def outside(self, value: Layout | None) -> list[str]:
        """Sizes of boxes in mm, and how many there are of a class; extents are whole voxels, so half of one is none."""
        boxes = (value.boxes or ()) if value is not None else ()
        half = np.array(self.spacing) / 2
        found = []
        for box in boxes:
            known = self.classes[box.name]
            size, low, high = (np.array(lengths) for lengths in (box.size, known.low, known.high))
            if box.size_in == MM and not ((low - half <= size) & (size <= high + half)).all():
                found.append(f"{box} (training {_size(known.low)} to {_size(known.high)} mm)")
        for name, known in self.classes.items():
            count = sum(box.name == name for box in boxes)
            if count > known.most:
                found.append(f"{count} boxes of {name} (training at most {known.most})")
        return found

    def recorded(self, value: Layout | None) -> list[dict[str, Any]] | None:
        """Mappings that `read` takes again; [] where there is to be no box."""
        if value is None or value.boxes is None:
            return None
        return [
            {
                "class": box.name,
                "centre": [round(place, 3) for place in box.centre],
                "centre_in": box.centre_in,
                "size": [round(length, 3) for length in box.size],
                "size_in": box.size_in,
            }
            for box in value.boxes
        ]

    def told(self, value: Layout | None) -> str:
        if value is None or value.boxes is None:
            return "unknown"
        return "; ".join(map(str, value.boxes)) or NONE

    def facts(self) -> dict[str, Any]:
        return {name: kind.facts() for name, kind in self.classes.items()}

    def encode(self, values: Sequence[Layout | None]) -> Tensor:
        """``(B, 2 C, x, y, z)``, float32.

        Raises:
            FibldmError: a layout is not on a model grid yet.
        """
        return torch.stack([self._encoded(value) for value in values])

    def encode_case(self, case: Case) -> Tensor:
        voxels = case.labels[0].cpu().numpy()
        spans = {name: spans_of(voxels, kind.value, self.smallest) for name, kind in self.classes.items()}
        unknown = (case.labels == UNKNOWN_LABEL).float()
        return self._rows(spans, self._cells(voxels.shape), F.avg_pool3d(unknown[None].cpu(), tuple(self.compression)))

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        covered, unknown = encoded.chunk(2, dim=1)
        away = dropped.view(*dropped.shape, *[1] * (encoded.ndim - 2))
        covered.masked_fill_(away, 0.0)
        unknown.masked_fill_(away, 1.0)
        return encoded

    def _encoded(self, value: Layout | None) -> Tensor:
        if value is None or value.grid is None:
            raise FibldmError("boxes must be on a model grid to be encoded; these are not", "use Condition.place")
        cells, grid = self._cells(value.grid.shape), value.grid
        if value.boxes is None or value.field is None:
            return self._rows({}, cells, torch.ones(1, 1, *cells))
        spans = {
            name: [grid.span(box) for box in value.boxes if box.name == name]
            for name in self.classes  # of each, also where there is none
        }
        seen = Span(*(tuple(grid.to_voxels(value.field.to_mm(end))) for end in ((0, 0, 0), value.field.shape)))
        known = torch.from_numpy(coverage([seen], cells, self.compression))
        return self._rows(spans, cells, (1 - known)[None, None])

    def _rows(self, spans: Mapping[str, Sequence[Span]], cells: Sequence[int], unknown: Tensor) -> Tensor:
        """Coverage of every class, then what is unknown ``(1, 1, x, y, z)``, as often."""
        covered = [torch.from_numpy(coverage(spans.get(name, ()), cells, self.compression)) for name in self.classes]
        return torch.cat([torch.stack(covered), unknown[0].expand(len(covered), *cells)])

    def _cells(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(length // factor for length, factor in zip(shape, self.compression, strict=True))


class BoxEmbedding(nn.Module):
    """A learned vector of each class in every cell, averaged where boxes of several classes overlap.

    Where no box is, there is a learned vector of its own for that; a class that is unknown adds one of its own, so that
    "no box" and "nobody said" differ. A cell that a face of a box cuts has a mixture, by how much of it is covered.

    Args:
        encoding: of the boxes.
        channels: of the condition.
    """

    def __init__(self, encoding: BoxEncoding, channels: int) -> None:
        super().__init__()
        self.encoding, self.channels = encoding, channels
        count = len(encoding.classes)
        self.classes, self.unknown = (nn.Parameter(torch.randn(count, channels)) for _ in range(2))
        self.nothing = nn.Parameter(torch.randn(channels))

    def forward(self, encoded: Tensor) -> Tensor:
        """``(B, channels, x, y, z)`` of encoded boxes ``(B, 2 C, x, y, z)``."""
        covered, unknown = encoded.chunk(2, dim=1)
        total = covered.sum(dim=1, keepdim=True)
        shares = covered / total.clamp(min=1)
        free = (1 - total).clamp(min=0)
        parts = torch.cat([shares, free, unknown], dim=1)
        table = torch.cat([self.classes, self.nothing[None], self.unknown])
        return torch.einsum("bp...,pc->bc...", parts, table)


def _chosen(names: Mapping[int, str], classes: Sequence[str | int] | None) -> dict[str, int]:
    """The values of the labels that have boxes, by name."""
    labels = {value: name for value, name in names.items() if value != 0}
    if twice := sorted({name for name in labels.values() if list(labels.values()).count(name) > 1}):
        raise FibldmError(f"labels with boxes need names of their own; several are called {', '.join(twice)}")
    values = {name: value for value, name in labels.items()}
    if classes is None:
        return values
    known = values | {str(value): value for value in labels}
    strange = [str(one) for one in classes if str(one) not in known]
    if strange or not classes:
        listed = ", ".join(f"{value} {name}" for value, name in labels.items())
        raise FibldmError(f"classes of boxes must be some of the labels {listed}; got {', '.join(strange) or 'none'}")
    return {labels[value]: value for value in dict.fromkeys(known[str(one)] for one in classes)}


def _in_mm(box: Box, field: Frame) -> Box:
    """A box in mm, with places and lengths in voxels or percent as those of the volume that people get."""
    centre = np.array(box.centre) if box.centre_in == VOXELS else np.array(box.centre) / 100 * field.shape
    size = np.array(box.size) if box.size_in == VOXELS else np.array(box.size) / 100 * field.shape
    return Box(
        box.name,
        box.centre if box.centre_in == MM else _point(field.to_mm(centre)),
        box.size if box.size_in == MM else _point(size * field.spacing),
    )


def _lies_in(span: Span, shape: Sequence[int]) -> bool:
    return bool((np.array(span.low) >= -_ROUNDING).all() and (np.array(span.high) <= np.array(shape) + _ROUNDING).all())


def _point(values: ArrayLike) -> Point:
    x, y, z = (float(value) for value in np.asarray(values))
    return x, y, z


def _size(lengths: Sequence[float]) -> str:
    return "x".join(f"{length:.4g}" for length in lengths)
