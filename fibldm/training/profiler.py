"""Where the time and the memory of training steps go, by PyTorch's profiler."""

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.profiler import ProfilerActivity, profile, schedule

from fibldm.errors import FibldmError
from fibldm.files import write_text

_BEFORE = 3  # iterations that are slower than the others
_ROWS = 40

_logger = logging.getLogger("fibldm")


class Profiler:
    """Records some iterations into ``profile/``.

    ``trace.json.gz`` is for https://ui.perfetto.dev or Chrome's own tracing, ``operators.txt`` lists what took longest.

    Args:
        folder: of the stage.
        iterations: how many are recorded, after the first three.

    Raises:
        FibldmError: ``iterations`` is no whole number of at least 1.
    """

    def __init__(self, folder: Path, iterations: int) -> None:
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise FibldmError(f"profile must be a number of iterations, 0 for none; got {iterations!r}", "5 will do")
        self.folder, self.iterations = Path(folder) / "profile", iterations
        self._profile: Any = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self._profile.step())
        engine.add_event_handler(Events.COMPLETED, self._stop)

    def _start(self, engine: Engine) -> None:
        with_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *with_cuda],
            schedule=schedule(wait=_BEFORE - 1, warmup=1, active=self.iterations, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def _stop(self, engine: Engine) -> None:
        self._profile.stop()
        if not (self.folder / "operators.txt").exists():
            _logger.warning("profile: it takes more than %d iterations; there were fewer", _BEFORE)

    def _write(self, made: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        made.export_chrome_trace(str(self.folder / "trace.json.gz"))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(self.folder / "operators.txt", made.key_averages().table(sort_by=order, row_limit=_ROWS) + "\n")
        _logger.info("profile: %d iterations in %s", self.iterations, self.folder)
