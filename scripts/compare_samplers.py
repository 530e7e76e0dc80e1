"""Our samplers beside MONAI's schedulers, where the truth is known: Gaussian data and an exact denoiser.

    python scripts/compare_samplers.py [--calls N ...] [--samples N] [--json FILE]

The data are N(0.3, 0.5^2), so whatever a figure is off by is the sampler's own. All get the same start (mean 0 and
standard deviation 1 exactly), the same schedule and, as far as their steps allow, the same number of network calls.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler
from torch import Tensor

from fibldm.files import write_json
from fibldm.models.process import Prediction, Process, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import calls, sampler
from fibldm.models.timesteps import Spacing, sampling_times

MEAN, STD = 0.3, 0.5
SCALED_LINEAR = VariancePreserving("scaled_linear", beta_start=0.0015, beta_end=0.0195)
MONAI_SCHEDULE: dict[str, Any] = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}

Run = Callable[[int, Tensor], tuple[int, Tensor] | None]
"""From the calls one may make and the start to the calls made and the samples; None where it needs more calls."""


@dataclass(frozen=True)
class Row:
    """What one way to sample gives; ``distance`` is the Wasserstein-2 distance of a Gaussian like it from the data."""

    name: str
    calls: int
    calls_made: int
    mean: float
    std: float
    distance: float


def posterior(z: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """The exact ``z_0`` and the logarithm of its variance."""
    total = alpha**2 * STD**2 + sigma**2
    z_0 = MEAN + alpha * STD**2 / total * (z - alpha * MEAN)
    return Prediction(z_0, (STD**2 * sigma**2 / total).log().expand_as(z))


def exact_noise(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise in ``z`` as an exact network would tell it."""
    return (z - alpha * posterior(z, alpha, sigma).z_0) / sigma


def ours(method: str, process: Process, spacing: Spacing, *, learned: bool = False) -> Run:
    """One of `fibldm.models.samplers`."""

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        prediction = posterior(z, process.alpha(t), process.sigma(t))
        return prediction if learned else Prediction(prediction.z_0)

    def run(budget: int, z: Tensor) -> tuple[int, Tensor]:
        steps = next(steps for steps in range(budget, 0, -1) if calls(method, steps) <= budget)
        times = sampling_times(steps, spacing=spacing)
        out = sampler(method)(denoise, z, times, process=process, generators=[torch.Generator().manual_seed(1)])
        return calls(method, steps), out

    return run


def ddpm(budget: int, z: Tensor) -> tuple[int, Tensor]:
    scheduler, generator = DDPMScheduler(1000, clip_sample=False, **MONAI_SCHEDULE), torch.Generator().manual_seed(1)
    return _monai(scheduler, budget, z, lambda noise, index, z: scheduler.step(noise, index, z, generator)[0])


def ddim(budget: int, z: Tensor) -> tuple[int, Tensor]:
    scheduler = DDIMScheduler(1000, clip_sample=False, **MONAI_SCHEDULE)
    return _monai(scheduler, budget, z, lambda *step: scheduler.step(*step)[0])


def pndm(budget: int, z: Tensor, *, skip_prk_steps: bool) -> tuple[int, Tensor] | None:
    """With Runge-Kutta steps at the start, which cost 9 calls more, or without (PLMS)."""
    steps = budget if skip_prk_steps else budget - 9
    if steps < 4:
        return None
    scheduler = PNDMScheduler(1000, skip_prk_steps=skip_prk_steps, set_alpha_to_one=True, **MONAI_SCHEDULE)
    return _monai(scheduler, steps, z, lambda *step: scheduler.step(*step)[0])


def rectified_flow(budget: int, z: Tensor) -> tuple[int, Tensor]:
    """As MAISI samples: the next time is told; its velocity is from noise to data."""
    scheduler = RFlowScheduler(1000)
    scheduler.set_timesteps(budget)
    times = scheduler.timesteps
    for index, following in zip(times, [*times[1:], torch.zeros(())], strict=True):
        sigma = index / 1000
        velocity = posterior(z, 1 - sigma, sigma).z_0 - exact_noise(z, 1 - sigma, sigma)
        z, _ = scheduler.step(velocity, int(index), z, int(following))
    return len(times), z


def _monai(
    scheduler: DDPMScheduler | DDIMScheduler | PNDMScheduler,
    steps: int,
    z: Tensor,
    step: Callable[[Tensor, int, Tensor], Tensor],
) -> tuple[int, Tensor]:
    scheduler.set_timesteps(steps)
    for index in scheduler.timesteps.tolist():
        alpha_bar = scheduler.alphas_cumprod[index]
        z = step(exact_noise(z, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()), index, z)
    return len(scheduler.timesteps), z


WAYS: dict[str, Run] = {
    **{f"{name}, uniform times": ours(name, SCALED_LINEAR, "uniform") for name in ("ddim", "ancestral")},
    **{name: ours(name, SCALED_LINEAR, "quadratic") for name in ("ddim", "ancestral", "heun", "dpmpp_2m")},
    "ancestral, learned variance": ours("ancestral", SCALED_LINEAR, "quadratic", learned=True),
    "MONAI DDPMScheduler": ddpm,
    "MONAI DDIMScheduler": ddim,
    "MONAI PNDMScheduler": partial(pndm, skip_prk_steps=False),
    "MONAI PNDMScheduler, skip_prk_steps": partial(pndm, skip_prk_steps=True),
    **{f"{name}, flow": ours(name, RectifiedFlow(), "uniform") for name in ("ddim", "ancestral", "heun", "dpmpp_2m")},
    "MONAI RFlowScheduler": rectified_flow,
}


def compare(budgets: Sequence[int], samples: int) -> Iterator[Row]:
    """Every way to sample with every number of network calls, where it can."""
    start = torch.randn((1, 1, samples, 1, 1), generator=torch.Generator().manual_seed(0))
    start = (start - start.mean()) / start.std()
    for name, run in WAYS.items():
        for budget in budgets:
            if (result := run(budget, start)) is not None:
                made, out = result
                mean, std = float(out.mean()), float(out.std())
                yield Row(name, budget, made, mean, std, math.hypot(mean - MEAN, std - STD))


def table(rows: Sequence[Row], budgets: Sequence[int]) -> str:
    """Markdown: a line for each way; standard deviation, mean in brackets, for each number of calls."""
    found = {(row.name, row.calls): f"{row.std:.3f} ({row.mean:.3f})" for row in rows}
    head = [f"true {STD:.3f} ({MEAN:.3f})", *(f"{budget} calls" for budget in budgets)]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(found.get((name, budget), "–") for budget in budgets)] for name in WAYS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="+", default=[1000, 50, 10, 5], help="network calls of a sample")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="the figures, with the calls that were made")
    options = parser.parse_args(arguments)
    if not all(1 <= budget <= 1000 for budget in options.calls):
        parser.error(f"--calls must be from 1 to 1000, the steps of the schedule; got {options.calls}")
    rows = list(compare(options.calls, options.samples))
    print(table(rows, options.calls))
    if options.json:
        truth = {"mean": MEAN, "std": STD, "samples": options.samples}
        write_json(options.json, {"true": truth, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
