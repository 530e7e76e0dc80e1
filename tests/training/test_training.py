"""Losses, what a batch becomes before the network sees it, and the handlers around the steps."""

import csv
import errno
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import list_data_collate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior, Reconstruction
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.timesteps import GridTimes, LogitNormalTimes, UniformTimes
from fibldm.training.checkpoints import Checkpoints
from fibldm.training.draws import EpochSampler
from fibldm.training.handlers import EMA, ClipGradient, Metrics, Schedule, SetEpoch, ShowProgress, TensorBoard
from fibldm.training.losses import AutoencoderLoss, DenoisingLoss, Weighted, kl_divergence, weighted_error
from fibldm.training.prepare_batch import LatentPrepareBatch, VolumePrepareBatch

MASK = MaskEncoding((0, 1, 2), 4)
PAIRS = [
    (process, target)
    for process in (RectifiedFlow(), VariancePreserving(), VariancePreserving(zero_terminal_snr=True))
    for target in process.targets
]


def sample(seed: int, *, view: int = 0, std: float = 0.0) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(3, (1, 1, 16, 8, 8), generator=drawn)
    return {
        "mean": torch.randn(2, 4, 2, 2, generator=drawn),
        "std": torch.full((2, 4, 2, 2), std),
        "valid": torch.rand(1, 4, 2, 2, generator=drawn),
        "mask": MASK.encode(labels)[0],
        "seed": seed,
        "view": view,
    }


def batch(*samples: dict[str, Any]) -> dict[str, Tensor]:
    collated: dict[str, Tensor] = list_data_collate(list(samples))
    return collated


# --- losses


@pytest.mark.parametrize(("norm", "expected"), [("l1", 2.0), ("l2", 5.0), ("huber", 1.5)])
def test_the_error_is_the_mean_over_the_places_that_count(norm: Any, expected: float) -> None:
    prediction = torch.tensor([1.0, 3.0, 1000.0]).view(1, 1, 3, 1, 1)
    weight = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1, 1)
    assert float(weighted_error(prediction, Weighted(torch.zeros(1, 1, 3, 1, 1), weight), norm)) == expected


def test_an_unknown_norm_lists_the_choices() -> None:
    with pytest.raises(FibldmError, match="norm must be one of l1, l2, huber, charbonnier; got 'l3'"):
        DenoisingLoss("l3")(torch.zeros(1, 1), Weighted(torch.zeros(1, 1), torch.ones(1, 1)))  # type: ignore[arg-type]


