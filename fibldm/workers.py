"""Independent items of work, done by an engine: in this process, by processes of this machine, or by a cluster.

Whatever the engine, the results are the same and come in the order of the items. An item must be able to be done again,
since the worker that did it may be lost: what it writes, it writes whole or not at all, and what is there it keeps.
"""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from fibldm.errors import FibldmError
from fibldm.progress import Bar

MOST_LOSSES = 2
"""Workers that one item may cost before it is given up: a second time is no accident."""

_logger = logging.getLogger("fibldm")


@dataclass(frozen=True)
class Work:
    """What is done with each item.

    Attributes:
        function: of a module, as are its arguments and results, so that they can be sent to another process.
        kit: called once in each process that works; what it gives is the function's first argument. None gives none.
        what: a worker does, for an error: "read a case".
        folder: that the items are written to, which all workers must see; None where they write nothing.
    """

    function: Callable[..., Any]
    kit: Callable[[], Any] | None = None
    what: str = "worked"
    folder: Path | None = None

    def opened(self) -> Callable[..., Any]:
        """The function, with its kit at hand."""
        return self.function if self.kit is None else self.given(self.kit())

    def given(self, kit: Any) -> Callable[..., Any]:
        """The function, with a kit at hand that was opened before."""
        return partial(self.function, kit)


class Engine(Protocol):
    """Who does the work."""

    @property
    def here(self) -> bool:
        """Whether all is done in this process."""

    @property
    def on_this_machine(self) -> bool:
        """Whether all is done on this machine."""

    def each(self, work: Work, items: Sequence[tuple[Any, ...]], bar: Bar) -> Iterator[Any]:
        """What the work gives for each item, in their order.

        What a worker says in the log is said here, with the result of its item.

        Args:
            work: what is done.
            items: the arguments of each.
            bar: of what is waited for.

        Raises:
            FibldmError: an item was refused, or cost too many workers.
        """


@dataclass(frozen=True)
class Processes:
    """Processes of this machine; a single one works in this one.

    Where a process is killed from outside, the items that it and its neighbours were at are done again.

    Attributes:
        workers: processes at the same time.

    Raises:
        FibldmError: there is none.
    """

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise FibldmError(f"`workers` must be at least 1; got {self.workers}")

    @property
    def here(self) -> bool:
        return self.workers == 1

    @property
    def on_this_machine(self) -> bool:
        return True

    def each(self, work: Work, items: Sequence[tuple[Any, ...]], bar: Bar) -> Iterator[Any]:
        if self.here or len(items) < 2:
            yield from _each_here(work, items, bar)
            return
        pool, losses = self._pool(work, items), Counter[int]()
        try:
            waiting = _submitted(pool, dict(enumerate(items)))
            for place in bar(range(len(items))):
                while _is_lost(waiting.get(place)):
                    pool.shutdown(wait=True, cancel_futures=True)
                    lost = {late: items[late] for late in range(place, len(items)) if _is_lost(waiting.get(late))}
                    losses.update(list(lost)[: self.workers])  # they begin in this order
                    if losses[place] >= MOST_LOSSES:
                        raise FibldmError(
                            f"a process that {work.what} was killed {MOST_LOSSES} times, likely for memory",
                            "use fewer --workers",
                        )
                    _logger.warning("a process that %s was killed; what it was at is done again", work.what)
                    pool = self._pool(work, items)
                    waiting |= _submitted(pool, lost)
                yield retold(waiting.pop(place).result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pool(self, work: Work, items: Sequence[tuple[Any, ...]]) -> ProcessPoolExecutor:
        count, context = min(self.workers, len(items)), get_context("spawn")
        numbers = context.SimpleQueue()
        for number in range(count):
            numbers.put(number)
        return ProcessPoolExecutor(count, context, _begin_worker, (work, numbers, max(1, cores() // count)))


def engine_of(workers: int | None = None, cluster: str | None = None, *, default: int = 1) -> Engine:
    """The engine that is asked for.

    Args:
        workers: processes of this machine; None takes ``default``.
        cluster: address of a scheduler of Dask; None works on this machine.
        default: processes where nothing is asked for.

    Raises:
        FibldmError: both are given, there are no workers, or Dask is not installed.
    """
    if cluster is None:
        return Processes(default if workers is None else workers)
    if workers is not None:
        raise FibldmError("a cluster has its own workers; got `workers` and `cluster`", "give one of them")
    from fibldm.cluster import Cluster

    return Cluster(cluster)


def cores() -> int:
    """The cores this process may use; a container or a batch system may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Told:
    """What an item gave, and what was said in the log meanwhile: level and text."""

    made: Any
    said: tuple[tuple[int, str], ...]


def told(function: Callable[..., Any], arguments: Sequence[Any]) -> Told:
    """Call a function, and keep what it says in the log."""
    with _kept() as said:
        made = function(*arguments)
    return Told(made, tuple(said))


def retold(told: Told) -> Any:
    """Say here what a worker said, and give what it made."""
    for level, text in told.said:
        _logger.log(level, "%s", text)
    return told.made


@contextmanager
def _kept() -> Iterator[list[tuple[int, str]]]:
    queue: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler, said = QueueHandler(queue), list[tuple[int, str]]()
    level, propagates = _logger.level, _logger.propagate
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    try:
        yield said
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _logger.propagate = propagates
        while not queue.empty():
            record = queue.get()
            said.append((record.levelno, record.getMessage()))


def _each_here(work: Work, items: Sequence[tuple[Any, ...]], bar: Bar) -> Iterator[Any]:
    if items:
        function = work.opened()
        yield from (function(*arguments) for arguments in bar(items))


def _submitted(pool: ProcessPoolExecutor, items: Mapping[int, tuple[Any, ...]]) -> dict[int, Future[Told]]:
    """The items that a pool took, by their places; it takes none any more as soon as a process was killed."""
    taken = {}
    with suppress(BrokenProcessPool):
        for place, arguments in items.items():
            taken[place] = pool.submit(_in_process, arguments)
    return taken


def _is_lost(future: Future[Told] | None) -> bool:
    """Wait for an item; whether its process was killed, or another one before it began."""
    return future is None or future.cancelled() or isinstance(future.exception(), BrokenProcessPool)


_work: Work | None = None
_function: Callable[..., Any] | None = None


def _in_process(arguments: tuple[Any, ...]) -> Told:
    """An item, in a process of a pool; what all items need is made for the first of them."""
    global _function
    if _function is None:
        assert _work is not None
        _function = told(_work.opened, ()).made
    return told(_function, arguments)


def _begin_worker(work: Work, numbers: Any, threads: int) -> None:
    """An interruption is for the parent to deal with; a worker ends when the parent does, however that was."""
    global _work, _function
    _work, _function = work, None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["LOCAL_RANK"] = str(numbers.get())  # which decides the GPU
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
