"""The one exception of FibLDM: what must hold and what came, and what to do about it."""

from collections.abc import Iterable


class FibldmError(Exception):
    """Bad input or a state that forbids going on; the command line shows it without a traceback and exits with 2.

    Args:
        message: what must hold and what came instead, in one sentence.
        remedy: what the user can do about it; may be empty where the message says it already.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return sentence(self.message, self.remedy)


def sentence(message: str, remedy: str) -> str:
    """Message and remedy as one text; after a list, the remedy has a line of its own."""
    separator = "\n" if "\n" in message else "; "
    return f"{message}{separator}{remedy}" if remedy else message


def some_of(texts: Iterable[str], most: int) -> str:
    """The first texts of a list, and how many more there are."""
    listed = list(texts)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def shown(asked: object, most: int = 40) -> str:
    """What somebody asked for, for messages and logs: of what is long, such as a report, the length alone."""
    written = repr(asked)
    if len(written) <= most:
        return written
    kind, length = ("text", len(asked)) if isinstance(asked, str) else (type(asked).__name__, len(written))
    return f"a {kind} of {length} characters"


def unknown_choice(what: str, given: object, choices: object) -> FibldmError:
    """The error for a name that is not among ``choices`` (any iterable of names)."""
    listed = ", ".join(str(choice) for choice in choices)  # type: ignore[attr-defined]
    return FibldmError(f"{what} must be one of {listed}; got {given!r}")
