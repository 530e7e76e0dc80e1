"""The engine of stages 2 and 3: MONAI's, with one loss for all ranks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fibldm.training.distributed import part_of_mean
from fibldm.training.losses import Weighted
from fibldm.training.precision import ScaledTrainer


class DenoisingTrainer(ScaledTrainer):
    """Train a denoising network; on several ranks, by the mean over the places of all of them that count.

    Args:
        loss_function: a mean over places, each weighing as its weight says.
        settings: of `ScaledTrainer`.
    """

    def __init__(self, *, loss_function: Callable[[Tensor, Weighted], Tensor], **settings: Any) -> None:
        super().__init__(loss_function=self._loss, **settings)
        self._loss_of_rank = loss_function

    def _loss(self, prediction: Tensor, target: Weighted) -> Tensor:
        return part_of_mean(self._loss_of_rank(prediction, target), target.weight)
