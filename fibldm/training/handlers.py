"""Ignite handlers: what happens around the steps of training."""

import csv
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver, EMAHandler
from monai.engines.utils import IterationEvents
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from fibldm.errors import FibldmError
from fibldm.files import write_text
from fibldm.training.draws import EpochSampler, key_seed

_logger = logging.getLogger("fibldm")


class SetEpoch:
    """Key the order of the data and the global random numbers of an epoch by (seed, epoch), so a resume repeats them.

    Args:
        sampler: of the training data.
        seed: seed of the run.
    """

    def __init__(self, sampler: EpochSampler, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.sampler.set_epoch(engine.state.epoch)
        torch.manual_seed(key_seed(self.seed, engine.state.epoch))


class EMA(EMAHandler):
    """Exponential moving average of the trainable weights, with a warm-up that depends on the iteration alone.

    At iteration ``n`` the momentum (1 - decay) is ``max(momentum, 9 / (10 + n))``: early on a plain average, later the
    stated one. Weights that are not trained are equal in both networks and stay so to the bit.
    """

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Move the average one step towards the weights."""
        momentum = max(self.momentum, 9 / (10 + engine.state.iteration))
        for average, weight in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            if weight.requires_grad:
                average.lerp_(weight, momentum)
        for buffer, current in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(current)


class ClipGradient:
    """Scale the gradient down to a norm of at most ``max_norm``."""

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network, self.max_norm = network, max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class Metrics:
    """One row per epoch in ``metrics.csv``: epoch, iteration, training loss, validation loss, learning rate, seconds.

    A resume drops the rows of the epochs that are done again.

    Args:
        file: the CSV file.
        optimizer: whose learning rate is written.
    """

    FIELDS = ("epoch", "iteration", "loss", "validation_loss", "learning_rate", "seconds")

    def __init__(self, file: Path, optimizer: torch.optim.Optimizer) -> None:
        self.file, self.optimizer = Path(file), optimizer
        self.rows: list[dict[str, Any]] = []
        self.validation_loss: float | None = None
        self._losses: list[torch.Tensor] = []
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        rows = list(csv.DictReader(self.file.read_text().splitlines())) if self.file.exists() else []
        self.rows = [row for row in rows if int(row["epoch"]) <= engine.state.epoch]

    def _begin(self, engine: Engine) -> None:
        self._losses, self.validation_loss, self._started = [], None, time.monotonic()

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self._losses.append(output["loss"].detach())

    def _write(self, engine: Engine) -> None:
        loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(loss):
            raise FibldmError(
                f"the training loss must stay finite; it is {loss} in epoch {engine.state.epoch}",
                "lower learning_rate or clip_norm; the last checkpoint is as it was",
            )
        row = (
            engine.state.epoch,
            engine.state.iteration,
            f"{loss:.6g}",
            "" if self.validation_loss is None else f"{self.validation_loss:.6g}",
            f"{self.optimizer.param_groups[0]['lr']:.4g}",
            f"{time.monotonic() - self._started:.2f}",
        )
        self.rows.append(dict(zip(self.FIELDS, row, strict=True)))
        lines = [",".join(self.FIELDS), *(",".join(str(row[name]) for name in self.FIELDS) for row in self.rows)]
        write_text(self.file, "\n".join(lines) + "\n")


class TensorBoard:
    """The rows of ``metrics.csv`` as TensorBoard events beside it, flushed every epoch.

    Args:
        metrics: what is written; the epochs that a resume does again take the place of those before.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.writer: Any = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._close)

    def _open(self, engine: Engine) -> None:
        # imported here, since it takes a second that only training has
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.metrics.file.parent), purge_step=engine.state.epoch + 1)

    def _write(self, engine: Engine) -> None:
        row = self.metrics.rows[-1]
        for name in ("loss", "validation_loss", "learning_rate", "seconds"):
            if row[name]:
                self.writer.add_scalar(name, float(row[name]), engine.state.epoch)
        self.writer.flush()

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.writer is not None:
            self.writer.close()


class ShowProgress:
    """A bar with loss, epochs and time left on a terminal; elsewhere a line in the log about every twentieth epoch.

    Args:
        name: of the stage.
        metrics: where the losses are.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name, self.metrics = name, metrics
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._stop)

    def _start(self, engine: Engine) -> None:
        total = (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0)
        self.task = self.progress.add_task(self.name, total=total, completed=engine.state.iteration, loss="")
        self.progress.start()

    def _step(self, engine: Engine) -> None:
        self.progress.update(self.task, completed=engine.state.iteration)

    def _epoch(self, engine: Engine) -> None:
        row = self.metrics.rows[-1]
        text = f"loss {float(row['loss']):.4f}"
        self.progress.update(self.task, loss=text)
        epochs = engine.state.max_epochs or 0
        if engine.state.epoch % max(1, epochs // 20) == 0 or engine.state.epoch == epochs:
            validation = f", validation {row['validation_loss']}" if row["validation_loss"] else ""
            _logger.info("%s: epoch %d/%d, %s%s", self.name, engine.state.epoch, epochs, text, validation)

    def _stop(self, engine: Engine, error: BaseException | None = None) -> None:
        self.progress.stop()
        if error is not None:
            raise error


class Checkpoints:
    """``last.pt`` with everything to go on exactly, and ``best.pt`` with the averaged weights of the lowest loss.

    Args:
        folder: where they lie.
        objects: what ``last.pt`` holds, by name; each has ``state_dict`` and ``load_state_dict``.
        ema: whose average is the model that counts.
        every: epochs between two checkpoints.
        metrics: where the validation loss is.
    """

    def __init__(self, folder: Path, objects: dict[str, Any], *, ema: EMA, every: int, metrics: Metrics) -> None:
        self.folder, self.objects, self.ema, self.every, self.metrics = Path(folder), objects, ema, every, metrics
        self.best_loss = float("inf")
        self.best: dict[str, Any] | None = None
        self.saver = DiskSaver(str(folder), atomic=True, create_dir=True, require_empty=False)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = self.metrics.validation_loss
        if loss is not None and loss < self.best_loss:
            self.best_loss = loss
            model = {name: value.detach().cpu().clone() for name, value in self.ema.ema_model.state_dict().items()}
            self.best = {"model": model, "epoch": engine.state.epoch, "loss": loss}
        if engine.state.epoch % self.every == 0 or engine.state.epoch == engine.state.max_epochs:
            self._save(engine)

    def resume(self, engine: Engine) -> int:
        """Load ``last.pt`` if there is one and put the engine at its epoch; returns the epoch (0: begin anew).

        Raises:
            FibldmError: the file cannot be read.
        """
        file = self.folder / "last.pt"
        if not file.exists():
            return 0
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FibldmError(
                f"{file} must be a readable checkpoint; {error}", "give --restart to begin this stage anew"
            ) from error
        for name, part in self.objects.items():
            part.load_state_dict(state["objects"][name])
        self.best, self.best_loss = state["best"], state["best_loss"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        return int(state["epoch"])

    def _save(self, engine: Engine) -> None:
        objects = {name: part.state_dict() for name, part in self.objects.items()}
        last = {"epoch": engine.state.epoch, "objects": objects, "best": self.best, "best_loss": self.best_loss}
        try:
            if self.best is not None:
                self.saver(self.best, "best.pt")
            self.saver(last, "last.pt")
        except (OSError, RuntimeError) as error:
            raise FibldmError(
                f"cannot write a checkpoint to {self.folder}: {error}",
                "free some disk space and run the same command again; the last checkpoint is as it was",
            ) from error