def test_the_kl_divergence_is_that_of_two_gaussians() -> None:
    mean, std = torch.tensor([0.3, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    gaussians = torch.distributions.Normal(mean, std)
    expected = torch.distributions.kl_divergence(gaussians, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(Posterior(mean, std)), expected)


def test_the_autoencoder_loss_does_not_see_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    volume, target = (torch.randn(1, 1, 4, 4, 4, generator=generator) for _ in range(2))
    weight = torch.ones(1, 1, 4, 4, 4)
    weight[:, :, 2:] = 0
    posterior = Posterior(torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))
    loss = AutoencoderLoss(spectral_weight=0.5)
    before = loss(Reconstruction(volume, posterior), Weighted(target, weight))
    changed = torch.where(weight > 0, volume, torch.full_like(volume, 7.0))
    assert float(loss(Reconstruction(changed, posterior), Weighted(target, weight))) == float(before) > 0


# --- prepare batch


def test_a_volume_is_its_own_target() -> None:
    image, valid = torch.rand(2, 1, 4, 4, 4), torch.ones(2, 1, 4, 4, 4)
    batch = {"image": image, "valid": valid, "seed": torch.tensor([3, 4])}
    inputs, target, _, options = VolumePrepareBatch()(batch, device="cpu")
    assert torch.equal(options["seeds"], batch["seed"])
    assert torch.equal(inputs, image)
    assert torch.equal(target.value, image)
    assert torch.equal(target.weight, valid)


@pytest.mark.parametrize(("process", "target"), PAIRS, ids=lambda value: getattr(value, "schedule", str(value)))
def test_the_noise_that_is_added_is_the_noise_that_is_predicted(process: Process, target: Any) -> None:
    """With a certain latent ``eps = (z_t - alpha z_0) / sigma``; the target must be made of that very noise."""
    items = [sample(5, view=1), sample(6, view=2)]
    prepare = LatentPrepareBatch(process, target=target, times=GridTimes(4))
    z_t, wanted, (network_time,), _ = prepare(batch(*items), device="cpu")
    z_0, t = torch.stack([item["mean"] for item in items]), torch.tensor([0.375, 0.625])
    shape = (2, 1, 1, 1, 1)
    eps = (z_t - process.alpha(t).view(shape) * z_0) / process.sigma(t).view(shape)
    torch.testing.assert_close(wanted.value, process.target(target, z_0, eps, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network_time, process.network_time(t))
    assert 0.5 < float(eps.std()) < 1.5
    assert torch.equal(wanted.weight, torch.stack([item["valid"] for item in items]))


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormalTimes(), GridTimes(3)], ids=lambda t: type(t).__name__)
def test_a_batch_equals_its_samples_done_singly(times: Any) -> None:
    prepare = LatentPrepareBatch(
        RectifiedFlow(), target="flow", times=times, conditions={"mask": MASK}, dropout={"mask": 0.3}
    )
    items = [sample(seed, view=seed, std=0.5) for seed in range(6)]
    together = prepare(batch(*items), device="cpu")
    for position, item in enumerate(items):
        alone = prepare(batch(item), device="cpu")
        assert torch.equal(alone[0][0], together[0][position])
        assert torch.equal(alone[1].value[0], together[1].value[position])
        assert torch.equal(alone[2][0][0], together[2][0][position])
        assert torch.equal(alone[2][1]["mask"][0], together[2][1]["mask"][position])


def test_the_same_draw_gives_the_same_noise_and_another_does_not() -> None:
    prepare = LatentPrepareBatch(RectifiedFlow(), target="flow", times=UniformTimes())
    torch.manual_seed(1)
    first = prepare(batch(sample(3)), device="cpu")[0]
    torch.manual_seed(2)
    assert torch.equal(prepare(batch(sample(3)), device="cpu")[0], first)
    assert not torch.equal(prepare(batch({**sample(3), "seed": 4}), device="cpu")[0], first)


def test_the_latent_is_drawn_from_its_posterior() -> None:
    """At the smallest time of a long grid, ``z_t`` is the latent that was drawn."""
    items = [{**sample(seed, std=2.0), "mean": torch.full((2, 4, 2, 2), 5.0)} for seed in range(200)]
    z = LatentPrepareBatch(RectifiedFlow(), target="flow", times=GridTimes(10**6))(batch(*items), device="cpu")[0]
    assert abs(float(z.mean()) - 5) < 0.1
    assert abs(float(z.std()) - 2) < 0.1


def test_a_cell_weighs_as_the_labels_that_fill_it() -> None:
    labels = torch.zeros(1, 1, 16, 8, 8)
    labels[:, :, :4, :4, :4] = 2
    labels[:, :, :1, 4:, :4] = 1  # a quarter of the next cell
    item = {**sample(1), "mask": MASK.encode(labels)[0], "valid": torch.ones(1, 4, 2, 2)}
    item["valid"][0, 0, 0, 0] = 0.5

    def weight(**given: Any) -> Tensor:
        prepare = LatentPrepareBatch(
            RectifiedFlow(), target="flow", times=UniformTimes(), conditions={"mask": MASK}, **given
        )
        made: Tensor = prepare(batch(item), device="cpu")[1].weight
        return made

    assert torch.equal(weight(), item["valid"][None])
    expected = torch.ones(1, 1, 4, 2, 2)
    expected[..., 0, 0, 0], expected[..., 0, 1, 0] = 0.5 * 3, 0.25 * 5 + 0.75
    torch.testing.assert_close(weight(label_weights={2: 3, 1: 5}), expected)


