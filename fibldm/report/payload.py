"""Volumes as a page carries them: whole numbers of one byte, squeezed, as text; coarser where there is no room."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm.report.cases import Case, View
from fibldm.report.colours import label_colour
from fibldm.report.planes import centre_of, letters_of
from fibldm.volumes.pictures import PLANES, planes_of

_AT_BEST = 8  # voxels in a byte of text, of what is mostly air
_SMALLEST = 8  # voxels along an axis, below which nothing is made coarser


class Payload(NamedTuple):
    """What the viewer of a page reads.

    Attributes:
        contents: JSON that says what the volumes are.
        volumes: text of each, by the name that the contents call it by.
        coarsest: how many voxels along each axis became one, at most.
    """

    contents: str
    volumes: Mapping[str, str]
    coarsest: int


def payload_of(cases: Sequence[Case], names: Mapping[int, str], most: int) -> Payload:
    """The volumes of some cases.

    Args:
        cases: in their order.
        names: of labels by value.
        most: bytes that all of them may take.
    """
    count = sum(1 + (view.labels is not None) for case in cases for view in case.views if not view.is_mask)
    share = most // max(1, count)
    volumes: dict[str, str] = {}
    told, coarsest = [], 1
    for number, case in enumerate(cases):
        views = []
        for place, view in enumerate(case.views):
            if view.is_mask:
                continue
            name, step = f"v{number}-{place}", coarseness(view, share)
            coarsest = max(coarsest, step)
            volumes |= _texts(view, step, name)
            entry = _entry(view, step, name)
            if place and case.views[place - 1].is_mask:  # its labels are those of the volume after it
                views.append(entry | {"what": "mask", "voxels": None})
            views.append(entry)
        told.append({"name": case.name, "views": views})
    colours = {str(value): {"name": name, "colour": label_colour(value)} for value, name in names.items()}
    contents = json.dumps({"cases": told, "labels": colours, "planes": PLANES}, ensure_ascii=True)
    return Payload(contents.replace("<", "\\u003c"), volumes, coarsest)


def coarseness(view: View, most: int) -> int:
    """How many voxels along each axis become one, so that voxels and labels take at most so many bytes each."""
    step = 1
    while view.voxels.size > _AT_BEST * most * step**3:  # not worth a try
        step += 1
    while len(_text(_coarse(view.voxels, step))) > most and min(_larger(view, 2 * step)) >= _SMALLEST:
        step += 1
    return step


def _larger(view: View, step: int) -> list[int]:
    return [length // step for length in view.voxels.shape if length > 1]


def _texts(view: View, step: int, name: str) -> dict[str, str]:
    texts = {name: _text(_coarse(view.voxels, step))}
    if view.labels is not None:
        texts[f"{name}-labels"] = _text(_picked(view.labels, step))
    return texts


def _entry(view: View, step: int, name: str) -> dict[str, Any]:
    shape, centre = _coarse(view.voxels, step).shape, centre_of(view.voxels, view.labels)
    affine = view.affine @ np.diag([*_steps(view.voxels, step), 1.0])
    affine[:3, 3] += view.affine[:3, :3] @ ((_steps(view.voxels, step) - 1) / 2)
    return {
        "what": view.what,
        "voxels": name,
        "labels": None if view.labels is None else f"{name}-labels",
        "shape": shape,
        "affine": [round(float(value), 6) for value in affine.ravel()],
        "spacing": [round(float(value), 6) for value in np.linalg.norm(affine[:3, :3], axis=0)],
        "letters": [list(letters_of(view.affine, plane)) for plane in planes_of(view.voxels)],
        "coarse": step,
        "at": [round(at / max(1, length - 1), 4) for at, length in zip(centre, view.voxels.shape, strict=True)],
    }


def _steps(array: NDArray[Any], step: int) -> NDArray[np.float64]:
    return np.array([step if length > 1 else 1 for length in array.shape], dtype=np.float64)


def _coarse(voxels: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Means of blocks; what is left at the high end is cut off."""
    if step == 1:
        return voxels
    steps = _steps(voxels, step).astype(int)
    kept = voxels[tuple(slice(0, length // by * by) for length, by in zip(voxels.shape, steps, strict=True))]
    x, y, z = (length // by for length, by in zip(kept.shape, steps, strict=True))
    blocks = kept.reshape(x, steps[0], y, steps[1], z, steps[2]).astype(np.float32)
    return np.rint(blocks.mean(axis=(1, 3, 5))).astype(np.uint8)


def _picked(labels: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """The label in the middle of each block."""
    shape = _coarse(labels, step).shape
    steps = _steps(labels, step).astype(int)
    picked: NDArray[np.uint8] = labels[
        tuple(slice(by // 2, by * count, by) for by, count in zip(steps, shape, strict=True))
    ]
    return picked


def _text(array: NDArray[np.uint8]) -> str:
    """Voxels, X fastest, as NIfTI has them."""
    return base64.b64encode(gzip.compress(array.tobytes(order="F"), mtime=0)).decode()
