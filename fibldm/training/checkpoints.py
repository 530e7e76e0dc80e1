"""What a stage keeps to go on exactly, and when it stops before its last epoch."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver

from fibldm.errors import FibldmError
from fibldm.models.low_rank import merged_state, updates_of
from fibldm.training.distributed import is_first_rank, on_first_rank
from fibldm.training.handlers import EMA, Metrics

_logger = logging.getLogger("fibldm")


class Checkpoints:
    """``last.pt`` with everything to go on exactly, ``best.pt`` with the averaged weights of the lowest loss.

    And ``epoch_0010.pt`` with the averaged weights of an epoch, for those who want to look back: of every so many, and
    of those with the lowest losses.

    Every rank reads them, the first rank writes them.

    Args:
        folder: where they lie.
        objects: what ``last.pt`` holds, by name; each has ``state_dict`` and ``load_state_dict``.
        ema: whose average is the model that counts.
        every: epochs between two checkpoints.
        keep_every: epochs between two whose averaged weights are kept; 0 keeps none.
        keep_best: how many epochs are kept because of their validation loss; 0 keeps none.
        metrics: where the validation loss is.
        optional: the same as ``objects``, of what may have no state; ``last.pt`` need not hold it.
    """

    def __init__(
        self,
        folder: Path,
        objects: dict[str, Any],
        *,
        ema: EMA,
        every: int,
        metrics: Metrics,
        keep_every: int = 0,
        keep_best: int = 0,
        optional: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.folder, self.objects, self.ema, self.every, self.metrics = Path(folder), objects, ema, every, metrics
        if isinstance(keep_best, bool) or not isinstance(keep_best, int) or keep_best < 0:
            raise FibldmError(f"keep_best must be a whole number of at least 0; got {keep_best!r}", "0 keeps best.pt")
        self.keep_every, self.keep_best, self.optional = keep_every, keep_best, optional
        self.best_loss = float("inf")
        self.best: dict[str, Any] | None = None
        self.saved_epoch = 0
        self.saver = DiskSaver(str(folder), atomic=True, create_dir=True, require_empty=False)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = self.metrics.validation_loss
        if loss is not None and loss < self.best_loss:
            self.best_loss = loss
            updates = updates_of(self.ema.ema_model)
            self.best = {"model": self._averaged(), "epoch": engine.state.epoch, "loss": loss}
            self.best |= {"updates": updates} if updates else {}
        epoch, kept = engine.state.epoch, self._among_best(engine.state.epoch)
        if is_first_rank() and (self._is_regular(epoch) or epoch in kept):
            self._write({_name(epoch): {"model": self._averaged(), "epoch": epoch, "loss": loss}})
            self._drop(set(self._among_best(epoch - 1)) - set(kept))
        if engine.state.epoch % self.every == 0 or engine.state.epoch == engine.state.max_epochs:
            self.save(engine)

    def resume(self, engine: Engine) -> int:
        """Load ``last.pt`` if there is one and put the engine at its epoch; returns the epoch (0: begin anew).

        Raises:
            FibldmError: the file cannot be read, or lacks one of the objects.
        """
        file = self.folder / "last.pt"
        if is_first_rank():
            self._tidy()
        if not file.exists():
            return 0
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FibldmError(
                f"{file} must be a readable checkpoint; {error}", "give --restart to begin this stage anew"
            ) from error
        if missing := self.objects.keys() - state["objects"].keys():
            raise FibldmError(
                f"{file} must hold the state of {', '.join(self.objects)}; it lacks {', '.join(sorted(missing))}",
                "give --restart to begin this stage anew",
            )
        for name, part in self.objects.items():
            part.load_state_dict(state["objects"][name])
        for name in self.optional.keys() & state["objects"].keys():
            self.optional[name].load_state_dict(state["objects"][name])
        self.best, self.best_loss = state["best"], state["best_loss"]
        engine.state.epoch = self.saved_epoch = int(state["epoch"])
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        return self.saved_epoch

    def save(self, engine: Engine) -> None:
        """Write both files as they are at the end of this epoch, unless that was done.

        Raises:
            FibldmError: the disk is full or the folder cannot be written; the files are as they were.
        """
        if self.saved_epoch == engine.state.epoch:
            return
        self.saved_epoch = engine.state.epoch
        if is_first_rank():
            objects = {name: part.state_dict() for name, part in self.objects.items()}
            objects |= {name: kept for name, part in self.optional.items() if (kept := part.state_dict())}
            last = {"epoch": engine.state.epoch, "objects": objects, "best": self.best, "best_loss": self.best_loss}
            self._write({"best.pt": self.best, "last.pt": last} if self.best is not None else {"last.pt": last})

    def _among_best(self, epoch: int) -> list[int]:
        """The epochs up to one with the lowest losses, by the rows of ``metrics.csv``, so that it needs no state."""
        if not self.keep_best:
            return []
        rows = (
            (float(row["validation_loss"]), int(row["epoch"])) for row in self.metrics.rows if row["validation_loss"]
        )
        return [number for _, number in sorted(row for row in rows if row[1] <= epoch)[: self.keep_best]]

    def _is_regular(self, epoch: int) -> bool:
        return bool(self.keep_every) and epoch % self.keep_every == 0

    def _drop(self, epochs: set[int]) -> None:
        for epoch in epochs:
            if not self._is_regular(epoch):
                (self.folder / _name(epoch)).unlink(missing_ok=True)

    def _averaged(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in merged_state(self.ema.ema_model).items()}

    def _write(self, contents: dict[str, Any]) -> None:
        try:
            for name, content in contents.items():
                self.saver(content, name)
        except (OSError, RuntimeError) as error:
            raise FibldmError(
                f"cannot write a checkpoint to {self.folder}: {error}",
                "free some disk space and run the same command again; the last checkpoint is as it was",
            ) from error

    def _tidy(self) -> None:
        """Remove what a kill left of a file that was being written."""
        for pattern in ("checkpoints/tmp*", ".writing-*"):
            for unfinished in self.folder.parent.glob(pattern):
                unfinished.unlink()


def _name(epoch: int) -> str:
    return f"epoch_{epoch:04d}.pt"


class Stop(ABC):
    """End a training after an epoch, with a checkpoint; what is kept of it is the epoch of the lowest loss.

    Args:
        checkpoints: is saved before the stop.
    """

    reason: str

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.is_over(engine.state.epoch):
            self.checkpoints.save(engine)
            engine.terminate()

    @abstractmethod
    def is_over(self, epoch: int) -> bool:
        """Whether the training stops after an epoch; asked again by a resume, which must hear the same."""


class Patience(Stop):
    """Stop a training whose validation loss has not fallen for a number of validations.

    It counts from the epoch of the best weights, so that it needs no state of its own.

    Args:
        checkpoints: knows the best epoch.
        patience: validations without a lower loss; 0 never stops.
        interval: epochs between two validations.
    """

    reason = "its patience is over"

    def __init__(self, checkpoints: Checkpoints, *, patience: int, interval: int) -> None:
        super().__init__(checkpoints)
        self.patience, self.interval = patience, interval

    def is_over(self, epoch: int) -> bool:
        if not self.patience or self.checkpoints.best is None:
            return False
        return epoch // self.interval - self.checkpoints.best["epoch"] // self.interval >= self.patience


class GapLimit(Stop):
    """Stop a training that learns its patients by heart: its validation loss stays too far above that of training.

    It counts the rows of ``metrics.csv``, so that it needs no state of its own.

    Args:
        checkpoints: is saved before the stop.
        metrics: knows the gaps, see `fibldm.training.watch.gap`.
        limit: the largest gap, above 0; None never stops.
        patience: validations in a row with a larger one; 0 counts as 1.

    Raises:
        FibldmError: the limit is not above 0.
    """

    reason = "its gap between validation and training stays above stop_gap"

    def __init__(self, checkpoints: Checkpoints, metrics: Metrics, *, limit: float | None, patience: int = 1) -> None:
        super().__init__(checkpoints)
        if limit is not None and not limit > 0:
            raise FibldmError(f"stop_gap must be above 0, as a share of the training loss; got {limit}")
        self.metrics, self.limit, self.patience = metrics, limit, max(1, patience)

    def gaps(self, epoch: int) -> dict[int, float]:
        """The gap of every validation up to an epoch, by its epoch."""
        rows = ((int(row["epoch"]), row.get("gap")) for row in self.metrics.rows)
        return {number: float(value) for number, value in rows if value and number <= epoch}

    def is_over(self, epoch: int) -> bool:
        limit, last = self.limit, list(self.gaps(epoch).values())[-self.patience :]
        return limit is not None and len(last) == self.patience and all(value > limit for value in last)


class WallTime:
    """Stop at the end of an epoch when the next one may end after the limit; at least one epoch is done.

    An epoch is the unit, as a checkpoint lies between epochs: what goes on from there goes on exactly.

    Args:
        checkpoints: is saved before the stop.
        limit: seconds from now; None never stops.
        clock: seconds from any beginning.
    """

    def __init__(
        self, checkpoints: Checkpoints, limit: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.checkpoints, self.limit, self.clock = checkpoints, limit, clock
        self.began = self.last = clock()
        self.longest = 0.0
        self.is_over = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        self.last = self.clock()

    def __call__(self, engine: Engine) -> None:
        now = self.clock()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.limit is None or engine.state.epoch == engine.state.max_epochs or engine.should_terminate:
            return
        limit = self.limit
        # the clocks of ranks differ, their decision must not
        if on_first_rank(lambda: now - self.began + self.longest > limit):
            self.checkpoints.save(engine)
            self.is_over = True
            engine.terminate()
