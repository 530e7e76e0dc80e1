"""The engine of stages 2 and 3: MONAI's, with one loss for all ranks."""

from typing import Any

from torch import Tensor

from fibldm.training.distributed import part_of_mean
from fibldm.training.losses import DenoisingLoss, Weighted
from fibldm.training.precision import ScaledTrainer


class DenoisingTrainer(ScaledTrainer):
    """Train a denoising network; on several ranks, by the mean over the places of all of them that count.

    Where the loss has several terms, ``output["losses"]`` holds them, without their weights.

    Args:
        loss_function: whose terms are means over places, each weighing as its weight says.
        settings: of `ScaledTrainer`.
    """

    def __init__(self, *, loss_function: DenoisingLoss, **settings: Any) -> None:
        super().__init__(loss_function=self._loss, **settings)
        self._loss_of_rank = loss_function

    def _loss(self, prediction: Tensor, target: Weighted) -> Tensor:
        terms = self._loss_of_rank.terms(prediction, target)
        terms = {name: part_of_mean(term, target.weight) for name, term in terms.items()}
        if len(terms) > 1:
            output: Any = self.state.output
            output["losses"] = {name: term.detach() for name, term in terms.items()}
        return self._loss_of_rank.objective(terms)
