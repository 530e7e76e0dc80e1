"""The loss on training patients beside that on validation patients, loss by time, and what they are good for."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from conftest import TinyStage
from ignite.engine import Engine
from monai.data import list_data_collate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.process import RectifiedFlow
from fibldm.models.timesteps import GridTimes
from fibldm.runs import StageFolder
from fibldm.training import watch
from fibldm.training.draws import EpochSampler, KeyedDataset, take_subset
from fibldm.training.latents import Latents, LoadLatent
from fibldm.training.losses import DenoisingLoss, Weighted
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.training.watch import LossByTime, Validation, as_many_patients, gap

# --- which patients


def cached(patients: int, *, cases: int = 1, views: int = 1, prefix: str = "p") -> list[dict[str, str]]:
    return [
        {"file": f"{prefix}{patient}_{case}_view-{view}", "case": f"{patient}_{case}", "subject": f"{prefix}{patient}"}
        for patient in range(patients)
        for case in range(cases)
        for view in range(views)
    ]


def test_as_many_training_patients_are_watched_as_there_are_for_validation() -> None:
    """Every case of theirs, without augmentation."""
    watched = as_many_patients(cached(10, cases=2, views=4), cached(3, cases=5, prefix="v"))
    assert len({item["subject"] for item in watched}) == 3
    assert len(watched) == 6
    assert all(item["file"].endswith("_view-0") for item in watched)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.7, 1.0])
def test_the_watched_patients_are_of_those_that_were_trained_on(share: float) -> None:
    """A subset of training holds them, and as long as it is large enough they are the same."""
    training, validation = cached(10, views=2), cached(3, prefix="v")
    subset = take_subset(training, share)
    watched = as_many_patients(subset, validation)
    assert all(item in subset for item in watched)
    assert len(watched) == min(3, round(10 * share))
    if share >= 0.3:
        assert watched == as_many_patients(training, validation)


# --- loss by time


class MeanError(nn.Module):
    """The weighted mean of a prediction's distance from its target."""

    def forward(self, prediction: Tensor, target: Weighted) -> Tensor:
        return ((prediction - target.value).abs() * target.weight).sum() / target.weight.sum()


def by_time(batches: list[tuple[list[float], list[int]]], count: int = 4) -> LossByTime:
    """Batches of errors, each with half of its places weighing nothing, and views."""
    metric = LossByTime(MeanError(), GridTimes(count))
    for errors, views in batches:
        prediction = torch.tensor(errors).view(-1, 1, 1) * torch.tensor([1.0, 100.0])
        weight = torch.tensor([1.0, 0.0]).expand(len(errors), 1, 2)
        state = SimpleNamespace(
            output={"pred": prediction, "label": Weighted(torch.zeros_like(prediction), weight)},
            batch={"view": torch.tensor(views)},
        )
        metric.iteration_completed(SimpleNamespace(state=state))  # type: ignore[arg-type]
    return metric


BATCHES = [([1.0, 2.0, 3.0], [0, 1, 2]), ([4.0, 5.0, 6.0], [3, 4, 5]), ([7.0], [2])]


def test_every_time_has_a_loss_of_its_own() -> None:
    """Of seven draws in uneven batches; view 4 is at the time of view 0."""
    assert by_time(BATCHES).compute() == {
        "validation_loss/t0.12": 3.0,
        "validation_loss/t0.38": 4.0,
        "validation_loss/t0.62": 5.0,
        "validation_loss/t0.88": 4.0,
    }


@pytest.mark.parametrize(("count", "first"), [(1, "t0.50"), (10, "t0.05"), (64, "t0.01"), (100, "t0.005")])
def test_every_time_has_a_name_of_its_own(count: int, first: str) -> None:
    names = by_time([([1.0] * count, list(range(count)))], count).compute()
    assert len(names) == count
    assert next(iter(names)) == f"validation_loss/{first}"


