"""Cells that are known, and others drawn to fit: held to a Gaussian whose conditional distribution is known."""

from functools import partial

import pytest
import torch

from fibldm.errors import FibldmError
from fibldm.models.inpainting import KnownLatents
from fibldm.models.process import Prediction, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import SAMPLERS
from fibldm.models.timesteps import sampling_times

SAMPLES, CORRELATION, KNOWN = 1500, 0.8, 1.5
COVARIANCE = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
PROCESSES = [RectifiedFlow(), VariancePreserving()]


def two_cells(process, z_t, t):
    """The exact denoiser of latents of two correlated cells along X."""
    alpha, sigma = (float(level(t[:1].double())) for level in (process.alpha, process.sigma))
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double())
    return Prediction((z_t[:, 0, :, 0, 0] @ gain.T)[:, None, :, None, None])


def drawn(process, sampler: str, *, steps: int = 10, **settings):
    """Latents ``(SAMPLES, 1, 2, 1, 1)`` whose second cell is known."""
    z = torch.zeros(SAMPLES, 1, 2, 1, 1, dtype=torch.float64)
    z[:, :, 1] = KNOWN
    inside = torch.zeros_like(z, dtype=torch.bool)
    inside[:, :, 0] = True
    generators = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
    noise = torch.stack([torch.randn(1, 2, 1, 1, generator=part) for part in generators]).double()
    times = sampling_times(steps, spacing=process.sampling_spacing, shift=1.0)
    sample = partial(SAMPLERS[sampler], process=process, generators=generators)
    known = KnownLatents(z, inside, **settings)
    return known.draw(sample, partial(two_cells, process), noise, times, process=process, generators=generators)


def test_many_cells_that_depend_on_each_other_do_not_pull_too_far():
    """Sixty cells along a line, correlated over ten of them: half are known, and far from the mean."""
    places = torch.arange(60, dtype=torch.float64)
    covariance = torch.exp(-((places[:, None] - places) ** 2) / 200) + 1e-3 * torch.eye(60)
    process, known = (
        RectifiedFlow(),
        torch.linalg.cholesky(covariance)
        @ torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    inside = torch.zeros(1, 1, 60, 1, 1, dtype=torch.bool)
    inside[:, :, 15:45] = True

    def denoise(z_t, t):
        alpha, sigma = (float(level(t[:1].double())) for level in (process.alpha, process.sigma))
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(60))
        return Prediction((z_t[:, 0, :, 0, 0] @ gain.T)[:, None, :, None, None])

    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    noise = torch.stack([torch.randn(1, 60, 1, 1, generator=part) for part in generators]).double()
    z = known[None, None, :, None, None].expand_as(noise)
    sample = partial(SAMPLERS["dpmpp_2m"], process=process, generators=generators)
    times = sampling_times(10, spacing=process.sampling_spacing, shift=1.0)
    made = KnownLatents(z, inside.expand_as(noise)).draw(
        sample, denoise, noise, times, process=process, generators=generators
    )[:, 0, :, 0, 0]
    drawn, rest = slice(15, 45), [*range(15), *range(45, 60)]
    asked = covariance[drawn][:, rest] @ torch.linalg.solve(covariance[rest][:, rest], known[rest])
    off = (made[:, drawn].mean(dim=0) - asked).abs()
    assert float(off[:5].max()) < 0.25 and float(off[-5:].max()) < 0.25  # 0.5 without the pull; the deviation is 0.18
    assert float(made[:, drawn].std(dim=0)[[0, 1, 2, -3, -2, -1]].max()) < 0.3
    assert float(made.abs().max()) < 5


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_cells_stay_to_the_bit_and_pull_the_others_to_their_conditional_mean(process, sampler):
    z = drawn(process, sampler)[:, 0, :, 0, 0]
    assert (z[:, 1] == KNOWN).all()
    assert float(z[:, 0].mean()) == pytest.approx(CORRELATION * KNOWN, abs=0.15)  # 0.5 without the pull
    assert float(z[:, 0].std()) == pytest.approx((1 - CORRELATION**2) ** 0.5, abs=0.2)


def test_drawing_again_brings_them_closer():
    off = [abs(float(drawn(RectifiedFlow(), "dpmpp_2m", steps=5, resampling=n)[:, 0, 0].mean()) - 1.2) for n in (0, 2)]
    assert off[1] < 0.7 * off[0]


def test_a_small_strength_stays_near_what_was_there():
    spreads = [float((drawn(RectifiedFlow(), "ddim", strength=share)[:, 0, 0]).abs().mean()) for share in (0.02, 0.3)]
    assert spreads[0] < 0.1 < spreads[1]  # the cell was 0


@pytest.mark.parametrize(("settings", "named"), [({"strength": 0}, "strength"), ({"resampling": -1}, "resampling")])
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(FibldmError, match=f"{named} must"):
        KnownLatents(torch.zeros(1), torch.ones(1, dtype=torch.bool), **settings)
