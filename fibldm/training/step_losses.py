"""The losses of single steps, where somebody wants to see more than one number per epoch."""

import csv
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.files import write_text
from fibldm.training.distributed import is_first_rank, mean_over_ranks
from fibldm.training.handlers import is_step, steps_done


class StepLosses:
    """The losses of single steps: a row of ``steps.csv`` every so many, and TensorBoard events in ``steps/``.

    Where gradients are accumulated, a step's loss is the mean over its iterations. Numbers are taken from the device
    at the end of an epoch, as reading them waits for it. A resume drops the rows of the steps that are done again.

    Args:
        folder: of the stage; the first rank writes to it.
        every: steps between two rows; 0 writes none.

    Raises:
        FibldmError: ``every`` is no whole number of at least 0.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise FibldmError(f"log_every must be a whole number of at least 0; got {every!r}", "0 is none")
        self.file, self.every = Path(folder) / "steps.csv", every
        self.rows: list[dict[str, str]] = []
        self.writer: Any = None
        self._iterations: list[dict[str, Tensor]] = []
        self._steps: dict[int, dict[str, Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        if self.every:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
            engine.add_event_handler(Events.COMPLETED, self._close)

    def _start(self, engine: Engine) -> None:
        done = steps_done(engine)
        there = csv.DictReader(self.file.read_text().splitlines()) if self.file.exists() else []
        self.rows = [row for row in there if int(row["step"]) <= done]
        self._iterations, self._steps = [], {}
        if is_first_rank():
            from torch.utils.tensorboard import SummaryWriter

            # of its own folder, as a resume purges what follows a step there, and epochs are counted otherwise
            self.writer = SummaryWriter(str(self.file.parent / "steps"), purge_step=done + 1)

    def _add(self, engine: Any) -> None:
        (output,) = engine.state.output
        parts = {f"loss/{name}": value.detach() for name, value in output.get("losses", {}).items()}
        self._iterations.append({"loss": output["loss"].detach(), **parts})
        if is_step(engine):
            step = steps_done(engine)
            if step % self.every == 0:
                self._steps[step] = _mean_of(self._iterations)
            self._iterations = []

    def _write(self, engine: Engine) -> None:
        for step, losses in self._steps.items():
            numbers = {name: float(mean_over_ranks(value)) for name, value in losses.items()}
            self.rows.append({"step": str(step), **{name: f"{value:.6g}" for name, value in numbers.items()}})
            for name, value in numbers.items() if self.writer is not None else ():
                self.writer.add_scalar(name, value, step)
        self._steps = {}
        if is_first_rank():
            names = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step"]
            lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in self.rows)]
            write_text(self.file, "\n".join(lines) + "\n")
            self.writer.flush()

    def _close(self, engine: Engine) -> None:
        if self.writer is not None:
            self.writer.close()


def _mean_of(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in losses for name in part)
    return {name: torch.stack([part[name] for part in losses if name in part]).mean() for name in names}
