"""Settings from plain values, such as those of a YAML file: every name and type is checked."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fibldm.errors import FibldmError, shown, unknown_choice

Settings = TypeVar("Settings")


def counted(number: int, what: str) -> str:
    """A number of things in words: "1 volume", "2 volumes"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def settings_of(kind: type[Settings], given: Mapping[Any, Any], what: str) -> Settings:
    """Settings of a dataclass; lists become tuples where it wants them.

    Args:
        kind: the dataclass.
        given: values by name; those that are left out have their defaults.
        what: how an error calls them, such as "option of prepare".

    Raises:
        FibldmError: a name is unknown or a value has another type.
    """
    return kind(**checked_values(kind, given, what))


def checked_values(kind: type[Any], given: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Values for fields of a dataclass, as `settings_of` takes them, before anything is made of them.

    Raises:
        FibldmError: as `settings_of`.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    for name, value in given.items():
        if name not in names:
            raise unknown_choice(what, name, names)
        if not _fits(value, hints[name]):
            raise FibldmError(f"{what} {name} must be {_said(hints[name])}; got {shown(value)}")
    return {name: _as_hinted(value, hints[name]) for name, value in given.items()}


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(part, parts[0]) for part in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0]) and _fits(part, parts[1]) for key, part in value.items()
        )
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _as_hinted(value: Any, hint: Any) -> Any:
    wants_tuple = any(get_origin(part) is tuple for part in (hint, *get_args(hint)))
    return tuple(value) if isinstance(value, list) and wants_tuple else value


def _said(hint: Any) -> str:
    """A type as people write the value in YAML."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_said(part) for part in parts)
    if kind is tuple and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)} values, each {_said(parts[0])}"
    if kind in (tuple, Sequence):
        return f"a list of values, each {_said(parts[0])}"
    if kind is Mapping:
        return f"a mapping from {_said(parts[0])} to {_said(parts[1])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    names |= {Path: "a path"}
    return names.get(hint, "any value")
