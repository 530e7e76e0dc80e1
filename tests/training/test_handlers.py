"""Steps of several batches, watching, guards, and stops before the last epoch."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyStage
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.optimizers.lr_scheduler import WarmupCosineSchedule
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss

from fibldm.cli import run as fibldm
from fibldm.errors import FibldmError
from fibldm.runs import StageFolder
from fibldm.training.checkpoints import Checkpoints, GapLimit, Patience, WallTime
from fibldm.training.handlers import EMA, ClipGradient, Metrics, Schedule, is_step, steps_done
from fibldm.training.precision import ScaledTrainer
from fibldm.training.step_losses import StepLosses


def engine_of(step: Callable[[Engine, Any], Any], accumulation: int = 1) -> Engine:
    engine = Engine(step)
    engine.accumulation_steps = accumulation  # type: ignore[attr-defined]  # as MONAI's trainer has it
    return engine


# --- steps of several batches


def test_steps_are_where_monai_steps() -> None:
    """Every third of seven batches, and at the end of the epoch."""
    seen: list[tuple[bool, int]] = []
    engine = engine_of(lambda engine, item: seen.append((is_step(engine), steps_done(engine))), accumulation=3)
    engine.run(range(7), max_epochs=2)
    assert [step for step, _ in seen] == [False, False, True, False, False, True, True] * 2
    assert [done for _, done in seen] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6]


def linear_trainer(accumulation: int, batch: int, **settings: Any) -> tuple[ScaledTrainer, nn.Linear, EMA]:
    """Twelve samples an epoch, clipped, averaged and on a schedule, as a stage attaches them."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    samples = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).split(batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=12, warmup_multiplier=0.1)
    trainer = ScaledTrainer(
        device="cpu",
        max_epochs=3,
        train_data_loader=samples,
        network=network,
        optimizer=optimizer,
        loss_function=lambda prediction, target: 100 * mse_loss(prediction, target),
        prepare_batch=lambda batch, *_, **__: (batch[:, :3], batch[:, 3:]),
        accumulation_steps=accumulation,
        decollate=False,
        **settings,
    )
    ema = EMA(network, momentum=0.1)
    for handler in (ClipGradient(network, 0.5), ema, Schedule(scheduler)):
        handler.attach(trainer)
    return trainer, network, ema


@pytest.mark.parametrize("accumulation", [2, 4])
def test_batches_of_a_step_are_as_one_batch(accumulation: int) -> None:
    """Gradient, clipping, average and schedule."""
    trainer, network, ema = linear_trainer(accumulation, 4 // accumulation)
    trainer.run()
    whole, expected, expected_ema = linear_trainer(1, 4)
    whole.run()
    torch.testing.assert_close(network.weight, expected.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(ema.ema_model.weight, expected_ema.ema_model.weight, rtol=0, atol=1e-6)
    rates = [engine.optimizer.param_groups[0]["lr"] for engine in (trainer, whole)]
    assert rates == pytest.approx([0.025, 0.025])


def test_a_gradient_scaler_of_a_power_of_two_changes_nothing() -> None:
    """What is clipped and logged is the gradient itself, not the scaled one."""
    trainer, network, _ = linear_trainer(2, 2, scaler=GradScaler("cpu", init_scale=2.0**10))
    trainer.run()
    plain, expected, _ = linear_trainer(2, 2)
    plain.run()
    assert torch.equal(network.weight, expected.weight)
    assert trainer.state.gradient_norm == plain.state.gradient_norm


def test_a_gradient_that_is_too_large_for_its_scale_is_left_out_and_lowers_it() -> None:
    """The scale lives in the scaler that was given, which a checkpoint keeps."""
    scaler = GradScaler("cpu", init_scale=2.0**127)
    trainer, network, _ = linear_trainer(1, 4, scaler=scaler)
    before = network.weight.detach().clone()
    seen: list[bool] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(torch.equal(network.weight, before)))
    trainer.run()
    assert seen[0] and not seen[-1]
    assert 0 < scaler.get_scale() < 2.0**127
    assert scaler.state_dict()["scale"] == scaler.get_scale()


# --- watching


def watched(folder: Path, outputs: list[dict[str, Any]], after: int = 0) -> list[dict[str, str]]:
    """Metrics of one iteration an epoch with these outputs."""
    engine = Engine(lambda engine, item: outputs[engine.state.epoch - 1])
    metrics = Metrics(folder / "metrics.csv", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25))
    metrics.attach(engine)
    engine.state.max_epochs, engine.state.epoch_length = len(outputs), 1
    engine.state.epoch = engine.state.iteration = after
    engine.run([0], max_epochs=len(outputs))
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def output(loss: float, **parts: float) -> list[dict[str, Any]]:
    losses = {name: torch.tensor(value) for name, value in parts.items()}
    return [{"loss": torch.tensor(loss), "losses": losses}]


