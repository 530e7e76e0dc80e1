"""Times of a diffusion process: drawn and weighted for training, fixed for validation, decreasing for sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.process import Process, Target

# Cells of the 32 x 32 latents with which Esser et al. 2024 found how times are best drawn without a shift.
BASE_CELLS = 1024

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
class ShiftedTimes:
    """Times of another kind, moved towards noise as `shifted` does.

    Args:
        times: draws them.
        shift: above 1 moves them towards noise, 1 leaves them as they are.

    Raises:
        FibldmError: ``shift`` is not positive.
    """

    times: TrainingTimes
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def sample(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """``n`` times in (0, 1], float32 on the CPU, shape (n,)."""
        return shifted(self.times.sample(generator, n), self.shift)


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


def shifted(t: Tensor, shift: float) -> Tensor:
    """``t' = s t / (1 + (s - 1) t)``: as much is lost of a larger latent at ``t'`` as of a smaller one at ``t``.

    Neighbouring cells are alike, so that the more of them there are, the more noise it takes to hide them (Esser et al.
    2024, eq. 23).

    Args:
        t: times in [0, 1], any shape.
        shift: ``s``; above 1 moves the times towards noise, 1 leaves them as they are to the bit.
    """
    return t / (t + (1 - t) / shift)  # the docstring's fraction, in the form that is exact at both ends


def resolution_shift(cells: int, base_cells: int = BASE_CELLS) -> float:
    """The shift for latents of ``cells`` cells where ``base_cells`` need none (Esser et al. 2024, section 5.3.2).

    The square root of their ratio: the mean of n noisy cells tells a constant latent with a standard deviation of
    ``sigma / sqrt(n)``, in any number of dimensions.

    Raises:
        FibldmError: a number of cells is not positive.
    """
    if cells < 1 or base_cells < 1:
        raise FibldmError(f"a time shift needs at least 1 cell; got {cells}, and {base_cells} to compare with")
    return math.sqrt(cells / base_cells)


def time_shift(
    given: float | Literal["auto"], *, size: Sequence[int], compression: Sequence[int], base_cells: int = BASE_CELLS
) -> float:
    """The shift that a configuration asks for: a number, or ``auto`` for that of the latents' resolution.

    Args:
        given: the number or ``auto``.
        size: of the model grid in voxels.
        compression: voxels per latent cell along each axis.
        base_cells: see `resolution_shift`.

    Raises:
        FibldmError: it is neither, or not positive.
    """
    if given == "auto":
        return resolution_shift(math.prod(size) // math.prod(compression), base_cells)
    check_shift(given)
    return float(given)


def min_snr_weight(process: Process, target: Target, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of the squared error of a network's output (Hang et al. 2023, section 3.4).

    The squared error of ``z_0`` weighs ``min(SNR, gamma)``, ``SNR = alpha^2 / sigma^2``; the output's error times
    ``|d z_0 / d output|`` is that error. So it is ``min(SNR, gamma) / SNR`` for epsilon and, on a variance-preserving
    process, ``min(SNR, gamma) / (SNR + 1)`` for v; finite at every time of a target that is regular.

    Args:
        process: of the network.
        target: what its output means.
        t: times in (0, 1], any shape.
        gamma: the largest weight of an error of ``z_0``; 5 in the paper.

    Returns:
        The weight, at least 0, shape of ``t``.

    Raises:
        FibldmError: ``gamma`` is not positive, or the target is unknown or singular on this process.
    """
    check_gamma(gamma)
    snr = (process.alpha(t) / process.sigma(t)).square()
    return snr.clamp(max=gamma) * process.output_scale(target, t).square()


def check_gamma(gamma: float) -> None:
    """Refuse a bound of the signal-to-noise ratio that is not positive.

    Raises:
        FibldmError: it is not.
    """
    if not gamma > 0:
        raise FibldmError(f"snr_gamma must be above 0; got {gamma}", "5 is usual, null weighs all times alike")


def sampling_times(steps: int, *, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
    """The times a sampler visits, from exactly 1 down to exactly 0.

    Args:
        steps: number of steps.
        spacing: ``uniform`` in t, or ``quadratic`` (t squared: denser near the data, the better choice on
            variance-preserving processes, where sigma grows like sqrt(t) and uniform times make every sampler first
            order).
        shift: moves them towards noise, see `shifted`; 1 leaves them.

    Returns:
        Strictly decreasing times, float64, shape (steps + 1,).

    Raises:
        FibldmError: ``steps`` or ``shift`` is out of range, or the spacing is unknown.
    """
    if spacing not in get_args(Spacing):
        raise unknown_choice("spacing", spacing, get_args(Spacing))
    if steps < 1:
        raise FibldmError(f"sampling needs steps >= 1; got {steps}")
    check_shift(shift)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shifted(t**2 if spacing == "quadratic" else t, shift)


def check_shift(shift: object) -> None:
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise FibldmError(f"a time shift must be a number above 0, or auto in a configuration; got {shift!r}")
