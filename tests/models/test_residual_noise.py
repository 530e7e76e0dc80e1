"""What a decoder leaves out: measured against noise that is known, drawn again, and part of every synthetic volume."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.models.residual_noise import ResidualNoise
from fibldm.synthesis import SamplingSettings, SynthesisRequest, Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume

SHAPE = (48, 40, 32)
DECODED = torch.linspace(-1, 1, SHAPE[2]).expand(1, *SHAPE)
EVERYWHERE = torch.ones(1, *SHAPE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_along_x(white: Tensor) -> Tensor:
    """Noise of variance 1 whose neighbours along x correlate by 2/3 and 1/6, and those along y and z not at all."""
    weights = torch.tensor([0.5, 1.0, 0.5]) / math.sqrt(1.5)
    return F.conv3d(white[:, None], weights.view(1, 1, 3, 1, 1), padding=(1, 0, 0))[:, 0]


def cases(count: int = 6, strengths: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Noise of level 0.02 where the decoder says -1, and 0.10 where it says 1."""
    draws = generator()
    for case in range(count):
        strength = 1.0 if strengths is None else float(strengths[case])
        noise = smooth_along_x(torch.randn(1, *SHAPE, generator=draws))
        yield DECODED + strength * (0.06 + 0.04 * DECODED) * noise, DECODED, EVERYWHERE


def autocorrelation(noise: Tensor, axis: int, lag: int = 1) -> float:
    one, other = noise.narrow(axis, 0, noise.shape[axis] - lag), noise.narrow(axis, lag, noise.shape[axis] - lag)
    return float((one * other).mean() / noise.square().mean())


@pytest.fixture(scope="module")
def fitted() -> ResidualNoise:
    return ResidualNoise.fit(cases())


@pytest.fixture(scope="module")
def a_mask(phantom_work: Path) -> Volume:
    return read_volume(load_datalist(phantom_work, "test", masks=True)[0]["label"])


def test_levels_are_those_of_the_noise(fitted: ResidualNoise) -> None:
    level = fitted.level(DECODED)[0, 0, 0]
    assert level[1:-1].tolist() == pytest.approx((0.06 + 0.04 * DECODED[0, 0, 0, 1:-1]).tolist(), rel=0.08)
    assert fitted.spread < 0.02


def test_drawn_noise_has_level_and_correlation_of_what_was_measured(fitted: ResidualNoise) -> None:
    drawn = torch.stack([fitted.draw(DECODED, generator(seed)) for seed in range(4)]) / (0.06 + 0.04 * DECODED)
    assert float(drawn.std()) == pytest.approx(1, rel=0.05) and abs(float(drawn.mean())) < 0.02
    assert autocorrelation(drawn, 2) == pytest.approx(2 / 3, abs=0.03)
    assert autocorrelation(drawn, 2, lag=2) == pytest.approx(1 / 6, abs=0.03)
    assert [autocorrelation(drawn, axis) for axis in (3, 4)] == pytest.approx([0, 0], abs=0.03)


def test_volumes_differ_in_strength_as_the_cases_do() -> None:
    strengths = (0.3 * torch.randn(24, generator=generator(1))).exp()
    fitted = ResidualNoise.fit(cases(24, strengths))
    assert fitted.spread == pytest.approx(float(strengths.log().std(correction=0)), rel=0.1)
    drawn = [float(fitted.draw(DECODED, generator(seed)).std().log()) for seed in range(60)]
    assert np.std(drawn) == pytest.approx(fitted.spread, rel=0.25)


def test_weak_noise_tells_as_much_of_the_strength_as_strong_noise() -> None:
    """Where it is bright there is a lot in every case alike; where it is dark, little that differs."""
    strengths = (0.4 * torch.randn(24, generator=generator(1))).exp()
    bright = DECODED > 0
    odd = [
        (torch.where(bright, decoded + 10 * (real - decoded), decoded + strength * (real - decoded)), decoded, valid)
        for (real, decoded, valid), strength in zip(cases(24), strengths, strict=True)
    ]
    assert ResidualNoise.fit(odd).spread == pytest.approx(float(strengths.log().std(correction=0)) / 2, rel=0.1)


