"""Texts that are taken as they stand, in configurations, on MONAI's command line and in a shell."""

import re
import shlex
from pathlib import Path
from typing import Any

# What means something anywhere in a value, and a hyphen that would begin an option.
_MEANING = re.compile(r"[$@%#]|::|^-")
_ESCAPED = re.compile(r"[$@%#:'\\\x00-\x1f]")


def verbatim(value: Any) -> Any:
    """A value from outside, such as a path, for a configuration in which it is to be read as it stands.

    MONAI takes a text that begins with ``$`` for a program, with ``@`` for a reference, with ``%`` for a file to be put
    there, and makes ``::`` of ``#``. Where a text holds any of these, an expression comes back that gives the text.

    Args:
        value: a text, or lists and mappings with texts at any depth; anything else stays as it is.
    """
    if isinstance(value, dict):
        return {key: verbatim(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [verbatim(part) for part in value]
    if not isinstance(value, str) or not _MEANING.search(value):
        return value
    inside = _ESCAPED.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return f"$'{inside}'"


def as_argument(value: Any) -> str:
    """A value of a configuration as an argument of ``python -m monai.bundle``, which comes to the same there.

    Its reader, Fire, would make a number of the text ``2024`` and a list of ``[a]``.
    """
    from fire.parser import DefaultParseValue

    return repr(value) if isinstance(value, str) and DefaultParseValue(value) != value else str(value)


def as_word(path: str | Path) -> str:
    """A path as one word of a shell's command line that is no option either."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
