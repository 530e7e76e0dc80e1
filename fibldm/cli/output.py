"""What a command says at its end: a JSON object as the last line of standard output, or one clear paragraph."""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

from fibldm.errors import FibldmError, sentence

_LINES: ContextVar[TextIO | None] = ContextVar("_LINES", default=None)


@contextmanager
def standard_output_for_json(as_json: bool) -> Iterator[None]:
    """While a command runs: under ``--json`` all it prints goes to standard error."""
    if not as_json:
        yield
        return
    lines = _LINES.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _LINES.reset(lines)


def emit_line(report: Mapping[str, Any]) -> None:
    """Show what came of one of the things that a command does, under ``--json``: an object on a line of its own."""
    if (stream := _LINES.get()) is not None:
        print(json.dumps(report, default=str, allow_nan=False), file=stream, flush=True)


def emit_result(result: Mapping[str, Any] | None, as_json: bool) -> int:
    """Show what a command returned, and return its exit code.

    Args:
        result: ``ok`` (``True`` where absent) and anything JSON-able; paths become strings. ``None`` is an empty one.
        as_json: without ``--json`` nothing is shown, as the command has printed for people already.
    """
    complete = {"ok": True, **(result or {})}
    if as_json:
        print(json.dumps(complete, default=str, allow_nan=False))
    return 0 if complete["ok"] else 1


def emit_error(message: str, remedy: str, as_json: bool) -> None:
    """Show an error as one paragraph on standard error and, under ``--json``, as the object on standard output."""
    print(f"fibldm: {sentence(message, remedy)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"ok": False, "error": {"message": message, "remedy": remedy}}))


@contextmanager
def as_command() -> Iterator[None]:
    """What a script does within ends as a command does: an error is one paragraph, and exit code 2."""
    log_to_standard_error()
    try:
        yield
    except FibldmError as error:
        emit_error(error.message, error.remedy, as_json=False)
        sys.exit(2)


def with_options(text: str, options: Mapping[str, str]) -> str:
    """An error of the library, in which fields stand in backquotes, with the options of the command in their place.

    Args:
        text: for example "`skip_bad` leaves it out"; what is no option stays as it is.
        options: by field, for example ``--skip-bad``.
    """
    return re.sub(r"`(\w+)`", lambda field: options.get(field[1], field[0]), text)


def log_to_standard_error() -> None:
    """Show what the stages say about their progress on standard error."""
    logging.getLogger("ignite.engine.engine").setLevel(logging.CRITICAL)  # says again, per engine, what ended the run
    logger = logging.getLogger("fibldm")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