def test_every_part_of_the_loss_has_a_column_from_the_epoch_on_that_has_it(tmp_path: Path) -> None:
    rows = watched(tmp_path, [output(1.0, kl=0.25), output(2.0, kl=0.5, generator=3.0)])
    assert [(row["loss"], row["loss/kl"], row["loss/generator"]) for row in rows] == [
        ("1", "0.25", ""),
        ("2", "0.5", "3"),
    ]
    assert list(rows[0])[-1] == "seconds"
    rows = watched(tmp_path, [output(0.0), output(0.0), output(4.0, generator=5.0)], after=2)
    assert [row["loss/kl"] for row in rows] == ["0.25", "0.5", ""]
    assert [row["loss/generator"] for row in rows] == ["", "3", "5"]


def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(tmp_path: Path) -> None:
    """The mean over the steps of an epoch; nothing is clipped by a norm of 0."""
    weight = nn.Parameter(torch.zeros(2))
    engine = Engine(lambda engine, item: output(1.0))
    engine.register_events(*IterationEvents)
    clip = ClipGradient(nn.ParameterList([weight]), 0)  # type: ignore[arg-type]  # a module, as all that trains

    @engine.on(Events.ITERATION_STARTED)
    def backward(engine: Engine) -> None:
        weight.grad = torch.tensor([3.0, 4.0]) * engine.state.iteration
        clip(engine)
        assert torch.equal(weight.grad, torch.tensor([3.0, 4.0]) * engine.state.iteration)

    Metrics(tmp_path / "metrics.csv", torch.optim.SGD([weight], lr=0.1)).attach(engine)
    engine.run(range(3), max_epochs=1)
    (row,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert float(row["gradient_norm"]) == 10.0


def stepped(folder: Path, losses: list[float], *, every: int, accumulation: int = 1, after: int = 0) -> list[list[str]]:
    """Rows of ``steps.csv`` of two epochs of so many iterations."""
    engine = engine_of(lambda engine, item: output(losses[item], kl=1.0), accumulation)
    StepLosses(folder, every).attach(engine)
    engine.state.max_epochs, engine.state.epoch_length = 2, len(losses)
    engine.state.epoch, engine.state.iteration = after, after * len(losses)
    engine.run(range(len(losses)), max_epochs=2)
    return [line.split(",") for line in (folder / "steps.csv").read_text().splitlines()]


def test_losses_of_single_steps_are_kept_if_asked(tmp_path: Path) -> None:
    """Every so many; a step is the mean of its iterations, and a resume does its own again."""
    rows = stepped(tmp_path, [1.0, 2.0, 3.0], every=2)
    assert rows == [["step", "loss", "loss/kl"], ["2", "2", "1"], ["4", "1", "1"], ["6", "3", "1"]]
    again = stepped(tmp_path, [5.0, 5.0, 5.0], every=2, after=1)
    assert again == [rows[0], rows[1], ["4", "5", "1"], ["6", "5", "1"]]
    assert list((tmp_path / "steps").glob("events.out.tfevents*"))
    rows = stepped(tmp_path / "sum", [1.0, 2.0, 6.0], every=1, accumulation=2)
    assert [row[:2] for row in rows[1:]] == [["1", "1.5"], ["2", "6"], ["3", "1.5"], ["4", "6"]]
    StepLosses(tmp_path / "none", 0).attach(Engine(lambda engine, item: None))
    for wrong in (-1, True, 1.5):
        with pytest.raises(FibldmError, match="log_every must be a whole number of at least 0"):
            StepLosses(tmp_path, wrong)  # type: ignore[arg-type]


# --- guards


@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_within_the_epoch(tmp_path: Path, loss: float) -> None:
    losses = [1.0, 1.0, 1.0, loss, 1.0]
    engine = Engine(lambda engine, item: output(losses[item]))
    Metrics(tmp_path / "metrics.csv", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)).attach(engine)
    with pytest.raises(FibldmError, match=r"training loss must stay finite; it is (nan|-inf) in epoch 1, iteration 4"):
        engine.run(range(5), max_epochs=1)
    assert engine.state.iteration == 4


