"""A training that ends after a number of minutes: its length is fitted to what its own steps take."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.files import write_json
from fibldm.runs import BUDGET, StageFolder
from fibldm.training.checkpoints import Checkpoints
from fibldm.training.distributed import is_first_rank, on_first_rank
from fibldm.training.draws import EpochSampler
from fibldm.training.handlers import UNKNOWN, Schedule
from fibldm.training.pace import Length, Pace, Place, Stopwatch, fit, remaining, shortened, spaced
from fibldm.training.watch import Validation

_logger = logging.getLogger("fibldm")

_MEASURED = 3  # iterations, which take at least
_SHARE, _SECONDS = 0.01, 5.0  # of the time, or so many seconds
_LONG, _VERY_LONG = 0.05, 0.25  # of the time, after which one of them is enough, or a slow one
_TOLERANCE = 0.03  # of the time: a prediction that is off by less changes nothing
_LEAST = 5  # iterations
_FORWARD = 1 / 3  # of a training step
_LOST, _LOST_SECONDS = 0.005, 60.0  # of the time, or at most so many seconds, lie between two checkpoints
_NOTE_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Governed:
    """What follows the length of a training.

    Attributes:
        sampler: of the training data.
        schedule: of the learning rate.
        validation: of the averaged weights.
        checkpoints: are written less often where epochs are short.
        others: whatever else counts the epochs between two validations, by an attribute ``interval``; pictures with an
            attribute ``early`` are drawn once more, after the first validation, so that their time is known.
    """

    sampler: EpochSampler
    schedule: Schedule
    validation: Validation
    checkpoints: Checkpoints
    others: Sequence[Any] = ()


class TimeBudget:
    """Fit a training to a number of minutes, those of earlier attempts included.

    Its first steps are measured, which are steps of the training as all others. Then the number of epochs is chosen,
    and with it the schedule of the learning rate and the interval of validations. At the end of every epoch all that
    was measured is looked at again, and another number is chosen if the stage would end more than a few per cent too
    early or too late. Where few epochs would fit, they are cut, see `EpochSampler.cut`.

    ``budget.json`` in the folder of the stage says what was chosen, and how many seconds were used.

    Args:
        folder: of the stage.
        minutes: None fits nothing; a training whose epochs were cut before goes on with such epochs.
        began: when this attempt began, by ``clock``; None is now.
        clock: seconds from any beginning.
    """

    def __init__(
        self,
        folder: StageFolder,
        minutes: float | None,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.minutes, self.clock = folder, minutes, clock
        self.began = clock() if began is None else began
        self.limit = 0.0 if minutes is None else 60 * minutes
        self.before = 0.0 if minutes is None else folder.seconds()
        self.length: Length | None = None
        self.known, self.stopwatch = Pace(), Stopwatch(self.limit / 10)
        self._noted = self.began
        self._within_whole_epoch = False

    @property
    def seconds(self) -> float:
        """Used so far, by earlier attempts as well."""
        return self.before + self.clock() - self.began

    @property
    def left(self) -> float:
        """Seconds; below 0 where the time is over."""
        return self.limit - self.seconds

    @property
    def pace(self) -> Pace:
        """What the parts of the training take, as far as it is known."""
        return self.stopwatch.pace(self.known)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What happens inside counts, however it ends; a refusal before the first checkpoint uses up nothing."""
        self._note()
        try:
            yield
        except FibldmError:
            if (self.folder.checkpoints / "last.pt").exists():
                self._note()
            elif self.minutes is not None and is_first_rank():
                (self.folder.path / BUDGET).unlink(missing_ok=True)
            raise
        except BaseException:
            self._note()
            raise
        self._note()

    def govern(self, trainer: Any, parts: Governed) -> None:
        """Take charge of a training, before its checkpoint is read and before what ends an epoch is attached."""
        self.trainer, self.parts = trainer, parts
        self.per_step = int(getattr(trainer, "accumulation_steps", 1))
        self.whole = int(trainer.state.epoch_length)
        self._interval, self._every = parts.validation.interval, parts.checkpoints.every
        if self.minutes is None:
            return
        for part in parts.others:
            if hasattr(part, "early"):
                part.early = True
        trainer.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._see_iteration)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def go_on(self) -> None:
        """Choose what is to come, after the checkpoint was read if there is one.

        Raises:
            FibldmError: nothing was trained yet, and the time is over.
        """
        state = self.trainer.state
        if self.minutes is None:
            if self.is_cut:
                state.max_epochs = math.ceil(state.max_epochs * self.whole / state.epoch_length)
                self._stretch(state.max_epochs)
            return
        self._begun = state.epoch
        length = on_first_rank(self._resumed)
        if length is not None:
            self._apply(length)
            return
        state.max_epochs = UNKNOWN
        self._stretch(UNKNOWN)
        self._space(UNKNOWN)

    @property
    def is_cut(self) -> bool:
        """Whether an epoch is less than a pass through the data."""
        return bool(self.trainer.state.epoch_length != self.whole)

    def facts(self) -> dict[str, Any]:
        """What ``done.json`` says: minutes and seconds, and the passes through the data where epochs are cut."""
        used = {} if self.minutes is None else {"minutes": self.minutes, "seconds": round(self.seconds, 1)}
        passes = self.trainer.state.max_epochs * self.trainer.state.epoch_length / self.whole
        return {**used, **({"passes": round(passes, 3)} if self.is_cut else {})}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty where nothing was chosen."""
        if self.minutes is None or self.length is None:
            return {"length": {"iterations": self.trainer.state.epoch_length}} if self.is_cut else {}
        seconds, pace = self.seconds, asdict(self.pace)
        return {"minutes": self.minutes, "seconds": seconds, "length": asdict(self.length), "pace": pace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the epochs of a checkpoint, and where there are minutes with the number that was chosen."""
        if state["length"]["iterations"] != self.whole:
            self._cut(state["length"]["iterations"])
        if self.minutes is not None and "minutes" in state:
            self.length, self.known = Length(**state["length"]), Pace(**state["pace"])
            self.before = max(self.before, state["seconds"])

    # --- what is seen

    def _begin_epoch(self, engine: Engine) -> None:
        validated = self.length is not None and self.length.validates(engine.state.epoch - 1)
        if self._within_whole_epoch:
            engine.set_data(engine.state.dataloader)  # type: ignore[arg-type]
            self._within_whole_epoch = False
        self.stopwatch.begin_epoch(self.clock(), validated=validated)

    def _see_iteration(self, engine: Engine) -> None:
        now = self.clock()
        self.stopwatch.see_iteration(now)
        if self.length is None and on_first_rank(self._has_seen_enough):
            self._choose(engine)
        if now - self._noted >= _NOTE_EVERY:
            self._note()

    def _has_seen_enough(self) -> bool:
        count, seconds = self.stopwatch.measured
        if count >= _MEASURED and seconds >= min(_SHARE * self.limit, _SECONDS):
            return True
        since = self.clock() - (self.stopwatch.began or 0.0)
        too_long = since >= (_LONG if count else _VERY_LONG) * self.limit
        return (too_long and len(self.stopwatch.slow) > 1) or self.left <= 0

    def _end_epoch(self, engine: Any) -> None:
        """Look at an epoch before it is validated, as it may be the last one."""
        self.stopwatch.end_epoch(self.clock(), engine.state.epoch_length)
        if self.length is not None:
            length = on_first_rank(lambda: self._again(Place(engine.state.epoch, 0)))
            if length != self.length:
                self._apply(length)
        self.stopwatch.begin_end(self.clock())

    # --- what is chosen

    def _resumed(self) -> Length | None:
        """What a training that goes on has to come; None if that is to be measured first."""
        epoch, left = self.trainer.state.epoch, self.left
        place = Place(epoch + 1, self.trainer.state.epoch_length)
        if self.length is None:
            if left > 0:
                return None
            if epoch:
                return Length(epoch + 1, place.iterations, self._interval)
            raise self._too_little(f"loading the data took {self.seconds:.0f} s")
        if epoch < self.length.epochs:
            return self._again(place)
        done, pace = replace(self.length, epochs=epoch), self.pace
        longer = fit(pace, done, place, left=left, limit=self.limit)
        return longer if _TOLERANCE * self.limit < remaining(pace, longer, place) <= left else done

    def _again(self, place: Place) -> Length:
        """What is to come by what is known now: the same, unless the prediction is off."""
        assert self.length is not None
        pace, left = self.pace, self.left
        if abs(remaining(pace, self.length, place) - left) > _TOLERANCE * self.limit:
            return fit(pace, self.length, place, left=left, limit=self.limit)
        return spaced(pace, self.length, self.limit)

    def _choose(self, engine: Any) -> None:
        """Choose for the first time, after an iteration of any epoch."""
        self.known, length = on_first_rank(lambda: self._first_choice(engine))
        if length.iterations != engine.state.epoch_length:
            self._cut(length.iterations)
            self._within_whole_epoch = True
        self._apply(length)

    def _first_choice(self, engine: Any) -> tuple[Pace, Length]:
        epoch, whole, left = engine.state.epoch, engine.state.epoch_length, self.left
        within, iteration = (engine.state.iteration - 1) % whole + 1, self.stopwatch.iteration
        validation = iteration * _FORWARD * self._size_of_validation(engine.state.batch)
        known = Pace(iteration, 0.0, validation, validation)
        pace = self.stopwatch.pace(known)
        if engine.state.iteration + (left - validation) / iteration < _LEAST:
            least = (self.seconds + _LEAST * iteration + validation) / 60
            raise self._too_little(f"a batch takes {iteration:.2g} s", f", at least {math.ceil(10 * least) / 10:g}")
        iterations = whole
        if epoch == 1 and self._can_cut():
            iterations = shortened(pace, whole, done=within, left=left, multiple=self.per_step)
        length, place = Length(0, iterations, self._interval), Place(epoch, iterations - within)
        return known, fit(pace, length, place, left=left, limit=self.limit)

    def _apply(self, length: Length) -> None:
        before, self.length = self.length, length
        self.trainer.state.max_epochs = length.epochs
        self._stretch(length.epochs)
        self._space(length.interval)
        epoch = length.iterations * on_first_rank(lambda: self.pace.iteration)
        apart = math.floor(min(_LOST * self.limit, _LOST_SECONDS) / epoch)
        self.parts.checkpoints.every = max(self._every, apart)
        if before is None or before.epochs != length.epochs:
            self._say(first=before is None)
        self._note()

    def _stretch(self, epochs: int) -> None:
        self.parts.schedule.stretch(epochs * math.ceil(self.trainer.state.epoch_length / self.per_step))
        self.parts.schedule.place(self.trainer)

    def _space(self, interval: int) -> None:
        for part in (self.parts.validation, *self.parts.others):
            if hasattr(part, "interval"):
                part.interval = interval

    def _can_cut(self) -> bool:
        loader = self.trainer.data_loader
        return loader.sampler is self.parts.sampler and bool(loader.batch_size)

    def _cut(self, iterations: int) -> None:
        self.parts.sampler.cut(iterations * self.trainer.data_loader.batch_size)
        self.trainer.state.epoch_length = iterations

    def _size_of_validation(self, batch: Any) -> float:
        """How much a validation looks at, in batches of training."""
        evaluators = [self.parts.validation.evaluator, self.parts.validation.training]
        loaders = [evaluator.data_loader for evaluator in evaluators if evaluator is not None]
        numbers = [_numbers(loader.dataset[draw]) for loader in loaders for draw in [*loader.sampler][:1]]
        draws = [len(loader.sampler) for loader in loaders if len(loader.sampler)]
        return sum(map(math.prod, zip(draws, numbers, strict=True))) / max(1, _numbers(batch))

    # --- what is said

    def say_end(self) -> None:
        """Say how much of the time was used, where there is a budget."""
        if self.minutes is not None:
            _logger.info("%s: took %.1f of %s", self.folder.name, self.seconds / 60, in_minutes(self.minutes))

    def _say(self, *, first: bool) -> None:
        assert self.length is not None and self.minutes is not None
        if not is_first_rank():
            return
        name, step = self.folder.name, f"{self.pace.iteration * self.per_step:.2g} s a step"
        if not first:
            said = "%s: %s; the number of epochs that fits into %s is now %d"
            _logger.debug(said, name, step, in_minutes(self.minutes), self.length.epochs)
            return
        steps, whole = (math.ceil(count / self.per_step) for count in (self.length.iterations, self.whole))
        of = f" of the {whole} of a pass through the data" if self.is_cut else ""
        said = "%s: %s, %d steps%s an epoch; %d epochs fit into what is left of %s"
        _logger.info(said, name, step, steps, of, self.length.epochs - self._begun, in_minutes(self.minutes))

    def _note(self) -> None:
        """Write ``budget.json``."""
        if self.minutes is None or not is_first_rank():
            return
        self._noted = self.clock()
        chosen = {}
        if self.length is not None:
            chosen = {
                "seconds_per_step": round(self.pace.iteration * self.per_step, 4),
                "steps_per_epoch": math.ceil(self.length.iterations / self.per_step),
                "steps_per_pass": math.ceil(self.whole / self.per_step),
                "epochs": self.length.epochs,
                "val_interval": self.length.interval,
                "checkpoint_every": self.parts.checkpoints.every,
            }
        write_json(self.folder.path / BUDGET, {"minutes": self.minutes, "seconds": round(self.seconds, 1), **chosen})

    def _too_little(self, reason: str, least: str = "") -> FibldmError:
        assert self.minutes is not None
        return FibldmError(
            f"{in_minutes(self.minutes)} must leave time for at least {_LEAST} batches of training; {reason}",
            f"give more minutes{least}",
        )


def in_minutes(minutes: float) -> str:
    """A number of minutes, as it is said."""
    return "1 minute" if minutes == 1 else f"{minutes:.4g} minutes"


def _numbers(item: Any) -> int:
    """How many numbers an item or a batch holds."""
    return sum(value.numel() for value in item.values() if isinstance(value, Tensor))