def test_ranks_add_up_their_losses_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has seen no draw of a time still has its loss."""
    alone, other, rank = by_time(BATCHES), by_time(BATCHES[1:]), by_time(BATCHES[:1])
    parts = iter((other._sums, other._draws))
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_reduce", lambda value, *_: value + next(parts))
    summed = rank.compute()
    monkeypatch.undo()
    assert summed == alone.compute()


# --- when


class Evaluator:
    """Stands for an evaluator whose metrics are known beforehand."""

    def __init__(self, **metrics: float) -> None:
        self.state = SimpleNamespace(metrics=metrics)
        self.epochs: list[int] = []

    def run(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_both_losses_are_taken_after_the_same_epochs() -> None:
    """And the gap is a share of the training loss."""
    metrics: Any = SimpleNamespace(validation_loss=None, watched={})
    evaluator = Evaluator(**{"validation_loss": 0.75, "validation_loss/t0.50": 0.7, "other": 3.0})
    training = Evaluator(training_loss=0.5)
    engine = Engine(lambda engine, item: None)
    Validation(evaluator, metrics, interval=2, training=training).attach(engine)
    engine.run([0], max_epochs=5)
    assert evaluator.epochs == training.epochs == [2, 4, 5]
    assert metrics.validation_loss == 0.75
    assert metrics.watched == {"validation_loss/t0.50": 0.7, "training_loss": 0.5, "gap": 0.5}
    assert gap(0.5, 0.5) == 0 and gap(0.25, 0.5) == -0.5


def test_validation_sees_as_many_batches_as_it_may() -> None:
    """And the training patients as many, so that the gap compares like with like."""
    evaluators: list[Any] = [SimpleNamespace(state=SimpleNamespace(epoch_length=length)) for length in (7, 2)]
    metrics: Any = SimpleNamespace()
    Validation(evaluators[0], metrics, interval=1, training=evaluators[1], batches=3)
    assert [evaluator.state.epoch_length for evaluator in evaluators] == [3, 2]
    for wrong in (0, 1.5, True):
        with pytest.raises(FibldmError, match="limit_val_batches must be a whole number of at least 1"):
            Validation(evaluators[0], metrics, interval=1, batches=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    engine = Engine(lambda engine, item: None)
    metrics: Any = SimpleNamespace()
    Validation(Evaluator(validation_loss=loss), metrics, interval=1).attach(engine)
    with pytest.raises(FibldmError, match=r"validation loss must stay finite; it is (nan|inf) in epoch 1; lower"):
        engine.run([0], max_epochs=2)


# --- whole stages

EPOCHS = 3


@pytest.fixture(scope="module")
def begun(tiny_stage: TinyStage, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a run folder whose latents, of several views, are there."""
    latents = tmp_path_factory.mktemp("watched")
    (latents / "first").mkdir()
    (latents / "first" / "autoencoder").symlink_to(tiny_run / "autoencoder")
    tiny_stage("latents", latents / "first", views=2).run()

    def named(name: str) -> Path:
        (latents / name).mkdir()
        for stage in ("autoencoder", "latents"):
            (latents / name / stage).symlink_to(latents / "first" / stage)
        return latents / name

    return named


@pytest.fixture(scope="module")
def watched_run(tiny_stage: TinyStage, begun: Callable[[str], Path]) -> Path:
    """A run whose stage 2 was watched; only read."""
    run = begun("run")
    tiny_stage("diffusion", run, epochs=EPOCHS).run()
    return run


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "diffusion" / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def loss_of(run: Path, weights: dict[str, Tensor], items: list[dict[str, str]], views: list[int]) -> float:
    """The loss of a network on latents, one draw after the other and with none of the engines."""
    folder, latents = StageFolder(run, "diffusion"), Latents.open(run)
    network = folder.component("network_def").eval()
    network.load_state_dict(weights)
    prepare = LatentPrepareBatch(RectifiedFlow(), target="flow", times=GridTimes(2))
    dataset = KeyedDataset(items, transform=LoadLatent(latents, {}), progress=False)
    losses = []
    for draw in EpochSampler(len(items), seed=0, views=2, shuffle=False):
        if draw.view in views:
            inputs, target, times, _ = prepare(list_data_collate([dataset[draw]]))
            with torch.no_grad():
                losses.append(float(DenoisingLoss()(network(inputs, *times), target)))
    return sum(losses) / len(losses)


