"""A training that ends after a number of minutes: its arithmetic and its decisions, by a clock that tests move."""

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyStage
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.optimizers.lr_scheduler import WarmupCosineSchedule
from torch import nn

from fibldm.cli import run as fibldm
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.runs import BUDGET, StageFolder
from fibldm.training import budget as budget_module
from fibldm.training.budget import Governed, TimeBudget
from fibldm.training.checkpoints import Checkpoints, WallTime
from fibldm.training.draws import Draw, EpochSampler
from fibldm.training.handlers import EMA, Schedule, SetEpoch
from fibldm.training.pace import Length, Pace, Place, Stopwatch, fit, remaining, shortened, spaced
from fibldm.training.watch import Validation

# --- arithmetic

seconds = st.floats(0, 50)
counts = st.integers(1, 60)


@given(seconds, seconds, seconds, seconds, counts, counts, counts, counts)
def test_what_remains_is_the_sum_of_all_that_comes(
    iteration: float, plain: float, validated: float, last: float, epochs: int, iterations: int, interval: int, at: int
) -> None:
    pace, length = Pace(iteration, plain, validated, last), Length(epochs, iterations, interval)
    at, inside = min(at, epochs), iterations // 2
    expected = inside * iteration
    for epoch in range(at, epochs + 1):
        expected += iterations * iteration * (epoch > at)
        expected += last if epoch == epochs else validated if length.validates(epoch) else plain
    assert remaining(pace, length, Place(at, inside)) == pytest.approx(expected)
    assert length.validations(at) == sum(length.validates(epoch) for epoch in range(at, epochs + 1))
    assert remaining(pace, length, Place(epochs + 1, iterations)) == 0.0


@given(st.floats(0.01, 5), st.floats(0, 5), st.floats(0, 60), counts, st.floats(10, 10_000))
def test_as_many_epochs_as_fit_and_no_more(
    iteration: float, plain: float, validated: float, iterations: int, left: float
) -> None:
    validated += plain
    pace, place = Pace(iteration, plain, validated, validated), Place(1, iterations)
    length = fit(pace, Length(0, iterations, 1), place, left=left, limit=left)
    epoch = iterations * iteration
    if length.epochs > 1:
        assert remaining(pace, length, place) <= left + 0.25 * epoch + 1e-6
    more = Length(length.epochs + 1, iterations, length.interval)
    assert remaining(pace, more, place) > left + 0.25 * epoch - 1e-6


@pytest.mark.parametrize(
    ("validated", "interval", "expected"),
    [(0.0, 10, 10), (0.0, 1, 11), (0.0, 25, 11), (0.0, 7, 7), (2.0, 10, 21), (200.0, 10, 200), (1.2, 10, 10)],
)
def test_validations_are_few_enough_and_enough(validated: float, interval: int, expected: int) -> None:
    """Of 100 epochs in 100 seconds: an interval that gives 5 to 15 stays, unless they take too long."""
    length = spaced(Pace(1.0, 0.0, validated, validated), Length(100, 1, interval), 100.0)
    assert length == Length(100, 1, expected)


def test_an_epoch_is_shortened_until_twenty_fit() -> None:
    pace = Pace(1.0)
    assert shortened(pace, 100, done=5, left=2000 / 0.9) == 100
    assert shortened(pace, 100, done=5, left=1000 / 0.9) == 50
    assert shortened(pace, 100, done=5, left=1000 / 0.9, multiple=4) == 52
    assert shortened(pace, 100, done=5, left=10.0) == 5
    assert shortened(pace, 3, done=3, left=1.0, multiple=4) == 3


def test_a_stopwatch_leaves_slow_iterations_out_and_forgets() -> None:
    watch, now = Stopwatch(window=10.0), 0.0
    for epoch, (iteration, end) in enumerate([(1.0, 0.5), (1.0, 3.0), (4.0, 9.0), (4.0, 2.0)], start=1):
        watch.begin_epoch(now, validated=epoch in (3, 4))
        for number in range(3):
            now += iteration + 7.0 * (epoch == 1 and number < 2)
            watch.see_iteration(now)
        watch.end_epoch(now, 3)
        watch.begin_end(now)
        now += end
    assert watch.measured == (10, 28.0)
    assert watch.iteration == pytest.approx(2.8)
    assert watch.pace(Pace()) == Pace(iteration=4.0, plain=0.5, validated=3.0, last=9.5)
    assert Stopwatch(1.0).pace(Pace(3.0, 1.0, 2.0, 4.0)) == Pace(3.0, 1.0, 2.0, 4.0)


