"""Work shared between processes of this machine, in order, with an end when the parent ends."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, TypeVar

from fibldm.errors import FibldmError
from fibldm.progress import Bar

Made = TypeVar("Made")


def cores() -> int:
    """The cores this process may use; a container or a batch system may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[..., Made], calls: Sequence[tuple[Any, ...]], *, workers: int, bar: Bar, what: str
) -> Iterator[Made]:
    """What a function returns for each of several calls, in their order.

    Args:
        function: of a module, as are its arguments and results, so that they can be sent to another process.
        calls: arguments of each.
        workers: processes at the same time; 1 works in this one.
        bar: of what is waited for.
        what: a worker does, for an error.

    Raises:
        FibldmError: a process was killed from outside.
    """
    if workers == 1 or len(calls) < 2:
        yield from (function(*arguments) for arguments in bar(calls))
        return
    pool = ProcessPoolExecutor(min(workers, len(calls)), get_context("spawn"), _begin_worker)
    try:
        waiting: list[Future[Made]] = [pool.submit(function, *arguments) for arguments in calls]
        for future in bar(waiting):
            yield future.result()
    except BrokenProcessPool as error:
        raise FibldmError(f"a process that {what} was killed, likely for memory", "use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """An interruption is for the parent to deal with; a worker ends when the parent does, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
