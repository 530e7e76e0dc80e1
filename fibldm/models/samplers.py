"""Samplers: from noise to a latent with a denoiser, on any process.

All share one signature, ``sample(denoise, z, times, *, process, generators, callback=None) -> z``, and one ordinary
differential equation: with ``y = z / sigma`` and ``kappa = alpha / sigma`` the probability flow is ``dy/dkappa = D``,
``D = E[z_0 | z_t]``. Written so, every step is regular at t = 1, even where alpha = 0, and the step to t = 0 is
``z = D``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.process import Prediction, Process

Denoise = Callable[[Tensor, Tensor], Prediction]
"""``(z_t, t) -> Prediction`` with z_t of shape (B, C, x, y, z) and t of shape (B,)."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Sampler(Protocol):
    """The one signature of all samplers.

    Args:
        denoise: says what latent is behind ``z_t``.
        z: start, ``z_t`` at the first of ``times``, shape (B, C, x, y, z); its dtype is kept.
        times: strictly decreasing in [0, 1], shape (steps + 1,), see ``timesteps.sampling_times``.
        process: the process of the denoiser.
        generators: one CPU generator per sample; deterministic samplers draw nothing from them.
        callback: called after each step with (steps done, steps in all); ``None`` for silence.

    Returns:
        ``z`` at the last of ``times``, shape (B, C, x, y, z).

    Raises:
        FibldmError: the times do not decrease in [0, 1], or generators and samples differ in number.
    """

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        times: Tensor,
        *,
        process: Process,
        generators: Sequence[torch.Generator],
        callback: Progress | None = None,
    ) -> Tensor: ...


@torch.no_grad()
def ddim(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    *,
    process: Process,
    generators: Sequence[torch.Generator] = (),
    callback: Progress | None = None,
    eta: float = 0.0,
) -> Tensor:
    """First order: deterministic for ``eta = 0``, ancestral for ``eta = 1`` (Song et al. 2021, eq. 12 and 16).

    The posterior of ``z_s`` runs from the true previous time ``t``, however far away. A learned variance of ``z_0`` is
    added to it (Bao et al. 2022, theorem 1); a learned share lies between the bounds of this very step, which are those
    of the respaced betas (Nichol & Dhariwal 2021, eq. 15 and 19). The last step adds no noise. See ``Sampler`` for
    arguments.

    Raises:
        FibldmError: as ``Sampler``, or ``eta`` is outside [0, 1].
    """
    _check_eta(eta)
    for step in _steps(times, process, callback):
        prediction = denoise(z, _batch_time(step.t, z))
        data = prediction.z_0
        if eta == 0 or step.sigma_s == 0:
            z = _advance(z, data, step)
            continue
        drawn = eta**2 * step.posterior_variance
        kept = math.sqrt(step.sigma_s**2 - drawn) / step.sigma_t
        data_weight = step.alpha_s - kept * step.alpha_t
        noise = _noise_like(z, generators) * _spread(drawn, eta * data_weight, step, prediction)
        z = kept * z + data_weight * data + noise
    return z


@torch.no_grad()
def heun(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    *,
    process: Process,
    generators: Sequence[torch.Generator] = (),
    callback: Progress | None = None,
) -> Tensor:
    """Second order, two calls a step: Heun's method for ``dy/dkappa = D``; the step to t = 0 is first order.

    After Karras et al. 2022, algorithm 1, who take it over ``1 / kappa``. See ``Sampler`` for arguments.
    """
    for step in _steps(times, process, callback):
        data = denoise(z, _batch_time(step.t, z)).z_0
        if step.sigma_s > 0:
            ahead = denoise(_advance(z, data, step), _batch_time(step.s, z)).z_0
            data = (data + ahead) / 2
        z = _advance(z, data, step)
    return z


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    *,
    process: Process,
    generators: Sequence[torch.Generator] = (),
    callback: Progress | None = None,
) -> Tensor:
    """Second order, one call a step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the step to t = 0 is first order.

    After a start with alpha = 0 the previous ``h`` is infinite, which makes the second step first order too. See
    ``Sampler`` for arguments.
    """
    previous: tuple[Tensor, float] | None = None
    for step in _steps(times, process, callback):
        data = denoise(z, _batch_time(step.t, z)).z_0
        if step.sigma_s == 0:
            z = _advance(z, data, step)
            continue
        guess = data
        if previous is not None:
            weight = step.h / (2 * previous[1])  # 1 / (2 r)
            guess = (1 + weight) * data - weight * previous[0]
        z, previous = _advance(z, guess, step), (data, step.h)
    return z


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ancestral": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def sampler(name: str, eta: float | None = None) -> Sampler:
    """The sampler of a name.

    Args:
        name: one of `SAMPLERS`.
        eta: of `ddim`, in [0, 1]; None takes the sampler as it is.

    Raises:
        FibldmError: no such sampler, or ``eta`` is out of range or given to a sampler without it.
    """
    if name not in SAMPLERS:
        raise unknown_choice("sampler", name, SAMPLERS)
    if eta is None:
        return SAMPLERS[name]
    _check_eta(eta)
    if name != "ddim":
        raise FibldmError(f"eta is for the sampler ddim only; got {eta} for {name}", "leave it out, or take ddim")
    return partial(ddim, eta=eta)


