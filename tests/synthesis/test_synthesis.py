"""From a mask to a written volume, with tiny networks of random weights.

Nothing here looks anatomical; what is tested is geometry, marks, seeds, costs and what is refused.
"""

import gzip
import itertools
import json
import os
import shutil
import struct
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import monai.bundle
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
import yaml
from builders import awake, kl_numbers, unet_numbers
from highdicom import get_volume_from_series
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from nibabel import orientations

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.control import Control
from fibldm.models.identity_autoencoder import IdentityAutoencoder
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import RectifiedFlow
from fibldm.models.samplers import SAMPLERS
from fibldm.synthesis import (
    Job,
    Output,
    SamplingSettings,
    SynthesisRequest,
    SynthesisSettings,
    Synthesizer,
    jobs_of,
    synthesize_files,
)
from fibldm.synthesis.evaluator import SynthesisEvaluator, mask_items
from fibldm.synthesis.mask_source import MaskSource
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.interchange import to_sitk
from fibldm.volumes.masks import as_labels, find_masks, hash_mask, mask_stem, read_mask
from fibldm.volumes.writer import sidecar

LABELS = (0, 1, 2, 5)
QUICK = SamplingSettings(sampler="ddim", steps=2)


def synthesize_file(synthesizer, file: Path, out: Path, *, number: int, settings: SamplingSettings, **given) -> Path:
    asked = SynthesisSettings.of(settings, **given)
    (path,) = Output(synthesizer, out, asked).write([Job(MaskSource(file, synthesizer.names), number)])
    return path


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    torch.manual_seed(0)
    mask = MaskEncoding(LABELS, 4)
    return Synthesizer(
        network=network_of(mask, 4, attention=True),
        first_stage=FrozenFirstStage(
            Autoencoder(AutoencoderKL(**kl_numbers(channels=8, latent_channels=4)), wavelet=True, local_norm=True)
        ),
        space=LatentSpace((0.1, 0.0, -0.1, 0.0), (1.0, 0.5, 1.0, 2.0), "ae"),
        process=RectifiedFlow(),
        target="flow",
        conditions={"mask": mask},
        grid=ModelGrid((5.0, 5.0, 5.0), (32, 32, 32)),
        intensity=Intensity("window", low=-1000, high=600),
        envelope=Envelope(
            ((4.0, 6.0),) * 3, ((80.0, 200.0),) * 3, {1: (1.0, 9000.0), 2: (1.0, 9000.0), 5: (0.0, 90.0)}
        ),
        source={"weights": "w", "autoencoder": "ae", "licence": "CC0-1.0"},
        names={1: "left lung", 2: "right lung", 5: "nodule"},
    )


def body(shape=(22, 27, 19), spacing=(5.2, 4.9, 5.0), flips=(-1, 1, -1)) -> Volume:
    """An asymmetric mask, oblique, flipped, cropped: no axis is divisible by 8."""
    labels = np.zeros(shape, dtype=np.uint8)
    labels[2:9, 4:20, 3:15], labels[12:20, 5:18, 2:12], labels[13:15, 6:8, 3:5] = 1, 2, 5
    cos, sin = np.cos(0.2), np.sin(0.2)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return Volume(labels, nibabel.affines.from_matvec(turn @ np.diag(np.array(spacing) * flips), (80.0, -31.0, 412.0)))


def write_mask(path: Path, mask: Volume) -> Path:
    nibabel.save(nibabel.Nifti1Image(mask.array, mask.affine), path)
    return path


def network_of(mask: MaskEncoding, channels: int, *, attention: bool) -> ConditionedNetwork:
    """Random weights everywhere, in the ControlNet's outputs too, so that the mask matters."""
    numbers = unet_numbers(in_channels=channels, channels=(8, 8), attention_levels=(False, attention))
    embedding = {"conditioning_embedding_num_channels": (8,), "conditioning_embedding_in_channels": mask.channels}
    controlnet = ControlNet(**numbers, **embedding)
    return awake(ConditionedNetwork(DiffusionModelUNet(**numbers, out_channels=channels), [Control(controlnet)]))


@pytest.mark.parametrize(
    ("spacing", "resampled"), [((5.2, 4.9, 5.0), None), ((4.0, 5.0, 5.9), [5.0, 5.0, 5.0])], ids=["kept", "resampled"]
)
def test_the_volume_lies_on_the_masks_grid_in_hounsfield_units(synthesizer, spacing, resampled):
    mask = body(spacing=spacing)
    made = synthesizer(mask, settings=QUICK)
    assert made.volume.array.shape == mask.array.shape
    np.testing.assert_array_equal(made.volume.affine, mask.affine)
    assert made.volume.array.dtype == np.int16
    assert -1000 <= made.volume.array.min() < made.volume.array.max() <= 600
    used = made.provenance["grid"]
    assert used["resampled"] == bool(resampled)
    assert used["spacing_mm"] == pytest.approx(resampled or spacing)


@pytest.mark.parametrize("spacing", [(5.2, 4.9, 5.0), (4.0, 5.0, 5.9)], ids=["kept", "resampled"])
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_turning_the_mask_turns_the_volume_and_changes_nothing_else(synthesizer, spacing, order):
    """To the bit."""
    mask = body(spacing=spacing)
    turn = np.array([[axis, flip] for axis, flip in zip(order, (-1, -1, 1), strict=True)], dtype=float)
    turned = Volume(
        orientations.apply_orientation(mask.array, turn),
        mask.affine @ orientations.inv_ornt_aff(turn, mask.array.shape),
    )
    plain, other = (synthesizer(volume, settings=QUICK).volume for volume in (mask, turned))
    assert len(np.unique(plain.array)) > 50
    np.testing.assert_array_equal(orientations.apply_orientation(plain.array, turn), other.array)


def test_one_seed_per_sample(synthesizer):
    """Seed, name and number decide a volume; nothing else does."""
    torch.manual_seed(1)
    first = synthesizer(body(), name="a", number=1, settings=QUICK).volume.array
    torch.manual_seed(2)
    synthesizer(body(), name="b", number=7, settings=QUICK)
    np.testing.assert_array_equal(synthesizer(body(), name="a", number=1, settings=QUICK).volume.array, first)
    others = [("a", 2, QUICK), ("b", 1, QUICK), ("a", 1, replace(QUICK, seed=1))]
    volumes = [synthesizer(body(), name=name, number=k, settings=how).volume.array for name, k, how in others]
    for one, other in itertools.combinations([first, *volumes], 2):
        assert (one != other).mean() > 0.5


def test_the_mask_matters(synthesizer):
    """Fewer labels, another volume, and most where they were taken away."""
    mask, without = body(), body()
    without.array[without.array == 2] = 0
    one, other = (synthesizer(volume, settings=QUICK).volume.array.astype(float) for volume in (mask, without))
    assert np.abs(one - other)[mask.array == 2].mean() > 1