def test_padding_and_misplaced_edges_do_not_count(fitted: ResidualNoise) -> None:
    valid = EVERYWHERE.clone()
    valid[:, :16] = 0
    edge = torch.zeros(1, *SHAPE)
    edge[:, 30] = 1.0
    odd = [(torch.where(valid > 0, real + edge, -1.0), decoded, valid) for real, decoded, _ in cases()]
    levels = ResidualNoise.fit(odd).level(DECODED)
    assert torch.allclose(levels, fitted.level(DECODED), rtol=0.12)


def test_edges_have_a_level_of_their_own() -> None:
    """Half of the voxels of a brightness lie at edges, where ten times as much is left."""
    rows = torch.arange(SHAPE[0]).view(1, -1, 1, 1).expand(1, *SHAPE)
    edges = rows >= 24
    decoded = 0.3 + 0.0566 * (edges & (rows % 4 > 1))  # half of it per voxel is the middle of an octave
    noise = torch.randn(1, *SHAPE, generator=generator()) * torch.where(edges, 0.2, 0.02)
    fitted = ResidualNoise.fit([(decoded + noise, decoded, EVERYWHERE)])
    assert float(fitted.level(torch.full((1, 4, 4, 4), 0.3)).mean()) == pytest.approx(0.02, rel=0.1)
    level = fitted.level(decoded)
    assert level[:, :20].flatten().tolist() == pytest.approx([0.02] * level[:, :20].numel(), rel=0.1)
    assert level[:, 28:].flatten().tolist() == pytest.approx([0.2] * level[:, 28:].numel(), rel=0.1)
    drawn = fitted.draw(decoded, generator())
    assert float(drawn[:, 28:].std() / drawn[:, :20].std()) == pytest.approx(10, rel=0.15)


def test_noise_of_another_form_is_refused(fitted: ResidualNoise, tmp_path: Path) -> None:
    replace(fitted, levels=fitted.levels[..., 0]).save(tmp_path / "noise.safetensors")
    with pytest.raises(FibldmError, match=r"levels by 16 values and 7 slopes; they have the shape \(1, 16\)"):
        ResidualNoise.load(tmp_path / "noise.safetensors")


def test_values_that_were_never_seen_have_the_level_of_the_nearest(fitted: ResidualNoise) -> None:
    dark = [(real[..., :16], decoded[..., :16], valid[..., :16]) for real, decoded, valid in cases()]
    levels = ResidualNoise.fit(dark).levels[0, :, 2]
    assert levels[8:].tolist() == [levels[7]] * 8 and levels[7] == pytest.approx(float(fitted.levels[0, 7, 2]), rel=0.1)


def test_channels_have_noise_of_their_own() -> None:
    both = [
        tuple(torch.cat([one, one * scale]) for one, scale in ((real, 0.5), (decoded, 0.5)))
        for real, decoded, _ in cases()
    ]
    fitted = ResidualNoise.fit((real, decoded, EVERYWHERE) for real, decoded in both)
    drawn = fitted.draw(torch.cat([DECODED, 0.5 * DECODED]), generator())
    assert float(drawn[1].std() / drawn[0].std()) == pytest.approx(0.5, rel=0.06)
    assert abs(float(np.corrcoef(drawn[0].flatten(), drawn[1].flatten())[0, 1])) < 0.03


@pytest.mark.parametrize("shape", [(5, 60, 17), (48, 40, 1), (16, 16, 16)])
def test_noise_has_the_shape_of_the_volume(fitted: ResidualNoise, shape: tuple[int, ...]) -> None:
    decoded = torch.zeros(1, *shape)
    one, again, other = (fitted.draw(decoded, generator(seed)) for seed in (3, 3, 4))
    assert one.shape == decoded.shape and torch.equal(one, again) and not torch.allclose(one, other)
    assert float(one.std()) == pytest.approx(0.06, rel=0.4)


def test_slices_have_noise_in_their_plane() -> None:
    slices = [(real[..., :1], decoded[..., :1] + 1, EVERYWHERE[..., :1]) for real, decoded, _ in cases(12)]
    fitted = ResidualNoise.fit((real + 1, decoded, valid) for real, decoded, valid in slices)
    drawn = torch.stack([fitted.draw(torch.zeros(1, 48, 40, 1), generator(seed)) for seed in range(8)])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.15)
    assert autocorrelation(drawn, 2) == pytest.approx(2 / 3, abs=0.06)


