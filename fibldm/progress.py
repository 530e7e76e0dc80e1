"""Progress bars on standard error, where that is a terminal; a log, a pipe and a batch job see none."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, BinaryIO, TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import Progress, ProgressColumn

Item = TypeVar("Item")
Bar = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps what is waited for, to show how far it is."""


def track(items: Sequence[Item], what: str, *, shown: bool = True) -> Iterable[Item]:
    """The items one after the other, with a bar that says how many are done; ``shown=False`` shows none anywhere."""
    return rich_progress.track(items, what, **_place(shown))


def bar(*columns: ProgressColumn) -> Progress:
    """A bar whose tasks are moved by hand; with the columns of Rich where none are given."""
    return Progress(*columns, **_place())


def reading(stream: IO[bytes], length: int, what: str) -> AbstractContextManager[BinaryIO]:
    """A stream with a bar that says how many of its ``length`` bytes have been read."""
    return rich_progress.wrap_file(stream, length, description=what, **_place())  # type: ignore[arg-type]


def _place(shown: bool = True) -> dict[str, Any]:
    console = Console(stderr=True)  # one each, as bars lie within others and a console takes one at a time
    return {"console": console, "disable": not (shown and console.is_terminal)}