def counted_calls(synthesizer: Synthesizer, settings: SamplingSettings) -> tuple[int, int]:
    """UNet passes that a volume really took, and those that its provenance tells."""
    seen: list[int] = []
    hook = synthesizer.network.unet.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    try:
        made = synthesizer(body(), settings=settings)
    finally:
        hook.remove()
    return sum(seen), made.provenance["network_calls"]


@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_those_that_are_made(synthesizer, name, guidance):
    """One call a step without guidance, two with it; heun takes one more a step, but for the last."""
    settings = SamplingSettings(sampler=name, steps=3, guidance=guidance)
    made, told = counted_calls(synthesizer, settings)
    assert made == settings.network_calls == told == (5 if name == "heun" else 3) * (1 + (guidance != 1))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("interval", "shift", "guided_calls"),
    [
        ((0.0, 0.8), None, (3, 6)),  # times 1, 3/4, 1/2, 1/4; heun asks twice at all but the first
        ((0.3, 0.75), None, (2, 4)),
        ((0.75, 1.0), None, (1, 1)),
        ((0.8, 0.95), None, (0, 0)),
        ((0.0, 0.8), 3.0, (2, 4)),  # times 1, 9/10, 3/4, 1/2
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_costs_nothing_outside_its_interval(synthesizer, name, interval, shift, guided_calls, guidance):
    """What is told of the network calls is what a counting network sees."""
    settings = SamplingSettings(
        sampler=name, steps=4, guidance=guidance, guidance_rescale=0.7, guidance_interval=interval, shift=shift
    )
    twice = guided_calls[name == "heun"] if guidance != 1 else 0
    made, told = counted_calls(synthesizer, settings)
    assert made == told == (7 if name == "heun" else 4) + twice
    assert made <= settings.network_calls


def test_the_autoencoder_gets_latents_in_its_own_scale(synthesizer):
    """The latent space is undone once, just before decoding."""
    decoded = []

    class Recorder(FrozenFirstStage):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            decoded.append(latent)
            return super().decode(latent)

    recording = replace(synthesizer, first_stage=Recorder(synthesizer.first_stage.autoencoder))
    recording(body(), settings=QUICK)
    replace(recording, space=LatentSpace((0.0,) * 4, (1.0,) * 4, "ae"))(body(), settings=QUICK)
    torch.testing.assert_close(decoded[0], synthesizer.space.denormalise(decoded[1]))


def test_a_volume_is_the_same_in_any_batch(synthesizer, monkeypatch):
    """The same noise to the bit, and the same volume to 1e-4 of its range, alone and with others of other sizes."""
    seen: list[torch.Tensor] = []
    real = SAMPLERS["ancestral"]

    def record(denoise, z, times, **given):
        if z.shape[1] == 4:  # counting the network's calls rehearses on two numbers
            seen.append(z.clone())
        return real(denoise, z, times, **given)

    monkeypatch.setitem(SAMPLERS, "ancestral", record)
    settings = replace(QUICK, sampler="ancestral", steps=3, guidance=2.0)
    small = Volume(body().array[:20], body().affine)
    wanted = [
        SynthesisRequest(mask, *named)
        for mask, *named in ((body(), "a", 0), (body(), "a", 1), (small, "b", 0), (body(), "c", 7))
    ]
    together = synthesizer.batch(wanted, settings=settings, allow_extrapolation=True)
    together_noise = [noise for z in seen for noise in z]
    seen.clear()
    alone = [synthesizer.batch([one], settings=settings, allow_extrapolation=True)[0] for one in wanted]
    sizes = [part.provenance["grid"]["size"] for part in alone]
    order = [place for size in (sizes[0], sizes[2]) for place in range(4) if sizes[place] == size][:4]
    assert all(torch.equal(one, seen[place][0]) for one, place in zip(together_noise, order, strict=True))
    width = synthesizer.intensity.high - synthesizer.intensity.low
    for one, other in zip(together, alone, strict=True):
        assert one.provenance == other.provenance
        assert np.abs(one.volume.array.astype(float) - other.volume.array).max() <= max(1.0, 1e-4 * width / 2)
    assert not np.array_equal(together[0].volume.array, together[1].volume.array)


def test_processes_share_the_volumes_and_batches_change_nothing(tiny_run, phantom_work, tmp_path, monkeypatch):
    """Two ranks with batches of 2 write what one process with batches of 1 writes."""
    masks = sorted((phantom_work / "labels").iterdir())[:3]
    settings = replace(QUICK, sampler="ancestral", steps=2)

    fixed = {"count": 2, "settings": settings, "device": "cpu", "allow_extrapolation": True}

    def make(out: str, **given: object) -> list[str]:
        written = synthesize_files(tiny_run, masks, tmp_path / out, **fixed, **given)
        return [path.name for path in written]

    names = make("one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(make("two", batch_size=2))
    assert shares == [names[0::2], names[1::2]]
    for name in names:
        one, two = (np.asarray(nibabel.load(tmp_path / out / name).dataobj, float) for out in ("one", "two"))
        assert np.abs(one - two).max() <= 1.0
        assert (tmp_path / "one" / name).with_suffix("").with_suffix(".json").read_text() == (
            (tmp_path / "two" / name).with_suffix("").with_suffix(".json").read_text()
        )
    with pytest.raises(FibldmError, match="batch_size must be at least 1; got 0"):
        make("none", batch_size=0)


def test_options_of_guidance_change_the_volume(synthesizer):
    settings = replace(QUICK, steps=4, guidance=3.0)
    options = [{}, {"guidance_rescale": 0.7}, {"guidance_interval": (0.0, 0.6)}, {"guidance": 1.0}, {"shift": 3.0}]
    volumes = [synthesizer(body(), settings=replace(settings, **option)).volume.array for option in options]
    for one, other in itertools.combinations(volumes, 2):
        assert (one != other).mean() > 0.2


def test_sampling_is_shifted_as_training_was_unless_told(synthesizer):
    """The sidecar says by how much."""
    trained, settings = replace(synthesizer, shift=3.0), replace(QUICK, steps=4)
    made = trained(body(), settings=settings)
    told = synthesizer(body(), settings=replace(settings, shift=3.0))
    np.testing.assert_array_equal(made.volume.array, told.volume.array)
    assert made.provenance["sampling"] == told.provenance["sampling"]
    assert made.provenance["sampling"]["shift"] == 3.0
    plain = trained(body(), settings=replace(settings, shift=1.0)).volume.array
    np.testing.assert_array_equal(plain, synthesizer(body(), settings=settings).volume.array)
    assert (plain != made.volume.array).mean() > 0.2


@pytest.fixture(scope="module")
def of_voxels(synthesizer) -> Synthesizer:
    """A generator without an autoencoder."""
    torch.manual_seed(1)
    mask = MaskEncoding(LABELS, 1)
    return replace(
        synthesizer,
        network=network_of(mask, 1, attention=False),
        first_stage=FrozenFirstStage(IdentityAutoencoder()),
        space=LatentSpace((-0.2,), (0.5,), "none"),
        conditions={"mask": mask},
        grid=ModelGrid((5.0, 5.0, 5.0), (16, 16, 16)),
    )


def test_dynamic_thresholding_ends_within_the_range_of_a_volume(of_voxels, monkeypatch):
    """Guided, the network leaves the range, and clamping leaves voxels at its ends; thresholding need not."""
    decoded = []

    def record(first_stage: FrozenFirstStage, latent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        decoded.append(latent)
        return first_stage.decode(latent, mask)

    monkeypatch.setattr("fibldm.synthesis.synthesizer.tiled_decode", record)
    plain, held = (
        of_voxels(
            body((16, 13, 15)), settings=replace(QUICK, guidance=4.0, dynamic_threshold=share), allow_extrapolation=True
        )
        for share in (None, 0.9)
    )
    assert float(decoded[0].abs().max()) > 1.2
    assert float(decoded[1].abs().max()) <= 1 + 1e-5
    assert held.provenance["sampling"]["dynamic_threshold"] == 0.9
    assert (plain.volume.array != held.volume.array).mean() > 0.3


def test_dynamic_thresholding_of_latents_is_refused(synthesizer):
    with pytest.raises(
        FibldmError, match="dynamic_threshold needs a run in pixel space, .*; this one has latents; lea"
    ):
        synthesizer(body(), settings=replace(QUICK, dynamic_threshold=0.9))


def _changed(value: float, dtype: type = np.float32) -> Volume:
    mask = body()
    array = mask.array.astype(dtype)
    array[3, 5, 4] = value
    return Volume(array, mask.affine)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (_changed(3), r"may hold the labels \[0, 1, 2, 5\] or 255 \(unknown\); got also \[3\]"),
        (_changed(0.5), "a mask must hold whole numbers; is this a label map, .* It holds 0.5"),
        (_changed(1.002), "a mask must hold whole numbers; is this a label map, .* It holds 1.002"),
        (_changed(np.nan), "a mask must hold whole numbers"),
        (_changed(-1), r"must lie in 0..255; got -1..5"),
        (_changed(256, np.int16), r"must lie in 0..255; got 0..256"),
        (body(spacing=(5.0, 5.0, 8.0)), r"spacing along S 8.00 mm \(training up to 6.00 mm\); give `allow_extrapol"),
        (body(spacing=(2.0, 5.0, 5.0)), r"field of view along R 44 mm \(training 80-200 mm\)"),
        (Volume(np.zeros((20, 20, 20), dtype=np.uint8), np.diag([5.0, 5, 5, 1])), "no voxel has a label"),
        (
            Volume(np.where(body().array > 0, 255, 0).astype(np.uint8), body().affine),
            "only background and 255, which is unknown .a binary mask holds 0 and the value of its label",
        ),
    ],
)
def test_masks_that_are_refused(synthesizer, mask, message):
    """Label set, whole numbers, envelope."""
    with pytest.raises(FibldmError, match=message):
        synthesizer(mask, settings=QUICK)


def test_extrapolation_is_allowed_and_told(synthesizer):
    made = synthesizer(body(spacing=(5.0, 5.0, 8.0)), settings=QUICK, allow_extrapolation=True)
    assert made.provenance["extrapolation"] == ["spacing along S 8.00 mm (training up to 6.00 mm)"]
    assert synthesizer(body(), settings=QUICK).provenance["extrapolation"] == []


def test_a_declared_range_comes_back_in_the_volume_c21(synthesizer):
    made = replace(synthesizer, intensity=Intensity("range", low=0, high=4095))(body(), settings=QUICK)
    hu = synthesizer(body(), settings=QUICK).volume.array.astype(float)
    assert made.volume.array.dtype == np.float32 and made.provenance["intensity"]["kind"] == "range"
    np.testing.assert_allclose(made.volume.array / 4095, (hu + 1000) / 1600, atol=1 / 1600)


def test_masks_and_volumes_may_be_those_of_simpleitk_and_torchio(synthesizer):
    volume = synthesizer(body(), settings=QUICK).volume
    made = synthesizer(to_sitk([body()]), settings=QUICK)
    np.testing.assert_allclose(made.volume.array, volume.array, atol=1)  # HU; the affine's last bits differ
    at = made.to_sitk().TransformIndexToPhysicalPoint((5, 6, 7))
    np.testing.assert_allclose(np.multiply(at, (-1, -1, 1)), nibabel.affines.apply_affine(body().affine, (5, 6, 7)))
    np.testing.assert_array_equal(made.to_torchio().data[0].numpy(), made.volume.array)


def test_a_mask_that_nibabel_scaled_gives_the_volume_of_its_labels(synthesizer, tmp_path, caplog):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(body().array.astype(float), body().affine, header), tmp_path / "scaled.nii.gz")
    mask = _changed(1.0000153)
    for given, name in ((mask, "a mask"), (read_mask(tmp_path / "scaled.nii.gz", {}), "scaled.nii.gz")):
        np.testing.assert_array_equal(as_labels(given).array, np.rint(given.array))
        assert f"{name}: labels that are nearly whole numbers were rounded" in caplog.text


