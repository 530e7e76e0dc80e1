"""The benchmark script in its pieces, on the smallest networks: what a row holds, and that its meters are right."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from builders import STAGES, script

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("benchmark", monkeypatch)


@pytest.fixture
def bench(benchmark, phantom_work: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path):
    """A bench on the shared run with the smallest networks."""
    (tmp_path / "work").symlink_to(phantom_work)
    (tmp_path / "run").symlink_to(tiny_run)
    configs = (str(tiny_data), "tiny")
    return benchmark.Bench(tmp_path, precision="float32", configs=configs, repeats=2, warm_up=1)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "latents"])
def test_training_step_is_measured_beside_the_bare_loop(benchmark, bench, stage: str) -> None:
    stopwatch = benchmark.Stopwatch("cpu")
    benchmark.training_step(bench, stopwatch, stage=stage)
    assert {name: len(values) for name, values in stopwatch.seconds.items()} == {"fibldm": 3, "bare": 3}
    run = next(path.parent for path in bench.folder.glob(f"*/{stage}") if path.parent.name != "run")
    assert json.loads((run / stage / "done.json").read_text())["epochs"] == 3  # the stage itself ran, to its end
    rows = (run / stage / "metrics.csv").read_text().splitlines()
    steps = int(rows[-1].split(",")[1]) // 3
    seconds = [float(row.split(",")[-1]) for row in rows[1:]]  # to the hundredth, and what ends an epoch is in it
    assert all(
        0 < steps * ours < whole + 0.02 for ours, whole in zip(stopwatch.seconds["fibldm"], seconds, strict=True)
    )


def test_bare_loop_trains_a_copy(benchmark, bench, tmp_path: Path) -> None:
    workflow = bench.workflow("autoencoder", tmp_path / "other")
    trainer = workflow.parser.get_parsed_content("train::trainer")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    inputs: list[torch.Tensor] = []
    bare = benchmark.bare_loop(trainer, bench)
    trainer.loss_function.register_forward_hook(lambda _, given, loss: inputs.append(loss.detach()))
    for _ in range(20):
        bare()
    epochs = torch.stack(inputs).reshape(20, -1).mean(1)
    assert epochs.shape == (20,) and epochs[-1] < 0.9 * epochs[0]  # it learns
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "row",
    [
        "load",
        "encode",
        "network call",
        "sample, 10 steps",
        "decode",
        pytest.param("decode, tiled", marks=pytest.mark.slow),
    ],
)
def test_row_has_its_repeats_without_warm_up(benchmark, bench, row: str) -> None:
    few = replace(bench, repeats=1, warm_up=0) if row == "decode, tiled" else bench  # which takes long
    measured = benchmark.speed(few, row)
    assert list(measured) == ["fibldm"]
    assert measured["fibldm"]["median"] > 0 and measured["fibldm"]["iqr"] >= 0


def test_options_are_rows_of_their_own(benchmark, bench) -> None:
    """Every stage with every setting, only where asked for; the setting reaches the stage."""
    assert benchmark.chosen_rows(bench) is benchmark.ROWS
    asked = benchmark.chosen_rows(replace(bench, options=True))
    stages = [stage for stage in STAGES if stage != "latents"]
    named = {f"{stage}, {option}" for stage in stages for option in benchmark.OPTIONS}
    assert set(asked) == set(benchmark.ROWS) | named
    asked["diffusion, checkpointing"](bench, benchmark.Stopwatch("cpu"))
    config = next(bench.folder.glob("tmp*/diffusion/config.yaml")).read_text()
    assert "activation_checkpointing: true" in config


def test_plan_stands_beside_the_memory_of_a_step(benchmark, bench) -> None:
    plain, saving = (
        benchmark.planned(bench, row)["planned_mb"] for row in ("autoencoder step", "autoencoder, bfloat16")
    )
    assert 0 < saving < plain
    assert benchmark.planned(bench, "decode") == {}


def test_speed_leaves_the_warm_up_out_and_takes_ratios_pair_by_pair(benchmark, bench, monkeypatch) -> None:
    def row(_, stopwatch) -> None:
        stopwatch.seconds |= {"fibldm": [100.0, 2.0, 6.0], "bare": [1.0, 1.0, 2.0]}

    monkeypatch.setitem(benchmark.ROWS, "known", row)
    measured = benchmark.speed(bench, "known")
    assert measured["fibldm"] == {"median": 4.0, "iqr": 2.0}
    assert measured["ratio"] == {"median": 2.5, "iqr": 0.5}


def test_stopwatch_divides_by_steps(benchmark) -> None:
    stopwatch = benchmark.Stopwatch("cpu")
    with stopwatch("nap", 4):
        time.sleep(0.08)
    assert 0.02 <= stopwatch.seconds["nap"][0] < 0.04


def test_peak_memory_is_what_a_block_held_at_most(benchmark) -> None:
    """96 MB for a moment and 32 MB for good are a peak of 96 MB."""
    peak = benchmark.PeakMemory("cpu")
    held = []
    with peak("block", 1):
        np.ones(96_000_000, dtype=np.uint8)
        held.append(np.ones(32_000_000, dtype=np.uint8))
    assert peak.bytes["block"] == pytest.approx(96e6, rel=0.05)


@pytest.mark.slow
def test_memory_of_a_row_comes_from_a_process_of_its_own(benchmark, bench) -> None:
    megabytes = benchmark.in_fresh_process(benchmark.memory, bench, "decode")
    volume = 4 * np.prod([32, 32, 32]) / 1e6
    assert volume < megabytes < 200


def test_table_has_a_line_for_every_row(benchmark) -> None:
    spread = {"median": 0.0123, "iqr": 0.001}
    rows = {
        "autoencoder step": {
            "fibldm": spread,
            "bare": spread,
            "ratio": {"median": 1.0, "iqr": 0.01},
            "peak_mb": 512.3,
            "planned_mb": 490.1,
        },
        "decode": {"fibldm": spread, "peak_mb": 20.0},
    }
    _, training, decode = benchmark.table(rows).splitlines()
    assert training.split() == "autoencoder step 12.3 ± 0.5 12.3 ± 0.5 1.000 ± 0.005 512 490".split()
    assert decode.split() == ["decode", "12.3", "±", "0.5", "20"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cuda needs a CUDA device; there is none" in capsys.readouterr().err
