"""The first stage: wavelet, autoencoder, latent space."""

import copy

import numpy as np
import pytest
import torch
from builders import kl_numbers, normal
from monai.networks.nets import AutoencoderKL
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder, ChannelNorm, FrozenFirstStage, Posterior
from fibldm.models.latents import LatentSpace
from fibldm.models.wavelet import HaarWavelet

LABELS = (0, 1, 4, 7)


def autoencoder(*, wavelet: bool = True, local_norm: bool = True) -> Autoencoder:
    torch.manual_seed(0)
    network = AutoencoderKL(**kl_numbers(channels=8) if wavelet else kl_numbers(3))
    return Autoencoder(network, wavelet=wavelet, local_norm=local_norm)


# --- wavelet


def test_the_haar_bands_are_orthonormal_but_for_the_mean() -> None:
    """The band of means has the volume's own values; the other seven bands hold the rest of its energy exactly."""
    volume = normal(2, 3, 6, 4, 8)
    bands = HaarWavelet()(volume).unflatten(1, (3, 8))
    means = nn.functional.avg_pool3d(volume, 2)
    torch.testing.assert_close(bands[:, :, 0], means)
    torch.testing.assert_close(bands[:, :, 1:].square().sum(), volume.square().sum() - 8 * means.square().sum())


def test_the_haar_inverse_is_exact() -> None:
    wavelet = HaarWavelet()
    volume = normal(1, 2, 4, 6, 2)
    torch.testing.assert_close(wavelet.inverse(wavelet(volume)), volume, rtol=0, atol=1e-6)


def test_the_wavelet_is_no_weight() -> None:
    assert not HaarWavelet().state_dict()


# --- autoencoder


def test_a_channel_norm_says_the_same_of_a_patch_and_of_the_whole() -> None:
    norm, whole = ChannelNorm(6), normal(1, 6, 8, 8, 8)
    with torch.no_grad():
        norm.norm.weight.copy_(normal(6, seed=1))
        torch.testing.assert_close(norm(whole)[:, :, 2:5, 3:, :4], norm(whole[:, :, 2:5, 3:, :4]))
    torch.testing.assert_close(ChannelNorm(6)(whole).mean(1), torch.zeros(1, 8, 8, 8), atol=1e-6, rtol=0)


def test_local_norms_make_a_patch_decode_as_in_the_whole_and_group_norms_do_not() -> None:
    def difference(local_norm: bool) -> float:
        network, latent = autoencoder(local_norm=local_norm).eval(), normal(1, 3, 16, 8, 8)
        with torch.no_grad():
            whole, part = network.decode(latent), network.decode(latent[:, :, :12])
        return float((whole[:, :, :8] - part[:, :, :8]).abs().max())

    assert difference(local_norm=True) < 1e-5
    assert difference(local_norm=False) > 1e-3


@pytest.mark.parametrize("wavelet", [True, False])
def test_a_volume_becomes_a_latent_at_a_quarter_of_its_size(wavelet: bool) -> None:
    network = autoencoder(wavelet=wavelet)
    assert (network.compression, network.latent_channels) == ((4, 4, 4), 3)
    posterior = network.encode(normal(2, 1, 16, 8, 12))
    assert posterior.mean.shape == posterior.std.shape == (2, 3, 4, 2, 3)
    assert bool((posterior.std > 0).all())
    assert network.decode(posterior.mean).shape == (2, 1, 16, 8, 12)
    assert network(normal(1, 1, 8, 8, 8)).volume.shape == (1, 1, 8, 8, 8)


def test_a_size_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(FibldmError, match=r"\(16, 10, 12\) must be divisible by 4 .*10 = 2 x 4 \+ 2") as raised:
        autoencoder().encode(torch.zeros(1, 1, 16, 10, 12))
    assert raised.value.remedy == "pad to (16, 12, 12), for example with DivisiblePadd(k=4)"


def test_a_frozen_first_stage_cannot_be_trained() -> None:
    frozen = FrozenFirstStage(autoencoder())
    model = nn.ModuleDict({"first": frozen, "other": nn.Conv3d(3, 3, 1)}).train()
    before = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    latent = frozen.encode(normal(1, 1, 8, 8, 8)).mean
    frozen.decode(model["other"](latent))
    model["other"](latent).square().sum().backward()
    optimizer.step()
    assert not any(part.training for part in frozen.autoencoder.modules())
    assert frozen.train() is frozen
    assert all(weight.grad is None and not weight.requires_grad for weight in frozen.parameters())
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not latent.requires_grad


# --- latent space


def test_the_latent_space_has_the_moments_of_drawn_latents() -> None:
    posteriors = [
        Posterior(normal(1, 2, *size, seed=n) * 3 + 5, normal(1, 2, *size, seed=n + 9).abs())
        for n, size in enumerate([(2, 3, 4), (5, 1, 2)])
    ]
    space = LatentSpace.fit(iter(posteriors), "ae")
    flat = [np.concatenate([np.moveaxis(p[k].numpy(), 1, 0).reshape(2, -1) for p in posteriors], 1) for k in (0, 1)]
    flat = [part.astype(np.float64) for part in flat]
    np.testing.assert_allclose(space.mean, flat[0].mean(1), rtol=1e-12)
    np.testing.assert_allclose(np.square(space.std), flat[0].var(1) + np.square(flat[1]).mean(1), rtol=1e-10)


def test_normalised_latents_come_back() -> None:
    space = LatentSpace((1.0, -2.0), (0.5, 4.0), "ae")
    latent = normal(3, 2, 4, 5, 6)
    torch.testing.assert_close(space.denormalise(space.normalise(latent)), latent)
    noise = normal(3, 2, 4, 5, 6, seed=1)
    posterior = Posterior(latent, latent.abs())
    torch.testing.assert_close(
        space.normalise_posterior(posterior).sample(noise), space.normalise(posterior.sample(noise))
    )
    assert LatentSpace.from_dict(space.to_dict()) == space


def test_a_constant_scales_as_in_stable_diffusion() -> None:
    latent = normal(1, 4, 2, 2, 2)
    space = LatentSpace.constant(0.18215, 4, "ae")
    torch.testing.assert_close(space.normalise(latent), latent * 0.18215)
    torch.testing.assert_close(space.denormalise(latent), latent / 0.18215)


def test_latents_of_another_autoencoder_are_refused() -> None:
    space = LatentSpace.constant(1, 4, "a" * 64)
    space.check_autoencoder("a" * 64, "run")
    with pytest.raises(FibldmError, match=r"of run must come from .*\(b{12}\); .* another one \(a{12}\)"):
        space.check_autoencoder("b" * 64, "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentSpace.fit([], "ae"), "at least one training latent"),
        (lambda: LatentSpace.fit([Posterior(torch.ones(1, 2, 3, 3, 3), torch.zeros(1, 2, 3, 3, 3))], "ae"), "vary"),
        (lambda: LatentSpace((0.0,), (0.0,), "ae"), "one std above 0"),
        (lambda: LatentSpace((0.0,), (1.0, 1.0), "ae"), "one std above 0"),
        (lambda: LatentSpace.constant(1, 1, "ae").normalise(torch.zeros(1, 2, 1, 1, 1)), "has 1 channels; got 2"),
    ],
)
def test_what_no_latent_space_can_be(make: object, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        make()  # type: ignore[operator]
