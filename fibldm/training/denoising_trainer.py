"""The engine of stages 2 and 3: MONAI's, with one loss for all ranks."""

from typing import Any

from monai.engines.utils import IterationEvents
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.training.distributed import mean_over_ranks, part_of_mean
from fibldm.training.handlers import is_step
from fibldm.training.loss_aware import TellTimes
from fibldm.training.losses import DenoisingLoss, Weighted
from fibldm.training.precision import ScaledTrainer


class DenoisingTrainer(ScaledTrainer):
    """Train a denoising network; on several ranks, by the mean over the places of all of them that count.

    Where the loss has several terms, ``output["losses"]`` holds them, without their weights. Times that follow the loss
    are told of it.

    Args:
        loss_function: whose terms are means over places, each weighing as its weight says.
        settings: of `ScaledTrainer`.

    Raises:
        FibldmError: network and loss take a learned variance for different things.
    """

    def __init__(self, *, loss_function: DenoisingLoss, **settings: Any) -> None:
        variance = getattr(settings["network"], "variance", loss_function.variance)
        if variance != loss_function.variance:
            raise FibldmError(
                f"network and loss must take the learned variance for the same; got {variance} and "
                f"{loss_function.variance}",
                "put configuration learned_variance_vlb after both stages 2 and 3, or after neither",
            )
        super().__init__(loss_function=self._loss, **settings)
        self._loss_of_rank = loss_function
        self.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._share_gradients)
        if (follows := getattr(settings.get("prepare_batch"), "following", None)) is not None:
            TellTimes(follows, loss_function).attach(self)

    def _loss(self, prediction: Tensor, target: Weighted) -> Tensor:
        terms = self._loss_of_rank.terms(prediction, target)
        terms = {name: part_of_mean(term, target.weight) for name, term in terms.items()}
        if len(terms) > 1:
            output: Any = self.state.output
            output["losses"] = {name: term.detach() for name, term in terms.items()}
        return self._loss_of_rank.objective(terms)

    def _share_gradients(self) -> None:
        """Average those of the loss over the ranks; the network's own are averaged by what distributes it."""
        if not is_step(self):
            return
        for weight in self._loss_of_rank.parameters():
            if weight.grad is not None:
                weight.grad = mean_over_ranks(weight.grad)