def calls(name: str, steps: int) -> int:
    """Calls of the denoiser that a sampler makes on ``steps`` steps down to t = 0.

    Raises:
        FibldmError: no such sampler.
    """
    return 2 * steps - 1 if sampler(name) is heun else steps


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, one generator per sample, so that a sample is the same in any batch.

    Args:
        shape: of one sample, (C, x, y, z).
        generators: on the CPU, so that a sample is also the same on any device.

    Returns:
        Float32 on the CPU, shape (B, C, x, y, z).
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


class _Step(NamedTuple):
    """A step from time ``t`` to ``s < t``, in double precision."""

    t: float
    alpha_t: float
    sigma_t: float
    s: float
    alpha_s: float
    sigma_s: float

    @property
    def posterior_variance(self) -> float:
        """Of ``q(z_s | z_t, z_0)`` (Kingma et al. 2021, appendix A.2)."""
        forward = self.sigma_t**2 - (self.alpha_t / self.alpha_s * self.sigma_s) ** 2
        return max(forward, 0.0) * (self.sigma_s / self.sigma_t) ** 2

    @property
    def h(self) -> float:
        """``lambda_s - lambda_t`` with ``lambda = log(alpha / sigma)``; infinite where alpha_t = 0."""
        if self.alpha_t == 0:
            return math.inf
        return math.log(self.alpha_s / self.sigma_s) - math.log(self.alpha_t / self.sigma_t)


def _steps(times: Tensor, process: Process, callback: Progress | None) -> Iterator[_Step]:
    times = times.detach().cpu().double()
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()) or times[0] > 1 or times[-1] < 0:
        raise FibldmError(
            f"sampling times must decrease strictly within [0, 1], at least two of them; got {times.tolist()}",
            "take them from fibldm.models.timesteps.sampling_times",
        )
    knots = zip(times.tolist(), process.alpha(times).tolist(), process.sigma(times).tolist(), strict=True)
    for done, (now, then) in enumerate(pairwise(knots), start=1):
        yield _Step(*now, *then)
        if callback is not None:
            callback(done, len(times) - 1)


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise FibldmError(f"eta must be in [0, 1]; got {eta}", "0 is deterministic DDIM, 1 is ancestral sampling")


def _advance(z: Tensor, data: Tensor, step: _Step) -> Tensor:
    """The first-order step ``y_s = y_t + (kappa_s - kappa_t) D``, which is deterministic DDIM."""
    ratio = step.sigma_s / step.sigma_t
    return ratio * z + (step.alpha_s - step.alpha_t * ratio) * data


def _spread(drawn: float, data_weight: float, step: _Step, prediction: Prediction) -> Tensor | float:
    """Standard deviation of ``z_s``: what the posterior draws and, where learned, what is unknown of ``z_0``."""
    if prediction.interpolation is not None:  # the forward variance is the posterior's times (sigma_t / sigma_s)^2
        return math.sqrt(drawn) * (step.sigma_t / step.sigma_s) ** prediction.interpolation
    if prediction.log_variance is None:
        return math.sqrt(drawn)
    return (drawn + data_weight**2 * prediction.log_variance.exp()).sqrt()


def _batch_time(t: float, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))


def _noise_like(z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    if len(generators) != len(z):
        raise FibldmError(f"sampling needs one generator per sample; got {len(generators)} for {len(z)} samples")
    return draw_noise(z.shape[1:], generators).to(z)