def test_what_is_written_is_the_loss_of_the_averaged_weights(watched_run: Path) -> None:
    """A/E16: fixed noise and times, EMA weights, training patients in the same way."""
    latents, last = Latents.open(watched_run), StageFolder(watched_run, "diffusion").weights("last")["objects"]
    splits = {split: latents.items(split) for split in ("training", "validation")}
    watched, views = as_many_patients(splits["training"], splits["validation"]), [0, 1]
    row = rows_of(watched_run)[-1]
    expected = {
        "validation_loss": loss_of(watched_run, last["ema"], splits["validation"], views),
        "training_loss": loss_of(watched_run, last["ema"], watched, views),
        "validation_loss/t0.25": loss_of(watched_run, last["ema"], splits["validation"], [0]),
        "validation_loss/t0.75": loss_of(watched_run, last["ema"], splits["validation"], [1]),
    }
    expected["gap"] = expected["validation_loss"] / expected["training_loss"] - 1
    # the gap is a difference of two of them
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=2e-5, abs=2e-5)
    trained = loss_of(watched_run, last["network"], splits["validation"], views)
    assert abs(trained - expected["validation_loss"]) > 1e-4


def test_the_losses_stand_side_by_side_and_tensorboard_has_them(watched_run: Path) -> None:
    names = list(rows_of(watched_run)[0])
    place = names.index("validation_loss")
    assert names[place : place + 3] == ["validation_loss", "training_loss", "gap"]
    assert names[-3:] == ["validation_loss/t0.25", "validation_loss/t0.75", "seconds"]
    events = EventAccumulator(str(watched_run / "diffusion")).Reload()
    for name in ("training_loss", "gap", "validation_loss/t0.25"):
        shown = [event.value for event in events.Scalars(name)]
        assert shown == pytest.approx([float(row[name]) for row in rows_of(watched_run)], rel=1e-5)


def test_the_gap_of_the_best_and_of_the_last_epoch_is_kept(watched_run: Path) -> None:
    done = StageFolder(watched_run, "diffusion").require()
    gaps = [float(row["gap"]) for row in rows_of(watched_run)]
    assert done["gap"] == {"best": gaps[done["best_epoch"] - 1], "last": gaps[-1]}
    assert "against training patients)" in (watched_run / "diffusion" / "log.txt").read_text()


def test_a_stage_that_is_not_watched_ends_with_the_same_weights(
    tiny_stage: TinyStage, begun: Callable[[str], Path], watched_run: Path
) -> None:
    """Watching costs time only, and can be switched off."""
    run = begun("blind")
    tiny_stage("diffusion", run, epochs=EPOCHS, watch_training=False).run()
    blind, seeing = (StageFolder(folder, "diffusion").require() for folder in (run, watched_run))
    assert blind["weights"] == seeing["weights"]
    assert "gap" not in blind and "gap" not in rows_of(run)[0]
    assert [row["validation_loss"] for row in rows_of(run)] == [row["validation_loss"] for row in rows_of(watched_run)]


def test_a_stage_stops_at_its_gap_whether_interrupted_or_not(
    tiny_stage: TinyStage, begun: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second validation in a row above the limit ends it; the best weights before are kept."""
    monkeypatch.setattr(watch, "gap", lambda validation, training: validation / training)  # about 1, before memorising
    settings = {"epochs": EPOCHS, "stop_gap": 0.5, "patience": 2}
    whole, parts = begun("whole"), begun("parts")
    tiny_stage("diffusion", whole, **settings).run()
    done = StageFolder(whole, "diffusion").require()
    assert done["stopped_epoch"] == 2
    assert done["best_epoch"] in (1, 2)
    assert done["gap"]["last"] == float(rows_of(whole)[-1]["gap"]) > 0.9
    log = (whole / "diffusion" / "log.txt").read_text()
    assert "stopped after epoch 2 of 3, as its gap between validation and training stays above stop_gap" in log
    tiny_stage("diffusion", parts, **settings, wall_time=0.001).run()
    assert StageFolder(parts, "diffusion").done() is None
    tiny_stage("diffusion", parts, **settings, wall_time=0.001).run()
    assert StageFolder(parts, "diffusion").require() == done


def test_a_gap_that_nobody_watches_stops_nothing(tiny_stage: TinyStage, begun: Callable[[str], Path]) -> None:
    settings = {"watch_training": False, "stop_gap": 0.5}
    with pytest.raises(FibldmError, match="stop_gap needs the loss on training patients; watch_training is false"):
        tiny_stage("diffusion", begun("refused"), **settings).run()
