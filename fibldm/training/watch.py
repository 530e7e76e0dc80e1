"""Watching what small data do: the loss on validation patients beside the same on training patients.

A network with few patients memorises them. What it has learned by heart it denoises better than what it has not, so
both losses are taken in the same way: of plain views, with fixed noise, at fixed times, by the averaged weights.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.timesteps import GridTimes
from fibldm.training.draws import Item, KeyedDataset, take_subset
from fibldm.training.handlers import Metrics
from fibldm.training.losses import Weighted


def as_many_patients(training: Sequence[Item], validation: Sequence[Item]) -> list[Item]:
    """The plain views of as many training patients as there are validation patients, or of all where there are fewer.

    Args:
        training: cached views with "case" and "subject"; the first one of each case is the plain one. They are chosen
            by the hash of `take_subset`, so that any subset that was trained on holds them.
        validation: likewise; only counted.
    """
    plain: dict[Any, Item] = {}
    for item in training:
        plain.setdefault(item["case"], item)
    ours, theirs = (len({str(item["subject"]) for item in items}) for items in (training, validation))
    return take_subset(list(plain.values()), min(1.0, theirs / ours))


def same_evaluation(
    evaluator: SupervisedEvaluator, dataset: KeyedDataset, key_val_metric: dict[str, Metric]
) -> SupervisedEvaluator:
    """An evaluator of other cases, that sees them as another one sees its own.

    Args:
        evaluator: of the validation cases; its loader draws by an `EpochSampler`.
        dataset: the other cases.
        key_val_metric: what is measured of them, by its name.
    """
    loader: Any = evaluator.data_loader
    sampler = copy(loader.sampler)
    sampler.length = len(dataset)
    return SupervisedEvaluator(
        device=evaluator.state.device,  # type: ignore[arg-type]
        val_data_loader=DataLoader(
            dataset, sampler=sampler, batch_size=loader.batch_size, num_workers=loader.num_workers
        ),
        network=evaluator.network,
        prepare_batch=evaluator.prepare_batch,
        inferer=evaluator.inferer,
        key_val_metric=key_val_metric,
        amp=evaluator.amp,
        decollate=False,
    )


class LossByTime(Metric):
    """The validation loss of each time of a grid by itself, ``validation_loss/t0.12`` and so on.

    Every draw weighs alike; the times are told by the views of the batch, as `LatentPrepareBatch` does.

    Args:
        loss: of a prediction and its `Weighted` target, a scalar.
        times: of the validation.
    """

    def __init__(self, loss: nn.Module, times: GridTimes) -> None:
        self.loss, self.times = loss, times
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        self._sums = torch.zeros(self.times.count, dtype=torch.float64)
        self._draws = torch.zeros(self.times.count, dtype=torch.float64)

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Take the views from the batch: the output of an evaluator does not hold them."""
        output: Any = engine.state.output
        self.update((output["pred"], output["label"], engine.state.batch["view"]))  # type: ignore[index, call-overload]

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Weighted, Tensor]) -> None:
        """Add the draws of a batch: predictions ``(B, C, ...)``, their targets, and views ``(B,)``."""
        prediction, target, views = output
        for draw, view in enumerate(views.tolist()):
            loss = self.loss(prediction[draw : draw + 1], target.sample(draw))
            self._sums[view % self.times.count] += float(loss)
            self._draws[view % self.times.count] += 1

    @sync_all_reduce("_sums", "_draws")
    def compute(self) -> dict[str, float]:
        """The mean loss of each time, by the name of its column."""
        digits = max(2, len(str(self.times.count)))
        names = [f"validation_loss/t{float(self.times.at(index)):.{digits}f}" for index in range(self.times.count)]
        means = zip(names, self._sums.tolist(), self._draws.tolist(), strict=True)
        return {name: total / draws for name, total, draws in means if draws}  # of few batches, some have none


class Validation:
    """Validate after every so many epochs and after the last one, and tell `Metrics`.

    Args:
        evaluator: whose metrics are ``validation_loss`` and, where it has them, its parts.
        metrics: gets what was measured.
        interval: epochs between two validations.
        training: the same on training patients, whose metric is ``training_loss``; None does not look at them.
        batches: of each that are seen, the first ones; None sees all.

    Raises:
        FibldmError: ``batches`` is no whole number of at least 1.
    """

    def __init__(
        self, evaluator: Any, metrics: Metrics, *, interval: int, training: Any = None, batches: int | None = None
    ) -> None:
        for looked in (evaluator, training):
            if looked is not None and batches is not None:
                _limit(looked, batches)
        self.evaluator, self.metrics, self.interval, self.training = evaluator, metrics, interval, training

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Validate, if it is time.

        Raises:
            FibldmError: the validation loss is not finite.
        """
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        measured = _measure(self.evaluator, epoch, "validation_loss")
        loss = measured.pop("validation_loss")
        if not math.isfinite(loss):
            raise FibldmError(
                f"the validation loss must stay finite; it is {loss} in epoch {epoch}",
                "lower learning_rate or clip_norm; the last checkpoint is as it was",
            )
        if self.training is not None:
            measured |= _measure(self.training, epoch, "training_loss")
            measured["gap"] = gap(loss, measured["training_loss"])
        self.metrics.validation_loss, self.metrics.watched = loss, measured


def _limit(evaluator: Any, batches: int) -> None:
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise FibldmError(
            f"limit_val_batches must be a whole number of at least 1; got {batches!r}", "null validates on all batches"
        )
    evaluator.state.epoch_length = min(batches, evaluator.state.epoch_length)


def gap(validation: float, training: float) -> float:
    """How much larger the loss is on validation patients than on training patients, as a share; 0 where it is equal."""
    return validation / training - 1 if training else math.inf


def _measure(evaluator: Any, epoch: int, name: str) -> dict[str, float]:
    """The metric of a name and its parts, ``name/part``."""
    evaluator.run(epoch)
    metrics: Mapping[str, Any] = evaluator.state.metrics
    return {key: float(value) for key, value in metrics.items() if key.split("/")[0] == name}