# --- a training on a machine of known speed


class Machine:
    """A clock that moves when something is done, and what that takes."""

    def __init__(self, *, batch: float, end: float = 0.0, validation: float = 0.0, picture: float = 0.0) -> None:
        self.now, self.batch, self.end, self.validation, self.picture = 0.0, batch, end, validation, picture

    def take(self, seconds: float) -> None:
        self.now += seconds


class Items:
    """A dataset whose items are their draws."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return {"draw": torch.tensor([draw.index, draw.view, draw.seed])}


class Evaluator:
    """Takes its time, and finds that the loss falls."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.epochs = machine, list[int]()
        self.data_loader = DataLoader(Items(), sampler=EpochSampler(4, seed=0, shuffle=False))
        self.state = SimpleNamespace(metrics={"validation_loss": 1.0})

    def run(self, epoch: int) -> None:
        self.machine.take(self.machine.validation)
        self.epochs.append(epoch)
        self.state.metrics["validation_loss"] = 1.0 / epoch


class Pictures:
    """Drawn with every tenth validation, the first and the last."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.interval, self.early, self.epochs = machine, 1, False, list[int]()

    def draw(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        early = self.early and epoch % self.interval == 0
        if early or epoch % (10 * self.interval) == 0 or epoch == engine.state.max_epochs:
            self.early = False
            self.epochs.append(epoch)
            self.machine.take(self.machine.picture)


class Training:
    """A stage in small: 3 cases of 4 views and batches of 2, so 6 batches an epoch unless there are more ``cases``."""

    def __init__(self, folder: Path, machine: Machine, minutes: float | None, **settings: Any) -> None:
        self.machine = machine
        self.stage = StageFolder(folder, "autoencoder")
        self.budget = TimeBudget(self.stage, minutes, clock=lambda: machine.now)
        self.batches: list[tuple[int, list[tuple[int, int, int]]]] = []
        self.rates: list[float] = []
        cases, self.epochs = settings.pop("cases", 3), settings.pop("epochs", 100)
        self.sampler = EpochSampler(cases, seed=1, views=4)
        weight = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
        self.engine: Any = Engine(self.step)
        self.engine.accumulation_steps = settings.pop("accumulation", 1)
        self.engine.data_loader = DataLoader(Items(), sampler=self.sampler, batch_size=2)
        self.engine.state.max_epochs, self.engine.state.epoch_length = self.epochs, len(self.engine.data_loader)
        schedule = WarmupCosineSchedule(self.optimizer, warmup_steps=settings.pop("warmup", 10), t_total=10**6)
        metrics: Any = SimpleNamespace(validation_loss=None, watched={})
        self.evaluator, self.pictures = Evaluator(machine), Pictures(machine)
        self.checkpoints = Checkpoints(
            self.stage.checkpoints,
            {"network": weight},
            ema=EMA(weight, momentum=0.5),
            every=1,
            metrics=metrics,
            optional={"budget": self.budget},
        )
        self.checkpoints.saver = self.save  # type: ignore[assignment]  # no disk is waited for
        self.schedule = Schedule(schedule)
        self.validation = Validation(self.evaluator, metrics, interval=settings.pop("interval", 1))
        parts = Governed(self.sampler, self.schedule, self.validation, self.checkpoints, (self.pictures,))
        SetEpoch(self.sampler, 1).attach(self.engine)
        self.budget.govern(self.engine, parts)
        for handler in (self.schedule, self.validation):
            handler.attach(self.engine)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.pictures.draw)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: machine.take(machine.end))
        self.checkpoints.attach(self.engine)
        self.wall_time = WallTime(self.checkpoints, settings.pop("wall_time", None), clock=lambda: machine.now)
        self.wall_time.attach(self.engine)
        assert not settings

    def save(self, content: Any, name: str) -> None:
        self.stage.checkpoints.mkdir(parents=True, exist_ok=True)
        torch.save(content, self.stage.checkpoints / name)

    def step(self, engine: Any, batch: dict[str, torch.Tensor]) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.machine.take(self.machine.batch)
        if not self.batches:
            self.machine.take(2 * self.machine.batch)  # the first one is slower
        self.batches.append((engine.state.epoch, [tuple(draw) for draw in batch["draw"].tolist()]))  # type: ignore[misc]

    def run(self, *, load: float = 0.0, stop_at: float = math.inf) -> "Training":
        """Train; be interrupted at a time, in the middle of an epoch."""

        @self.engine.on(Events.ITERATION_STARTED)
        def stop() -> None:
            if self.machine.now >= stop_at:
                raise KeyboardInterrupt

        with self.budget.counted():
            self.machine.take(load)
            self.checkpoints.resume(self.engine)
            self.budget.go_on()
            if self.engine.state.epoch < self.engine.state.max_epochs:
                self.engine.run(self.engine.data_loader, max_epochs=self.engine.state.max_epochs)
            self.stage.finish(epochs=self.engine.state.max_epochs, **self.budget.facts())
        return self

    @property
    def length(self) -> Length:
        assert self.budget.length is not None
        return self.budget.length


def begun(folder: Path) -> Path:
    StageFolder(folder, "autoencoder").begin({"epochs": 100, "minutes": 1.0}, {})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return begun(tmp_path)


def said(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / "autoencoder" / BUDGET)
    return content


@pytest.mark.parametrize(
    ("costs", "load"),
    [
        ({"batch": 0.1}, 0.0),
        ({"batch": 0.1, "end": 0.2, "validation": 1.0, "picture": 2.0}, 5.0),
        ({"batch": 0.5, "validation": 0.1}, 10.0),
        ({"batch": 0.01, "end": 0.5, "validation": 3.0}, 1.0),
        ({"batch": 0.03, "end": 0.005, "validation": 0.05}, 1.0),
        ({"batch": 1.0, "end": 0.1, "validation": 6.0, "picture": 1.0}, 12.0),
    ],
)
@pytest.mark.parametrize("cases", [3, 40])
def test_a_training_ends_with_its_minutes(folder: Path, costs: dict[str, float], load: float, cases: int) -> None:
    """From a twentieth of a pass to thousands of passes; loading, ends of epochs, validations and pictures count."""
    machine = Machine(**costs)
    training = Training(folder, machine, 1.0, cases=cases).run(load=load)
    assert 54 <= machine.now <= 63
    assert training.evaluator.epochs[-1] == training.length.epochs == training.engine.state.epoch
    assert (len(training.evaluator.epochs) - 1) * machine.validation <= 0.15 * machine.now  # one to know its time
    assert len(training.evaluator.epochs) <= 16
    assert training.stage.weights("last")["epoch"] == training.length.epochs
    done = training.stage.require()
    assert (done["minutes"], done["seconds"], done["epochs"]) == (
        1.0,
        pytest.approx(machine.now, abs=0.1),
        said(folder)["epochs"],
    )


def test_choices_are_said_and_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(batch=0.1, validation=0.5)
    with caplog.at_level("INFO", logger="fibldm"):
        training = Training(folder, machine, 1.0).run(load=3.0)
        training.budget.say_end()
    first, *_, last = caplog.messages
    assert first.startswith("autoencoder: 0.1 s a step, 6 steps an epoch; 9")
    assert first.endswith(" epochs fit into what is left of 1 minute")
    assert last == f"autoencoder: took {machine.now / 60:.1f} of 1 minute"
    assert said(folder) == {
        "minutes": 1.0,
        "seconds": pytest.approx(machine.now, abs=0.1),
        "seconds_per_step": pytest.approx(0.1),
        "steps_per_epoch": 6,
        "steps_per_pass": 6,
        "epochs": training.length.epochs,
        "val_interval": training.length.interval,
        "checkpoint_every": 1,
    }


def test_the_rate_falls_to_its_end_with_the_last_step(folder: Path) -> None:
    """The warm-up is a fifth of the steps at most, and stays as it is where there are many."""
    for minutes, warmup in [(1.0, 10), (0.1, 12)]:
        training = Training(begun(folder / str(minutes)), Machine(batch=0.1), minutes, warmup=warmup).run()
        steps, rates = len(training.batches), training.rates
        ends = min(warmup, steps // 5)
        assert training.schedule.scheduler.warmup_steps == ends
        assert max(rates) == pytest.approx(1.0, abs=0.05)
        assert rates[-1] < 0.02
        falling = rates[ends + 6 :]
        assert sorted(falling, reverse=True) == falling


def test_steps_of_several_batches_are_counted_as_steps(folder: Path) -> None:
    training = Training(folder, Machine(batch=0.5), 1.0, cases=40, accumulation=4).run()
    assert training.length.iterations % 4 == 0
    assert training.schedule.scheduler.t_total == training.length.epochs * training.length.iterations / 4
    assert said(folder)["seconds_per_step"] == pytest.approx(2.0)
    assert said(folder)["steps_per_pass"] == 20


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changes_its_speed_changes_the_number_of_epochs(folder: Path, factor: float) -> None:
    machine = Machine(batch=0.1, end=0.1)
    training = Training(folder, machine, 1.0)

    @training.engine.on(Events.EPOCH_STARTED(once=30))
    def change() -> None:
        machine.batch *= factor

    training.run()
    assert 54 <= machine.now <= 63
    assert training.length.epochs == training.evaluator.epochs[-1]


def test_noise_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(batch=0.1)
    training = Training(folder, machine, 1.0)
    noise = itertools.cycle([0.098, 0.103, 0.1, 0.099])

    @training.engine.on(Events.EPOCH_STARTED)
    def change() -> None:
        machine.batch = next(noise)

    with caplog.at_level("INFO", logger="fibldm"):
        training.run()
    assert len(caplog.messages) == 1


def test_checkpoints_are_rare_where_epochs_are_short(folder: Path) -> None:
    training = Training(folder, Machine(batch=0.02), 1.0).run()
    assert training.checkpoints.every == 2  # 0.3 seconds


def test_the_time_of_pictures_is_known_after_the_first_validation(folder: Path) -> None:
    training = Training(folder, Machine(batch=0.1, picture=3.0), 1.0).run()
    first, last = training.evaluator.epochs[0], training.length.epochs
    assert training.pictures.epochs[0] == first and training.pictures.epochs[-1] == last
    assert len(training.pictures.epochs) <= 4


# --- epochs that are cut


def passes(batches: list[tuple[int, list[tuple[int, int, int]]]]) -> Iterator[list[tuple[int, int, int]]]:
    draws = [draw for _, batch in batches for draw in batch]
    return (draws[start : start + 160] for start in range(0, len(draws), 160))


def test_where_few_epochs_fit_they_are_cut_and_a_pass_still_sees_all(folder: Path) -> None:
    """3 passes of 80 batches fit; a cut epoch is a row of batches of a whole one, to the seed of every draw."""
    training = Training(folder, Machine(batch=0.25), 1.0, cases=40).run()
    assert training.length.iterations < 12 and training.length.epochs >= 19
    whole = EpochSampler(40, seed=1, views=4)
    for number, seen in enumerate(passes(training.batches), start=1):
        whole.set_epoch(number)
        expected = [(draw.index, draw.view, draw.seed) for draw in whole]
        assert seen == expected[: len(seen)]
        assert max(Counter(draw[:2] for draw in seen).values()) == 1
    assert number >= 2
    per_epoch = Counter(epoch for epoch, _ in training.batches)
    assert set(per_epoch.values()) == {training.length.iterations}
    done = training.stage.require()
    assert done["passes"] == pytest.approx(len(training.batches) / 80, abs=1e-3)


def test_an_epoch_of_draws_continues_where_the_one_before_ended() -> None:
    sampler, whole = EpochSampler(5, seed=3, views=2), EpochSampler(5, seed=3, views=2)
    sampler.cut(4)
    assert len(sampler) == 4
    drawn: list[Draw] = []
    for epoch in range(1, 11):
        sampler.set_epoch(epoch)
        drawn += sampler
    expected: list[Draw] = []
    for epoch in range(1, 5):
        whole.set_epoch(epoch)
        expected += whole
    assert drawn == expected
    sampler.cut(23)  # more than a pass
    sampler.set_epoch(2)
    whole.set_epoch(5)
    assert list(sampler)[:17] == expected[23:] and len(list(sampler)) == 23 and list(sampler)[17:] == [*whole][:6]


def test_cut_epochs_go_on_exactly(folder: Path, tmp_path: Path) -> None:
    machine = Machine(batch=0.25)
    broken = Training(folder, machine, 1.0, cases=40)
    with pytest.raises(KeyboardInterrupt):
        broken.run(stop_at=25.0)
    again = Training(folder, machine, 1.0, cases=40).run()
    kept = [(epoch, batch) for epoch, batch in broken.batches if epoch < again.batches[0][0]]
    assert kept[-1][0] == again.batches[0][0] - 1
    for number, seen in enumerate(passes(kept + again.batches), start=1):
        whole = EpochSampler(40, seed=1, views=4)
        whole.set_epoch(number)
        assert seen == [(draw.index, draw.view, draw.seed) for draw in whole][: len(seen)]
    assert again.length.iterations == broken.length.iterations


def test_more_epochs_after_a_cut_training_are_passes(folder: Path) -> None:
    """Without minutes, an epoch of the configuration is a pass through the data, in cut epochs."""
    first = Training(folder, Machine(batch=0.25), 1.0, cases=40).run()
    assert StageFolder(folder, "autoencoder").begin({"epochs": 2}, {}) == "done"
    assert StageFolder(folder, "autoencoder").begin({"epochs": 5}, {}) == "resume"
    more = Training(folder, Machine(batch=0.25), None, cases=40, epochs=5).run()
    assert len(first.batches) + len(more.batches) == pytest.approx(5 * 80, abs=first.length.iterations)
    assert more.schedule.scheduler.t_total == more.engine.state.epoch * first.length.iterations
    done = more.stage.require()
    assert done["passes"] >= 5 and "minutes" not in done
    kept = more.stage.weights("last")["objects"]["budget"]
    assert kept == {"length": {"iterations": first.length.iterations}}
    assert StageFolder(folder, "autoencoder").begin({"epochs": 5}, {}) == "done"


# --- going on


@pytest.mark.parametrize(("cases", "batch"), [(3, 0.1), (40, 0.25), (3, 0.03)])
def test_an_interrupted_training_ends_within_the_same_minutes(folder: Path, cases: int, batch: float) -> None:
    """What was lost after the last checkpoint counts, and loading twice."""
    machine = Machine(batch=batch, end=0.1, validation=0.5)
    broken = Training(folder, machine, 1.0, cases=cases)
    with pytest.raises(KeyboardInterrupt):
        broken.run(load=4.0, stop_at=20.0)
    assert said(folder)["seconds"] == pytest.approx(machine.now, abs=0.1)
    again = Training(folder, machine, 1.0, cases=cases).run(load=4.0)
    assert 54 <= machine.now <= 63
    assert again.batches[0][0] > 1
    assert said(folder)["seconds"] == pytest.approx(machine.now, abs=0.1)
    assert again.evaluator.epochs[-1] == again.engine.state.epoch


def test_what_a_kill_leaves_unsaid_is_known_from_the_checkpoint(folder: Path) -> None:
    machine = Machine(batch=0.1)
    with pytest.raises(KeyboardInterrupt):
        Training(folder, machine, 1.0).run(stop_at=20.0)
    (folder / "autoencoder" / BUDGET).unlink()
    again = Training(folder, machine, 1.0)
    again.checkpoints.resume(again.engine)
    assert 19 < again.budget.seconds <= machine.now


def test_an_interruption_before_the_first_checkpoint_counts_too(folder: Path) -> None:
    machine = Machine(batch=1.0)
    with pytest.raises(KeyboardInterrupt):
        Training(folder, machine, 1.0, cases=40).run(load=10.0, stop_at=14.0)
    stage = StageFolder(folder, "autoencoder")
    assert stage.begin({"epochs": 100, "minutes": 1.0}, {}) == "new"
    assert stage.seconds() == pytest.approx(machine.now, abs=0.1)
    Training(folder, machine, 1.0, cases=40).run(load=10.0)
    assert 54 <= machine.now <= 63


def test_a_budget_of_another_configuration_is_forgotten(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Training(folder, Machine(batch=1.0), 1.0, cases=40).run(load=10.0, stop_at=14.0)
    stage = StageFolder(folder, "autoencoder")
    assert stage.begin({"epochs": 100, "seed": 3}, {}) == "new"
    assert stage.seconds() == 0.0


def test_a_training_whose_time_was_lost_ends_with_one_more_epoch(folder: Path) -> None:
    machine = Machine(batch=0.1)
    broken = Training(folder, machine, 1.0)
    with pytest.raises(KeyboardInterrupt):
        broken.run(stop_at=20.0)
    again = Training(folder, machine, 1.0).run(load=100.0)
    assert len({epoch for epoch, _ in again.batches}) == 1
    assert again.evaluator.epochs == [again.engine.state.epoch]
    assert again.stage.require()["epochs"] == again.engine.state.epoch


def test_a_stage_is_done_for_as_many_minutes_or_fewer(folder: Path) -> None:
    stage = StageFolder(folder, "autoencoder")
    Training(folder, Machine(batch=0.1), 1.0).run()
    asked = [{"epochs": 1}, {"epochs": 7, "minutes": 1.0}, {"epochs": 10**6, "minutes": 0.5}, {"minutes": 9.0}]
    assert [stage.begin(config, {}) for config in asked] == ["done"] * 4
    assert stage.begin({"epochs": 1, "minutes": 2.0}, {}) == "resume"


def test_more_minutes_go_on(folder: Path) -> None:
    machine = Machine(batch=0.1)
    first = Training(folder, machine, 1.0).run()
    StageFolder(folder, "autoencoder").begin({"epochs": 100, "minutes": 2.0}, {})
    second = Training(folder, machine, 2.0).run()
    assert 108 <= machine.now <= 122
    assert second.batches[0][0] == first.engine.state.epoch + 1
    assert second.length.epochs == pytest.approx(2 * first.length.epochs, rel=0.05)
    assert second.rates[0] == pytest.approx(0.5, abs=0.05)  # the middle of the longer schedule
    assert second.stage.require()["minutes"] == 2.0


def test_minutes_after_a_training_by_epochs_count_what_it_took(folder: Path) -> None:
    machine = Machine(batch=0.1)
    first = Training(folder, machine, None, epochs=50).run()
    assert first.engine.state.epoch == 50 and not (folder / "autoencoder" / BUDGET).exists()
    assert set(first.stage.weights("last")["objects"]) == {"network"}
    rows = "\n".join(f"{epoch},0.6" for epoch in range(1, 51))
    (folder / "autoencoder" / "metrics.csv").write_text(f"epoch,seconds\n{rows}\n")
    stage = StageFolder(folder, "autoencoder")
    assert stage.seconds() == pytest.approx(30.0)
    assert stage.begin({"epochs": 1, "minutes": 0.5}, {}) == "done"
    assert stage.begin({"epochs": 1, "minutes": 1.0}, {}) == "resume"
    second = Training(folder, machine, 1.0).run()
    assert second.batches[0][0] == 51 and 54 <= machine.now <= 63


def test_a_stage_that_was_over_when_it_was_killed_does_no_more(folder: Path) -> None:
    """Between its last checkpoint and ``done.json``."""
    machine = Machine(batch=0.1)
    first = Training(folder, machine, 1.0).run()
    (folder / "autoencoder" / "done.json").unlink()
    again = Training(folder, machine, 1.0).run()
    assert again.batches == [] and again.engine.state.max_epochs == first.engine.state.epoch


def test_wall_time_stops_and_the_minutes_go_on(folder: Path) -> None:
    machine = Machine(batch=0.1)
    first = Training(folder, machine, 1.0, wall_time=20.0)
    with pytest.raises(AssertionError):
        first.run()
        assert not first.wall_time.is_over
    assert machine.now <= 20
    second = Training(folder, machine, 1.0).run()
    assert second.batches[0][0] == first.engine.state.epoch + 1 and 54 <= machine.now <= 63


def test_decisions_are_those_of_the_first_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of another rank, here one that stands, decides nothing."""
    told: list[Any] = []

    def on_first_rank(function: Callable[[], Any]) -> Any:
        told.append(function())
        return told[-1]

    monkeypatch.setattr(budget_module, "on_first_rank", on_first_rank)
    first = Training(folder, Machine(batch=0.25), 1.0, cases=40).run()
    monkeypatch.setattr(budget_module, "on_first_rank", lambda function: told.pop(0))
    monkeypatch.setattr(budget_module, "is_first_rank", lambda: False)
    other = Training(begun(folder / "other"), Machine(batch=0.0), 1.0, cases=40).run()
    assert other.batches == first.batches and other.rates == first.rates
    assert other.length == first.length and told == []
    assert other.checkpoints.every == first.checkpoints.every
    assert not (folder / "other" / "autoencoder" / BUDGET).exists()


