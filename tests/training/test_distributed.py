"""Several ranks train as one process does: the same draws, batches, steps and files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from conftest import TinyStage
from processes import finish, run_words, start_ranks

from fibldm.cli import run as cli
from fibldm.errors import FibldmError
from fibldm.runs import StageFolder
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration
from fibldm.training import distributed
from fibldm.training.distributed import (
    batch_of_rank,
    join_ranks,
    mean_over_ranks,
    on_first_rank,
    part_of_mean,
    require_joined,
)
from fibldm.training.draws import EpochSampler
from fibldm.training.launch import check_devices


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    monkeypatch.setattr(idist, "get_world_size", lambda: ranks)


def draws_of_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int, **settings: Any) -> list[list[Any]]:
    made = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        sampler = EpochSampler(**{"length": 5, "seed": 3, "views": 2, **settings})
        sampler.set_epoch(4)
        made.append(list(sampler))
        assert len(sampler) == len(made[-1])
    return made


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_batches_of_all_ranks_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """And with them every seed, so that what is random does not depend on the number of ranks."""
    (alone,) = draws_of_ranks(monkeypatch, 1)
    shared = draws_of_ranks(monkeypatch, ranks)
    for step in range(10 // ranks):
        batch = {draws[step] for draws in shared}
        assert batch == set(alone[step * ranks : (step + 1) * ranks])


def test_ranks_have_as_many_draws_though_they_cannot_be_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with fewer would let the others wait for ever."""
    (alone,) = draws_of_ranks(monkeypatch, 1)
    shared = draws_of_ranks(monkeypatch, 4)
    assert [len(draws) for draws in shared] == [3, 3, 3, 3]
    assert shared[2][2] == alone[0] and shared[3][2] == alone[1]


def test_validation_sees_every_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = draws_of_ranks(monkeypatch, 1, shuffle=False)
    shared = draws_of_ranks(monkeypatch, 3, shuffle=False)
    assert sorted(draw.seed for draws in shared for draw in draws) == sorted(draw.seed for draw in alone)
    few = draws_of_ranks(monkeypatch, 3, shuffle=False, length=1)
    assert few == [few[0]] * 3 and len(few[0]) == 2


def test_a_batch_is_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_of_rank(3) == 3
    as_rank(monkeypatch, 0, 2)
    assert batch_of_rank(8) == 4
    with pytest.raises(FibldmError, match="must be divisible by their number; got 3 for 2 ranks; .* such as 4"):
        batch_of_rank(3)


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_first_rank(lambda: 7) == 7
    assert float(mean_over_ranks(torch.tensor(3.0))) == 3.0
    require_joined()
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(FibldmError, match="multi_gpu needs the ranks that torchrun starts"):
        join_ranks("cpu")


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FibldmError, match="the 2 processes that torchrun started must train together.*multi_gpu"):
        require_joined()


def test_parts_of_ranks_make_the_mean_over_all_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with 1 and 3 places that count."""
    weights, means = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])], [torch.tensor(4.0), torch.tensor(8.0)]
    assert float(part_of_mean(means[0], weights[0])) == 4.0
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(idist, "all_reduce", lambda value: torch.tensor(4.0))
    parts = [part_of_mean(mean, weight) for mean, weight in zip(means, weights, strict=True)]
    assert float(torch.stack(parts).mean()) == (1 * 4.0 + 3 * 8.0) / 4


def test_a_refusal_of_the_first_rank_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank waits for one that has given up, and only the first one acts."""
    told: list[Any] = []
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda outcome: told.extend(outcome))

    def refuse() -> None:
        raise FibldmError("the folder must be empty", "empty it")

    as_rank(monkeypatch, 0, 2)
    with pytest.raises(FibldmError, match="the folder must be empty"):
        on_first_rank(refuse)
    assert on_first_rank(lambda: 7) == 7

    def hear(outcome: list[Any]) -> None:
        outcome[:] = [told.pop(0)]

    monkeypatch.setattr(distributed, "broadcast_object_list", hear)
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(FibldmError, match="the folder must be empty; empty it"):
        on_first_rank(lambda: pytest.fail("only the first rank acts"))
    assert on_first_rank(lambda: 8) == 7


# --- started by --devices


def test_devices_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2)
    check_devices(8, "cpu")
    with pytest.raises(FibldmError, match="at most the number of CUDA devices; got 3, there are 2"):
        check_devices(3)
    with pytest.raises(FibldmError, match="a CUDA device of its own; device is 'cuda:1'"):
        check_devices(2, "cuda:1")
    with pytest.raises(FibldmError, match="--devices must be at least 1; got 0"):
        check_devices(0)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FibldmError, match="started by torchrun or the like.*multi_gpu"):
        check_devices(2)


