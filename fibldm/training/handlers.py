"""Ignite handlers: what happens around the steps of training.

An iteration is a batch; a step is one of the optimizer, after ``accumulation_steps`` iterations or at an epoch's end.
"""

import csv
import logging
import math
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines.utils import IterationEvents
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fibldm.files import write_text
from fibldm.progress import bar
from fibldm.training.distributed import is_first_rank, mean_over_ranks
from fibldm.training.draws import EpochSampler, key_seed
from fibldm.training.finite import Finite

_logger = logging.getLogger("fibldm")

UNKNOWN = 10**9  # epochs of a training whose length is not chosen yet


def is_step(engine: Any) -> bool:
    """Whether the optimizer steps in this iteration, as MONAI's trainer decides it."""
    within = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return bool(within % _accumulated(engine) == 0 or within == engine.state.epoch_length)


def steps_done(engine: Any) -> int:
    """How often the optimizer has stepped up to and with this iteration."""
    epochs, within = divmod(engine.state.iteration, engine.state.epoch_length)
    return int(epochs * math.ceil(engine.state.epoch_length / _accumulated(engine)) + within // _accumulated(engine))


def _accumulated(engine: Any) -> int:
    return int(getattr(engine, "accumulation_steps", 1))


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
        rank = [idist.get_rank()] if idist.get_rank() else []
        torch.manual_seed(key_seed(self.seed, engine.state.epoch, *rank))


class EMA(EMAHandler):
    """Exponential moving average of the trainable weights, with a warm-up that depends on the step alone.

    At step ``n`` the momentum (1 - decay) is ``max(momentum, 9 / (10 + n))``: early on a plain average, later the
    stated one. Weights that are not trained are equal in both networks and stay so to the bit.
    """

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Move the average one step towards the weights, after every step of the optimizer."""
        if not is_step(engine):
            return
        momentum = max(self.momentum, 9 / (10 + steps_done(engine)))
        for average, weight in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            if weight.requires_grad:
                average.lerp_(weight, momentum)
        for buffer, current in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(current)


class Schedule:
    """Follow a schedule that is a closed form of the optimizer's steps.

    Args:
        scheduler: such as MONAI's `WarmupCosineSchedule`; its ``get_lr`` depends on ``last_epoch`` alone.
    """

    def __init__(self, scheduler: LambdaLR) -> None:
        self.scheduler: Any = scheduler
        self.warmup_steps = getattr(scheduler, "warmup_steps", 0)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED | Events.ITERATION_COMPLETED, self.place)

    def stretch(self, steps: int) -> None:
        """Let the schedule end after so many steps, the warm-up after a fifth of them at the latest.

        A schedule without ``t_total`` stays as it is.
        """
        if hasattr(self.scheduler, "t_total"):
            self.scheduler.t_total = steps
            self.scheduler.warmup_steps = min(self.warmup_steps, steps // 5)

    def place(self, engine: Engine) -> None:
        """Set the rate of the next step.

        It comes from the schedule and not from the checkpoint, as more epochs make it another one. A group of weights
        may have a ``share`` of it.
        """
        self.scheduler.last_epoch = steps_done(engine)
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate * group.get("share", 1.0)


class ClipGradient:
    """Scale the gradient of a step down to a norm of at most ``max_norm``; its own is ``engine.state.gradient_norm``.

    That is a tensor where the network is, as reading its number waits for the device. The engine has taken the factor
    of a gradient scaler out of the gradient before.

    Args:
        network: whose gradient it is.
        max_norm: 0 only looks at the norm.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network, self.max_norm = network, max_norm
        self.finite = Finite("the gradient must stay finite; its norm is")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, before a step.

        Raises:
            FibldmError: the gradient is not finite; see `Finite` for when that is seen.
        """
        if not is_step(engine):
            return
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm or math.inf)
        engine.state.gradient_norm = norm
        if not _scales(engine):  # a scaler leaves such a step out and lowers its scale
            self.finite(engine, norm)


def _scales(engine: Any) -> bool:
    scaler = getattr(engine, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


class Metrics:
    """One row per epoch in ``metrics.csv``: epoch, iteration, losses, learning rate, gradient's norm, seconds.

    Losses are means over the iterations and ranks; the gradient's norm is one over the steps, without those that a
    gradient scaler left out. Every part in ``output["losses"]`` has a column ``loss/<name>``, and whatever else a
    validation measured has one of its name. A resume drops the rows of the epochs that are done again.

    Args:
        file: the CSV file, with the epochs that were done before; the first rank writes it.
        optimizer: whose learning rate is written.
    """

    FIELDS = ("epoch", "iteration", "loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")
    WATCHED = ("training_loss", "gap")  # beside the validation loss, where they are measured

    def __init__(self, file: Path, optimizer: torch.optim.Optimizer) -> None:
        self.file, self.optimizer = Path(file), optimizer
        self.rows = list(csv.DictReader(self.file.read_text().splitlines())) if self.file.exists() else []
        self.validation_loss: float | None = None
        self.watched: dict[str, float] = {}
        self._losses: dict[str, list[Tensor]] = {}
        self._norms: list[Tensor] = []
        self._started = 0.0
        self._finite = Finite("the training loss must stay finite; it is")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self.rows = [row for row in self.rows if int(row["epoch"]) <= engine.state.epoch]

    def _begin(self, engine: Engine) -> None:
        self._losses, self._norms = {}, []
        self.validation_loss, self.watched = None, {}
        self._started = time.monotonic()

    def _add(self, engine: Any) -> None:
        (output,) = engine.state.output
        self._finite(engine, output["loss"])
        parts = {f"loss/{name}": value for name, value in output.get("losses", {}).items()}
        for name, value in {"loss": output["loss"], **parts}.items():
            self._losses.setdefault(name, []).append(value.detach())
        if is_step(engine) and getattr(engine.state, "gradient_norm", None) is not None:
            self._norms.append(engine.state.gradient_norm)

    def _write(self, engine: Engine) -> None:
        losses = {name: mean_over_ranks(torch.stack(values).mean()) for name, values in self._losses.items()}
        row = {
            "epoch": str(engine.state.epoch),
            "iteration": str(engine.state.iteration),
            **{name: f"{float(loss):.6g}" for name, loss in losses.items()},
            "validation_loss": "" if self.validation_loss is None else f"{self.validation_loss:.6g}",
            **{name: f"{value:.6g}" for name, value in self.watched.items()},
            "learning_rate": f"{self.optimizer.param_groups[0]['lr']:.4g}",
            "gradient_norm": self._norm(),
            "seconds": f"{time.monotonic() - self._started:.2f}",
        }
        self.rows.append(row)
        if is_first_rank():
            names = self._names()
            lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in self.rows)]
            write_text(self.file, "\n".join(lines) + "\n")

    def _norm(self) -> str:
        norms = [norm for norm in torch.stack(self._norms).tolist() if math.isfinite(norm)] if self._norms else []
        return f"{sum(norms) / len(norms):.4g}" if norms else ""

    def _names(self) -> list[str]:
        known = dict.fromkeys(name for row in self.rows for name in row)
        place = self.FIELDS.index("validation_loss") + 1
        first = [*self.FIELDS[:place], *(name for name in self.WATCHED if name in known), *self.FIELDS[place:-1]]
        return [*first, *(name for name in known if name not in {*first, self.FIELDS[-1]}), self.FIELDS[-1]]


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
        for name, value in self.metrics.rows[-1].items():
            if value and name not in ("epoch", "iteration"):
                self.writer.add_scalar(name, float(value), engine.state.epoch)
        self.writer.flush()

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.writer is not None:
            self.writer.close()


class ShowProgress:
    """A bar with loss, speed and time left on a terminal; elsewhere a line in the log about every twentieth epoch.

    Args:
        name: of the stage.
        metrics: where the losses are.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name, self.metrics = name, metrics
        self.progress = bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}{task.fields[of]}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._stop)

    def _start(self, engine: Engine) -> None:
        self.task = self.progress.add_task(self.name, loss="", speed="", **self._done(engine))
        self.progress.start()

    def _done(self, engine: Engine) -> dict[str, Any]:
        epochs, length = engine.state.max_epochs or 0, engine.state.epoch_length or 0
        total = None if epochs == UNKNOWN else epochs * length
        return {"completed": engine.state.iteration, "total": total, "of": "" if total is None else f"/{total}"}

    def _step(self, engine: Engine) -> None:
        rate = self.progress.tasks[self.task].speed
        self.progress.update(self.task, speed="" if rate is None else f"{rate:.1f} it/s", **self._done(engine))

    def _epoch(self, engine: Engine) -> None:
        row = self.metrics.rows[-1]
        text = f"loss {float(row['loss']):.4f}"
        self.progress.update(self.task, loss=text)
        epochs = engine.state.max_epochs or 0
        if engine.state.epoch % max(1, epochs // 20) == 0 or engine.state.epoch == epochs:
            validation = f", validation {row['validation_loss']}" if row["validation_loss"] else ""
            validation += f" ({float(row['gap']):+.1%} against training patients)" if row.get("gap") else ""
            _logger.info("%s: epoch %d/%d, %s%s", self.name, engine.state.epoch, epochs, text, validation)

    def _stop(self, engine: Engine, error: BaseException | None = None) -> None:
        self.progress.stop()
        if error is not None:
            raise error
