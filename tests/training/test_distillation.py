"""Students of known data in closed form, and the stage that trains them."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyStage

from fibldm.runs import StageFolder
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files


@pytest.fixture(scope="module")
def distilled(tiny_run: Path, tiny_stage: TinyStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a ControlNet and its student."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    folder.mkdir()
    for stage in ("autoencoder", "latents", "diffusion", "controlnet"):
        shutil.copytree(tiny_run / stage, folder / stage)
    tiny_stage("distillation", folder, teacher_steps=2).run()
    return folder


def test_smoke(distilled: Path, mask_file: Path, tmp_path: Path) -> None:
    assert StageFolder(distilled, "distillation").done()
    print((distilled / "distillation/metrics.csv").read_text())
    made = Synthesizer.from_run(distilled)
    print(made.student, made.sampling)
    synthesize_files(distilled, [mask_file], tmp_path / "out", allow_extrapolation=True, device="cpu")
