"""How long a training will take, of what its parts were seen to take; and how much of it fits into a time."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

_EPOCHS = 20  # of which one is at most a twentieth of the time: a training ends with an epoch
_VALIDATIONS = 10
_FEW, _MANY = 5, 15
_VALIDATION_SHARE = 0.1
_MUCH_VALIDATION = 0.15  # of an interval that stays as it is: the share above, and the noise of what was measured
_SLACK = 0.25  # of an epoch, by which a training may end late rather than early
_INSTANT = 1e-6

_SLOW = 2  # first iterations of a process, which also allocate, compile or choose algorithms
_SEEN_ENDS = 20  # the last of them are looked at
_SEEN_VALIDATIONS = 5


@dataclass(frozen=True)
class Pace:
    """What the parts of a training take, in seconds.

    Attributes:
        iteration: a batch, with its loading.
        plain: the end of an epoch without validation: checkpoint, metrics.
        validated: the same with validation; not less.
        last: the end of the last epoch, with pictures, and of the stage, which reads its best weights.
    """

    iteration: float = _INSTANT
    plain: float = 0.0
    validated: float = 0.0
    last: float = 0.0


@dataclass(frozen=True)
class Length:
    """How long a training is.

    Attributes:
        epochs: of it.
        iterations: of an epoch.
        interval: epochs between two validations; the last epoch is validated in any case.
    """

    epochs: int
    iterations: int
    interval: int

    def validations(self, epoch: int = 1) -> int:
        """How many there are from the end of an epoch on."""
        return self.epochs // self.interval - (epoch - 1) // self.interval + (self.epochs % self.interval > 0)

    def validates(self, epoch: int) -> bool:
        """Whether a validation follows an epoch."""
        return epoch % self.interval == 0 or epoch == self.epochs


@dataclass(frozen=True)
class Place:
    """Where a training is.

    Attributes:
        epoch: the one whose end comes next, from 1.
        iterations: of it that are still to come.
    """

    epoch: int
    iterations: int


def remaining(pace: Pace, length: Length, place: Place) -> float:
    """Seconds from a place to the end of the stage; 0 where all epochs are done."""
    if place.epoch > length.epochs:
        return 0.0
    more, validations = length.epochs - place.epoch, length.validations(place.epoch)
    return (
        (more * length.iterations + place.iterations) * pace.iteration
        + (more + 1 - validations) * pace.plain
        + (validations - 1) * pace.validated
        + pace.last
    )


def fit(pace: Pace, length: Length, place: Place, *, left: float, limit: float) -> Length:
    """As many epochs as fit, and the interval of their validations.

    Args:
        pace: what the parts take.
        length: of now; its iterations stay.
        place: where the training is; the epoch that runs is done in any case.
        left: seconds from now.
        limit: seconds of all of the training.
    """
    fitted = _fitted(pace, length, place, left)
    for _ in range(3):  # more validations are fewer epochs
        interval = spaced(pace, replace(fitted, interval=length.interval), limit).interval
        fitted = _fitted(pace, replace(fitted, interval=interval), place, left)
    return fitted


def spaced(pace: Pace, length: Length, limit: float) -> Length:
    """The same with another interval, unless it gives 5 to 15 validations that take about a tenth of the time or less.

    Args:
        pace: what the parts take.
        length: with the interval of now.
        limit: seconds of all of the training.
    """
    wanted, most = (
        max(1, int(share * limit / max(_INSTANT, pace.validated))) for share in (_VALIDATION_SHARE, _MUCH_VALIDATION)
    )
    if min(_FEW, most, length.epochs) <= length.validations() <= min(_MANY, most):
        return length
    number = min(_VALIDATIONS, wanted)
    # no multiple is the last epoch: one epoch more would then be another validation, too
    return replace(length, interval=length.epochs // number + 1 if number > 1 else 2 * length.epochs)


def shortened(pace: Pace, iterations: int, *, done: int, left: float, multiple: int = 1) -> int:
    """Iterations of an epoch, of which at least 20 fit.

    Args:
        pace: what the parts take.
        iterations: of a pass through the data, which is not made longer.
        done: iterations of this epoch that are done; it cannot be shorter.
        left: seconds from now.
        multiple: an epoch has a multiple of so many iterations, where several make a step.
    """
    fitting = done + (left * (1 - _VALIDATION_SHARE) - pace.last) / pace.iteration
    wanted = max(1, done, math.floor(fitting / _EPOCHS))
    return min(iterations, math.ceil(wanted / multiple) * multiple)


def _fitted(pace: Pace, length: Length, place: Place, left: float) -> Length:
    epoch = length.iterations * pace.iteration
    choices = range(place.epoch, place.epoch + max(0, math.floor(left / epoch)) + 2)

    def seconds(epochs: int) -> float:
        return remaining(pace, replace(length, epochs=epochs), place)

    epochs = choices[max(0, bisect_right(choices, left + _SLACK * epoch, key=seconds) - 1)]
    return replace(length, epochs=epochs)


class Stopwatch:
    """What the parts of a training took so far in this process.

    Args:
        window: seconds of training that are looked at, the last ones: a machine may become slower or faster.

    Attributes:
        began: when the first epoch began; None before.
        slow: seconds of the first two iterations, which are slower.
        measured: number of the others, and their seconds.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self.began: float | None = None
        self.slow: list[float] = []
        self.measured = (0, 0.0)
        self._epochs: list[tuple[int, float]] = []
        self._plain: list[float] = []
        self._validated: list[float] = []
        self._began = self._last = 0.0
        self._ended: float | None = None

    def begin_epoch(self, now: float, *, validated: bool) -> None:
        """An epoch begins, and what ended the one before is over, which was validated or not."""
        if self._ended is not None:
            (self._validated if validated else self._plain).append(now - self._ended)
        self._began = self._last = now
        self.began = now if self.began is None else self.began

    def see_iteration(self, now: float) -> None:
        """An iteration is done."""
        seconds, self._last = now - self._last, now
        if len(self.slow) < _SLOW:
            self.slow.append(seconds)
        else:
            self.measured = (self.measured[0] + 1, self.measured[1] + seconds)

    def end_epoch(self, now: float, iterations: int) -> None:
        """The iterations of an epoch are done."""
        seconds = now - self._began
        if not self._epochs and iterations > _SLOW:
            seconds, iterations = seconds - sum(self.slow), iterations - _SLOW
        self._epochs.append((iterations, seconds))

    def begin_end(self, now: float) -> None:
        """What ends an epoch begins: validation, metrics, checkpoint."""
        self._ended = now

    @property
    def iteration(self) -> float:
        """Seconds of one, since the start; of a slow one where there are no others."""
        count, seconds = self.measured
        return max(_INSTANT, seconds / count if count else self.slow[-1])

    def pace(self, known: Pace) -> Pace:
        """What the parts take, by what was seen last; by what was known before where nothing was seen.

        Pictures are drawn after few of the validations, and after the last one.
        """
        plain = _mean(self._plain[-_SEEN_ENDS:], known.plain)
        validated = sorted(self._validated[-_SEEN_VALIDATIONS:])
        return Pace(
            iteration=self._recent(known.iteration),
            plain=plain,
            validated=_mean(validated[:-1] or validated, max(plain, known.validated)),
            last=max(self._validated) + plain if validated else max(plain, known.last),
        )

    def _recent(self, known: float) -> float:
        count, seconds = 0, 0.0
        for more, took in reversed(self._epochs):
            count, seconds = count + more, seconds + took
            if seconds >= self.window:
                break
        return max(_INSTANT, seconds / count) if count else known


def _mean(values: Sequence[float], known: float) -> float:
    return sum(values) / len(values) if values else known