@pytest.mark.parametrize("weights", [{7: 2.0}, {1: 0.0}, {1: math.nan}])
def test_weights_of_unknown_labels_or_of_nothing_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(FibldmError, match=r"positive numbers for the labels \[0, 1, 2\]; got"):
        LatentPrepareBatch(
            RectifiedFlow(), target="flow", times=UniformTimes(), conditions={"mask": MASK}, label_weights=weights
        )


def test_dropout_makes_whole_masks_or_single_labels_unknown() -> None:
    items = [sample(seed) for seed in range(400)]
    given = torch.stack([item["mask"] for item in items])

    def masks(by_name: Any = None, **chances: float) -> Tensor:
        chances = chances if by_name is None else by_name
        prepare = LatentPrepareBatch(
            RectifiedFlow(), target="flow", times=UniformTimes(), conditions={"mask": MASK}, dropout={"mask": chances}
        )
        made: Tensor = prepare(batch(*items), device="cpu")[2][1]["mask"]
        return made

    assert torch.equal(masks(), given)
    assert torch.equal(masks(all=1.0), MASK.null(given))
    assert torch.equal(masks(each=1.0), MASK.null(given))
    whole = (masks(all=0.25) == MASK.null(given)).flatten(1).all(1)
    assert 0.15 < float(whole.float().mean()) < 0.35
    gone = masks(each=0.25).flatten(2).sum(2) == 0
    assert torch.equal(gone[:, 0], gone[:, 1] | gone[:, 2])  # the background goes with a label, and only then
    assert 0.15 < float(gone[:, 1].float().mean()) < 0.35
    assert 0.0 < float((gone[:, 1] & gone[:, 2]).float().mean()) < 0.15
    one = masks({2: 0.5}).flatten(2).sum(2) == 0  # a label by its value, as YAML reads it
    assert not one[:, 1].any() and 0.35 < float(one[:, 2].float().mean()) < 0.65
    assert torch.equal(masks({"each": 0.5, 0: 0.0, 1: 0.0}), masks({"2": 0.5}))
    with pytest.raises(FibldmError, match="must name some of 0, 1, 2, all or each; got 77"):
        masks({77: 0.5})


def test_a_target_that_is_singular_on_the_process_is_refused() -> None:
    with pytest.raises(FibldmError, match="target 'epsilon' needs alpha"):
        LatentPrepareBatch(RectifiedFlow(), target="epsilon", times=UniformTimes())


# --- handlers


def engine_of(step: Callable[[Engine, Any], Any], length: int = 1, epochs: int = 1) -> Engine:
    engine = Engine(step)
    engine.state.max_epochs, engine.state.epoch_length = epochs, length
    return engine


