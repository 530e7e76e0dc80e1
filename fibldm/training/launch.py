"""Several processes of this machine that run one function together, started as torchrun starts them."""

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError
from fibldm.workers import cores

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # those that the launcher answers


def check_devices(count: int, device: object = None) -> None:
    """Refuse a number of processes that cannot be started here, each with a device of its own.

    Args:
        count: of the processes.
        device: "cpu", or None for CUDA devices where there are some.

    Raises:
        FibldmError: there are fewer CUDA devices, one device is given for all, or others were started already.
    """
    if count < 1:
        raise FibldmError(f"--devices must be at least 1; got {count}")
    if count > 1 and "RANK" in os.environ:
        raise FibldmError(
            "--devices starts the processes itself, and this one was started by torchrun or the like (RANK is set)",
            "leave --devices out, and add --config multi_gpu",
        )
    if count > 1 and device not in (None, "cpu"):
        raise FibldmError(
            f"with --devices every process has a CUDA device of its own; device is {device!r}",
            "leave device out, or set it to cpu; CUDA_VISIBLE_DEVICES chooses among the devices",
        )
    if device is None and torch.cuda.is_available() and count > torch.cuda.device_count():
        raise FibldmError(
            f"--devices must be at most the number of CUDA devices; got {count}, there are {torch.cuda.device_count()}",
            "give fewer, or --set device=cpu",
        )


def run_together(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call a function in so many new processes, which torch.distributed can join; the first that fails ends all.

    Args:
        function: of a module, as are its arguments, so that they can be sent to another process.
        arguments: the same for each.
        count: of the processes.

    Raises:
        FibldmError: the function raised it in one of them.
        KeyboardInterrupt: on SIGINT, when all have ended.
        RuntimeError: a process failed otherwise.
    """
    # imported here, as only those who start processes have them
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    with tempfile.TemporaryDirectory() as folder, _surroundings(count):
        try:
            elastic_launch(config, _answer)(function, arguments, folder)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            sys.exit(128 + int(error.sigval))
        except ChildFailedError as error:
            for file in sorted(Path(folder).glob("*.json")):
                raise FibldmError(*json.loads(file.read_text(encoding="utf-8"))) from error
            rank, failure = error.get_first_failure()
            message = failure.message if isinstance(failure.message, str) else failure.message["message"]
            raise RuntimeError(f"process {rank} of {count} failed; {message}") from error


def _answer(function: Callable[..., None], arguments: tuple[Any, ...], folder: str) -> None:
    """Call the function; what it refuses goes to a file."""
    try:
        function(*arguments)
    except FibldmError as error:
        file = Path(folder) / f"{int(os.environ['RANK']):04d}.json"
        file.write_text(json.dumps([error.message, error.remedy]), encoding="utf-8")
        sys.exit(2)


@contextmanager
def _surroundings(count: int) -> Iterator[None]:
    """Cores shared by the processes, nothing said by the launcher, and its signal handlers taken back."""
    before, threads = {number: signal.getsignal(number) for number in _SIGNALS}, os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error says it, once
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
