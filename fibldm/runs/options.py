"""Overrides of a configuration: from and to options of a command line, and in an order in which none is lost."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fibldm.errors import FibldmError


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-4`` is a number, as it is for MONAI, and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), list("+-0123456789")
)


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """``["key::sub=value"]`` as a mapping; values are YAML, and ``1e-4`` is a number as it is for MONAI.

    Raises:
        FibldmError: an assignment has no ``=``, or its value is no YAML.
    """
    overrides = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise FibldmError(f"--set needs key::sub=value; got {assignment!r}")
        try:
            overrides[key] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise FibldmError(f"--set needs a YAML value; got {assignment!r}: {error}") from error
    return overrides


def as_options(overrides: Mapping[str, Any]) -> str:
    """Changes of a configuration as options ``--set`` of a command line; read again, they are the same."""
    return "".join(f" --set {shlex.quote(_assignment(key, value))}" for key, value in overrides.items())


def in_order(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with each whole before its parts, which it would replace, and of parts the class before its arguments.

    Raises:
        FibldmError: a part is given of a whole that is given too and has no parts.
    """
    for key, value in overrides.items():
        part = next((other for other in overrides if other.startswith(f"{key}::")), None)
        if part is not None and not isinstance(value, dict | list):
            raise FibldmError(
                f"overrides must go together; {key} is {value!r}, of which {part} cannot be a part", "give one of them"
            )
    keys = sorted(overrides, key=lambda key: (key.count("::"), not key.endswith("::_target_")))
    return {key: overrides[key] for key in keys}


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