def test_whole_numbers_of_any_type_and_unknown_voxels_are_taken(synthesizer):
    plain = synthesizer(body(), settings=QUICK).volume.array
    for dtype in (np.int64, np.float32, np.int16):
        np.testing.assert_array_equal(synthesizer(_changed(1, dtype), settings=QUICK).volume.array, plain)
    assert synthesizer(_changed(255), settings=QUICK).volume.array.shape == plain.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddim, ancestral, heun, dpmpp_2m; got 'euler'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"guidance": -1.0}, "guidance must be a number of at least 0; got -1.0"),
        ({"guidance": float("nan")}, "guidance must be a number of at least 0; got nan"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must lie in \[0, 1\]; got 1.5; 0.7 is usual"),
        ({"guidance_rescale": float("nan")}, r"guidance_rescale must lie in \[0, 1\]; got nan"),
        ({"guidance_interval": (0.5, 0.5)}, r"two times 0 <= low < high <= 1; got \(0.5, 0.5\); 0 and 1 guide always"),
        ({"guidance_interval": (-0.1, 0.5)}, "two times 0 <= low < high <= 1; got"),
        ({"guidance_interval": (0.1, 1.5)}, "two times 0 <= low < high <= 1; got"),
        ({"guidance_interval": [0.5]}, r"two times 0 <= low < high <= 1; got \[0.5\]"),
        ({"guidance_interval": 0.5}, "two times 0 <= low < high <= 1; got 0.5"),
        ({"shift": 0.0}, "a time shift must be a number above 0.*; got 0.0"),
        ({"sampler": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5; 0 is deterministic DDIM, 1 is ancestral"),
        ({"sampler": "ddim", "eta": float("nan")}, r"eta must be in \[0, 1\]; got nan"),
        ({"eta": 0.5}, "eta is for the sampler ddim only; got 0.5 for dpmpp_2m; leave it out, or take ddim"),
        ({"dynamic_threshold": 0.0}, r"dynamic_threshold must lie in \(0, 1\]; got 0.0; 0.995 is usual, null is none"),
        ({"dynamic_threshold": 99.5}, r"dynamic_threshold must lie in \(0, 1\]; got 99.5"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(FibldmError, match=message):
        SamplingSettings(**given)


def test_file_with_sidecar_and_mask(synthesizer, tmp_path):
    """The file's name is the mask's name; an array under it gives the same volume."""
    file = write_mask(tmp_path / "case.1.nii.gz", body())
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=2, settings=QUICK)
    assert path == tmp_path / "out" / "case.1_002.nii.gz"
    written, mask = nibabel.load(path), nibabel.load(file)
    assert written.header["descrip"].item().startswith(b"SYNTHETIC")
    np.testing.assert_allclose(written.affine, mask.affine, atol=1e-4)
    assert written.shape == mask.shape and written.get_data_dtype() == np.int16
    told = json.loads(sidecar(path).read_text())
    assert told["synthetic"] is True
    assert told["mask"] == "case.1.nii.gz" and told["mask_sha256"] == hash_file(file)
    assert told["sampling"] == {
        **{"sampler": "ddim", "steps": 2, "guidance": 1.0, "seed": 0, "shift": 1.0},
        **{"guidance_rescale": 0.0, "guidance_interval": [0.0, 1.0], "dynamic_threshold": None, "residual_noise": 0.0},
    }
    assert (told["number"], told["network_calls"], told["units"]) == (2, 2, "HU")
    assert told["intensity"] == synthesizer.intensity.to_dict() and told["source"] == synthesizer.source
    assert told["extrapolation"] == [] and "anatomy of its patient" in told["notice"]
    assert told["mark"] == {"voxels": False, "why": "this generator draws no residual noise"}
    used = read_volume(str(tmp_path / "out" / "masks" / "case.1.nii.gz"))
    np.testing.assert_array_equal(used.array, body().array)
    np.testing.assert_allclose(used.affine, body().affine, atol=1e-4)
    made = synthesizer(read_volume(str(file)), name="case.1", number=2, settings=QUICK)
    np.testing.assert_array_equal(read_volume(str(path)).array, made.volume.array)
    names = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*"))
    assert names == ["case.1_002.json", "case.1_002.nii.gz", "masks/case.1.nii.gz"]


def test_a_rerun_keeps_what_is_there_and_refuses_another_request(synthesizer, tmp_path):
    file = write_mask(tmp_path / "case.nii.gz", body())
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    before = [(part, part.stat().st_mtime_ns) for part in (tmp_path / "out").rglob("*.*")]
    for allow in (False, True):
        again = synthesize_file(
            synthesizer, file, tmp_path / "out", number=0, settings=QUICK, allow_extrapolation=allow
        )
        assert again == path
    assert before == [(part, part.stat().st_mtime_ns) for part in (tmp_path / "out").rglob("*.*")]
    (tmp_path / "out/masks/case.nii.gz").unlink()
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    assert (tmp_path / "out/masks/case.nii.gz").is_file()
    retrained = replace(synthesizer, source={**synthesizer.source, "weights": "other"})
    others = (synthesizer, replace(QUICK, seed=1)), (synthesizer, replace(QUICK, eta=0.5)), (retrained, QUICK)
    for other, settings in others:
        with pytest.raises(FibldmError, match="case_000.nii.gz lies there already and was made from another mask, run"):
            synthesize_file(other, file, tmp_path / "out", number=0, settings=settings)


def test_two_masks_of_one_name_are_not_mixed(synthesizer, tmp_path):
    """``masks/case.nii.gz`` stays the mask of every volume of that name."""
    (tmp_path / "other").mkdir()
    file, other = (
        write_mask(tmp_path / "case.nii.gz", body()),
        write_mask(tmp_path / "other" / "case.nii.gz", _changed(2)),
    )
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    with pytest.raises(FibldmError, match="case.nii.gz lies there already and is another mask; choose another `out`"):
        synthesize_file(synthesizer, other, tmp_path / "out", number=1, settings=QUICK)
    assert not (tmp_path / "out" / "case_001.nii.gz").exists()


def test_an_interrupted_write_is_made_good(synthesizer, tmp_path, monkeypatch):
    """Stopped between sidecar and volume, there is no volume; the next run overwrites the lone sidecar."""
    file, out = write_mask(tmp_path / "case.nii.gz", body()), tmp_path / "out"
    replace_file = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if str(target).endswith("_000.nii.gz"):
            raise KeyboardInterrupt
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            synthesize_file(synthesizer, file, out, number=0, settings=QUICK)
    assert sorted(os.listdir(out)) == ["case_000.json", "masks"]
    other = replace(QUICK, seed=9)
    path = synthesize_file(synthesizer, file, out, number=0, settings=other)
    assert json.loads(sidecar(path).read_text())["sampling"]["seed"] == 9
    assert sorted(os.listdir(out)) == ["case_000.json", "case_000.nii.gz", "masks"]


def test_all_masks_are_looked_at_before_the_first_volume(synthesizer, tmp_path):
    """One error tells all that are refused."""
    output, masks = Output(synthesizer, tmp_path / "out", SynthesisSettings(QUICK)), tmp_path / "masks"
    masks.mkdir()

    def missing() -> list[Job]:
        return output.missing(jobs_of(find_masks([masks]), synthesizer.names, 2))

    for name in "ac":
        write_mask(masks / f"{name}.nii.gz", body())
    assert [(mask.file.name, number) for mask, number in missing()] == [
        (f"{name}.nii.gz", k) for name in "ac" for k in (0, 1)
    ]
    write_mask(masks / "b.nii.gz", _changed(9))
    with pytest.raises(FibldmError, match=r"^b: a mask may hold .* got also \[9\]"):
        missing()
    write_mask(masks / "d.nii.gz", replace(body(), array=np.zeros_like(body().array)))
    (masks / "e.nii.gz").write_bytes(b"no mask")
    with pytest.raises(FibldmError) as refused:
        missing()
    said = str(refused.value).splitlines()
    assert said[0] == "3 of 5 masks are refused, nothing was made:"
    assert [line[:5] for line in said[1:3]] == ["  b: ", "  d: "] and "e.nii.gz" in said[3]
    assert "`allow_extrapolation`" in said[4]
    for number in range(20):
        write_mask(masks / f"f{number:02d}.nii.gz", _changed(9))
    with pytest.raises(FibldmError, match="\n  and 13 more\n"):
        missing()


def test_the_engine_looks_at_all_masks_first(synthesizer, tmp_path):
    """And gives the files of every batch."""
    files = [write_mask(tmp_path / "a.nii.gz", body()), write_mask(tmp_path / "b.nii.gz", _changed(9))]
    for masks, refused in ((files, True), (files[:1], False)):
        engine = SynthesisEvaluator(synthesizer, mask_items(masks, 2), tmp_path / "out", inferer=QUICK, batch_size=2)
        with pytest.raises(FibldmError, match="^b: ") if refused else nullcontext():
            engine.run()
        assert (tmp_path / "out").exists() != refused
    assert [Path(file).name for file in engine.state.output["files"]] == ["a_000.nii.gz", "a_001.nii.gz"]


def test_the_engine_takes_and_writes_dicom(synthesizer, tmp_path):
    """As the command does; options that are none of a synthesis are MONAI's."""
    file = write_mask(tmp_path / "case.nii.gz", body())
    own = synthesize_file(synthesizer, file, tmp_path / "own", number=0, settings=QUICK, format="dicom")
    given = {"format": "dicom", "patient_position": "HFS", "val_handlers": []}
    segmentation = tmp_path / "own" / "masks" / "case_000.dcm"
    for mask, name in ((file, "case_000"), (segmentation, "case_000_000")):
        items = mask_items(find_masks([mask]), 1)
        engine = SynthesisEvaluator(synthesizer, items, tmp_path / "out", inferer=QUICK, **given)
        engine.run()
        assert engine.state.output["files"] == [str(tmp_path / "out" / name)]
        slices = [pydicom.dcmread(part) for part in sorted((tmp_path / "out" / name).iterdir())]
        assert len(slices) == len(list(own.iterdir())) and slices[0].PatientPosition == "HFS"
        if mask == file:
            first = pydicom.dcmread(sorted(own.iterdir())[0])
            assert slices[0].PixelData == first.PixelData and not first.PatientPosition
        engine.run()
    with pytest.raises(FibldmError, match="format nifti takes no patient_position"):
        SynthesisEvaluator(synthesizer, items, tmp_path / "out", inferer=QUICK, patient_position="HFS")


def test_a_refused_mask_stops_a_folder_before_its_first_volume(tiny_run, phantom_work, tmp_path):
    """And what lies there already is not made again, though more is asked for."""
    masks, out = tmp_path / "masks", tmp_path / "out"
    masks.mkdir()
    good = [Path(shutil.copy(file, masks)) for file in sorted((phantom_work / "labels").glob("*.nii.gz"))[:2]]
    bad = write_mask(masks / "zz.nii.gz", _changed(77))
    asked = partial(
        *(synthesize_files, tiny_run), out=out, settings=QUICK, batch_size=3, allow_extrapolation=True, device="cpu"
    )
    with pytest.raises(FibldmError, match=r"^zz: a mask may hold .* got also \[77\]"):
        asked(masks=[masks], count=1)
    assert not out.exists()
    bad.unlink()
    times = {file: file.stat().st_mtime_ns for file in asked(masks=[masks], count=1)}
    made = asked(masks=[masks], count=2)
    assert [file.name for file in made] == [
        f"{file.name.removesuffix('.nii.gz')}_{number:03d}.nii.gz" for file in good for number in (0, 1)
    ]
    assert len(times) == 2 and all(file.stat().st_mtime_ns == written for file, written in times.items())


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FibldmError, match="the run must be a folder; .*absent is none; check the path"):
        Synthesizer.from_run(tmp_path / "absent")


@pytest.mark.parametrize("device", ["gpu", "meta:x"])
def test_a_device_that_is_not_there_is_refused(tiny_run, device):
    with pytest.raises(FibldmError, match=f"the device must be one that this machine has; {device}: .*fibldm doctor"):
        Synthesizer.from_run(tiny_run, device=device)


def test_find_masks(tmp_path, caplog):
    """Files and folders, in order; unfinished files and other files of a folder are passed over."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("b.nii.gz", "a.nii", ".writing-x.nii.gz", "._b.nii.gz", "notes.txt", "c.nii.bak", "d.dcm"):
        (folder / name).write_bytes(gzip.compress(b""))
    (folder / "sub").mkdir()
    (tmp_path / "z.nii.gz").touch()
    found = [folder / name for name in ("a.nii", "b.nii.gz", "d.dcm")]
    assert find_masks([tmp_path / "z.nii.gz", folder]) == [tmp_path / "z.nii.gz", *found]
    assert "masks: 3 left out, as no masks: c.nii.bak, notes.txt, sub; masks are files of NIfTI, NRRD" in caplog.text


def test_masks_of_every_format_and_case_are_found_and_read_alike(synthesizer, tmp_path, caplog):
    """As `prepare` reads them; DICOM that is no segmentation is left out by name."""
    folder, mask = tmp_path / "masks", body()
    write_mask(tmp_path / "case.nii.gz", mask)
    folder.mkdir()
    image = SimpleITK.ReadImage(str(tmp_path / "case.nii.gz"))
    for name in ("a.nrrd", "b.mha", "c.nhdr", "d.mhd"):
        SimpleITK.WriteImage(image, str(folder / name))
        (folder / name).rename(folder / name.upper())
    shutil.copy(tmp_path / "case.nii.gz", folder / "E.NII.GZ")
    made, dicom = tmp_path / "made", "dicom"
    synthesize_file(synthesizer, tmp_path / "case.nii.gz", made, number=0, settings=QUICK, format=dicom)
    shutil.copy(made / "masks" / "case_000.dcm", folder / "1.2.840.99")
    shutil.copy(made / "case_000" / "0001.dcm", folder / "0001.dcm")
    found = find_masks([folder])
    assert [mask_stem(file) for file in found] == ["1.2.840.99", "A", "B", "C", "D", "E"]
    assert "masks: 1 left out, as no masks: 0001.dcm; " in caplog.text
    for file in found[1:]:
        read = read_mask(file, synthesizer.names)
        np.testing.assert_array_equal(read.array, mask.array)
        np.testing.assert_allclose(read.affine, mask.affine, atol=1e-4)
    turned = read_mask(found[0], synthesizer.names)
    np.testing.assert_array_equal(turned.array, mask.canonical().array)
    path = synthesize_file(synthesizer, found[3], tmp_path / "out", number=0, settings=QUICK)
    assert path.name == "C_000.nii.gz" and read_volume(path).array.shape == mask.array.shape
    voxels = folder / "c.raw.gz" if (folder / "c.raw.gz").exists() else folder / "c.raw"
    before = hash_mask(found[3])
    voxels.write_bytes(voxels.read_bytes() + b" ")
    assert hash_mask(found[3]) != before


def test_segments_of_slicer_are_known_by_their_names(synthesizer, tmp_path):
    """Their values differ from file to file; left and right must not be mixed up."""
    write_mask(tmp_path / "case.nii.gz", body())
    image = SimpleITK.ReadImage(str(tmp_path / "case.nii.gz"))
    for number, (value, name) in enumerate({2: "left lung", 1: "right lung", 5: "nodule"}.items()):
        image.SetMetaData(f"Segment{number}_Name", name)
        image.SetMetaData(f"Segment{number}_LabelValue", str(value))
    SimpleITK.WriteImage(image, str(tmp_path / "case.seg.nrrd"))
    read = read_mask(tmp_path / "case.seg.nrrd", synthesizer.names)
    np.testing.assert_array_equal(read.array, np.array([0, 2, 1, 0, 0, 5])[body().array])
    with pytest.raises(FibldmError, match=r"must have the name of a label of the run \(lung\); got also left lung"):
        read_mask(tmp_path / "case.seg.nrrd", {1: "lung"})
    image.SetMetaData("Segment2_LabelValue", "7")
    SimpleITK.WriteImage(image, str(tmp_path / "other.seg.nrrd"))
    with pytest.raises(FibldmError, match=r"in other.seg.nrrd 5 has no name"):
        read_mask(tmp_path / "other.seg.nrrd", synthesizer.names)


def test_a_mask_a_tenth_of_a_degree_off_right_angles_is_squared_up_and_said(synthesizer, tmp_path, caplog):
    """SimpleITK opens such a mask by its qform alone; it opens what is made of it, too."""
    mask = body()
    sheared = mask.affine @ nibabel.affines.from_matvec([[1, np.tan(np.radians(0.1)), 0], [0, 1, 0], [0, 0, 1]])
    file = nibabel.Nifti1Image(mask.array, sheared)
    file.set_qform(sheared, 1)
    nibabel.save(file, tmp_path / "tilted.nii.gz")
    path = synthesize_file(synthesizer, tmp_path / "tilted.nii.gz", tmp_path / "out", number=0, settings=QUICK)
    opened = SimpleITK.ReadImage(str(path))
    kept = SimpleITK.ReadImage(str(tmp_path / "out" / "masks" / "tilted.nii.gz"))
    assert opened.GetDirection() == kept.GetDirection() and opened.GetSize() == mask.array.shape
    corners = [(0, 0, 0), *np.diag(np.array(mask.array.shape) - 1), np.array(mask.array.shape) - 1]
    placed = [np.multiply(opened.TransformIndexToPhysicalPoint([int(i) for i in c]), (-1, -1, 1)) for c in corners]
    moved = np.linalg.norm(placed - nibabel.affines.apply_affine(sheared, corners), axis=1)
    assert 0.05 < moved.max() < 0.12  # half of 0.1 degrees over 110 mm
    (told,) = [record.getMessage() for record in caplog.records]
    assert "tilted.nii.gz: the axes were 0.11 degrees off right angles and were squared up, by 0.078 mm at" in told


@pytest.mark.parametrize(("sform", "qform", "kept"), [(4, 4, 4), (2, 1, 2), (0, 5, 5), (1, 1, 1)])
def test_volumes_keep_the_coordinate_system_of_their_mask_and_nothing_else_of_its_header(
    synthesizer, tmp_path, sform, qform, kept
):
    """MNI stays MNI; what may tell a patient or darken the picture stays behind."""
    file = nibabel.Nifti1Image(body().array, body().affine)
    file.header.set_xyzt_units("mm", "sec")
    file.set_qform(body().affine, 1)
    file.header["descrip"], file.header["aux_file"], file.header["cal_max"] = b"Planted^Paula", b"Paula", 5
    file.header["intent_code"], file.header["intent_name"] = 1002, b"Paula"
    data = bytearray(file.to_bytes())
    struct.pack_into("<hh", data, 252, qform, sform)
    (tmp_path / "case.nii").write_bytes(data)
    path = synthesize_file(synthesizer, tmp_path / "case.nii", tmp_path / "out", number=0, settings=QUICK)
    for written in (path, tmp_path / "out" / "masks" / "case.nii.gz"):
        header = nibabel.load(written).header
        assert (int(header["sform_code"]), int(header["qform_code"])) == (kept, kept)
        assert header.get_xyzt_units() == ("mm", "unknown") and header["cal_max"] == 0 and header["intent_code"] == 0
        assert b"Paula" not in gzip.decompress(written.read_bytes())


def test_find_masks_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.nii", "a.nii.gz", "a.dcm", "scan.mhx"):
        (tmp_path / name).touch()
    bad = [
        ([tmp_path / "absent"], "masks must exist; .*absent does not"),
        ([tmp_path / "empty"], r"masks are files of NIfTI, NRRD or MetaImage \(.nii.gz, .*\) or DICOM .*; got none"),
        ([tmp_path / "scan.mhx"], r"masks are files of NIfTI, .*; got .*scan.mhx"),
        ([tmp_path], "every mask needs a name of its own; given twice: a; rename them"),
    ]
    for sources, message in bad:
        with pytest.raises(FibldmError, match=message):
            find_masks(sources)


def _tree(folder: Path) -> dict[str, int]:
    return {str(part.relative_to(folder)): part.stat().st_mtime_ns for part in folder.rglob("*.*")}


def test_dicom_and_nifti_are_one_volume(synthesizer, tmp_path):
    """The same voxels at the same places, a mask that references the series, and a sidecar."""
    file, dicom = write_mask(tmp_path / "case.nii.gz", body()), "dicom"
    nifti = synthesize_file(synthesizer, file, tmp_path / "nifti", number=1, settings=QUICK)
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=1, settings=QUICK, format=dicom)
    assert path == tmp_path / "out" / "case_001"
    slices = [pydicom.dcmread(part) for part in sorted(path.iterdir())]
    read = get_volume_from_series(slices)
    placed = Volume(read.array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ read.affine).canonical()
    wanted = read_volume(str(nifti)).canonical()
    np.testing.assert_array_equal(placed.array, wanted.array)
    np.testing.assert_allclose(placed.affine, wanted.affine, atol=1e-4)
    mask = pydicom.dcmread(tmp_path / "out" / "masks" / "case_001.dcm")
    assert mask.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert [item.SegmentLabel for item in mask.SegmentSequence] == ["left lung", "right lung", "nodule"]
    told, told_nifti = (json.loads(sidecar(part).read_text()) for part in (path, nifti))
    assert told["synthetic"] is True and told["dicom"] == {"quantisation_step": 1.0, "template": False, "slices": 19}
    assert {key: told[key] for key in told_nifti} == told_nifti
    number = len(slices)
    assert sorted(_tree(tmp_path / "out"))[0] == "case_001.json" and len(_tree(tmp_path / "out")) == number + 2


def test_a_dicom_rerun_keeps_what_is_there_and_refuses_another_request(synthesizer, tmp_path):
    file, out, dicom = write_mask(tmp_path / "case.nii.gz", body()), tmp_path / "out", "dicom"
    path = synthesize_file(synthesizer, file, out, number=0, settings=QUICK, format=dicom)
    before = _tree(out)
    assert synthesize_file(synthesizer, file, out, number=0, settings=QUICK, format=dicom) == path
    assert before == _tree(out)
    with pytest.raises(
        FibldmError, match="case_000 lies there already and was made from another mask, run or settings"
    ):
        synthesize_file(synthesizer, file, out, number=0, settings=replace(QUICK, seed=1), format=dicom)
    with pytest.raises(FibldmError, match="case_000 lies there already, in another format; choose another `out`"):
        synthesize_file(synthesizer, file, out, number=0, settings=QUICK)
    again = synthesize_file(synthesizer, file, tmp_path / "again", number=0, settings=QUICK, format=dicom)
    for part in sorted(path.iterdir()):
        assert part.read_bytes() == (again / part.name).read_bytes()
    next(again.glob("*.dcm")).unlink()
    with pytest.raises(FibldmError, match=r"must hold \d+ slices, and .*case_000.dcm its mask; \d+ slices are there"):
        synthesize_file(synthesizer, file, tmp_path / "again", number=0, settings=QUICK, format=dicom)


def test_a_label_without_coded_meaning_is_refused_before_anything_is_made(synthesizer, tmp_path):
    file = write_mask(tmp_path / "case.nii.gz", body())
    odd = replace(synthesizer, names={1: "left lung", 2: "label 2", 5: "odd"}, network=None)
    with pytest.raises(FibldmError, match="there is none for label 2, odd; give `label_codes` FILE"):
        synthesize_file(odd, file, tmp_path / "out", number=0, settings=QUICK, format="dicom")
    assert not (tmp_path / "out").exists()


def test_a_dicom_segmentation_is_taken_as_mask(synthesizer, tmp_path):
    """The mask that was written gives the volume of the same name again; strange segments are refused."""
    file = write_mask(tmp_path / "case.nii.gz", body())
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK, format="dicom")
    written = tmp_path / "out" / "masks" / "case_000.dcm"
    path = synthesize_file(synthesizer, written, tmp_path / "again", number=0, settings=QUICK)
    assert path.name == "case_000_000.nii.gz"
    used = read_volume(str(tmp_path / "again" / "masks" / "case_000.nii.gz"))
    canonical = body().canonical()
    np.testing.assert_array_equal(used.array, canonical.array)
    np.testing.assert_allclose(used.affine, canonical.affine, atol=1e-4)
    made = synthesizer(body(), name="case_000", settings=QUICK).volume.canonical()
    np.testing.assert_array_equal(read_volume(str(path)).array, made.array)
    other = replace(synthesizer, names={1: "left lung", 2: "right lung"})
    with pytest.raises(
        FibldmError, match=r"must have the name of a label of the run \(left.*; got also nodule; rename"
    ):
        synthesize_file(other, written, tmp_path / "other", number=0, settings=QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "dcm"], "format must be one of nifti, dicom; got 'dcm'"),
        (["--template", "x"], "format nifti takes no template"),
        (["--label-codes", "x"], "format nifti takes no label_codes"),
        (["--format", "dicom", "--bids", "T1w"], "--format dicom takes no --bids"),
        (["--format", "dicom", "--template", "/absent"], "a template must be a folder"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    assert run(["synthesize", "--run", str(tmp_path), "--masks", "x", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_writes_dicom_and_bids(tiny_run, mask_file, tmp_path):
    """With the phantoms' own labels, whose codes and names come from the run."""
    command = ["synthesize", "--run", str(tiny_run), "--masks", str(mask_file), "--steps", "1", "--allow-extrapolation"]
    assert run([*command, "--out", str(tmp_path / "dicom"), "--format", "dicom"]) == 0
    (segmentation,) = (tmp_path / "dicom" / "masks").iterdir()
    named = {item.SegmentLabel for item in pydicom.dcmread(segmentation).SegmentSequence}
    assert {"left lung", "right lung", "airways"} <= named
    assert run([*command, "--out", str(tmp_path / "nifti"), "--bids", "ct"]) == 0
    assert len(list((tmp_path / "nifti" / "bids").glob("sub-*/ct/*_desc-synthetic_ct.nii.gz"))) == 1
    assert "left lung" in (tmp_path / "nifti" / "bids" / "dseg.tsv").read_text()
    assert run([*command, "--out", str(tmp_path / "other"), "--bids", "T1w"]) == 2


@pytest.mark.parametrize(
    ("changes", "shift"),
    [
        ({}, 1.0),
        ({"time_shift": 2.5}, 2.5),
        ({"time_shift": "auto"}, (8**3 / 1024) ** 0.5),
        ({"times": {"_target_": "fibldm.models.timesteps.UniformTimes"}}, 1.0),
    ],
)
def test_a_run_says_how_its_times_were_shifted(tiny_run, tmp_path, changes, shift):
    """Also one whose configuration knows nothing of a shift."""
    shutil.copytree(tiny_run, tmp_path / "run")
    file = tmp_path / "run" / "controlnet" / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    assert Synthesizer.from_run(tmp_path / "run").shift == pytest.approx(shift)


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_monai_gives_what_the_command_gives(tiny_run, mask_file, tmp_path):
    """The command in the configuration's header, and another format."""
    given = {"run_dir": str(tiny_run), "masks": [str(mask_file)], "allow_extrapolation": True, "device": "cpu"}
    file = str(Path(__file__).parents[2] / "configs" / "inference.yaml")
    changes = {"settings::seed": 7, "settings::steps": 1}
    monai.bundle.run(config_file=file, out=str(tmp_path / "monai"), count=2, **given, **changes)
    command = [
        "synthesize",
        "--run",
        str(tiny_run),
        "--masks",
        str(mask_file),
        "--allow-extrapolation",
        "--device",
        "cpu",
    ]
    assert run([*command, "--out", str(tmp_path / "own"), "--count", "2", "--seed", "7", "--steps", "1"]) == 0
    made, own = ({path.name: path for path in (tmp_path / name).glob("*.*")} for name in ("monai", "own"))
    assert len(own) == 4 and {name: hash_file(path) for name, path in made.items()} == {
        name: hash_file(path) for name, path in own.items()
    }
    monai.bundle.run("inference", config_file=file, out=str(tmp_path / "dicom"), format="dicom", **given, **changes)
    assert len(list((tmp_path / "dicom" / "masks").glob("*.dcm"))) == 1


def test_the_command_takes_the_options_of_guidance(tiny_run, mask_file, tmp_path, capsys):
    command = ["synthesize", "--run", str(tiny_run), "--masks", str(mask_file), "--out", str(tmp_path), "--json"]
    command += ["--allow-extrapolation", "--steps", "4", "--sampler", "ddim", "--guidance", "5.5"]
    options = ["--guidance-rescale", "0.7", "--guidance-interval", "0.3", "0.8", "--shift", "1.5"]
    assert run([*command, *options]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    assert "guidance 5.5 is above 5: expect exaggerated anatomy" in printed.err
    assert told["network_calls"] == 4 + 2  # times 1, 9/11, 3/5, 1/3
    sampling = json.loads(sidecar(Path(told["outputs"][0])).read_text())["sampling"]
    assert (sampling["guidance_rescale"], sampling["guidance_interval"], sampling["shift"]) == (0.7, [0.3, 0.8], 1.5)
    assert run([*command, "--dynamic-threshold", "0.9", "--seed", "3"]) == 2


def test_eta_leads_from_ddim_to_ancestral(synthesizer):
    """The ends are both samplers, between them lies another volume; a sidecar tells it where it was given."""
    mask, steps = body(), {"steps": 4, "seed": 2}
    asked = [
        {"sampler": "ddim"},
        {"sampler": "ancestral"},
        *({"sampler": "ddim", "eta": eta} for eta in (0.0, 0.5, 1.0)),
    ]
    made = [synthesizer(mask, settings=SamplingSettings(**choice, **steps)) for choice in asked]
    ddim, ancestral, still, half, full = (one.volume.array for one in made)
    np.testing.assert_array_equal(still, ddim)
    np.testing.assert_array_equal(full, ancestral)
    assert all((half != end).mean() > 0.1 for end in (ddim, ancestral))
    assert [one.provenance["sampling"].get("eta", "untold") for one in made] == ["untold"] * 2 + [0.0, 0.5, 1.0]


def test_the_command_takes_number_eta_sampler_steps_and_batch(tiny_run, phantom_work, tmp_path, capsys):
    """Any batch size, and masks of a folder; the same asked again keeps what is there."""
    masks = [shutil.copy(file, tmp_path) for file in sorted((phantom_work / "labels").glob("*.nii.gz"))[:2]]
    command = ["synthesize", "--run", str(tiny_run), "--masks", str(tmp_path), "--out", str(tmp_path / "out"), "--json"]
    command += ["--allow-extrapolation", "--count", "2", "--batch-size", "3", "--device", "cpu"]
    chosen = ["--sampler", "ddim", "--eta", "0.3", "--steps", "3"]
    assert run([*command, *chosen]) == 0
    outputs = [Path(path) for path in json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]]
    assert sorted(path.name for path in outputs) == sorted(
        f"{Path(mask).name.removesuffix('.nii.gz')}_{number:03d}.nii.gz" for mask in masks for number in range(2)
    )
    told = [json.loads(sidecar(path).read_text())["sampling"] for path in outputs]
    assert all((one["sampler"], one["eta"], one["steps"]) == ("ddim", 0.3, 3) for one in told)
    before = [path.stat().st_mtime_ns for path in outputs]
    assert run([*command, *chosen]) == 0
    assert before == [path.stat().st_mtime_ns for path in outputs]
    assert run([*command, *chosen, "--eta", "0.4"]) == 2
    assert "made from another mask, run or settings" in capsys.readouterr().err
    assert run([*command, "--eta", "0.3"]) == 2
    assert "eta is for the sampler ddim only; got 0.3 for dpmpp_2m" in capsys.readouterr().err


def test_masks_may_be_those_of_a_split(tiny_run, phantom_work, tmp_path, capsys):
    options = ["synthesize", "--run", str(tiny_run), "--data", str(phantom_work), "--steps", "1", "--device", "cpu"]
    assert run([*options, "--split", "validation", "--out", str(tmp_path / "out"), "--allow-extrapolation"]) == 0
    cases = [entry["case"] for entry in read_datalist(phantom_work)["validation"] if "label" in entry]
    assert [path.name for path in sorted((tmp_path / "out").glob("*.nii.gz"))] == [
        f"{case}_000.nii.gz" for case in cases
    ]
    assert run([*options, "--split", "tests", "--out", str(tmp_path / "none")]) == 2
    assert "--split must be one of training, validation, test; got 'tests'" in capsys.readouterr().err
    assert run(["synthesize", "--run", str(tiny_run), "--out", str(tmp_path / "none")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "masks must be given to this generator, as its volumes follow them; got none; give --masks or --data" in said


def test_weights_of_an_epoch_that_was_kept(tiny_run, phantom_work, tmp_path):
    """They make other volumes, and the sidecar tells them from the best."""
    run_dir, mask = tmp_path / "run", read_volume(load_datalist(phantom_work, "test", masks=True)[0]["label"])
    shutil.copytree(tiny_run, run_dir)
    folder = run_dir / "controlnet" / "checkpoints"
    best = torch.load(folder / "best.pt", weights_only=True)
    torch.save({**best, "model": {name: 1.1 * part for name, part in best["model"].items()}}, folder / "epoch_0001.pt")
    made = {name: Synthesizer.from_run(run_dir, checkpoint=name) for name in ("best", "epoch_0001")}
    one, other = (synthesizer(mask, settings=QUICK) for synthesizer in made.values())
    assert not np.array_equal(one.volume.array, other.volume.array)
    done = json.loads((run_dir / "controlnet" / "done.json").read_text())
    assert made["best"].source["weights"] == done["weights"] != made["epoch_0001"].source["weights"]
    with pytest.raises(FibldmError, match="checkpoint must be one of best, epoch_0001; got 'epoch_1'"):
        Synthesizer.from_run(run_dir, checkpoint="epoch_1")


def test_a_larger_mask_is_drawn_from_tiles_as_one(synthesizer):
    """The sidecar tells the tiles, the seed decides, each tile is a call; other masks and settings have none."""
    large = body(shape=(70, 27, 19), spacing=(5.0, 5.0, 5.0))
    settings = replace(QUICK, guidance=2.0, tiles=True)
    made, again = (synthesizer(large, settings=settings, allow_extrapolation=True) for _ in range(2))
    tiles = made.provenance["tiles"]
    assert tiles["number"] > 1
    assert made.provenance["network_calls"] == settings.network_calls * tiles["number"]
    assert np.array_equal(made.volume.array, again.volume.array)
    assert made.volume.array.shape == large.array.shape
    whole = synthesizer(large, settings=replace(settings, tiles=False), allow_extrapolation=True)
    assert "tiles" not in whole.provenance and not np.array_equal(made.volume.array, whole.volume.array)
    assert "tiles" not in synthesizer(body(), settings=settings).provenance


def test_guidance_in_one_call_is_as_in_two(synthesizer, monkeypatch):
    """To 1e-4 of the range."""
    settings = replace(QUICK, guidance=2.0)
    joint = synthesizer(body(), settings=settings)
    real = SamplingSettings.guide
    monkeypatch.setattr(SamplingSettings, "guide", lambda self, one, two, both=None: real(self, one, two))
    apart = synthesizer(body(), settings=settings)
    width = synthesizer.intensity.high - synthesizer.intensity.low
    difference = np.abs(joint.volume.array.astype(float) - apart.volume.array).max()
    assert difference <= max(1.0, 1e-4 * width)
