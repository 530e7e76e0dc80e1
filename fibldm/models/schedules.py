"""How much noise each step of a variance-preserving process adds."""

import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]

DEFAULT_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.0015, 0.0195), "sigmoid": (1e-4, 0.02)}


def betas(schedule: Schedule, steps: int, start: float, end: float) -> Tensor:
    """Variances of the noise of every step of a variance-preserving process, float64, shape (steps,).

    Args:
        schedule: ``linear`` in beta (Ho et al. 2020), ``scaled_linear`` in sqrt(beta) (Rombach et al. 2022),
            ``cosine`` (Nichol & Dhariwal 2021, eq. 17, beta clipped at 0.999) or ``sigmoid`` (beta a sigmoid of
            [-6, 6]).
        steps: number of betas.
        start: first beta; not for ``cosine``.
        end: last beta; not for ``cosine``.
    """
    match schedule:
        case "linear":
            return torch.linspace(start, end, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
        case "sigmoid":
            return start + (end - start) * torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        case "cosine":
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
