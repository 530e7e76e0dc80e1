"""Boxes as people write them: "tumour 40x30x20mm at 10,-20,35", and as plain values of JSON and Python."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fibldm.errors import FibldmError, shown

Point = tuple[float, float, float]

MM, VOXELS, PERCENT = "mm", "voxels", "%"
UNITS = (MM, VOXELS, PERCENT)
NONE = "none"
"""What says that there is no box at all, which is not the same as saying nothing of boxes."""
FORM = '"CLASS 40x30x20mm at 10,-20,35", sizes and places in mm, voxels or %'

_LONGEST = 80  # of what is no box, in messages
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_UNIT = r"(?:mm|voxels?|vox|%)"
_BETWEEN = r"\s*[x×*]\s*(?=[-+.\d])"  # and not the x of voxels
_LENGTH = rf"{_NUMBER}\s*(?:{_UNIT})?"
_BOX = re.compile(
    rf"(?P<name>\S.*?)\s+(?P<size>{_LENGTH}(?:{_BETWEEN}{_LENGTH})*)\s+at\s+(?P<centre>.+)", re.IGNORECASE
)
_PART = re.compile(rf"\s*({_NUMBER})\s*({_UNIT})?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """A box along the axes of a grid.

    Attributes:
        name: of its class.
        centre: along the grid's axes, or RAS+ where it is in mm. Voxels count from the outer face of the first one,
            so that the middle of the first is 0.5; 100 % is the outer face of the last.
        size: from face to face, along the grid's axes, which are those nearest to R, A and S.
        centre_in: one of `UNITS`.
        size_in: one of `UNITS`.
    """

    name: str
    centre: Point
    size: Point
    centre_in: str = MM
    size_in: str = MM

    def __str__(self) -> str:
        """As `read_boxes` reads it."""
        size = "x".join(_shown(length) for length in self.size)
        return (
            f"{self.name} {size}{_after(self.size_in)} at {','.join(map(_shown, self.centre))}{_after(self.centre_in)}"
        )


def read_boxes(asked: Any) -> tuple[Box, ...]:
    """The boxes that somebody asks for.

    Args:
        asked: a text, with ``;`` between several boxes, or "none"; a list of such texts, of rows
            ``[x, y, z, dx, dy, dz, class]`` in mm, or of mappings ``{"class": ..., "centre": [x, y, z],
            "size": [dx, dy, dz]}``, which may say ``"centre_in"`` and ``"size_in"``, or ``"unit"`` for both. Places are
            centres.

    Raises:
        FibldmError: lists all that are no boxes.
    """
    if isinstance(asked, str):
        asked = (
            [] if asked.strip().lower() == NONE else [part.strip() for part in asked.split(";") if part.strip()] or [""]
        )
    if isinstance(asked, Mapping) or (isinstance(asked, Sequence) and asked and _is_number(asked[0])):
        asked = [asked]
    if not isinstance(asked, Sequence):
        raise FibldmError(f"boxes must be a text or a list; got {shown(asked)}", f"a box is {FORM}")
    made = [_box(one) for one in asked]
    if wrong := [shown(one, _LONGEST) for one, box in zip(asked, made, strict=True) if box is None]:
        raise FibldmError(
            f"a box must have a class, and numbers for place and size above 0, such as {FORM}; got {', '.join(wrong)}"
        )
    return tuple(box for box in made if box is not None)


def _box(given: Any) -> Box | None:
    if isinstance(given, str):
        return _of_text(given)
    if isinstance(given, Mapping):
        return _of_mapping(given)
    if isinstance(given, Sequence) and len(given) == 7:
        return _checked(given[6], given[:3], given[3:6], MM, MM)
    return None


def _of_text(text: str) -> Box | None:
    found = _BOX.fullmatch(text.strip())
    if found is None:
        return None
    size, centre = (_numbers(found[part], by) for part, by in (("size", _BETWEEN), ("centre", ",")))
    return None if size is None or centre is None else _checked(found["name"], centre[0], size[0], centre[1], size[1])


def _numbers(text: str, separator: str) -> tuple[list[float], str] | None:
    """Three numbers and their unit, which stands behind the last or behind all of them; mm where there is none."""
    parts = [_PART.fullmatch(part) for part in re.split(separator, text, flags=re.IGNORECASE)]
    if not all(parts):
        return None
    units = [_unit(part[2]) for part in parts if part is not None and part[2]]
    alone = len(units) == 1 and parts[-1] is not None and bool(parts[-1][2])
    if len(set(units)) > 1 or (units and not alone and len(units) < len(parts)):
        return None
    return [float(part[1]) for part in parts if part is not None], units[0] if units else MM


def _of_mapping(given: Mapping[str, Any]) -> Box | None:
    both = given.get("unit", MM)
    known = {"class", "centre", "size", "unit", "centre_in", "size_in"}
    if not {"class", "centre", "size"} <= given.keys() <= known:
        return None
    units = (given.get("centre_in", both), given.get("size_in", both))
    return _checked(given["class"], given["centre"], given["size"], *map(_unit, units))


def _checked(name: Any, centre: Any, size: Any, centre_in: str, size_in: str) -> Box | None:
    points = [part for part in (centre, size) if isinstance(part, Sequence) and not isinstance(part, str)]
    if len(points) < 2 or not all(len(part) == 3 and all(map(_is_number, part)) for part in points):
        return None
    if min(size) <= 0 or not str(name).strip() or not {centre_in, size_in} <= {*UNITS}:
        return None
    (x, y, z), (dx, dy, dz) = ([float(length) for length in part] for part in points)
    return Box(str(name).strip(), (x, y, z), (dx, dy, dz), centre_in, size_in)


def _unit(text: Any) -> str:
    lower = str(text).lower()
    return VOXELS if lower.startswith("vox") else PERCENT if lower == "relative" else lower


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(number: float) -> str:
    return f"{round(number, 3) + 0:.10g}"


def _after(unit: str) -> str:
    return f" {unit}" if unit == VOXELS else unit
