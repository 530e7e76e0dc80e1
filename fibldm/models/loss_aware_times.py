"""Times of training that follow the loss: more often where it is large, with weights that leave the objective alone."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.timesteps import ShiftedTimes, TrainingTimes, shifted


class LossAwareTimes:
    """Importance sampling by the second moment of the loss (Nichol & Dhariwal 2021, section 3.3).

    ``p(bin) ~ sqrt(E[L^2])`` over the last losses of a bin, mixed with a uniform share; until every bin has its
    history, times are `UniformTimes` to the bit. The loss of a sample weighs ``1 / (bins p)``, so that what is
    minimised is still the mean over uniform times, with less noise in its gradient. There a bin is one of the steps of
    the process; here, where time is continuous, it is one of equal pieces of (0, 1], in which times are uniform.

    A time is one number of the sample's own generator, through the inverse of the distribution function, which is
    continuous: losses that differ by rounding, as on several ranks, move times by rounding.

    Args:
        bins: pieces of (0, 1].
        history: losses that each of them keeps.
        uniform_share: of the samples that are drawn uniformly, in (0, 1], so that no bin is forgotten.

    Raises:
        FibldmError: a number is out of range.
    """

    def __init__(self, *, bins: int = 50, history: int = 10, uniform_share: float = 0.001) -> None:
        if bins < 1 or history < 1:
            raise FibldmError(f"bins and history of LossAwareTimes must be at least 1; got {bins} and {history}")
        if not 0 < uniform_share <= 1:
            raise FibldmError(
                f"uniform_share of LossAwareTimes must be above 0 and at most 1; got {uniform_share}", "0.001 is usual"
            )
        self.bins, self.uniform_share = bins, uniform_share
        self._losses = torch.zeros(bins, history, dtype=torch.float64)
        self._counts = torch.zeros(bins, dtype=torch.long)
        self._place()

    @property
    def is_warm(self) -> bool:
        """Whether every bin has its history."""
        return bool((self._counts == self._losses.shape[1]).all())

    @property
    def probabilities(self) -> Tensor:
        """Of the bins, float64, shape (bins,)."""
        return self._chances.clone()

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times in (0, 1], float32 on the CPU, shape (n,)."""
        level = 1 - torch.rand(n, generator=generator)
        if not self.is_warm:
            return level
        place = torch.searchsorted(self._ends, level.double()).clamp(max=self.bins - 1)
        within = 1 - (self._ends[place] - level.double()) / self._chances[place]
        t = (place + within.clamp(0, 1)) / self.bins
        return t.float().clamp(min=torch.finfo(torch.float32).tiny, max=1)

    def importance(self, t: Tensor) -> Tensor:
        """``1 / (bins p)``, by which the loss at times ``t`` (B,) weighs; float32, shape (B,)."""
        return (1 / (self.bins * self._chances[self._bin(t)])).float()

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses, without their `importance`, of samples at times ``t``, one after the other; both (B,)."""
        for place, loss in zip(self._bin(t).tolist(), losses.tolist(), strict=True):
            kept, count = self._losses[place], int(self._counts[place])
            if count == len(kept):
                kept[:-1] = kept[1:].clone()
            self._counts[place] = min(count + 1, len(kept))
            kept[self._counts[place] - 1] = loss
        self._place()

    def state_dict(self) -> dict[str, Tensor]:
        """The losses of every bin, oldest first, and how many there are."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            FibldmError: it is of other numbers of bins or losses.
        """
        if state["losses"].shape != self._losses.shape:
            raise FibldmError(
                f"the losses of LossAwareTimes must be (bins, history) {tuple(self._losses.shape)}; the checkpoint has "
                f"{tuple(state['losses'].shape)}",
                "keep the numbers that the stage was begun with, or give --restart",
            )
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()
        self._place()

    def _bin(self, t: Tensor) -> Tensor:
        """Of times (B,); bin ``i`` is ``(i / bins, (i + 1) / bins]``."""
        return ((t.double() * self.bins).ceil().long() - 1).clamp(0, self.bins - 1)

    def _place(self) -> None:
        moments = self._losses.square().mean(dim=1).sqrt()
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if self.is_warm and float(moments.sum()) > 0:
            self._chances = torch.lerp(moments / moments.sum(), uniform, self.uniform_share)
        else:
            self._chances = uniform
        self._ends = self._chances.cumsum(0)


class Following(NamedTuple):
    """Loss-aware times, as they are told of times that were shifted after they were drawn.

    Attributes:
        times: that follow the loss.
        shift: of `shifted`, by which all that they draw is moved.
    """

    times: LossAwareTimes
    shift: float

    def importance(self, t: Tensor) -> Tensor:
        """As `LossAwareTimes.importance`."""
        return self.times.importance(shifted(t, 1 / self.shift))

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """As `LossAwareTimes.observe`."""
        self.times.observe(shifted(t, 1 / self.shift), losses)


def following(times: TrainingTimes) -> Following | None:
    """What of the times of a training follows the loss; None where nothing does."""
    shift = 1.0
    while isinstance(times, ShiftedTimes):
        shift, times = shift * times.shift, times.times
    return Following(times, shift) if isinstance(times, LossAwareTimes) else None
