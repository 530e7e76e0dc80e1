"""What went wrong inside of a configuration: MONAI wraps it several times, and keeps the cause out of its message."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from monai.bundle import ConfigItem, ConfigParser, ReferenceResolver

from fibldm.errors import FibldmError
from fibldm.out_of_memory import out_of_memory

_WRAPPED = ("Failed to evaluate ", "Failed to instantiate component ", "applying transform ")
_RUN = re.compile(r"(run|training|initialize|finalize)(::|$)")
_CHANNELS = re.compile(r"expected input.* to have (\d+) channels, but got (\d+) channels instead")
_MOST = 300  # letters


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what a part of a configuration refused as it was, and anything else with the part that it came from.

    Raises:
        FibldmError: a part refused what it was given, it cannot be made, a file is missing, or memory is not enough.
    """
    try:
        yield
    except Exception as error:
        refused = _refused(error)
        if refused is not None:
            raise refused from None
        cause = error  # or the innermost one that is no wrapping
        while str(cause).startswith(_WRAPPED) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        told = out_of_memory(cause) or _of_file(cause) or _of_channels(cause) or _of_part(error, cause)
        if told is not None:
            raise told from cause
        if cause is error:
            raise
        raise cause from None


def _refused(error: BaseException) -> FibldmError | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FibldmError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _of_file(cause: Exception) -> FibldmError | None:
    if not isinstance(cause, OSError) or isinstance(cause, ConnectionError | TimeoutError):
        return None
    named = cause.filename is not None
    must = f"{cause.filename} must be a file that can be used; {cause.strerror}" if named else _line(cause)
    return FibldmError(must, "put it back, or see whether its folder is the right one")


def _of_channels(cause: Exception) -> FibldmError | None:
    found = _CHANNELS.search(str(cause))
    if found is None:
        return None
    return FibldmError(
        f"in_channels of a network must be the number of channels that it gets, {found[2]}; it is {found[1]}",
        "leave in_channels as it is, or change what comes before to fit",
    )


def _of_part(error: Exception, cause: Exception) -> FibldmError | None:
    """The error of a part that cannot be made; None where parts were made, and something failed while they ran."""
    part = _part(error)
    if part is None or _RUN.match(part):
        return None
    return FibldmError(
        f"what a configuration names must be possible to make; {part} is not: {type(cause).__name__}: {_line(cause)}",
        "see what was changed of it and of what it names; --debug shows the traceback",
    )


def _part(error: BaseException) -> str | None:
    """The ID of the innermost part of a configuration that was being made."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for wrapped in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(wrapped.__traceback__))):
            owner, name = frame.f_locals.get("self", frame.f_locals.get("cls")), frame.f_locals.get("id")
            if isinstance(owner, ConfigItem):
                return str(owner.get_id())
            if isinstance(owner, ReferenceResolver | ConfigParser) and isinstance(name, str) and name:
                return name
    return None


def _line(cause: Exception) -> str:
    """What an error says, in one line; of one of a loading process, what was said there."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["nothing more is said"]
    told = lines[-1] if lines[0].startswith("Caught ") else " ".join(lines)
    return told if len(told) <= _MOST else f"{told[:_MOST]}..."
