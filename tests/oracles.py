"""Exact denoisers of known data, and what samplers make of a Gaussian, by recursions in Python's floats.

The recursions share neither code nor form with the samplers: every step on Gaussian data is an affine map, so mean and
standard deviation of the output follow from scalars alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fibldm.models.process import Prediction, Process, Target
from fibldm.models.samplers import Denoise

MU, STD = 0.7, 0.5
Grid = Sequence[tuple[float, float]]
"""``(alpha, sigma)`` from noise to data."""


class Gaussian:
    """Exact denoiser of N(mu, std^2) per channel."""

    def __init__(
        self,
        process: Process,
        mu: Sequence[float] = (MU,),
        std: Sequence[float] = (STD,),
        *,
        learned_variance: bool = False,
    ) -> None:
        shape = (1, -1, 1, 1, 1)
        self.process, self.learned_variance = process, learned_variance
        self.mu = torch.tensor(mu, dtype=torch.float64).reshape(shape)
        self.var = torch.tensor(std, dtype=torch.float64).reshape(shape) ** 2

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        total = alpha**2 * self.var + sigma**2
        z_0 = self.mu + alpha * self.var / total * (z - alpha * self.mu)
        log_variance = (self.var * sigma**2 / total).log().expand_as(z) if self.learned_variance else None
        return Prediction(z_0.to(z.dtype), log_variance)

    def probability_flow(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Exact map from ``t`` to ``s``: the standardised value stays."""
        (a, sigma_t), (b, sigma_s) = ((self.process.alpha(u), self.process.sigma(u)) for u in (t, s))
        scale = ((b**2 * self.var + sigma_s**2) / (a**2 * self.var + sigma_t**2)).sqrt()
        return b * self.mu + scale * (z - a * self.mu)


class Mixture:
    """Exact denoiser of an anisotropic two-dimensional mixture of two Gaussians; channels are the dimensions."""

    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mu = torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=torch.float64)
    std = torch.tensor([[0.5, 0.1], [0.2, 0.8]], dtype=torch.float64)

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (f(t).double().reshape(-1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        residual = z.double().reshape(len(z), 1, 2) - alpha * self.mu
        total = alpha**2 * self.std**2 + sigma**2
        log_density = self.weight.log() - (residual**2 / total + total.log()).sum(-1) / 2
        means = self.mu + alpha * self.std**2 / total * residual
        z_0 = (log_density.softmax(-1)[..., None] * means).sum(1)
        return Prediction(z_0.reshape(z.shape).to(z.dtype))


@dataclass(frozen=True)
class Moment(Process):
    """A process at one time: its coefficients are computed once, its targets are those of every process."""

    alpha_then: Tensor
    sigma_then: Tensor

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_then

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_then

    def network_time(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class RoundTrip:
    """A denoiser by way of what a network would say of it: the first samples in the first target, and so on."""

    denoise: Denoise
    process: Process
    targets: Sequence[Target]

    def __call__(self, z_t: Tensor, t: Tensor) -> Prediction:
        then = Moment(self.process.alpha(t[0]), self.process.sigma(t[0]))
        z_0 = self.denoise(z_t, t).z_0
        noise = (z_t - then.alpha_then * z_0) / then.sigma_then
        groups = zip(self.targets, *(part.chunk(len(self.targets)) for part in (z_0, noise, z_t, t)), strict=True)
        return Prediction(torch.cat([_told(then, *group) for group in groups]))


def _told(process: Process, kind: Target, z_0: Tensor, noise: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    return process.to_z_0(kind, process.target(kind, z_0, noise, t), z_t, t)


# ---------------------------------------------------------------- recursions by hand


def table(schedule: str, *, zero_snr: bool) -> list[float]:
    """Cumulative products of 1 - beta, from 1 at index 0 to index 1000."""
    if schedule == "cosine":
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(0.999, 1 - f[i + 1] / f[i]) for i in range(1000)]
    elif schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    elif schedule == "sigmoid":
        betas = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * i / 999)) for i in range(1000)]
    else:
        low, high = math.sqrt(0.0015), math.sqrt(0.0195)
        betas = [(low + (high - low) * i / 999) ** 2 for i in range(1000)]
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    if zero_snr:
        roots = [math.sqrt(bar) for bar in bars]
        bars = [1.0] + [((r - roots[-1]) * roots[1] / (roots[1] - roots[-1])) ** 2 for r in roots[1:]]
    return bars


