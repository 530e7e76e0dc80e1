"""Denoisers: learned variance, guidance with rescale and interval, dynamic thresholding: D14, D16, C10."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.denoiser import Denoiser, guided, thresholded
from fibldm.models.latents import LatentSpace
from fibldm.models.process import Prediction, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import Denoise, sampler
from fibldm.models.timesteps import sampling_times

SHAPE = (3, 2, 4, 3, 5)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Fixed:
    """A denoiser that always says the same and counts how often it is asked."""

    def __init__(self, z_0: Tensor, log_variance: Tensor | None = None) -> None:
        self.prediction, self.asked = Prediction(z_0, log_variance), 0

    def __call__(self, z_t: Tensor, t: Tensor) -> Prediction:
        self.asked += 1
        return self.prediction


class Doubling(nn.Module):
    """A network with more output channels than its input has, each of them known."""

    variance = "free"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, z_t: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.cat([z_t, -3 * z_t, z_t], dim=1)[:, : self.channels]


TIMES = torch.tensor([0.2, 0.5, 0.8])


# --- learned variance


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_a_network_of_twice_the_channels_has_learned_a_variance(target):
    process, z = VariancePreserving(), normal(0)
    made = Denoiser(Doubling(4), process, target)(z, TIMES)  # type: ignore[arg-type]
    torch.testing.assert_close(made.z_0, process.to_z_0(target, z, z, TIMES))
    # z_0 = (z_t - sigma output) / alpha for epsilon, alpha z_t - sigma output for v: errors are as large as the factor
    factor = process.sigma(TIMES) / (process.alpha(TIMES) if target == "epsilon" else 1)
    assert made.log_variance is not None
    torch.testing.assert_close(made.log_variance, -3 * z + factor.square().log().view(3, 1, 1, 1, 1))
    plain = Denoiser(Doubling(2), process, target)(z, TIMES)  # type: ignore[arg-type]
    assert torch.equal(plain.z_0, made.z_0)
    assert plain.log_variance is None


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_a_network_of_other_channels_is_refused(channels):
    """One channel would be broadcast without a word."""
    with pytest.raises(FibldmError, match=rf"of 2 channels must give 2, or 4 with a learned variance; got {channels}"):
        Denoiser(Doubling(channels), RectifiedFlow(), "flow")(normal(0), TIMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.6, 0.7)])
def test_guidance_keeps_the_variance_of_the_condition(interval):
    given, null = Fixed(normal(1), normal(2)), Fixed(normal(3), normal(4))
    made = guided(given, null, 3.0, interval=interval)(normal(0), TIMES)
    assert made.log_variance is given.prediction.log_variance


# --- rescale


def rescaled_by_lin(given: Tensor, null: Tensor, scale: float, share: float) -> Tensor:
    """Equations 14 to 16 of Lin et al. 2024, sample by sample in plain numpy."""
    made = []
    for positive, negative in zip(given.double().numpy(), null.double().numpy(), strict=True):
        beyond = negative + scale * (positive - negative)
        back = beyond * positive.std(ddof=1) / beyond.std(ddof=1)
        made.append(share * back + (1 - share) * beyond)
    return torch.from_numpy(np.stack(made))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scale", [0.0, 2.0, 6.0])
def test_rescale_is_that_of_lin_in_terms_of_z_0(scale, share):
    given, null = normal(1) * torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1, 1, 1) + 0.4, normal(3)
    made = guided(Fixed(given), Fixed(null), scale, rescale=share)(normal(0), TIMES).z_0
    torch.testing.assert_close(made.double(), rescaled_by_lin(given, null, scale, share), rtol=1e-4, atol=1e-5)
    if share == 1:
        torch.testing.assert_close(made.std(dim=(1, 2, 3, 4)), given.std(dim=(1, 2, 3, 4)))


def test_rescale_of_the_sample_target_is_that_of_the_network():
    """For v it is close near noise, where ``v`` is nearly ``-z_0``, and another elsewhere, as the docstring says."""
    process, z_t, given, null = VariancePreserving(), normal(0), 2 * normal(1), normal(2)

    def gap(t: float) -> float:
        time = torch.full((3,), t, dtype=torch.float64)
        a, s = float(process.alpha(time)[0]), float(process.sigma(time)[0])
        v_given, v_null = ((a * z_t - z_0) / s for z_0 in (given, null))
        theirs = process.to_z_0("v", rescaled_by_lin(v_given, v_null, 4.0, 1.0), z_t.double(), time)
        ours = guided(Fixed(given), Fixed(null), 4.0, rescale=1.0)(z_t, time.float()).z_0
        return float((theirs - ours).abs().mean() / ours.abs().mean())

    assert gap(1.0) < 0.05 < 0.2 < gap(0.3)


# --- interval


def test_guidance_outside_its_interval_is_the_condition_and_one_call():
    given, null = Fixed(normal(1)), Fixed(normal(2))
    denoise = guided(given, null, 4.0, interval=(0.25, 0.75))
    for time, inside in ((0.1, False), (0.25, False), (0.26, True), (0.75, True), (0.76, False), (1.0, False)):
        before = null.asked
        made = denoise(normal(0), torch.full((3,), time)).z_0
        assert null.asked - before == inside
        expected = torch.lerp(null.prediction.z_0, given.prediction.z_0, 4.0) if inside else given.prediction.z_0
        assert torch.equal(made, expected)


def test_every_sample_of_a_batch_has_its_own_interval():
    given, null = normal(1), normal(2)
    made = guided(Fixed(given), Fixed(null), 4.0, rescale=0.5, interval=(0.25, 0.75))(normal(0), TIMES).z_0
    whole = guided(Fixed(given), Fixed(null), 4.0, rescale=0.5)(normal(0), TIMES).z_0
    assert torch.equal(made, torch.stack([given[0], whole[1], given[2]]))


@pytest.mark.parametrize("options", [{}, {"rescale": 0.7}, {"interval": (0.2, 0.6)}])
def test_guidance_1_never_asks_the_null(options):
    given, null = Fixed(normal(1)), Fixed(normal(2))
    assert guided(given, null, 1.0, **options) is given


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_is_the_same_to_the_bit_without_options(scale):
    given, null = normal(1), normal(2)
    made = guided(Fixed(given), Fixed(null), scale)(normal(0), torch.ones(3)).z_0
    assert torch.equal(made, torch.lerp(null, given, scale))


# --- dynamic thresholding


def volumes() -> Tensor:
    return normal(5) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1, 1) + 0.2


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_saharia(share):
    """In volumes, whatever the scale of the latents; the k-th value of numpy is the reference."""
    space = LatentSpace((0.3, -0.5), (0.4, 2.0), "none")
    given, log_variance = volumes(), normal(6)
    before = given.clone()
    made = thresholded(Fixed(space.normalise(given), log_variance), space, share)(normal(0), TIMES)
    assert made.log_variance is log_variance
    for volume, expected in zip(space.denormalise(made.z_0).numpy(), before.numpy(), strict=True):
        limit = max(1.0, float(np.quantile(np.abs(expected), share, method="inverted_cdf")))
        np.testing.assert_allclose(volume, expected.clip(-limit, limit) / limit, rtol=1e-4, atol=1e-5)
        assert np.abs(volume).max() <= 1 + 1e-5
    assert torch.equal(given, before)


def test_what_is_a_volume_already_stays_as_it_is():
    space, given = LatentSpace((0.0,) * 2, (1.0,) * 2, "none"), volumes()[:1].clamp(-1, 1)
    assert torch.equal(thresholded(Fixed(given), space, 0.9)(normal(0)[:1], TIMES[:1]).z_0, given)


def test_thresholding_takes_more_values_than_quantile_does():
    """A volume of 256 x 256 x 257 has more than 2^24 voxels, with which `torch.quantile` raises."""
    given = torch.linspace(-3, 3, 256 * 256 * 257).view(1, 1, 256, 256, 257)
    made = thresholded(Fixed(given), LatentSpace((0.0,), (1.0,), "none"), 0.5)(given, TIMES[:1]).z_0
    torch.testing.assert_close(made.flatten()[:: 2**20], (given.clamp(-1.5, 1.5) / 1.5).flatten()[:: 2**20])


def test_thresholding_keeps_guided_samples_in_range():
    """Without it, the same guidance leaves the range of a volume."""
    shape, process, space = (1, 1, 4, 3, 5), RectifiedFlow(), LatentSpace((0.0,), (1.0,), "none")
    beyond = guided(Fixed(normal(7, shape).clamp(-1, 1)), Fixed(torch.zeros(shape)), 5.0)

    def largest(denoise: Denoise) -> float:
        z = sampler("ddim")(denoise, normal(8, shape), sampling_times(4), process=process, generators=[])
        return float(z.abs().max())

    assert largest(beyond) > 4
    assert largest(thresholded(beyond, space, 0.995)) <= 1 + 1e-6


def test_guidance_of_1_costs_no_second_call() -> None:
    def conditional(z_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(z_t)

    def forbidden(z_t: Tensor, t: Tensor) -> Prediction:
        raise AssertionError

    assert guided(conditional, forbidden, 1.0) is conditional


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_goes_along_the_line_from_the_null_to_the_condition(scale: float) -> None:
    given, null = normal(0), normal(1)
    denoise = guided(lambda z, t: Prediction(given), lambda z, t: Prediction(null), scale)
    result = denoise(given, torch.ones(len(given))).z_0
    torch.testing.assert_close(result, null + scale * (given - null))


def test_guidance_in_terms_of_the_latent_is_guidance_in_terms_of_the_noise() -> None:
    """Ho & Salimans 2022, eq. 6: the latent of the guided noise is the guided latent."""
    process, t = RectifiedFlow(), torch.tensor([0.4])
    z_t, eps_c, eps_n = (normal(seed, (1, 1, 2, 2, 2)) for seed in range(3))

    def latent(eps: Tensor) -> Tensor:
        return (z_t - process.sigma(t) * eps) / process.alpha(t)

    made = guided(lambda z, t: Prediction(latent(eps_c)), lambda z, t: Prediction(latent(eps_n)), 3.0)(z_t, t).z_0
    torch.testing.assert_close(made, latent(eps_n + 3.0 * (eps_c - eps_n)))
