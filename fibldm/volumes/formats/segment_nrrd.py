"""Segmentations of 3D Slicer (``.seg.nrrd``): segments are known by name, their values differ from file to file.

The header says of segment N its name (``SegmentN_Name``), the value of its voxels (``SegmentN_LabelValue``) and the
layer that holds it (``SegmentN_Layer``); segments of different layers may overlap. Older files do not name layers:
with a fourth axis they have one for each segment, with the value 1. See "Segmentation NRRD file format" in Slicer's
manual.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fibldm.errors import FibldmError
from fibldm.volumes.formats.itk_images import nrrd_fields
from fibldm.volumes.scan import Remark, Scan

_SUFFIXES = (".nrrd", ".nhdr")
_NAME = re.compile(r"segment(\d+)_name")
_OVERLAP = "name labels in order of priority with `merge_masks`, which settles who wins"


@dataclass(frozen=True)
class Segment:
    """One segment.

    Attributes:
        name: as the file calls it; several segments of a file may share one, and are one label then.
        value: of its voxels.
        layer: which component of the voxels holds it, from 0.
    """

    name: str
    value: int
    layer: int


def segments_of(path: Path) -> tuple[Segment, ...]:
    """The segments that the header of a NRRD describes, in their order; none of any other file.

    Raises:
        FibldmError: one has no name or a wrong number, or one value of a layer stands for two names.
    """
    if not path.name.lower().endswith(_SUFFIXES):
        return ()
    fields = nrrd_fields(path)
    numbers = sorted(int(match[1]) for match in map(_NAME.fullmatch, fields) if match)
    layered = fields.get("dimension") == "3" or any(f"segment{number}_layer" in fields for number in numbers)
    segments = tuple(_segment(fields, number, place, layered, path) for place, number in enumerate(numbers))
    named: dict[tuple[int, int], str] = {}
    for segment in segments:
        other = named.setdefault((segment.layer, segment.value), segment.name)
        if other != segment.name:
            raise FibldmError(
                f"a value must have one name; in {path.name} {segment.value} is {other!r} and {segment.name!r}",
                "save the segmentation again from 3D Slicer",
            )
    return segments


def named_segments(scan: Scan, path: Path, names: Mapping[str, int], *, elsewhere: Collection[str] = ()) -> Scan:
    """The label map of a segmentation, the values of its segments by their names; others are left out.

    Args:
        scan: the file as read, ``(X, Y, Z)`` or, of several layers, ``(X, Y, Z, C)``.
        path: of the file.
        names: label values by the segments' names.
        elsewhere: segments that are read as other masks, of which nothing is said here.

    Raises:
        FibldmError: it holds none of the segments, voxels that belong to no segment, or segments that overlap.
    """
    segments = segments_of(path)
    wanted = [segment for segment in segments if segment.name in names]
    if not wanted:
        held = ", ".join(dict.fromkeys(segment.name for segment in segments)) or "none"
        raise FibldmError(f"a segmentation must hold at least one of {', '.join(names)}; {path.name} holds {held}")
    layers = scan.array[..., None] if scan.array.ndim == 3 else scan.array
    _check_values(layers, segments, path)
    labels = np.zeros(layers.shape[:3], dtype=np.uint8)
    for segment in wanted:
        inside = layers[..., segment.layer] == segment.value
        taken = sorted(set(np.unique(labels[inside]).tolist()) - {0, names[segment.name]})
        if taken:
            others = ", ".join(name for name, value in names.items() if value in taken)
            raise FibldmError(f"segments must not overlap; {segment.name} does with {others}", _OVERLAP)
        labels[inside] = names[segment.name]
    left_out = sorted({segment.name for segment in segments} - names.keys() - set(elsewhere))
    lines: list[Remark] = [("warning", f"left out, as not asked for: {', '.join(left_out)}")] if left_out else []
    found = {names[segment.name]: segment.name for segment in wanted}
    return replace(scan, array=labels, findings=(*scan.findings, *lines), names=found)


def _segment(fields: Mapping[str, str], number: int, place: int, layered: bool, path: Path) -> Segment:
    name = fields[f"segment{number}_name"].strip()
    value, layer = fields.get(f"segment{number}_labelvalue", "1"), fields.get(f"segment{number}_layer", "0")
    if not name or not value.isdecimal() or not layer.isdecimal() or value == "0":
        raise FibldmError(
            f"every segment must have a name, a value above 0 and a layer; segment {number} of {path.name} has "
            f"{name!r}, {value} and {layer}",
            "save the segmentation again from 3D Slicer",
        )
    return Segment(name, int(value), int(layer) if layered else place)


def _check_values(layers: np.ndarray, segments: tuple[Segment, ...], path: Path) -> None:
    if max(segment.layer for segment in segments) >= layers.shape[3]:
        raise FibldmError(
            f"every segment must lie in one of the layers; {path.name} has {layers.shape[3]}, and its header names "
            f"layer {max(segment.layer for segment in segments)}",
            "save the segmentation again from 3D Slicer",
        )
    for layer in range(layers.shape[3]):
        known = {segment.value for segment in segments if segment.layer == layer}
        unnamed = sorted(set(np.unique(layers[..., layer]).tolist()) - {0, *known})
        if unnamed:
            raise FibldmError(
                f"every value must belong to a segment; in {path.name} {', '.join(f'{v:g}' for v in unnamed[:5])} has "
                "no name",
                "save the segmentation again from 3D Slicer",
            )