def test_the_average_of_a_ramp_is_its_closed_form() -> None:
    """Weights ``w_n = n``: the average is a product formula, and past the warm-up it lags by ``(1 - m) / m``."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    ema, engine = EMA(model, momentum=0.2), Engine(lambda engine, item: model.weight.data.add_(1))
    ema.attach(engine)
    seen: list[float] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(float(ema.ema_model.weight)))
    engine.run(range(200), max_epochs=1)
    momenta = [max(0.2, 9 / (10 + n)) for n in range(1, 201)]
    expected = [
        sum((n + 1) * momenta[n] * math.prod(1 - m for m in momenta[n + 1 : end]) for n in range(end))
        for end in range(1, 201)
    ]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert seen[-1] == pytest.approx(200 - (1 - 0.2) / 0.2, abs=1e-6)


def test_the_average_does_not_touch_weights_that_are_not_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    ema, engine = EMA(model, momentum=0.1), Engine(lambda engine, item: None)
    frozen = model[0].weight.clone()
    with torch.no_grad():
        ema.ema_model[0].weight.add_(1e-3)  # were it averaged, it would move towards the model's
        model[0].bias.add_(1.0)
        model[1].running_mean.fill_(2.0)
    expected = ema.ema_model[0].weight.clone()
    ema.attach(engine)
    engine.run(range(3), max_epochs=1)
    assert torch.equal(ema.ema_model[0].weight, expected)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(ema.ema_model[0].bias, model[0].bias)
    assert torch.equal(ema.ema_model[1].running_mean, model[1].running_mean)


def test_every_epoch_sets_its_order_and_its_random_numbers() -> None:
    sampler = EpochSampler(3, seed=0)
    numbers: dict[int, float] = {}

    def run(epochs: int) -> None:
        engine = Engine(lambda engine, item: numbers.update({engine.state.epoch: float(torch.rand(1))}))
        SetEpoch(sampler, 0).attach(engine)
        engine.run([0], max_epochs=epochs)

    run(3)
    first = dict(numbers)
    torch.rand(5)
    run(2)
    assert numbers == first
    assert len(set(first.values())) == 3
    assert sampler.epoch == 2


def test_gradients_are_scaled_to_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    engine = engine_of(lambda engine, item: None)
    engine.state.iteration = 1
    ClipGradient(model, 1.0)(engine)
    assert engine.state.gradient_norm == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


def metrics_engine(folder: Path, losses: list[float]) -> tuple[Engine, Metrics]:
    """One iteration per epoch, with these losses; the engine ends after the last."""
    engine = engine_of(
        lambda engine, item: [{"loss": torch.tensor(losses[engine.state.epoch - 1])}], epochs=len(losses)
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
    metrics = Metrics(folder / "metrics.csv", optimizer)
    metrics.attach(engine)
    return engine, metrics


def read(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_metrics_write_a_row_per_epoch_and_drop_those_that_are_done_again(tmp_path: Path) -> None:
    engine, _ = metrics_engine(tmp_path, [1.0, 2.0, 3.0])
    engine.run([0], max_epochs=3)
    rows = read(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["iteration"], row["loss"]) for row in rows] == [
        ("1", "1", "1"),
        ("2", "2", "2"),
        ("3", "3", "3"),
    ]
    assert {row["learning_rate"] for row in rows} == {"0.25"}
    engine, _ = metrics_engine(tmp_path, [10.0, 20.0, 30.0, 40.0])
    engine.state.epoch, engine.state.iteration = 1, 1
    engine.run([0], max_epochs=4)
    assert [row["loss"] for row in read(tmp_path / "metrics.csv")] == ["1", "20", "30", "40"]


def test_tensorboard_shows_the_rows_and_those_done_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # files of one second are read in the order of a count that sorts as text, in which the tenth comes before the ninth
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def train(losses: list[float], after: int = 0) -> None:
        engine, metrics = metrics_engine(tmp_path, losses)
        TensorBoard(metrics).attach(engine)
        engine.state.epoch = engine.state.iteration = after
        engine.run([0], max_epochs=len(losses))

    train([1.0, 2.0, 3.0])
    train([10.0, 20.0, 30.0, 40.0], after=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 20), (3, 30), (4, 40)]
    assert "validation_loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, loss: float) -> None:
    engine, metrics = metrics_engine(tmp_path, [1.0, loss])
    progress = ShowProgress("autoencoder", metrics)
    progress.attach(engine)
    with pytest.raises(FibldmError, match=r"training loss must stay finite; it is (nan|inf) in epoch 2"):
        engine.run([0], max_epochs=2)
    assert len(read(tmp_path / "metrics.csv")) == 1


def checkpointed(
    folder: Path, validation_losses: list[float | None], *, keep_every: int = 0
) -> tuple[Engine, Checkpoints, nn.Module]:
    """An engine that adds 1 to a weight per epoch and meets these validation losses."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, momentum=0.9999)
    metrics = SimpleNamespace(validation_loss=None)
    engine = engine_of(lambda engine, item: model.weight.data.add_(1), epochs=len(validation_losses))
    ema.attach(engine)

    @engine.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        metrics.validation_loss = validation_losses[engine.state.epoch - 1]

    objects = {"network": model, "ema": ema.ema_model}
    checkpoints = Checkpoints(
        *(folder, objects),
        ema=ema,
        every=1,
        metrics=metrics,  # type: ignore[arg-type]
        keep_every=keep_every,
    )
    checkpoints.attach(engine)
    return engine, checkpoints, model


