"""Diffusion in pixel space: an autoencoder that does nothing, and every stage after it unchanged."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from builders import STAGES, data_file, tiny_configuration
from safetensors.torch import load_file

from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.reconstruction import Reconstructor
from fibldm.files import read_json
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.models.identity_autoencoder import IdentityAutoencoder
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.datalist import load_datalist

PixelStage = Callable[..., Configuration]


@pytest.fixture(scope="module")
def pixel_stage(phantom_work: Path, tmp_path_factory: pytest.TempPathFactory) -> PixelStage:
    """Makes the configuration of a stage with tiny networks, for whole chests on 16 voxels an axis."""
    data = data_file(tmp_path_factory.mktemp("configs"), 20.0, 16, 16, 16)

    def configuration(stage: str, run_dir: Path, **overrides: object) -> Configuration:
        extra = ["autoencoder_identity"] if stage == "autoencoder" else []
        return tiny_configuration(stage, phantom_work, run_dir, data, "tiny", *extra, **overrides)

    return configuration


@pytest.fixture(scope="module")
def pixel_run(pixel_stage: PixelStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "pixels"
    for stage in STAGES:
        pixel_stage(stage, run_dir).run()
    return run_dir


def test_the_identity_has_the_interface_of_a_first_stage() -> None:
    """No weights, no noise, no compression."""
    stage, volume = IdentityAutoencoder(channels=2), torch.randn(1, 2, 5, 4, 3)
    frozen = FrozenFirstStage(stage)
    assert (frozen.compression, frozen.latent_channels, frozen.needs_mask) == ((1, 1, 1), 2, False)
    assert frozen.is_identity
    assert not stage.state_dict()
    posterior = frozen.encode(volume)
    assert torch.equal(posterior.mean, volume)
    assert not posterior.std.any()
    assert torch.equal(frozen.decode(volume), volume)
    made = stage(volume, seeds=torch.tensor([1]))
    assert torch.equal(made.volume, volume)
    assert made.quantisation is None


def test_stage_1_is_done_at_once_and_skipped_afterwards(
    pixel_stage: PixelStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="fibldm"):
        pixel_stage("autoencoder", tmp_path).run()
        pixel_stage("autoencoder", tmp_path).run()
    assert "IdentityAutoencoder has nothing to learn" in caplog.text
    assert "done already" in caplog.text
    done = StageFolder(tmp_path, "autoencoder").require()
    assert (done["epochs"], done["validation_loss"]) == (0, 0.0)
    assert sorted(path.name for path in (tmp_path / "autoencoder" / "checkpoints").iterdir()) == ["best.pt"]


def test_latents_are_the_volumes_of_the_model_grid(pixel_run: Path, phantom_work: Path) -> None:
    facts = read_json(pixel_run / "latents" / "latents.json")
    assert facts["compression"] == [1, 1, 1]
    evaluated = Evaluated.open(pixel_run, phantom_work)
    plain = {item["case"]: item["file"] for item in facts["items"]["training"]}
    case = evaluated.real("training")[0]
    stored = load_file(pixel_run / "latents" / plain[case.name])
    sample = evaluated.read(case)
    assert np.array_equal(stored["mean"][0].numpy(), sample.image)
    assert not stored["std"].any()
    assert np.array_equal(stored["valid"][0].numpy(), sample.valid)
    samples = [evaluated.read(case) for case in evaluated.real("training")]
    values = np.concatenate([sample.image[sample.valid] for sample in samples])
    assert facts["space"]["mean"] == pytest.approx([float(values.mean(dtype=np.float64))], rel=1e-4)
    assert facts["space"]["std"] == pytest.approx([float(values.std(dtype=np.float64))], rel=1e-4)


def test_synthesis_and_reconstruction_need_no_decoder(pixel_run: Path, phantom_work: Path, tmp_path: Path) -> None:
    entry = load_datalist(phantom_work, "test")[0]
    settings = SamplingSettings(steps=2)
    (path,) = synthesize_files(pixel_run, [entry["label"]], tmp_path, count=1, settings=settings, device="cpu")
    made = nibabel.load(path)
    assert made.shape == nibabel.load(entry["label"]).shape
    assert float(np.std(made.get_fdata())) > 0
    image = Evaluated.open(pixel_run, phantom_work).read(Evaluated.open(pixel_run, phantom_work).real("test")[0]).image
    assert np.array_equal(Reconstructor.from_run(pixel_run)(image), image)
