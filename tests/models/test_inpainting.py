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


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_cells_stay_to_the_bit_and_draw_the_others_towards_them(process, sampler):
    z = drawn(process, sampler, resampling=3)[:, 0, :, 0, 0]
    assert (z[:, 1] == KNOWN).all()
    assert 0.5 < float(z[:, 0].mean()) < CORRELATION * KNOWN  # 0 without what is known
    assert float(z[:, 0].std()) == pytest.approx((1 - CORRELATION**2) ** 0.5, abs=0.3)


def test_each_time_that_cells_are_drawn_again_brings_them_closer_to_their_conditional_mean():
    means = [float(drawn(RectifiedFlow(), "dpmpp_2m", resampling=n)[:, 0, 0].mean()) for n in (0, 1, 3, 8)]
    off = [abs(mean - CORRELATION * KNOWN) for mean in means]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.6 * off[0]


def test_a_small_strength_stays_near_what_was_there():
    spreads = [float((drawn(RectifiedFlow(), "ddim", strength=share)[:, 0, 0]).abs().mean()) for share in (0.02, 0.3)]
    assert spreads[0] < 0.1 < spreads[1]  # the cell was 0


@pytest.mark.parametrize(("settings", "named"), [({"strength": 0}, "strength"), ({"resampling": -1}, "resampling")])
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(FibldmError, match=f"{named} must"):
        KnownLatents(torch.zeros(1), torch.ones(1, dtype=torch.bool), **settings)