# --- errors


def test_too_little_time_is_refused_with_what_it_would_take(folder: Path) -> None:
    for costs, load in [({"batch": 20.0}, 5.0), ({"batch": 5.0}, 40.0)]:
        with pytest.raises(
            FibldmError, match=r"1 minute must leave time for .*5 batches.* s; .*at least [1-9]"
        ) as error:
            Training(folder, Machine(**costs), 1.0, cases=40).run(load=load)
        assert not (folder / "autoencoder" / BUDGET).exists()
    least = float(error.value.remedy.split("at least ")[1])
    machine = Machine(batch=5.0)
    assert len(Training(folder, machine, least, cases=40).run(load=40.0).batches) >= 5
    with pytest.raises(FibldmError, match="loading the data took 61 s; give more minutes"):
        Training(folder / "other", Machine(batch=0.1), 1.0).run(load=61.0)


@pytest.mark.parametrize("minutes", [0, -1.0, math.nan, math.inf, "soon", True])
def test_minutes_are_above_0(tiny_stage: TinyStage, tmp_path: Path, minutes: Any) -> None:
    with pytest.raises(FibldmError, match="minutes must be a number above 0; got"):
        tiny_stage("autoencoder", tmp_path, minutes=minutes)


def test_minutes_and_epochs_are_one_too_many(tiny_stage: TinyStage, tmp_path: Path) -> None:
    """Unless the epochs stand in a file, as those of ``tiny`` do."""
    with pytest.raises(FibldmError, match="either so many minutes or so many epochs; got minutes 5 and epochs 3"):
        tiny_stage("autoencoder", tmp_path, minutes=5, epochs=3)
    assert tiny_stage("autoencoder", tmp_path, minutes=5).parser()["epochs"] == 1


