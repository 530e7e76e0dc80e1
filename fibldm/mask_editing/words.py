"""Edits as they are written: ``grow tumour 3mm``."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fibldm.errors import FibldmError, shown, unknown_choice
from fibldm.mask_editing.deformation import Deform
from fibldm.mask_editing.fibrosis import SetFibrosis
from fibldm.mask_editing.labels import Edit, Grow, Move, Remove, ToVolume
from fibldm.mask_editing.lesion import Insert

Options = dict[str, str]


def _grow(words: list[str], options: Options) -> Edit:
    label, amount = words
    return Grow(label, _number(amount, "mm"), _over(options))


def _shrink(words: list[str], options: Options) -> Edit:
    label, amount = words
    return Grow(label, -_number(amount, "mm"))


def _volume(words: list[str], options: Options) -> Edit:
    label, amount = words
    return ToVolume(label, _number(amount, "ml"), _over(options))


def _remove(words: list[str], options: Options) -> Edit:
    (label,) = words
    return Remove(label)


def _move(words: list[str], options: Options) -> Edit:
    label, way = words
    return Move(label, _way(way), over=_over(options))


def _copy(words: list[str], options: Options) -> Edit:
    label, way = words
    return Move(label, _way(way), keep=True, over=_over(options))


def _insert(words: list[str], options: Options) -> Edit:
    (label,) = words
    return Insert(label, Path(options.pop("from")), options.pop("in", None))


def _deform(words: list[str], options: Options) -> Edit:
    (amount,) = words or ["1"]
    return Deform(_number(amount, ""))


def _fibrosis(words: list[str], options: Options) -> Edit:
    (extent,) = words
    labels = {key: tuple(options.pop(key).split(",")) for key in list(options)}
    return SetFibrosis(_number(extent, "%") / 100, labels)


EDITS: dict[str, tuple[Callable[[list[str], Options], Edit], str]] = {
    "grow": (_grow, "grow LABEL 3mm [over=LABEL,LABEL]"),
    "shrink": (_shrink, "shrink LABEL 3mm"),
    "volume": (_volume, "volume LABEL 25ml [over=LABEL,LABEL]"),
    "remove": (_remove, "remove LABEL"),
    "move": (_move, "move LABEL R,A,Smm [over=LABEL,LABEL]"),
    "copy": (_copy, "copy LABEL R,A,Smm [over=LABEL,LABEL]"),
    "insert": (_insert, "insert LABEL from=MASK [in=LABEL]"),
    "deform": (_deform, "deform [1]"),
    "fibrosis": (
        _fibrosis,
        "fibrosis 30% [lungs=LABEL,LABEL] [ground-glass=LABEL] [reticulation=LABEL] [honeycombing=LABEL]",
    ),
}
"""How each edit is read, and how it is written."""


def read_edits(texts: Sequence[str]) -> list[Edit]:
    """Edits from their words; names with spaces stand in quotes, or with ``_`` in place of each space.

    Raises:
        FibldmError: there is none, or one is not written as `EDITS` says.
    """
    if not texts:
        raise FibldmError("at least one edit must be given; got none", f"such as --edit {EDITS['grow'][1]!r}")
    return [_read(text) for text in texts]


def _read(text: str) -> Edit:
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise FibldmError(f"an edit must close its quotes; got {shown(text)}") from error
    if not parts or parts[0] not in EDITS:
        raise unknown_choice("an edit", parts[0] if parts else text, list(EDITS))
    reader, form = EDITS[parts[0]]
    words = [part for part in parts[1:] if "=" not in part]
    options = {key: value for key, _, value in (part.partition("=") for part in parts[1:] if "=" in part)}
    try:
        edit = reader(words, options)
    except (ValueError, KeyError) as error:
        raise FibldmError(f"{parts[0]} is written {form}; got {shown(text)}") from error
    if options:
        raise FibldmError(f"{parts[0]} is written {form}; got also {', '.join(options)}=")
    return edit


def _number(text: str, unit: str) -> float:
    number = float(text.removesuffix(unit))
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return number


def _way(text: str) -> tuple[float, float, float]:
    x, y, z = (float(part) for part in text.removesuffix("mm").split(","))
    if not all(abs(part) < float("inf") for part in (x, y, z)):
        raise ValueError(text)
    return x, y, z


def _over(options: Options) -> tuple[str, ...] | None:
    over = options.pop("over", None)
    return None if over is None else tuple(over.split(","))