def test_a_gradient_that_is_not_finite_ends_the_training_before_it_is_used() -> None:
    """The loss of that step is still finite, and weights would be saved that are not."""
    trainer, network, _ = linear_trainer(1, 4)
    network.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FibldmError, match="gradient must stay finite; its norm is (nan|inf) in epoch 1, iteration 1"):
        trainer.run()
    assert torch.isfinite(network.weight).all()


# --- what is kept


def kept(folder: Path, losses: list[float | None], **settings: int) -> list[str]:
    """The epochs that are kept of an engine that meets these validation losses."""
    metrics: Any = SimpleNamespace(validation_loss=None, rows=[])
    engine = Engine(lambda engine, item: None)

    @engine.on(Events.EPOCH_COMPLETED)
    def measure(engine: Engine) -> None:
        metrics.validation_loss = losses[engine.state.epoch - 1]
        told = "" if metrics.validation_loss is None else str(metrics.validation_loss)
        metrics.rows.append({"epoch": str(engine.state.epoch), "validation_loss": told})

    model = nn.Linear(1, 1)
    ema = EMA(model, momentum=0.5)
    Checkpoints(folder, {"network": model}, ema=ema, every=100, metrics=metrics, **settings).attach(engine)
    engine.run([0], max_epochs=len(losses))
    return sorted(file.stem for file in folder.glob("epoch_*.pt"))


def test_the_best_epochs_are_kept(tmp_path: Path) -> None:
    """Beside those that are kept regularly, and the best of all."""
    losses = [5.0, 3.0, 4.0, None, 2.0, 6.0, 3.0]
    assert kept(tmp_path / "one", losses, keep_best=2) == ["epoch_0002", "epoch_0005"]
    assert kept(tmp_path / "two", losses, keep_best=3) == ["epoch_0002", "epoch_0005", "epoch_0007"]
    both = kept(tmp_path / "both", losses, keep_best=1, keep_every=3)
    assert both == ["epoch_0003", "epoch_0005", "epoch_0006"]
    assert kept(tmp_path / "none", losses) == []
    content = torch.load(tmp_path / "one" / "epoch_0002.pt", weights_only=True)
    assert (content["epoch"], content["loss"]) == (2, 3.0)
    with pytest.raises(FibldmError, match="keep_best must be a whole number of at least 0; got -1"):
        kept(tmp_path / "wrong", losses, keep_best=-1)


# --- stops


def checkpointed(folder: Path, losses: list[float], **settings: Any) -> tuple[Engine, Checkpoints]:
    """An engine of one iteration an epoch that meets these validation losses and saves at its last epoch only."""
    model = nn.Linear(1, 1)
    metrics: Any = SimpleNamespace(validation_loss=None)
    engine = Engine(lambda engine, item: None)
    engine.state.max_epochs, engine.state.epoch_length = len(losses), 1
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: setattr(metrics, "validation_loss", losses[engine.state.epoch - 1])
    )
    ema = EMA(model, momentum=0.5)
    objects = {"network": model, **settings}
    checkpoints = Checkpoints(folder / "checkpoints", objects, ema=ema, every=100, metrics=metrics)
    checkpoints.attach(engine)
    return engine, checkpoints


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [([3.0, 1.0, 2.0, 2.0, 0.5], 4), ([3.0, 1.0, 2.0, 0.5, 0.7], 5), ([3.0, 1.0, 1.0, 1.0, 0.1], 4)],
)
def test_training_stops_when_the_validation_loss_falls_no_more(
    tmp_path: Path, losses: list[float], stopped: int
) -> None:
    """After two validations without a lower loss, with a checkpoint, and a resume stops there as well."""
    engine, checkpoints = checkpointed(tmp_path, losses)
    patience = Patience(checkpoints, patience=2, interval=1)
    patience.attach(engine)
    engine.run([0], max_epochs=len(losses))
    assert engine.state.epoch == stopped
    engine, checkpoints = checkpointed(tmp_path, losses)
    assert checkpoints.resume(engine) == stopped
    assert Patience(checkpoints, patience=2, interval=1).is_over(stopped) == (stopped < len(losses))


