"""A stage that was interrupted ends with the same weights as one that was not.

The fast tests raise in the middle of an epoch; the slow ones kill the process, which gives nothing the time to tidy up.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import STAGES
from conftest import TinyStage
from processes import by_monai, finish, run_words, start

from fibldm.files import hash_file
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.runs import StageFolder
from fibldm.training.prepare_batch import LatentPrepareBatch, VolumePrepareBatch

TRAINED = ("autoencoder", "diffusion", "controlnet")
EPOCHS = 3


def slowly(words: list[str]) -> None:
    """MONAI's command, with time to be killed after every checkpoint and latent."""
    rename = os.replace

    def rename_slowly(source: Any, target: Any, **settings: Any) -> None:
        rename(source, target, **settings)
        if str(target).endswith(("last.pt", ".safetensors")):
            time.sleep(0.4)

    os.replace = rename_slowly
    by_monai(*words)


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def before(tiny_run: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes a run folder that has all the stages before one: ``before(stage, name)``."""

    def copied(stage: str, name: str) -> Path:
        for earlier in STAGES[: STAGES.index(stage)]:
            shutil.copytree(tiny_run / earlier, tmp_path / name / earlier)
        return tmp_path / name

    return copied


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values are not equal to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and len(one) == len(other):
        return [found for n, part in enumerate(one) for found in differences(part, other[n], f"{where}/{n}")]
    return [] if one == other else [where]


def checkpoint_differences(run: Path, other: Path, stage: str) -> list[str]:
    folders = [StageFolder(run, stage), StageFolder(other, stage)]
    assert folders[0].require()["weights"] == folders[1].require()["weights"]
    last, best = ([folder.weights(name) for folder in folders] for name in ("last", "best"))
    assert last[0]["objects"].keys() >= {"network", "ema", "optimizer"}
    return [*differences(*last, "last"), *differences(*best, "best")]


def losses(run: Path, stage: str) -> list[list[str]]:
    rows = [row.split(",") for row in (run / stage / "metrics.csv").read_text().splitlines()]
    return [row[:-1] for row in rows]  # all but the seconds


def test_a_difference_would_be_seen() -> None:
    one = {"a": [torch.zeros(2), {"b": 1.0}]}
    assert differences(one, {"a": [torch.zeros(2), {"b": 1.0}]}) == []
    assert differences(one, {"a": [torch.tensor([0.0, 1e-30]), {"b": 2.0}]}) == ["/a/0", "/a/1/b"]


# Times follow the losses of earlier epochs, and the loss has weights of its own.
LEARNING = (("loss_aware_times", "loss_log_variance"), {"times::times::bins": 2, "times::times::history": 2})


@pytest.mark.parametrize(
    ("stage", "configs", "more"),
    [*((stage, (), {}) for stage in TRAINED), pytest.param("diffusion", *LEARNING, marks=pytest.mark.slow)],
    ids=[*TRAINED, "learning"],
)
def test_a_stage_that_broke_off_in_an_epoch_ends_with_the_same_weights(
    tiny_stage: TinyStage,
    before: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    configs: tuple[str, ...],
    more: dict[str, Any],
) -> None:
    whole, broken = before(stage, "whole"), before(stage, "broken")
    settings = {"epochs": EPOCHS, "batch_size": 1, **more}
    tiny_stage(stage, whole, *configs, **settings).run()
    if configs:
        kept = StageFolder(whole, stage).weights("last")["objects"]
        assert kept["times"]["counts"].tolist() == [2, 2] and kept["loss"]["log_variance.layer.bias"] != 0
    prepare = VolumePrepareBatch if stage == "autoencoder" else LatentPrepareBatch
    original, calls = prepare.__call__, 0

    def break_off(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # an epoch of 3 or more steps is over, and its validation on both splits
        if calls > 12 and not (broken / "was-interrupted").exists():
            (broken / "was-interrupted").touch()
            raise Interrupted
        return original(self, *arguments, **options)

    monkeypatch.setattr(prepare, "__call__", break_off)
    with pytest.raises(Interrupted):
        tiny_stage(stage, broken, *configs, **settings).run()
    assert StageFolder(broken, stage).done() is None
    assert 0 < StageFolder(broken, stage).weights("last")["epoch"] < EPOCHS
    torch.manual_seed(12345)  # a new process has other random numbers
    tiny_stage(stage, broken, *configs, **settings).run()
    assert "going on after epoch" in (broken / stage / "log.txt").read_text()
    assert checkpoint_differences(whole, broken, stage) == []
    assert losses(whole, stage) == losses(broken, stage)


def test_latents_that_broke_off_end_the_same(
    tiny_stage: TinyStage, before: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = before("latents", "whole"), before("latents", "broken")
    tiny_stage("latents", whole, views=3).run()
    encode, calls = FrozenFirstStage.encode, 0

    def break_off(self: FrozenFirstStage, volume: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted
        return encode(self, volume)

    monkeypatch.setattr(FrozenFirstStage, "encode", break_off)
    with pytest.raises(Interrupted):
        tiny_stage("latents", broken, views=3).run()
    kept = latent_files(broken)
    assert len(kept) == 2
    tiny_stage("latents", broken, views=3).run()
    assert latent_files(broken) == latent_files(whole)
    assert kept.items() < latent_files(whole).items()


def latent_files(run: Path) -> dict[str, str]:
    files = (path for path in (run / "latents").rglob("*") if path.name.endswith((".safetensors", "latents.json")))
    return {str(file.relative_to(run)): hash_file(file) for file in files}


# --- the same by SIGKILL


def kill_when(process: ForkServerProcess, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.is_alive(), "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_that_was_killed_ends_with_the_same_weights(
    tiny_stage: TinyStage, before: Callable[[str, str], Path], stage: str, tmp_path: Path
) -> None:
    whole, killed = before(stage, "whole"), before(stage, "killed")
    tiny_stage(stage, whole, epochs=EPOCHS).run()
    interrupted = tiny_stage(stage, killed, epochs=EPOCHS)
    kill_when(
        start(tmp_path / "log.txt", slowly, run_words(interrupted)), (killed / stage / "checkpoints" / "last.pt").exists
    )
    assert StageFolder(killed, stage).done() is None
    assert StageFolder(killed, stage).weights("last")["epoch"] < EPOCHS
    log = tmp_path / "log.txt"
    finish(start(log, by_monai, *run_words(interrupted)), log=log)
    assert checkpoint_differences(whole, killed, stage) == []
    assert losses(whole, stage) == losses(killed, stage)


@pytest.mark.slow
def test_latents_that_were_killed_end_the_same(
    tiny_stage: TinyStage, before: Callable[[str, str], Path], tmp_path: Path
) -> None:
    whole, killed = before("latents", "whole"), before("latents", "killed")
    tiny_stage("latents", whole, views=3).run()
    interrupted = tiny_stage("latents", killed, views=3)
    folder = killed / "latents" / "training"
    kill_when(start(tmp_path / "log.txt", slowly, run_words(interrupted)), lambda: any(folder.glob("sub*.safetensors")))
    assert 0 < len(latent_files(killed)) < len(latent_files(whole))
    log = tmp_path / "log.txt"
    finish(start(log, by_monai, *run_words(interrupted)), log=log)
    assert latent_files(killed) == latent_files(whole)
