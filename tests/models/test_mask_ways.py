"""Every way of a mask into the networks, from its configuration to a synthetic volume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from builders import tiny_configuration, with_latents_of

from fibldm.cli import run as cli
from fibldm.errors import FibldmError
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files

Train = Callable[..., Configuration]
SETTINGS = SamplingSettings(steps=2, guidance=2.0)


@pytest.fixture
def train(phantom_work: Path, tiny_data: Path, tiny_run: Path, tmp_path: Path) -> Train:
    """Stages of a run with the latents of `tiny_run`."""
    run = with_latents_of(tiny_run, tmp_path / "run")

    def configuration(stage: str, *configs: str, **overrides: object) -> Configuration:
        settings = {"mask_dropout": 0.5, **overrides}
        return tiny_configuration(stage, phantom_work, run, tiny_data, "tiny", *configs, **settings)

    return configuration


def synthesize(run: Path, work: Path, out: Path, **choices: object) -> np.ndarray:
    mask = sorted((work / "labels").iterdir())[0]
    (file,) = synthesize_files(run, [mask], out, count=1, settings=SETTINGS, device="cpu", **choices)
    image = nibabel.load(file)
    assert image.shape == nibabel.load(mask).shape
    return np.asarray(image.dataobj)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mask_concat", "mask_spade"])
def test_a_base_network_with_the_mask_makes_volumes_alone_and_with_a_controlnet(
    train: Train, phantom_work: Path, tmp_path: Path, way: str
) -> None:
    """Concat and SPADE, each by itself, and each with a ControlNet on top."""
    run = tmp_path / "run"
    train("diffusion", way).run()
    network = StageFolder(run, "diffusion").trained()
    assert network.sees_mask and not network.controls
    synthesize(run, phantom_work, tmp_path / "alone")
    train("controlnet", way).run()
    both = StageFolder(run, "controlnet").trained()
    assert len(both.controls) == 1 and ("mask" in both.routes["channels"]) == (way == "mask_concat")
    assert ("mask" in both.routes["norms"]) == (way == "mask_spade")
    before, after = network.unet.state_dict(), both.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    synthesize(run, phantom_work, tmp_path / "both")


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["mask_label_value", "mask_distance", "mask_contour", "mask_rescaler", "mask_convolutions"]
)
def test_every_encoding_trains_and_makes_volumes(
    train: Train, phantom_work: Path, tmp_path: Path, encoding: str
) -> None:
    """Seen by the base network, then by a ControlNet."""
    run = tmp_path / "run"
    train("diffusion", "mask_concat", encoding).run()
    train("controlnet", "mask_concat", encoding).run()
    synthesize(run, phantom_work, tmp_path / "out")


@pytest.mark.slow
def test_several_controlnets_steer_together(train: Train, tiny_run: Path, phantom_work: Path, tmp_path: Path) -> None:
    """The second one, trained on a copy of the run, sees one label only; strength 0 takes it out again."""
    run, second = tmp_path / "run", tmp_path / "second"
    shutil.copytree(tiny_run / "diffusion", run / "diffusion")
    shutil.copytree(run, second)
    train("controlnet", epochs=2).run()
    train("controlnet", control_labels=[1], run_dir=str(second)).run()
    alone = synthesize(run, phantom_work, tmp_path / "alone")
    assert np.array_equal(synthesize(run, phantom_work, tmp_path / "off", others={second: 0.0}), alone)
    both = synthesize(run, phantom_work, tmp_path / "both", others={second: 1.0}, strength=0.5)
    assert not np.array_equal(both, alone)
    masks = str(sorted((phantom_work / "labels").iterdir())[0])
    options = ["--run", str(run), "--masks", masks, "--steps", "2", "--guidance", "2", "--strength", "0.5"]
    assert cli(["synthesize", *options, "--with-controlnet", f"{second}=1", "--out", str(tmp_path / "cli")]) == 0
    assert cli(["synthesize", *options, "--with-controlnet", f"{second}=x", "--out", str(tmp_path / "no")]) == 2
    (file,) = (tmp_path / "cli").glob("*.nii.gz")
    assert np.array_equal(np.asarray(nibabel.load(file).dataobj), both)
    with pytest.raises(FibldmError, match="strengths must be numbers of at least 0; got"):
        Synthesizer.from_run(run, strength=-1.0)


def test_without_a_mask_anywhere_the_controlnet_is_missed(tiny_run: Path, tmp_path: Path) -> None:
    """An unconditional base network is no generator."""
    for stage in ("autoencoder", "latents", "diffusion"):
        shutil.copytree(tiny_run / stage, tmp_path / "run" / stage)
    with pytest.raises(FibldmError, match="stage 'controlnet' of .* must be finished first; it was never started"):
        Synthesizer.from_run(tmp_path / "run")