def test_patience_counts_validations_and_not_epochs(tmp_path: Path) -> None:
    _, checkpoints = checkpointed(tmp_path, [1.0])
    checkpoints.best = {"epoch": 10}
    patience = Patience(checkpoints, patience=2, interval=5)
    assert [epoch for epoch in range(10, 26) if patience.is_over(epoch)][0] == 20
    assert not Patience(checkpoints, patience=0, interval=1).is_over(1000)


def gapped(folder: Path, gaps: list[float | None], patience: int) -> tuple[Engine, Checkpoints, GapLimit]:
    """An engine of one iteration an epoch that meets these gaps, and a limit of 0.5; None is no validation."""
    engine, checkpoints = checkpointed(folder, [1.0] * len(gaps))
    metrics = Metrics(folder / "metrics.csv", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: setattr(engine.state, "output", output(1.0)))
    metrics.attach(engine)

    def measure() -> None:
        value = gaps[engine.state.epoch - 1]
        metrics.watched = {} if value is None else {"training_loss": 1.0, "gap": value}

    engine.add_event_handler(Events.ITERATION_COMPLETED, measure)
    limit = GapLimit(checkpoints, metrics, limit=0.5, patience=patience)
    limit.attach(engine)
    return engine, checkpoints, limit


@pytest.mark.parametrize(
    ("gaps", "patience", "stopped"),
    [
        ([0.1, 0.4, 0.6, 0.7], 0, 3),
        ([0.1, 0.6, 0.4, 0.6, 0.6, 0.1], 2, 5),
        ([0.6, None, None, 0.7, 0.1], 2, 4),
        ([0.5, 0.5, -0.5], 1, 3),
    ],
)
def test_training_stops_when_the_gap_stays_too_large(
    tmp_path: Path, gaps: list[float | None], patience: int, stopped: int
) -> None:
    """With a checkpoint; a resume reads the validations before from the file, and stops there as well."""
    engine, _, limit = gapped(tmp_path, gaps, patience)
    engine.run([0], max_epochs=len(gaps))
    assert engine.state.epoch == stopped
    engine, checkpoints, again = gapped(tmp_path, gaps, patience)
    assert checkpoints.resume(engine) == stopped
    assert again.is_over(stopped) == limit.is_over(stopped) == (stopped < len(gaps))
    assert again.gaps(stopped) == limit.gaps(stopped)
    assert [epoch for epoch in range(1, stopped) if again.is_over(epoch)] == []


def test_the_limit_of_a_gap_is_above_0_or_none(tmp_path: Path) -> None:
    engine, checkpoints, limit = gapped(tmp_path, [9.0], 0)
    engine.run([0], max_epochs=1)
    assert not GapLimit(checkpoints, limit.metrics, limit=None).is_over(1)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(FibldmError, match="stop_gap must be above 0, as a share of the training loss; got"):
            GapLimit(checkpoints, limit.metrics, limit=wrong)


@pytest.mark.parametrize(("limit", "stopped"), [(0.5, 1), (9.0, 3), (10.0, 4), (20.0, 5), (None, 5)])
def test_a_stage_stops_before_its_wall_time_is_over(tmp_path: Path, limit: float | None, stopped: int) -> None:
    """Epochs of 2, 3, 2, 3, 2 seconds, one of them before the epoch; the next may be as long as the longest."""
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    engine, checkpoints = checkpointed(tmp_path, [1.0] * 5)
    wall_time = WallTime(checkpoints, limit, clock=lambda: now)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: wait(1))
    wall_time.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: wait(2 - engine.state.epoch % 2))
    engine.run([0], max_epochs=5)
    assert engine.state.epoch == stopped
    assert wall_time.is_over == (stopped < 5)
    assert torch.load(checkpoints.folder / "last.pt", weights_only=True)["epoch"] == stopped


# --- checkpoints