def saved(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return content


def test_the_best_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    engine, _, _ = checkpointed(tmp_path, [3.0, 1.0, None, 2.0])
    engine.run([0], max_epochs=4)
    best, last = saved(tmp_path, "best"), saved(tmp_path, "last")
    assert (best["epoch"], best["loss"]) == (2, 1.0)
    assert float(best["model"]["weight"]) == pytest.approx(2.0, abs=1e-3)
    assert (last["epoch"], float(last["objects"]["network"]["weight"])) == (4, 4.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_averaged_weights_of_some_epochs_are_kept(tmp_path: Path) -> None:
    engine, _, _ = checkpointed(tmp_path, [3.0, 1.0, None, None], keep_every=2)
    engine.run([0], max_epochs=4)
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch_0002.pt", "epoch_0004.pt"]
    kept = [saved(tmp_path, f"epoch_{epoch:04d}") for epoch in (2, 4)]
    assert [(content["epoch"], content["loss"]) for content in kept] == [(2, 1.0), (4, None)]
    assert [float(content["model"]["weight"]) for content in kept] == pytest.approx([2.0, 4.0], abs=2e-3)


def test_a_resume_knows_the_best_so_far(tmp_path: Path) -> None:
    engine, _, _ = checkpointed(tmp_path, [3.0, 1.0])
    engine.run([0], max_epochs=2)
    engine, checkpoints, model = checkpointed(tmp_path, [3.0, 1.0, 2.0])
    assert checkpoints.resume(engine) == 2
    assert float(model.weight.detach()) == 2.0
    engine.run([0], max_epochs=3)
    assert saved(tmp_path, "best")["epoch"] == 2
    assert float(saved(tmp_path, "last")["objects"]["network"]["weight"]) == 3.0


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    engine, _, _ = checkpointed(tmp_path, [3.0])
    engine.run([0], max_epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    engine, checkpoints, _ = checkpointed(tmp_path, [3.0, 1.0])
    checkpoints.resume(engine)

    def full(content: Any, file: Any, **settings: Any) -> None:
        file.write(b"the first bytes")
        raise failure

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FibldmError, match="cannot write a checkpoint to") as raised:
        engine.run([0], max_epochs=2)
    assert "free some disk space" in raised.value.remedy
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_broken_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    engine, checkpoints, _ = checkpointed(tmp_path, [1.0])
    with pytest.raises(FibldmError, match=r"last\.pt must be a readable checkpoint"):
        checkpoints.resume(engine)


# --- stage


def test_a_schedule_is_put_where_it_was() -> None:
    from monai.optimizers.lr_scheduler import WarmupCosineSchedule

    def schedule() -> WarmupCosineSchedule:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=20, end_lr=1e-3, warmup_multiplier=0.1)

    def place(scheduler: WarmupCosineSchedule, iteration: int) -> None:
        engine = engine_of(lambda engine, item: None, length=20)
        engine.state.iteration = iteration
        Schedule(scheduler).place(engine)

    stepped = schedule()
    for _ in range(11):
        stepped.optimizer.step()
        stepped.step()
    placed = schedule()
    place(placed, 11)
    assert placed.optimizer.param_groups[0]["lr"] == stepped.optimizer.param_groups[0]["lr"]
    for scheduler in (stepped, placed):
        scheduler.optimizer.step()
        scheduler.step()
    place(placed, 12)
    assert placed.optimizer.param_groups[0]["lr"] == stepped.optimizer.param_groups[0]["lr"]
