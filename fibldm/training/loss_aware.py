"""Telling loss-aware times what the samples of a training lost."""

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from fibldm.models.loss_aware_times import Following
from fibldm.training.distributed import rows_of_ranks
from fibldm.training.finite import LOOK_EVERY
from fibldm.training.handlers import is_step
from fibldm.training.losses import DenoisingLoss, Weighted


class TellTimes:
    """Tell loss-aware times, after every `LOOK_EVERY` steps of an epoch and at its end, what each sample lost.

    Reading a loss waits for the device, and ranks for each other; the loss of a time changes far more slowly. Samples
    are told in the order of one process, and never between the iterations of a step, so that neither batches nor ranks
    nor accumulation are more than a way of grouping. At the end of an epoch, before its checkpoint, nothing is left.

    Args:
        times: that follow the loss; the same on all ranks.
        loss: of the training.
    """

    def __init__(self, times: Following, loss: DenoisingLoss) -> None:
        self.times, self.loss = times, loss
        self._kept: list[tuple[Tensor, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._tell)

    def _forget(self) -> None:
        self._kept = []

    def _keep(self, engine: Any) -> None:
        (output,) = engine.state.output
        target: Weighted = output["label"]
        self._kept.append((target.times(), self.loss.by_sample(output["pred"].detach(), target)))
        if is_step(engine) and _step_of_epoch(engine) % LOOK_EVERY == 0:
            self._tell()

    def _tell(self) -> None:
        if not self._kept:
            return
        times = torch.cat([t.cpu() for t, _ in self._kept])
        losses = torch.cat([losses for _, losses in self._kept]).cpu()  # the one look at the device
        self._kept = []
        for_all = rows_of_ranks(torch.stack([times.double(), losses.double()], dim=1))
        self.times.observe(for_all[:, 0].float(), for_all[:, 1])


def _step_of_epoch(engine: Any) -> int:
    """The number of this step in its epoch, from 1 on."""
    state, accumulated = engine.state, int(getattr(engine, "accumulation_steps", 1))
    return -(-((state.iteration - 1) % state.epoch_length + 1) // accumulated)
