"""Tiled encoding and decoding: the same as the whole, seamless, bounded, and refused where it cannot be done."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import kl_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import VQVAE, AutoencoderKL, SPADEAutoencoderKL
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage, Posterior
from fibldm.models.identity_autoencoder import IdentityAutoencoder
from fibldm.models.receptive_field import SharedNorm, Source, StatisticsMissing, halo, with_shared_norms
from fibldm.models.spade_autoencoder import SpadeAutoencoder
from fibldm.models.tiles import Tile, plan_tiles
from fibldm.models.tiling import tiled_decode, tiled_encode
from fibldm.models.vector_quantised import VectorQuantisedAutoencoder
from fibldm.runs import StageFolder

CELLS = (21, 14, 9)


def autoencoder(
    *, local: bool = True, wavelet: bool = True, attention: bool = False, axes: int = 3
) -> FrozenFirstStage:
    torch.manual_seed(0)
    attentive = {"with_encoder_nonlocal_attn": attention, "with_decoder_nonlocal_attn": attention}
    network = AutoencoderKL(**kl_numbers(spatial_dims=axes, channels=2**axes if wavelet else 1, **attentive))
    return FrozenFirstStage(Autoencoder(network, wavelet=wavelet, local_norm=local))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def voxels(stage: FrozenFirstStage, cells: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count * step for count, step in zip(cells, stage.compression, strict=True))


def third(stage: FrozenFirstStage, cells: tuple[int, ...]) -> int:
    return int(np.prod(voxels(stage, cells))) // 3 * 2


@pytest.mark.parametrize("wavelet", [True, False])
def test_tiles_of_a_local_network_equal_the_whole(wavelet: bool) -> None:
    """Several tiles along the long axis, two samples."""
    stage = autoencoder(wavelet=wavelet)
    latent = random(2, 3, *CELLS)
    whole = stage.decode(latent)
    tiled = tiled_decode(stage, latent, max_voxels=third(stage, CELLS))
    assert torch.allclose(tiled, whole, atol=1e-5) and tiled.device.type == "cpu"
    volume = random(2, 1, *voxels(stage, CELLS))
    for part, expected in zip(
        tiled_encode(stage, volume, max_voxels=third(stage, CELLS)), stage.encode(volume), strict=True
    ):
        assert torch.allclose(part, expected, atol=1e-5)


def test_tiles_with_shared_statistics_equal_the_whole() -> None:
    """A network with GroupNorm; statistics of a tile alone are far off."""
    stage = autoencoder(local=False)
    latent = random(2, 3, *CELLS) + torch.linspace(-3, 3, CELLS[0])[:, None, None]
    whole = stage.decode(latent)
    assert torch.allclose(tiled_decode(stage, latent, max_voxels=third(stage, CELLS)), whole, atol=1e-4)
    alone = stage.decode(latent[:, :, :14])[:, :, : 4 * 7]
    assert (alone - whole[:, :, : 4 * 7]).abs().max() > 0.1
    volume = random(1, 1, *voxels(stage, CELLS))
    mean, std = tiled_encode(stage, volume, max_voxels=third(stage, CELLS))
    assert torch.allclose(mean, stage.encode(volume).mean, atol=1e-5)
    assert torch.allclose(std, stage.encode(volume).std, atol=1e-5)
    assert not any(isinstance(module, SharedNorm) for module in stage.modules())  # it worked on a copy


def test_two_dimensions() -> None:
    stage = autoencoder(axes=2)
    latent = random(1, 3, 40, 9, 1)
    assert torch.allclose(tiled_decode(stage, latent, max_voxels=4 * 4 * 9 * 20), stage.decode(latent), atol=1e-5)
    slices = random(1, 1, 160, 36, 1)
    mean, _ = tiled_encode(stage, slices, max_voxels=4 * 4 * 9 * 20)
    assert torch.allclose(mean, stage.encode(slices).mean, atol=1e-5)


def test_tiles_of_an_identity() -> None:
    """It has no weights that would say where it lies."""
    stage, volume = FrozenFirstStage(IdentityAutoencoder()), random(1, 1, 9, 8, 7)
    assert torch.equal(tiled_encode(stage, volume, max_voxels=100).mean, volume)
    assert torch.equal(tiled_decode(stage, volume, max_voxels=100), volume)


@pytest.mark.parametrize("quantised", [True, False])
def test_codebook(quantised: bool) -> None:
    """A codebook hides what is not a number, but the halo is found all the same."""
    torch.manual_seed(0)
    network = VQVAE(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_layers=1,
        num_res_channels=(8, 8),
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16,
        embedding_dim=3,
    )
    stage = FrozenFirstStage(VectorQuantisedAutoencoder(network, quantised_latents=quantised))
    latent = random(1, 3, *CELLS)
    tiled = tiled_decode(stage, latent, max_voxels=third(stage, CELLS))
    assert torch.allclose(tiled, stage.decode(latent), atol=1e-5)
    volume = random(1, 1, *voxels(stage, CELLS))
    mean = tiled_encode(stage, volume, max_voxels=third(stage, CELLS)).mean
    assert torch.allclose(mean, stage.encode(volume).mean, atol=1e-5)


def test_mask_is_tiled_with_the_latent() -> None:
    torch.manual_seed(0)
    network = SPADEAutoencoderKL(label_nc=2, spade_intermediate_channels=8, **kl_numbers())
    stage = FrozenFirstStage(SpadeAutoencoder(network))
    latent, mask = random(1, 3, *CELLS), random(1, 2, *voxels(stage, CELLS))
    tiled = tiled_decode(stage, latent, mask=mask, max_voxels=third(stage, CELLS))
    assert torch.allclose(tiled, stage.decode(latent, mask), atol=1e-4)


def test_attention_is_blended() -> None:
    """What attention sees differs between tiles; blending hides the seams."""
    stage = autoencoder(local=False, attention=True)
    shared, _ = with_shared_norms(stage)
    latent = random(1, 3, 24, 4, 4)
    assert halo(shared, lambda network, part: (network.decode(part),), [Source(latent, (1, 1, 1))]) == (None,) * 3
    tiled = tiled_decode(stage, latent, max_voxels=16 * 4 * 4 * 64)
    assert tiled.shape == (1, 1, 96, 16, 16) and seam(tiled[0, 0], [48]) < 1.5


def seam(volume: Tensor, borders: list[int]) -> float:
    """Mean step across the borders along the first axis, by that of all others."""
    steps = volume.diff(dim=0).abs().mean((1, 2))
    across = torch.zeros(len(steps), dtype=torch.bool)
    across[[border - 1 for border in borders]] = True
    return float(steps[across].mean() / steps[~across].mean())


def test_trained_network_has_no_seams(tiny_run: Path) -> None:
    """PSNR at least 45 dB and a step across seams at most 1.05 times another, relative to the whole."""
    stage = FrozenFirstStage(StageFolder(tiny_run, "autoencoder").trained())
    latent = random(1, stage.latent_channels, 32, 8, 8)
    whole, tiled = stage.decode(latent), tiled_decode(stage, latent, max_voxels=64 * 8 * 8 * 20)
    span = whole.max() - whole.min()
    assert 10 * torch.log10(span**2 / (tiled - whole).square().mean().clamp(min=1e-20)) >= 45
    borders = [4 * border for border in range(1, 32)]
    assert seam(tiled[0, 0], borders) <= 1.05 * seam(whole[0, 0], borders)


class Largest(nn.Module):
    """Notes the largest input of a first stage."""

    def __init__(self, stage: FrozenFirstStage) -> None:
        super().__init__()
        self.stage, self.most, self.compression = stage, 0, stage.compression

    def decode(self, latent: Tensor) -> Tensor:
        self.most = max(self.most, latent.numel() * 64 // latent.shape[1])
        return self.stage.decode(latent)


def test_no_tile_is_larger_than_allowed(tmp_path: Path) -> None:
    """Also into a file mapped to memory, and whole where the whole is allowed."""
    stage = Largest(autoencoder())
    latent, limit = random(1, 3, *CELLS), 64 * 21 * 14 * 9 // 2
    array = np.memmap(tmp_path / "volume.raw", dtype=np.float32, mode="w+", shape=(1, 1, *voxels(stage, CELLS)))
    out = torch.from_numpy(array)
    assert tiled_decode(stage, latent, max_voxels=limit, out=out) is out
    assert 0 < stage.most <= limit
    array.flush()
    read = np.fromfile(tmp_path / "volume.raw", dtype=np.float32).reshape(array.shape)
    assert np.allclose(read, stage.decode(latent).numpy(), atol=1e-5)


def test_encoding_fills_what_it_is_given() -> None:
    stage, volume = autoencoder(), random(1, 1, 84, 56, 36)
    out = Posterior(torch.full((1, 3, *CELLS), torch.nan), torch.full((1, 3, *CELLS), torch.nan))
    made = tiled_encode(stage, volume, max_voxels=third(stage, CELLS), out=out)
    assert made.mean is out.mean and made.std is out.std
    assert torch.allclose(out.std, stage.encode(volume).std, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2])
def test_halo_is_that_of_the_convolutions(reach: int) -> None:
    network = nn.Conv3d(2, 1, (2 * reach + 1, 1, 3), padding="same")
    source = Source(random(1, 2, 8, 8, 8), (1, 1, 1))
    assert halo(network, lambda net, part: (net(part),), [source]) == (reach, 0, 1)


def test_shared_norm_waits_for_all_parts() -> None:
    norm, features = nn.GroupNorm(2, 4), random(2, 4, 6, 4, 4)
    nn.init.uniform_(norm.weight)
    shared = SharedNorm(norm)
    assert shared(features) is features  # no part yet: it hands on what it gets
    for start, stop in ((0, 2), (2, 6)):
        shared.inside, shared.cells = (slice(start, stop), slice(0, 4), slice(0, 4)), (6, 4, 4)
        with pytest.raises(StatisticsMissing):
            shared(features)
    shared.finish()
    assert torch.allclose(shared(features), norm(features), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(*[st.integers(1, 40)] * 3),
    sides=st.tuples(*[st.integers(0, 3)] * 3),
    max_cells=st.integers(343, 4000),
)
def test_cores_fill_the_grid_once(cells: tuple[int, ...], sides: tuple[int, ...], max_cells: int) -> None:
    seen = np.zeros(cells, dtype=int)
    for tile in plan_tiles(cells, sides, max_cells, smallest=(1, 1, 1)):
        seen[tile.core] += 1
        assert np.prod([part.stop - part.start for part in tile.read]) <= max_cells
        for core, read, side, length in zip(tile.core, tile.read, sides, cells, strict=True):
            assert (read.start, read.stop) == (max(0, core.start - side), min(length, core.stop + side))
    assert (seen == 1).all()


def test_weights_of_all_tiles_add_up_to_one() -> None:
    total = torch.zeros(50, 18)
    for tile in plan_tiles((25, 9), (2, 2), 13 * 9, smallest=(4, 4)):
        total[tile.read[0].start * 2 : tile.read[0].stop * 2, :] += tile.weights((2, 2))
    assert torch.allclose(total, torch.ones(50, 18))


def test_inside_is_the_core_within_what_is_read() -> None:
    assert Tile((slice(5, 9),), (slice(3, 12),)).inside == (slice(2, 6),)


def test_too_small_a_tile_is_refused() -> None:
    message = r"a tile must hold min\(1 \+ 2 x 5, 21\) x .* = \d+ cells of the latent; max_voxels allows 15"
    with pytest.raises(FibldmError, match=message):
        tiled_decode(autoencoder(), random(1, 3, *CELLS), max_voxels=1000)


def test_other_shape_of_out_is_refused() -> None:
    with pytest.raises(
        FibldmError, match=r"out must have the shape of the result, \(1, 1, 84, 56, 36\); it has \(2,\)"
    ):
        tiled_decode(autoencoder(), random(1, 3, *CELLS), out=torch.zeros(2))


def test_indivisible_volume_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(FibldmError, match=r"\(84, 56, 38\) must be divisible by 4.*38 = 9 x 4 \+ 2"):
        tiled_encode(autoencoder(), random(1, 1, 84, 56, 38), max_voxels=20_000)
