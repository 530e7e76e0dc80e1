"""Marked noise: the signs of a key, and nothing else that tells it from noise without a mark."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.mark import PERIOD, PUBLIC_KEY, SITE_KEY, Mark, tile_of
from fibldm.models.residual_noise import ResidualNoise

SHAPE = (1, 40, 36, 33)
SITE = "a key that only one site knows"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(seed: int, mark: Mark | None = None) -> tuple[Tensor, Tensor]:
    """White noise and the same with the mark."""
    draws = generator(seed)
    white = torch.randn(SHAPE, generator=draws)
    return white, (mark or Mark()).imprint(white, draws)


def agreement(marked: Tensor, key: str) -> float:
    """The mean of noise along the tile, at the place and of the sign where it is largest."""
    padded = np.pad(marked[0].numpy(), [(0, -length % PERIOD) for length in SHAPE[1:]])
    x, y, z = (length // PERIOD for length in padded.shape)
    folded = padded.reshape(x, PERIOD, y, PERIOD, z, PERIOD).sum((0, 2, 4))
    sums = np.fft.ifftn(np.fft.fftn(folded) * np.conj(np.fft.fftn(tile_of(key)))).real
    return float(np.abs(sums).max() / marked.numel())


def test_the_tile_is_that_of_sha256() -> None:
    tile = tile_of(PUBLIC_KEY)
    first = int.from_bytes(hashlib.sha256(b"FibLDM mark 1:0").digest()[:2], "big")
    assert [int(sign) for sign in tile[0, 0]] == [1 if first >> (15 - bit) & 1 else -1 for bit in range(16)]
    last = hashlib.sha256(b"FibLDM mark 1:15").digest()[-1]
    assert tile.shape == (16, 16, 16) and tile[-1, -1, -1] == (1 if last & 1 else -1)
    assert abs(float(tile.mean())) < 4 / 64 and not np.array_equal(tile, tile_of(SITE))


def test_only_signs_change_and_of_half_of_the_share_that_is_marked() -> None:
    white, marked = pair(0)
    assert torch.equal(white.abs(), marked.abs())
    assert float((white != marked).float().mean()) == pytest.approx(0.2 / 2, abs=0.006)


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.5])
def test_noise_agrees_with_the_key_as_the_strength_says(strength: float) -> None:
    _, marked = pair(1, Mark(strength=strength))
    assert agreement(marked, PUBLIC_KEY) == pytest.approx(strength * math.sqrt(2 / math.pi), abs=0.012)


def test_level_and_spectrum_are_those_of_white_noise() -> None:
    marked = torch.stack([pair(seed)[1][0] for seed in range(40)])
    assert abs(float(marked.mean())) < 0.003 and float(marked.var()) == pytest.approx(1, abs=0.005)
    assert float(marked.pow(4).mean()) == pytest.approx(3, abs=0.03)
    for axis in (1, 2, 3):
        for lag in (1, 2, 3):
            one, other = (marked.narrow(axis, start, marked.shape[axis] - lag) for start in (0, lag))
            assert abs(float((one * other).mean())) < 0.005
    power = torch.fft.rfftn(marked, dim=(1, 2, 3)).abs().square().mean(0) / marked[0].numel()
    x, y, z = torch.fft.fftfreq(SHAPE[1]), torch.fft.fftfreq(SHAPE[2]), torch.fft.rfftfreq(SHAPE[3])
    frequency = (x[:, None, None].square() + y[:, None].square() + z.square()).sqrt()
    for low in (0.05, 0.15, 0.25, 0.35, 0.45):
        band = (frequency >= low) & (frequency < low + 0.1)
        assert float(power[band].mean()) == pytest.approx(1, abs=0.03)


def test_voxels_whole_periods_apart_correlate_by_as_much_as_is_said() -> None:
    marked = torch.stack([pair(seed, Mark(strength=0.5))[1][0] for seed in range(40)])
    correlation = float((marked[:, PERIOD:] * marked[:, :-PERIOD]).mean())
    assert correlation == pytest.approx((0.5 * math.sqrt(2 / math.pi)) ** 2, abs=0.005)


def test_no_two_volumes_or_channels_share_the_place_of_the_mark() -> None:
    white = torch.ones(8, 16, 16, 16)
    channels = Mark(strength=1.0).imprint(white, generator())
    assert len({channel.numpy().tobytes() for channel in channels}) == 8
    assert {int(channel.sum()) == int(tile_of(PUBLIC_KEY).sum()) for channel in channels} == {True, False}  # its sign


def test_a_site_has_its_own_mark_beside_the_public_one() -> None:
    _, marked = pair(2, Mark(SITE))
    assert agreement(marked, PUBLIC_KEY) == pytest.approx(0.16, abs=0.012)
    assert agreement(marked, SITE) == pytest.approx(0.16 * 0.8, abs=0.014)
    assert agreement(marked, "another key of sixteen") < 0.05


def test_the_key_of_a_site_is_told_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SITE_KEY, SITE)
    mark = Mark.from_environment()
    assert mark.site_key == SITE and SITE not in f"{mark} {mark.recorded()}"
    assert len(mark.recorded()["site_key"]) == 8
    monkeypatch.setenv(SITE_KEY, "")
    assert Mark.from_environment() == Mark() and Mark().recorded() == {
        "voxels": True,
        "key": "FibLDM mark 1",
        "strength": 0.2,
    }


def test_a_key_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SITE_KEY, "hospital")
    with pytest.raises(FibldmError, match="at least 16 characters; it has 8") as refused:
        Mark.from_environment()
    assert "hospital" not in str(refused.value) + refused.value.remedy
    with pytest.raises(FibldmError, match=r"strength of a mark must lie in \(0, 1\]; got 0"):
        Mark(strength=0.0)


def test_without_a_mark_noise_is_what_it_was() -> None:
    """The strength is drawn first, then one number for each voxel; a mark draws after both."""
    kernel = torch.zeros(1, 16, 16, 16)
    kernel[0, 0, 0, 0] = 1
    noise = ResidualNoise(torch.full((1, 16, 7), 0.1), kernel, spread=0.2)
    draws, decoded = generator(5), torch.zeros(1, 20, 18, 17)
    strength = math.exp(0.2 * float(torch.randn((), generator=draws)))
    expected = strength * 0.1 * torch.randn(decoded.shape, generator=draws)
    plain, marked = noise.draw(decoded, generator(5)), noise.draw(decoded, generator(5), Mark())
    assert torch.allclose(plain, expected, atol=1e-6)
    assert torch.allclose(marked.abs(), plain.abs(), atol=1e-6) and not torch.allclose(marked, plain)
