"""Parallel slices that are no regular stack, as under a tilted gantry or at uneven distances, brought to one.

The regular stack has the slices' own planes, pixels and normal. A tilt then only shifts slices within their planes,
which interpolation along one direction undoes, and no detail is lost across slices; dcm2niix does the same. Places at
uneven distances are filled in by linear interpolation between the two slices beside them. Where a slice lies is taken
from its position alone: scanners do not agree on the sign of the tilt's own attribute.

Coordinates are DICOM's, LPS+ mm, of voxel centres; arrays are ``(slice, row, column)``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]

_EVEN = 0.02
"""How far a slice may lie from its place in an even stack, in slice spacings."""
_WHOLE = 1e-3


@dataclass(frozen=True)
class AcquiredSlices:
    """Where the slices of a series lie, and the regular stack that they are brought to.

    Attributes:
        positions: ``(N, 3)``, centre of each slice's first pixel, in the order of their places along the normal; two
            at least.
        directions: ``(3, 2)``, along a row and along a column.
        pixel: mm between columns and between rows.
        shape: rows and columns.
    """

    positions: Array
    directions: Array
    pixel: Array
    shape: tuple[int, int]

    @cached_property
    def normal(self) -> Array:
        """Of the slices' planes."""
        return np.cross(self.directions[:, 0], self.directions[:, 1])

    @cached_property
    def places(self) -> Array:
        """Of the slices along the normal, mm from the first."""
        return np.asarray((self.positions - self.positions[0]) @ self.normal)

    @cached_property
    def shifts(self) -> Array:
        """How far slices lie off the first within their planes, ``(N, 2)``: in columns, and in rows."""
        return np.asarray((self.positions - self.positions[0]) @ self.directions / self.pixel)

    @property
    def tilt(self) -> float:
        """Degrees between the normal and the line from the first slice to the last."""
        return float(np.degrees(np.arctan2(np.linalg.norm(self.shifts[-1] * self.pixel), self.places[-1])))

    @property
    def even(self) -> bool:
        """Whether the slices are at even distances."""
        off = self.places - np.linspace(0, self.places[-1], len(self.places))
        return bool(np.abs(off).max() <= _EVEN * np.diff(self.places).mean())

    @cached_property
    def count(self) -> int:
        """Slices of the regular stack: those there are, or as many as the smallest distance asks for.

        Of distances below half of the median, that half counts: a volume is not to become huge for two slices that
        nearly share a place.
        """
        if self.even:
            return len(self.places)
        steps = np.diff(self.places)
        return int(np.ceil(self.places[-1] / max(steps.min(), np.median(steps) / 2) - _WHOLE)) + 1

    @property
    def spacing(self) -> float:
        """mm between the slices of the regular stack; the first and the last slice stay where they are."""
        return float(self.places[-1] / (self.count - 1))

    @cached_property
    def affine(self) -> Array:
        """``(4, 4)``, ``(column, row, slice)`` of the regular stack to LPS+ mm; it reaches over all slices."""
        before, _ = self._reach
        corner = self.positions[0] - self.directions @ (before * self.pixel)
        return _affine(self.directions * self.pixel, self.normal * self.spacing, corner)

    @cached_property
    def plain_affine(self) -> Array:
        """The affine that the slices would have, were they a regular stack that begins at the first one."""
        step = self.places[-1] / (len(self.places) - 1)
        return _affine(self.directions * self.pixel, self.normal * step, self.positions[0])

    def plain(self, points: Array) -> Array:
        """Points ``(N, 3)`` moved along with the slices they lie on (or between) to where `plain_affine` has these."""
        numbers = self.numbers(points)
        step = self.plain_affine[:3, 2]
        return points - self._origins(numbers) + self.positions[0] + numbers[:, None] * step

    def numbers(self, points: Array) -> Array:
        """On which slice points ``(N, 3)`` lie, from 0; fractions between slices and beyond the outermost."""
        places, steps = (points - self.positions[0]) @ self.normal, np.diff(self.places)
        inside = np.interp(places, self.places, np.arange(len(self.places), dtype=np.float64))
        below, above = np.minimum(places, 0) / steps[0], np.maximum(places - self.places[-1], 0) / steps[-1]
        return np.asarray(inside + below + above)

    def image(self, array: NDArray[Any], fill: float) -> NDArray[Any]:
        """Slices of an image as the regular stack, linear; what no slice shows is ``fill``.

        int16 is rounded and stays int16, all else becomes float32.
        """
        dtype = np.int16 if array.dtype == np.int16 else np.float32
        out: NDArray[Any] = np.empty((self.count, *self._size), dtype=dtype)
        for number, place in enumerate(self._along()):
            below = min(int(place), len(array) - 2)
            weight = place - below
            beside = [(index, share) for index, share in ((below, 1 - weight), (below + 1, weight)) if share > _WHOLE]
            values = sum(
                share * self._in_plane(array[index].astype(np.float64), index, np.nan, order=1)
                for index, share in beside
            ) / sum(share for _, share in beside)
            values = np.where(np.isnan(values), fill, values)  # where one of the two does not reach, neither does this
            out[number] = np.rint(values) if dtype == np.int16 else values
        return out

    def labels(self, array: NDArray[Any]) -> NDArray[Any]:
        """Slices of a label map as the regular stack, each voxel from the nearest; background where there is none."""
        out = np.zeros((self.count, *self._size), dtype=array.dtype)
        places = np.linspace(0, self.places[-1], self.count)
        for number, place in enumerate(places):
            index = int(np.abs(self.places - place).argmin())
            out[number] = self._in_plane(array[index], index, 0, order=0)
        return out

    def to_dict(self) -> dict[str, Any]:
        """What was done: the tilt in degrees, mm between slices before (least, greatest) and after, their number."""
        steps = np.diff(self.places)
        return {
            "tilt_degrees": round(self.tilt, 3),
            "slice_spacing_before_mm": [round(float(steps.min()), 4), round(float(steps.max()), 4)],
            "slice_spacing_after_mm": round(self.spacing, 4),
            "slices_before": len(self.places),
            "slices_after": self.count,
        }

    def __str__(self) -> str:
        steps = np.diff(self.places)
        tilted = f"a gantry tilt of {self.tilt:.1f} degrees was straightened" if self.tilted else ""
        evened = (
            ""
            if self.even
            else f"slices {steps.min():.2f} to {steps.max():.2f} mm apart were interpolated to {self.spacing:.2f} mm"
        )
        return ", and ".join(filter(None, (tilted, evened)))

    @property
    def tilted(self) -> bool:
        """Whether the slices are shifted against each other at all, by a fifth of a pixel."""
        return bool(np.linalg.norm(self.shifts * self.pixel, axis=1).max() > 0.2 * self.pixel.min())

    @cached_property
    def _reach(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whole columns and rows that slices reach beyond the first one, before it and behind it."""
        low, high = self.shifts.min(axis=0), self.shifts.max(axis=0)
        return np.ceil(-low - _WHOLE).astype(np.int64), np.ceil(high - _WHOLE).astype(np.int64)

    @property
    def _size(self) -> tuple[int, int]:
        """Rows and columns of the regular stack."""
        before, behind = self._reach
        columns, rows = before + behind
        return self.shape[0] + int(rows), self.shape[1] + int(columns)

    def _along(self) -> Array:
        """On which slice, with fractions, each slice of the regular stack lies."""
        places = np.linspace(0, self.places[-1], self.count)
        if self.even:
            return np.arange(self.count, dtype=np.float64)
        return np.interp(places, self.places, np.arange(len(self.places), dtype=np.float64))

    def _origins(self, numbers: Array) -> Array:
        """Where slices with these numbers, or slices between them, have their first pixel."""
        steps, last = np.diff(self.positions, axis=0), len(self.positions) - 2
        below = np.clip(np.floor(numbers).astype(np.int64), 0, last)
        origins: Array = self.positions[below] + (numbers - below)[:, None] * steps[below]
        return origins

    def _in_plane(self, values: NDArray[Any], index: int, fill: float, *, order: int) -> NDArray[Any]:
        """One slice on the pixels of the regular stack; it ends at the edges of its own pixels."""
        offset = (-self._reach[0] - self.shifts[index])[::-1]
        offset = np.where(np.abs(offset - np.rint(offset)) < _WHOLE, np.rint(offset), offset)
        moved = ndimage.affine_transform(
            values, np.ones(2), offset, output_shape=self._size, order=order, mode="nearest"
        )
        for axis, length in enumerate(self.shape):
            at = np.arange(self._size[axis]) + offset[axis]
            outside = (at < -0.5) | (at > length - 0.5)
            moved[(slice(None),) * axis + (outside,)] = fill
        return np.asarray(moved)


def _affine(directions: Array, step: Array, corner: Array) -> Array:
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = directions, step, corner
    return affine
