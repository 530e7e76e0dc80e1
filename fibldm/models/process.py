"""Diffusion processes: how a latent becomes noise, what a network may learn of it, and the way back to the latent.

A process is a pair of functions of time, ``z_t = alpha(t) z_0 + sigma(t) eps`` with ``eps ~ N(0, I)``, ``t`` in
``[0, 1]``, 0 = data, 1 = noise. Its objects are frozen: no call, whatever its precision, changes the schedule.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.schedules import DEFAULT_BETAS, Schedule, betas
from fibldm.models.transfer import to_device

Target = Literal["epsilon", "sample", "v", "flow"]
TimeInput = Literal["time", "alpha", "log_snr"]
Variance = Literal["free", "interpolated"]
"""What the second half of 2C channels says: ``log Var[target | z_t]``, or the share of `Prediction.interpolation`."""

SMALLEST_ALPHA = 1e-3  # below it, dividing by alpha turns a network's 1 % error in eps into ten times the signal
LOG_SNR_LIMIT = 20.0  # of the time input only: at both ends of a process log SNR may be infinite


class Prediction(NamedTuple):
    """What a denoiser says of the latent behind ``z_t``.

    Attributes:
        z_0: expected latent ``E[z_0 | z_t]``, shape (B, C, x, y, z).
        log_variance: elementwise ``log Var[z_0 | z_t]``, same shape; ``None`` where it is not learned. It belongs to
            ``z_0``, not to one step of one grid, so that every grid of sampling times can use it.
        interpolation: elementwise share ``v`` in [0, 1] of the way from the posterior's variance of a step, whichever
            step, to that of the forward process, in logarithms (Nichol & Dhariwal 2021, eq. 15); same shape, or
            ``None``.
    """

    z_0: Tensor
    log_variance: Tensor | None = None
    interpolation: Tensor | None = None


class Process(ABC):
    """A Gaussian diffusion process and the targets that are regular on it."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the latent at ``t`` in [0, 1], any shape; float32, or float64 where ``t`` is."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at ``t`` in [0, 1], any shape; float32, or float64 where ``t`` is."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The time input of a network trained on this process, same shape as ``t``; need not be whole."""

    def diffuse(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``z_t = alpha z_0 + sigma eps`` in the dtype of ``z_0``.

        Args:
            z_0: latent, shape (B, C, x, y, z).
            noise: standard normal, same shape.
            t: times in [0, 1], shape (B,), there or on the CPU.
        """
        alpha, sigma = self._coefficients(t, z_0)
        return (alpha * z_0 + sigma * noise).to(z_0.dtype)

    @property
    def sampling_spacing(self) -> Literal["uniform", "quadratic"]:
        """The grid of sampling times on which few steps lose least, see `timesteps.sampling_times`."""
        return "uniform"

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets from which ``z_0`` can be recovered at every time in (0, 1]."""
        return get_args(Target) if self._alpha_at_one >= SMALLEST_ALPHA else get_args(Target)[1:]

    def check_target(self, kind: str) -> None:
        """Refuse a target that is unknown, or singular on this process.

        Raises:
            FibldmError: with the choices and the reason.
        """
        if kind not in get_args(Target):
            raise unknown_choice("target", kind, self.targets)
        if kind not in self.targets:
            raise FibldmError(
                f"target {kind!r} needs alpha(1) >= {SMALLEST_ALPHA:g}, since z_0 = (z_t - sigma eps) / alpha; "
                f"{type(self).__name__} has alpha(1) = {self._alpha_at_one:.1e}",
                f"choose v or flow (regular here: {', '.join(self.targets)})",
            )

    def target(self, kind: Target, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network has to say at ``z_t``, in the dtype of ``z_0``.

        ``epsilon`` is the noise (Ho et al. 2020, eq. 14), ``sample`` is ``z_0``, ``v = alpha eps - sigma z_0``
        (Salimans & Ho 2022, section 4), ``flow = eps - z_0`` (Liu et al. 2023, eq. 1, with time from data to noise).

        Args:
            kind: one of ``targets``.
            z_0: latent, shape (B, C, x, y, z).
            noise: the noise of ``diffuse``, same shape.
            t: times in [0, 1], shape (B,), there or on the CPU.

        Raises:
            FibldmError: the target is unknown or singular on this process.
        """
        self.check_target(kind)
        alpha, sigma = self._coefficients(t, z_0)
        match kind:
            case "epsilon":
                return noise.to(z_0.dtype)
            case "sample":
                return z_0
            case "v":
                return (alpha * noise - sigma * z_0).to(z_0.dtype)
            case "flow":
                return (noise - z_0).to(z_0.dtype)

    def to_z_0(self, kind: Target, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of ``target``: the latent that a network's output stands for, in the dtype of ``z_t``.

        Args:
            kind: one of ``targets``.
            output: of the network, shape (B, C, x, y, z).
            z_t: its input, same shape.
            t: times in (0, 1], shape (B,).

        Raises:
            FibldmError: the target is unknown or singular on this process.
        """
        self.check_target(kind)
        alpha, sigma = self._coefficients(t, z_t)
        match kind:
            case "epsilon":
                return ((z_t - sigma * output) / alpha).to(z_t.dtype)
            case "sample":
                return output.to(z_t.dtype)
            case "v":
                return ((alpha * z_t - sigma * output) / (alpha**2 + sigma**2)).to(z_t.dtype)
            case "flow":
                return ((z_t - sigma * output) / (alpha + sigma)).to(z_t.dtype)

    def output_scale(self, kind: Target, t: Tensor) -> Tensor:
        """``|d z_0 / d output|``: by how much an error of the network's output is one of ``z_0``, shape of ``t``.

        Args:
            kind: one of ``targets``.
            t: times in [0, 1], any shape.

        Raises:
            FibldmError: the target is unknown or singular on this process.
        """
        self.check_target(kind)
        alpha, sigma = self.alpha(t), self.sigma(t)
        match kind:
            case "epsilon":
                return sigma / alpha
            case "sample":
                return torch.ones_like(sigma)
            case "v":
                return sigma / (alpha**2 + sigma**2)
            case "flow":
                return sigma / (alpha + sigma)

    def _time_input(self, kind: TimeInput, t: Tensor, own: Tensor) -> Tensor:
        """The process's ``own`` time, or a measure of the noise in the same range, which DDPM's embeddings resolve.

        ``1000 alpha`` is the noise level of Chen et al. 2021 (WaveGrad) in that range; the log SNR of Kingma et al.
        2021 (Variational diffusion models) goes from [20, -20] to [0, 1000].
        """
        match kind:
            case "time":
                value = own
            case "alpha":
                value = 1000 * self.alpha(t.double())
            case "log_snr":
                log_snr = 2 * (self.alpha(t.double()).log() - self.sigma(t.double()).log())
                value = 500 * (1 - log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT) / LOG_SNR_LIMIT)
        return _rounded(value, t)

    @cached_property
    def _alpha_at_one(self) -> float:
        return float(self.alpha(torch.ones((), dtype=torch.float64)))

    def _coefficients(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at ``t`` (B,) on the device of ``z``, shaped to multiply ``z``.

        They are computed where ``t`` is: times on the CPU give the same numbers whatever the device of ``z``.
        """
        shape = (-1,) + (1,) * (z.ndim - 1)
        alpha, sigma = (to_device(values, z.device).reshape(shape) for values in (self.alpha(t), self.sigma(t)))
        return alpha, sigma


@dataclass(frozen=True)
class VariancePreserving(Process):
    """The process of DDPM, ``alpha^2 + sigma^2 = 1``, at continuous time (Ho et al. 2020, eq. 4).

    ``alpha^2`` is the cumulative product of ``1 - beta_i`` at ``t = i / steps`` and 1 at ``t = 0``; in between its
    logarithm is linear. Index ``i - 1`` of the usual tables, which start at 0, is the network's time input.

    Args:
        schedule: ``linear``, ``scaled_linear``, ``cosine`` or ``sigmoid``, see `fibldm.models.schedules.betas`.
        steps: number of betas.
        beta_start: first beta; ``None`` is the schedule's own. Not for ``cosine``.
        beta_end: last beta; ``None`` is the schedule's own. Not for ``cosine``.
        zero_terminal_snr: shift and scale alpha so that ``alpha(1) = 0`` (Lin et al. 2024, algorithm 1).
        time_input: what the network is told of ``t``: ``time`` (the index), ``alpha`` (the square root of alpha-bar)
            or ``log_snr``.

    Raises:
        FibldmError: the schedule or time input is unknown, or the numbers of the schedule cannot be.
    """

    schedule: Schedule = "scaled_linear"
    steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    time_input: TimeInput = "time"

    def __post_init__(self) -> None:
        _check_time_input(self.time_input)
        if self.schedule not in get_args(Schedule):
            raise unknown_choice("schedule", self.schedule, get_args(Schedule))
        if self.steps < 2:
            raise FibldmError(f"steps of the schedule must be at least 2; got {self.steps}", "1000 is usual")
        if self.schedule == "cosine" and (self.beta_start, self.beta_end) != (None, None):
            raise FibldmError(
                f"the cosine schedule has no beta_start and beta_end; got {self.beta_start} and {self.beta_end}",
                "leave them out",
            )
        start, end = self._beta_range
        if not 0 < start <= end < 1:
            raise FibldmError(
                f"betas must hold 0 < beta_start <= beta_end < 1; got {start} and {end}",
                f"the usual ones of {self.schedule} are {DEFAULT_BETAS[self.schedule]}",
            )

    def alpha(self, t: Tensor) -> Tensor:
        return _rounded(self._log_alpha(t).exp(), t)

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - alpha^2 would lose half the digits near t = 0.
        return _rounded(torch.expm1(2 * self._log_alpha(t)).abs().sqrt(), t)

    @property
    def sampling_spacing(self) -> Literal["uniform", "quadratic"]:
        """Quadratic: the schedule changes fastest near t = 0."""
        return "quadratic"

    def network_time(self, t: Tensor) -> Tensor:
        """Index into the table of betas, ``steps t - 1`` in [0, steps - 1]; or see ``time_input``."""
        return self._time_input(self.time_input, t, own=(self.steps * t.double() - 1).clamp(min=0))

    @property
    def _beta_range(self) -> tuple[float, float]:
        start, end = DEFAULT_BETAS.get(self.schedule, (1e-4, 0.999))
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    @cached_property
    def _knots(self) -> Tensor:
        """``log alpha`` at ``t = i / steps``, i = 0 … steps, before any shift; float64, shape (steps + 1,)."""
        values = betas(self.schedule, self.steps, *self._beta_range)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-values).cumsum(0) / 2])

    def _log_alpha(self, t: Tensor) -> Tensor:
        knots = to_device(self._knots, t.device)
        position = (self.steps * t.double()).clamp(0, self.steps)
        left = position.long().clamp(max=self.steps - 1)
        log_alpha = torch.lerp(knots[left], knots[left + 1], position - left)
        if not self.zero_terminal_snr:
            return log_alpha
        # Lin et al. 2024 keep alpha_1, so that the first interval, which leads to alpha = 1, stays as it is.
        shifted = log_alpha + _log_one_minus_exp(knots[-1] - log_alpha) - _log_one_minus_exp(knots[-1] - knots[1])
        return torch.where(position > 1, shifted, log_alpha)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight line from data to noise, ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2023, eq. 1).

    Args:
        time_input: what the network is told of ``t``: ``time`` (1000 t), ``alpha`` or ``log_snr``.

    Raises:
        FibldmError: the time input is unknown.
    """

    time_input: TimeInput = "time"

    def __post_init__(self) -> None:
        _check_time_input(self.time_input)

    def alpha(self, t: Tensor) -> Tensor:
        return _rounded(1 - t.double(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return _rounded(t.double(), t)

    def network_time(self, t: Tensor) -> Tensor:
        """``1000 t``, so that the sinusoidal embeddings of DDPM networks resolve it; or see ``time_input``."""
        return self._time_input(self.time_input, t, own=1000 * t.double())


def _check_time_input(kind: str) -> None:
    if kind not in get_args(TimeInput):
        raise unknown_choice("time_input", kind, get_args(TimeInput))


def _log_one_minus_exp(x: Tensor) -> Tensor:
    return torch.log(-torch.expm1(x))


def _rounded(value: Tensor, t: Tensor) -> Tensor:
    """``value`` in the dtype of ``t``, but never below float32."""
    return value.to(torch.promote_types(t.dtype, torch.float32))
