"""Overrides of a configuration: as options of a command line, and in an order in which none is lost."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from fibldm.errors import FibldmError
from fibldm.runs.configuration import parse_overrides


def as_options(overrides: Mapping[str, Any]) -> str:
    """Changes of a configuration as options ``--set`` of a command line; read again, they are the same."""
    return "".join(f" --set {shlex.quote(_assignment(key, value))}" for key, value in overrides.items())


def _assignment(key: str, value: Any) -> str:
    plain = f"{key}={value}"
    if isinstance(value, str) and _is_read_as(plain, key, value):
        return plain
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _is_read_as(assignment: str, key: str, value: str) -> bool:
    try:
        return parse_overrides([assignment]) == {key: value}
    except FibldmError:  # no YAML, such as a text with an open bracket
        return False