def test_the_command_of_several_devices_is_that_of_torchrun(tiny_stage: TinyStage, tmp_path: Path) -> None:
    configuration = tiny_stage("diffusion", tmp_path, "multi_gpu")
    begin = "torchrun --standalone --nproc-per-node 4 -m monai.bundle run --config_file "
    assert configuration.command_of(4) == configuration.command.replace(
        "python -m monai.bundle run --config_file ", begin
    )


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_devices_train_as_torchrun_does_and_say_once_what_is_refused(
    latents: Path, phantom_work: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes on a CPU; a batch that cannot be shared is refused by both, and told by one."""
    run = Path(shutil.copytree(latents, tmp_path / "run"))
    given = ["train", "diffusion", "--data", str(phantom_work), "--run", str(run), "--config", str(tiny_data)]
    given += ["--config", "tiny", "--set", "views=4", "--set", "device=cpu", "--devices", "2", "--json"]
    threads = os.environ.get("OMP_NUM_THREADS")
    assert cli([*given, "--set", "batch_size=3"]) == 2
    said = capfd.readouterr()
    assert said.err.count("batch_size is that of all ranks together") == 1
    assert json.loads(said.out)["error"]["message"].endswith("got 3 for 2 ranks")
    assert cli([*given, "--set", "batch_size=4"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["done"] is True and "torchrun --standalone --nproc-per-node 2" in said.err
    assert StageFolder(run, "diffusion").require()["stopped_epoch"] == 1
    assert os.environ.get("OMP_NUM_THREADS") == threads


# --- by torchrun, and by ranks that have their imports done

STEPS = 52
SETTINGS: dict[str, Any] = {"epochs": 13, "batch_size": 4, "views": 4}
LEARNING = ("loss_aware_times", "loss_log_variance")


@pytest.fixture(scope="module")
def latents(tiny_stage: TinyStage, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with latents of several views; only read."""
    run = tmp_path_factory.mktemp("latents") / "run"
    shutil.copytree(tiny_run / "autoencoder", run / "autoencoder")
    tiny_stage("latents", run, views=4).run()
    return run


def run_by_torchrun(configuration: Configuration, ranks: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "monai.bundle", *run_words(configuration, shipped("multi_gpu"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_a_rank_when(ranks: list[ForkServerProcess], file: Path) -> None:
    """Then the other one, as torchrun does."""
    deadline = time.monotonic() + 600
    while not file.exists():
        assert all(rank.is_alive() for rank in ranks), "the processes ended before they could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert ranks[0].exitcode == -signal.SIGKILL


def saved(run: Path, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = StageFolder(run, "diffusion").weights("last")["objects"][name]
    return state


def rows(run: Path) -> list[list[str]]:
    return [row.split(",")[:-1] for row in (run / "diffusion" / "metrics.csv").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_exactly_when_killed(
    tiny_stage: TinyStage, latents: Path, tmp_path: Path
) -> None:
    """Two gloo processes with half the batch each; after 52 steps, weights of up to 1 agree to 1e-4."""
    runs, log = {name: tmp_path / name for name in ("one", "two", "killed")}, tmp_path / "log.txt"
    for run in runs.values():
        shutil.copytree(latents, run)
    tiny_stage("diffusion", runs["one"], **SETTINGS).run()
    run_by_torchrun(tiny_stage("diffusion", runs["two"], **SETTINGS), 2)
    assert StageFolder(runs["two"], "diffusion").require()["stopped_epoch"] == SETTINGS["epochs"]
    assert rows(runs["two"])[-1][1] == rows(runs["one"])[-1][1] == str(STEPS)
    for name in ("network", "ema"):
        one, two = saved(runs["one"], name), saved(runs["two"], name)
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4
    losses = [[float(row[2]) for row in rows(runs[name])[1:]] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    configuration = tiny_stage("diffusion", runs["killed"], **SETTINGS)
    kill_a_rank_when(start_ranks(configuration, 2, log), runs["killed"] / "diffusion" / "checkpoints" / "last.pt")
    assert StageFolder(runs["killed"], "diffusion").done() is None
    assert StageFolder(runs["killed"], "diffusion").weights("last")["epoch"] < SETTINGS["epochs"]
    finish(*start_ranks(configuration, 2, log), log=log)
    assert "going on after epoch" in (runs["killed"] / "diffusion" / "log.txt").read_text()
    for name in ("network", "ema"):
        two, again = saved(runs["two"], name), saved(runs["killed"], name)
        assert all(torch.equal(two[key], again[key]) for key in two)
    assert rows(runs["killed"]) == rows(runs["two"])


@pytest.mark.slow
def test_two_processes_learn_of_times_what_one_does(tiny_stage: TinyStage, latents: Path, tmp_path: Path) -> None:
    """Times that follow the losses of both, and the logarithm of the loss that both learn."""
    runs, log = {name: Path(shutil.copytree(latents, tmp_path / name)) for name in ("one", "two")}, tmp_path / "log.txt"
    # min-SNR weights, so that losses differ by time before the network has learned anything
    settings = {**SETTINGS, "epochs": 6, "snr_gamma": 5.0, "times::times::bins": 2, "times::times::history": 3}
    made = {name: tiny_stage("diffusion", run, *LEARNING, **settings) for name, run in runs.items()}
    made["one"].run()
    finish(*start_ranks(made["two"], 2, log), log=log)
    for name in ("network", "ema", "loss", "times"):
        one, two = saved(runs["one"], name), saved(runs["two"], name)
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4
    kept = saved(runs["one"], "times")
    moments = kept["losses"].square().mean(dim=1)
    assert kept["counts"].tolist() == [3, 3] and float(moments.max() / moments.min()) > 1.2
    assert len(set(kept["losses"].flatten().tolist())) == 6