class Counter:
    """The smallest thing with a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_whatever_else_a_stage_names_is_saved_and_restored(tmp_path: Path) -> None:
    engine, _ = checkpointed(tmp_path, [1.0], counter=Counter(5))
    engine.run([0], max_epochs=1)
    counter = Counter()
    engine, checkpoints = checkpointed(tmp_path, [1.0], counter=counter)
    checkpoints.resume(engine)
    assert counter.value == 5
    engine, checkpoints = checkpointed(tmp_path, [1.0], counter=counter, other=Counter())
    with pytest.raises(FibldmError, match="must hold the state of network, counter, other; it lacks other"):
        checkpoints.resume(engine)


def test_what_a_kill_left_is_gone_after_a_resume(tmp_path: Path) -> None:
    engine, checkpoints = checkpointed(tmp_path, [1.0])
    engine.run([0], max_epochs=1)
    for name in ("checkpoints/tmpk2x9", ".writing-ab12metrics.csv"):
        (tmp_path / name).write_bytes(b"half")
    checkpoints.resume(engine)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["best.pt", "checkpoints", "last.pt"]


# --- a whole stage


def weights(run: Path) -> str:
    done: str = StageFolder(run, "autoencoder").require()["weights"]
    return done


def test_a_stage_of_several_short_runs_ends_as_one_of_a_long_one(tiny_stage: TinyStage, tmp_path: Path) -> None:
    """By the command line, which exits with 0 and says what to do."""
    tiny_stage("autoencoder", tmp_path / "whole", epochs=3).run()
    settings = {"epochs": 3, "wall_time": 0.001}
    for epoch in (1, 2):
        tiny_stage("autoencoder", tmp_path / "parts", **settings).run()
        folder = StageFolder(tmp_path / "parts", "autoencoder")
        assert folder.done() is None
        assert folder.weights("last")["epoch"] == epoch
        assert f"stopped after epoch {epoch} of 3" in (folder.path / "log.txt").read_text()
    tiny_stage("autoencoder", tmp_path / "parts", **settings).run()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_stage_follows_what_is_asked_of_its_watching(tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path) -> None:
    """Fewer batches of validation, losses by step, and the best epochs; none of it is another training."""
    for stage in ("autoencoder", "latents"):
        (tmp_path / stage).symlink_to(tiny_run / stage)
    settings = {"epochs": 3, "batch_size": 1, "keep_best": 2, "limit_val_batches": 1, "log_every": 1}
    tiny_stage("diffusion", tmp_path, **settings).run()
    folder = tmp_path / "diffusion"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [name for name in rows[0] if name.startswith("validation_loss/")] == ["validation_loss/t0.25"]
    best = sorted(rows, key=lambda row: float(row["validation_loss"]))[:2]
    assert {file.stem for file in folder.glob("checkpoints/epoch_*.pt")} == {
        f"epoch_{int(row['epoch']):04d}" for row in best
    }
    steps = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
    assert len(steps) == int(rows[-1]["iteration"])
    first = [float(row["loss"]) for row in steps[: int(rows[0]["iteration"])]]
    assert float(rows[0]["loss"]) == pytest.approx(sum(first) / len(first), rel=1e-4)
    more = {**settings, "keep_best": 0, "limit_val_batches": None, "log_every": 0}
    tiny_stage("diffusion", tmp_path, **more).run()  # done already, and not refused


def test_the_command_line_says_that_a_stage_is_not_done(
    capsys: pytest.CaptureFixture[str], phantom_work: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """A stop at the wall time is no error."""
    chosen = ["--config", str(tiny_data), "--config", "tiny", "--set", "device=cpu", "--set", "epochs=2"]
    places = ["--data", str(phantom_work), "--run", str(tmp_path / "run"), "--set", "wall_time=0.001"]
    assert fibldm(["train", "autoencoder", *places, *chosen]) == 0
    assert "autoencoder is not done: run the same command again" in capsys.readouterr().out
    assert fibldm(["train", "autoencoder", *places, *chosen]) == 0
    assert "autoencoder is done" in capsys.readouterr().out


def test_a_stage_without_patience_left_is_done(tiny_stage: TinyStage, tmp_path: Path) -> None:
    """With a rate of 0 the weights and so the validation loss never change."""
    settings = {"epochs": 6, "learning_rate": 0.0, "patience": 2}
    tiny_stage("autoencoder", tmp_path / "run", **settings).run()
    folder = StageFolder(tmp_path / "run", "autoencoder")
    assert folder.require()["stopped_epoch"] < 6
    assert folder.require()["best_epoch"] == folder.require()["stopped_epoch"] - 2
    before = folder.require()
    tiny_stage("autoencoder", tmp_path / "run", **settings).run()
    assert folder.require() == before
    assert "done already" in (folder.path / "log.txt").read_text() or before["epochs"] == 6
