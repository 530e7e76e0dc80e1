"""The best linear autoencoder in closed form, and where stage 1 begins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import kl_numbers
from conftest import TinyStage
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder
from fibldm.models.lean_unet import LeanUNet
from fibldm.models.wavelet import HaarWavelet
from fibldm.runs import StageFolder


def network(bands: int, *, latent_channels: int = 3, channels: tuple[int, ...] = (8,), axes: int = 3) -> AutoencoderKL:
    numbers = kl_numbers(len(channels), spatial_dims=axes, channels=bands, latent_channels=latent_channels)
    return AutoencoderKL(**{**numbers, "channels": channels})


def autoencoder(levels: int = 1, **settings: Any) -> Autoencoder:
    torch.manual_seed(0)
    axes = settings.get("axes", 3)
    made = Autoencoder(
        network(2 ** (axes * levels), **settings), wavelet=levels, principal_components=True, local_norm=True
    )
    return made.eval()


def volumes(count: int = 4, size: tuple[int, ...] = (8, 16, 12)) -> list[tuple[Tensor, Tensor]]:
    """Smooth volumes with some noise, of which everything counts."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        coarse = torch.randn(1, 1, *(length // 4 for length in size), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")
        volume = (smooth + 0.05 * torch.randn(1, 1, *size, generator=generator)).clamp(-1, 1)
        made.append((volume, torch.ones_like(volume)))
    return made


def test_training_begins_with_the_linear_autoencoder_that_loses_least() -> None:
    """What is lost of the voxels is the sum of the variances left out, of the covariance of 2x2x2 blocks by NumPy."""
    stage, given = autoencoder(), volumes()
    stage.fit(given)
    volume = torch.cat([volume for volume, _ in given])
    with torch.no_grad():
        lost = (stage.decode(stage.encode(volume).mean) - volume).square().mean()
        latents = stage.encode(volume).mean.movedim(1, -1).flatten(0, -2)
    blocks = volume.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).reshape(-1, 8).double().numpy()
    variances = np.linalg.eigvalsh(np.cov(blocks.T, bias=True))
    assert float(lost) == pytest.approx(variances[:-3].sum() / 8, rel=1e-3)
    np.testing.assert_allclose(np.cov(latents.numpy().T, bias=True), np.eye(3), atol=1e-3)


def test_volumes_of_as_few_components_come_back_exactly() -> None:
    stage = autoencoder(latent_channels=8)
    given = volumes()
    stage.fit(given)
    with torch.no_grad():
        torch.testing.assert_close(stage.decode(stage.encode(given[0][0]).mean), given[0][0], rtol=0, atol=1e-4)


def test_the_noise_at_the_start_does_not_hide_the_latents() -> None:
    stage = autoencoder()
    stage.fit(volumes())
    with torch.no_grad():
        assert stage.encode(volumes(1)[0][0]).std.max() < 0.05


def test_padding_tells_nothing() -> None:
    plain, padded = autoencoder(), autoencoder()
    plain.fit(volumes())
    padded.fit([*volumes(), (torch.full((1, 1, 8, 8, 8), 100.0), torch.zeros(1, 1, 8, 8, 8))])
    for one, other in zip(plain.parameters(), padded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_slices_and_two_levels_of_wavelets_are_fitted_too() -> None:
    flat = autoencoder(axes=2)
    flat.fit([(volume[..., :1], valid[..., :1]) for volume, valid in volumes(8)])
    assert flat.compression == (2, 2, 1)
    fine = autoencoder(levels=2, latent_channels=4)
    given = torch.cat([volume for volume, _ in volumes(8)])
    fine.fit([(given, torch.ones_like(given))])
    assert fine.compression == (4, 4, 4)
    with torch.no_grad():
        means = torch.nn.functional.interpolate(torch.nn.functional.avg_pool3d(given, 4), scale_factor=4.0)
        assert (fine.decode(fine.encode(given).mean) - given).square().mean() < (means - given).square().mean()


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(FibldmError, match=r"a network without strides; this one shrinks the axes by \(2, 2, 2\)"):
        Autoencoder(network(8, channels=(8, 8)), wavelet=1, principal_components=True)
    with pytest.raises(FibldmError, match="of 64 bands need at least as many cells that count; got 6"):
        autoencoder(levels=2).fit(volumes(1, size=(8, 12, 4)))
    with pytest.raises(FibldmError, match="only an autoencoder with principal_components can be fitted"):
        Autoencoder(network(8), wavelet=1).fit(volumes())


def test_a_wavelet_of_two_levels_is_one_of_one_level_twice() -> None:
    """But for the scale of the differences of means; the mean band has the range of the volume in both."""
    volume = torch.randn(2, 1, 8, 12, 4, generator=torch.Generator().manual_seed(0))
    once, twice = HaarWavelet(), HaarWavelet(levels=2)
    bands = twice(volume)
    assert bands.shape == (2, 64, 2, 3, 1) and twice.bands == 64
    torch.testing.assert_close(bands[:, :1], torch.nn.functional.avg_pool3d(volume, 4))
    torch.testing.assert_close(bands[:, :1], once(once(volume)[:, :1])[:, :1])
    torch.testing.assert_close(twice.inverse(bands), volume, rtol=0, atol=1e-5)
    energy = bands[:, 1:].square().sum() + 64 * bands[:, :1].square().sum()
    torch.testing.assert_close(energy, volume.square().sum())


def test_the_default_autoencoder_begins_with_principal_components_and_goes_on(
    tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """By the configuration that ships; with a rate of 0 the weights stay where they began."""
    shipped = {"autoencoder_channels": [16], "wavelet_levels": 2, "learning_rate": 0.0}
    tiny_stage("autoencoder", tmp_path, **shipped).run()
    begun = StageFolder(tmp_path, "autoencoder").trained()
    assert begun.compression == (4, 4, 4) and begun.linear is not None
    assert (
        begun.linear.decode.weight.square().sum() > 0.01
        and begun.network.decoder.blocks[-1].conv.weight.abs().max() == 0
    )
    tiny_stage("autoencoder", tmp_path, **shipped, epochs=2).run()
    for one, other in zip(begun.parameters(), StageFolder(tmp_path, "autoencoder").trained().parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_lean_network_is_monais_with_smaller_kernels_after_upsampling() -> None:
    settings: dict[str, Any] = {
        "spatial_dims": 3,
        "in_channels": 2,
        "out_channels": 2,
        "channels": (8, 8, 16),
        "attention_levels": (False, False, True),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 4,
    }
    plain, lean = DiffusionModelUNet(**settings).state_dict(), LeanUNet(**settings).state_dict()
    assert plain.keys() == lean.keys()
    other = {name for name in plain if plain[name].shape != lean[name].shape}
    assert len(other) == 2 and all(name.endswith("upsampler.postconv.conv.weight") for name in other)
    assert all(lean[name].shape[2:] == (1, 1, 1) for name in other)
