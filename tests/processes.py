"""Processes of their own, as a command line would start them, without its many seconds of imports.

They are forked from a server, which every process of the tests starts when it is first asked for one, and which has
imported what takes long and done nothing else. Unlike forks of the tests' own process they begin afresh: nothing is
drawn, set or changed yet. They compute on one thread.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration

_IMPORTED = ("fibldm.pipeline", "fibldm.training.stage", "monai.bundle", "monai.engines", "monai.inferers")


def server(_: str = "") -> ForkServerContext:
    """The context of such processes; takes the place of `multiprocessing.get_context`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    with pytest.MonkeyPatch.context() as surroundings:
        surroundings.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def start(log: Path, function: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Call a function of a module in such a process, with its output in a file."""
    process = server().Process(target=_told, args=(log, function, arguments))
    process.start()
    return process


def finish(*processes: ForkServerProcess, log: Path) -> None:
    """Wait for processes that must end well."""
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * len(processes), log.read_text()[-3000:]


def by_monai(*words: str, **environment: str) -> None:
    """``python -m monai.bundle`` with these words, in this process."""
    os.environ.update(environment)
    sys.argv = ["monai.bundle", *words]
    runpy.run_module("monai.bundle", run_name="__main__")


def run_words(configuration: Configuration, *more: Path) -> list[str]:
    """What follows ``python -m monai.bundle`` to run a configuration, and files that come last."""
    listed = "[" + ",".join(f"'{file.resolve()}'" for file in (*configuration.files, *more)) + "]"
    options = [text for key, value in configuration.overrides.items() for text in (f"--{key}", str(value))]
    return ["run", "--config_file", listed, *options]


def start_ranks(configuration: Configuration, count: int, log: Path) -> list[ForkServerProcess]:
    """Ranks on the CPU, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    words = run_words(configuration, shipped("multi_gpu"))
    return [
        start(log, _as_rank, words, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
    ]


def _as_rank(words: Sequence[str], environment: dict[str, str]) -> None:
    by_monai(*words, **environment)


def _told(log: Path, function: Callable[..., object], arguments: Sequence[Any]) -> None:
    with log.open("a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    function(*arguments)