def variance_preserving_grid(bars: list[float], steps: int) -> Grid:
    """On uniform times; ``steps`` divides 1000."""
    return [(math.sqrt(bars[i]), math.sqrt(1 - bars[i])) for i in range(1000, -1, -1000 // steps)]


def flow_grid(steps: int, shift: float) -> Grid:
    """Esser et al. 2024, eq. 23, in the odds of t, which ``shift`` multiplies."""
    inner = [1 / (1 + (steps / k - 1) / shift) for k in range(steps - 1, 0, -1)]
    return [(1 - t, t) for t in (1.0, *inner, 0.0)]


def exact(z: float, alpha: float, sigma: float) -> float:
    """Posterior mean by precisions, ``(z alpha / sigma^2 + mu / s^2) / (alpha^2 / sigma^2 + 1 / s^2)``."""
    return (z * alpha / sigma**2 + MU / STD**2) / (alpha**2 / sigma**2 + 1 / STD**2)


def ddim_by_hand(z: float, grid: Grid) -> float:
    for (a, s), (b, r) in pairwise(grid):
        data = exact(z, a, s)
        epsilon = (z - a * data) / s
        z = b * data + r * epsilon
    return z


def heun_by_hand(z: float, grid: Grid) -> float:
    """Heun's method in y = z / sigma over kappa = alpha / sigma."""
    y = z / grid[0][1]
    for (a, s), (b, r) in pairwise(grid[:-1]):
        slope, step = exact(y * s, a, s), b / r - a / s
        y += step * (slope + exact((y + step * slope) * r, b, r)) / 2
    return exact(y * grid[-2][1], *grid[-2])


def dpmpp_2m_by_hand(z: float, grid: Grid) -> float:
    """Lu et al. 2022, algorithm 2, in log-SNR."""
    lam = [math.inf if s == 0 else -math.inf if a == 0 else math.log(a / s) for a, s in grid]
    data = [exact(z, *grid[0])]
    for i in range(1, len(grid)):
        h = lam[i] - lam[i - 1]
        first_order = i == 1 or i == len(grid) - 1 or lam[i - 2] == -math.inf
        ratio = math.inf if first_order else (lam[i - 1] - lam[i - 2]) / h
        guess = data[-1] if first_order else (1 + 1 / (2 * ratio)) * data[-1] - 1 / (2 * ratio) * data[-2]
        z = grid[i][1] / grid[i - 1][1] * z - grid[i][0] * math.expm1(-h) * guess
        if i < len(grid) - 1:
            data.append(exact(z, *grid[i]))
    return z


def ancestral_by_hand(mean: float, var: float, grid: Grid) -> tuple[float, float]:
    """Mean and variance through ``q(z_s | z_t, D)``, a product of two Gaussians by Bayes' rule."""
    for (a, s), (b, r) in pairwise(grid):
        zero = exact(0.0, a, s)
        slope = exact(1.0, a, s) - zero
        if r == 0:
            mean, var = zero + slope * mean, slope**2 * var
            continue
        scale = a / b
        step_var = s**2 - scale**2 * r**2
        precision = scale**2 / step_var + 1 / r**2
        of_z, of_data = scale / step_var / precision, b / r**2 / precision
        gain = of_z + of_data * slope
        mean, var = gain * mean + of_data * zero, gain**2 * var + 1 / precision
    return mean, var


BY_HAND = {"ddim": ddim_by_hand, "heun": heun_by_hand, "dpmpp_2m": dpmpp_2m_by_hand}