# --- a whole stage


@pytest.mark.slow
def test_a_stage_by_the_command_line(
    capsys: pytest.CaptureFixture[str], phantom_work: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """What was chosen was done; whether that took the minutes is up to the machine."""
    chosen = ["--config", str(tiny_data), "--config", "tiny", "--set", "device=cpu", "--set", "preview_every=10"]
    command = ["train", "autoencoder", "--data", str(phantom_work), "--run", str(tmp_path / "run"), *chosen]
    assert fibldm([*command, "--minutes", "0.2"]) == 0
    told = capsys.readouterr()
    assert "--minutes 0.2" in told.out and "autoencoder is done" in told.out
    assert "fit into what is left of 0.2 minutes" in told.err and "of 0.2 minutes\n" in told.err
    folder = StageFolder(tmp_path / "run", "autoencoder")
    rows = list(csv.DictReader((folder.path / "metrics.csv").read_text().splitlines()))
    done, budget = folder.require(), said(tmp_path / "run")
    assert done["epochs"] == done["stopped_epoch"] == budget["epochs"] == len(rows) > 1
    assert rows[-1]["validation_loss"] and len([row for row in rows if row["validation_loss"]]) <= 16
    assert done["seconds"] <= budget["seconds"]
    validated = [int(row["epoch"]) for row in rows if row["validation_loss"]]
    pictures = sorted(int(file.stem.split("_")[1]) for file in folder.path.glob("previews/*.png"))
    assert {validated[0], validated[-1]} <= set(pictures)
    assert fibldm([*command, "--minutes", "0.2"]) == 0
    assert "done already" in capsys.readouterr().err
    assert fibldm([*command, "--minutes", "0.2", "--set", "epochs=3", "--json"]) == 2
    assert "either so many minutes" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]