def test_nothing_is_not_measured() -> None:
    with pytest.raises(FibldmError, match="at least 100 voxels"):
        ResidualNoise.fit([])
    with pytest.raises(FibldmError, match="got 1 cases"):
        ResidualNoise.fit([(DECODED, DECODED, 0 * EVERYWHERE)])


def test_a_decoder_that_leaves_nothing_out_has_no_noise() -> None:
    fitted = ResidualNoise.fit([(DECODED, DECODED, EVERYWHERE)] * 2)
    assert not fitted.draw(DECODED, generator()).any()


def test_it_is_kept_in_a_file(fitted: ResidualNoise, tmp_path: Path) -> None:
    fitted.save(tmp_path / "noise.safetensors")
    again = ResidualNoise.load(tmp_path / "noise.safetensors")
    assert torch.equal(fitted.draw(DECODED, generator()), again.draw(DECODED, generator()))


def test_synthetic_volumes_have_the_noise_that_the_encode_stage_measured(tiny_run: Path, a_mask: Volume) -> None:
    """It comes on top of what is decoded, from the volume's own generator, and the sidecar says how much."""
    trained = Synthesizer.from_run(tiny_run)
    assert trained.residual_noise is not None
    assert trained.residual_noise.levels.min() > 0.01  # after one epoch
    made = replace(
        trained, residual_noise=replace(trained.residual_noise, levels=torch.full((1, 16, 7), 0.01), spread=0.0)
    )
    plain, once, twice = (
        made(a_mask, settings=SamplingSettings(steps=2, residual_noise=strength)) for strength in (0.0, 1.0, 2.0)
    )
    values = plain.volume.array.astype(float)
    far = np.abs(values) < 500  # from where the window clips
    noise, double = (part.volume.array[far] - values[far] for part in (once, twice))
    assert 2 < noise.std() < 15  # HU; 0.01 is 10 HU, and resampling to the mask's grid averages
    assert np.quantile(np.abs(double - 2 * noise), 0.99) <= 2  # rounding to whole HU
    assert [part.provenance["sampling"]["residual_noise"] for part in (plain, once, twice)] == [0, 1, 2]
    assert plain.provenance["mark"] == {"voxels": False, "why": "residual_noise is 0"}
    assert once.provenance["mark"] == {"voxels": True, "key": "FibLDM mark 1", "strength": 0.2}


def test_without_a_mark_only_signs_of_the_noise_differ_and_the_sidecar_says_so(tiny_run: Path, a_mask: Volume) -> None:
    trained = Synthesizer.from_run(tiny_run)
    settings = SamplingSettings(steps=1)
    decoded, marked, bare = (
        made.decoded([made.prepare(SynthesisRequest(a_mask))], made.as_trained(asked))[0]
        for made, asked in (
            (trained, SamplingSettings(steps=1, residual_noise=0.0)),
            (trained, settings),
            (replace(trained, mark=None), settings),
        )
    )
    assert not np.array_equal(marked, bare) and float((marked - decoded).std()) == pytest.approx(
        float((bare - decoded).std()), rel=0.02
    )
    assert replace(trained, mark=None).mark_of(settings) == {"voxels": False, "why": "it was left out"}
    assert replace(trained, residual_noise=None).mark_of(settings)["why"] == "this generator draws no residual noise"


def test_a_run_that_was_not_measured_says_so(tiny_run: Path, a_mask: Volume, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    facts = read_json(run / "latents" / "latents.json")
    write_json(run / "latents" / "latents.json", {**facts, "residual_noise": None})
    made = Synthesizer.from_run(run)(a_mask, settings=SamplingSettings(steps=1))
    assert made.provenance["sampling"]["residual_noise"] == 0
    write_json(run / "latents" / "latents.json", facts)
    (run / "latents" / facts["residual_noise"]["file"]).write_bytes(b"other")
    with pytest.raises(FibldmError, match="must be as the encode stage wrote it"):
        Synthesizer.from_run(run)


@pytest.mark.parametrize("strength", [-0.1, math.inf, math.nan])
def test_a_strength_that_cannot_be_is_refused(strength: float) -> None:
    with pytest.raises(FibldmError, match="residual_noise must be a number of at least 0"):
        SamplingSettings(residual_noise=strength)
