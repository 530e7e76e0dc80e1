"""Times of a diffusion process: drawn for training, fixed for validation, decreasing from 1 to 0 for sampling."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice

Spacing = Literal["uniform", "quadratic"]


class TrainingTimes(Protocol):
    """Whatever draws the times of a training batch."""

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times in (0, 1], float32 on the CPU, shape (n,)."""
        ...


@dataclass(frozen=True)
class UniformTimes:
    """Every time in (0, 1] alike, as in DDPM (Ho et al. 2020, algorithm 1) at continuous time."""

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times in (0, 1], float32 on the CPU, shape (n,)."""
        return 1 - torch.rand(n, generator=generator)


@dataclass(frozen=True)
class LogitNormalTimes:
    """``logit(t) ~ N(mean, std^2)``: more often the middle, where rectified flow is hard (Esser et al. 2024, eq. 19).

    Args:
        mean: of the logit; above 0 prefers noise.
        std: of the logit, above 0.

    Raises:
        FibldmError: ``std`` is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise FibldmError(f"std of LogitNormalTimes must be above 0; got {self.std}", "1.0 is usual")

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times in (0, 1], float32 on the CPU, shape (n,)."""
        logit = self.mean + self.std * torch.randn(n, generator=generator)
        return logit.sigmoid().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class GridTimes:
    """The midpoints ``(index + 0.5) / count``: a validation loss over them has no noise of the time's own.

    Args:
        count: number of times.

    Raises:
        FibldmError: ``count`` is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FibldmError(f"count of GridTimes must be at least 1; got {self.count}")

    def at(self, index: int) -> Tensor:
        """The time of case ``index``, going round the grid; float32, shape (1,)."""
        return torch.tensor([(index % self.count + 0.5) / self.count])

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times of the grid, each drawn alike, float32 on the CPU, shape (n,)."""
        return (torch.randint(self.count, (n,), generator=generator) + 0.5) / self.count


def sampling_times(steps: int, *, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
    """The times a sampler visits, from exactly 1 down to exactly 0.

    ``t' = s t / (1 + (s - 1) t)`` moves them towards noise for ``s > 1``, as larger latents need (Esser et al. 2024,
    eq. 23).

    Args:
        steps: number of steps.
        spacing: ``uniform`` in t, or ``quadratic`` (t squared: denser near the data, the better choice on
            variance-preserving processes, where sigma grows like sqrt(t) and uniform times make every sampler first
            order).
        shift: ``s`` above; 1 leaves the times.

    Returns:
        Strictly decreasing times, float64, shape (steps + 1,).

    Raises:
        FibldmError: ``steps`` or ``shift`` is out of range, or the spacing is unknown.
    """
    if spacing not in get_args(Spacing):
        raise unknown_choice("spacing", spacing, get_args(Spacing))
    if steps < 1 or not shift > 0:
        raise FibldmError(f"sampling needs steps >= 1 and shift > 0; got steps {steps}, shift {shift}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    t = t**2 if spacing == "quadratic" else t
    return t / (t + (1 - t) / shift)  # the docstring's fraction, in the form that is exact at both ends
