"""Parts of a configuration as definitions (`fibldm.synthesis.definitions`): references and expressions resolved.

A run's ``config.yaml`` says ``in_channels: "$@latents.channels"``, which needs the run; a bundle says ``4``.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from monai.bundle import ConfigParser

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Condition

_REFERENCE = re.compile(r"@([A-Za-z_]\w*(?:::\w+)*)")
_MARKS = ("_desc_", "_requires_", "_mode_")


def literal(parser: ConfigParser, name: str, *, known: Mapping[str, Any] | None = None) -> Any:
    """The definition of what stands at an ID.

    Args:
        parser: of the configuration.
        name: the ID, such as ``network_def``.
        known: definitions of IDs that are taken as they are, such as of a network that another stage trained.

    Raises:
        FibldmError: an expression gives something that has no definition.
    """
    if known and name in known:
        return known[name]
    return _literal(parser, name, parser[name], known or {})


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it; a dataclass as its definition.

    Raises:
        FibldmError: it is neither.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(part, where) for part in value]
    if isinstance(value, Mapping):
        return {str(key): plain(part, where) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        inside = {field.name: plain(getattr(value, field.name), where) for field in fields(value) if field.init}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **inside}
    raise FibldmError(
        f"{where} must come to plain values to be exported; it is a {type(value).__name__}",
        "write it as _target_ and what that is made with",
    )


def _literal(parser: ConfigParser, name: str, given: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(given, Mapping):
        if given.get("_disabled_") and parser.get_parsed_content(f"{name}::_disabled_"):
            return None
        if isinstance(given.get("_target_"), str) and isinstance(made := parser.get_parsed_content(name), Condition):
            return plain(made, name)  # as it was fitted, without the cases that it was fitted to
        kept = {key: part for key, part in given.items() if key not in ("_disabled_", *_MARKS)}
        return {key: _literal(parser, f"{name}::{key}", part, known) for key, part in kept.items()}
    if isinstance(given, list):
        return [_literal(parser, f"{name}::{place}", part, known) for place, part in enumerate(given)]
    if not isinstance(given, str) or given[:1] not in ("$", "@"):
        return given
    if given[0] == "@":
        return literal(parser, given[1:], known=known)
    value = parser.get_parsed_content(name)
    for reference in _REFERENCE.findall(given):  # an expression that chooses one of several parts
        if not isinstance(value, bool | int | float | str | None) and parser.get_parsed_content(reference) is value:
            return literal(parser, reference, known=known)
    return plain(value, name)
