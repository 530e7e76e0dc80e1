"""The engine of stage 1: MONAI's, with the terms of the loss by name and, where asked for, an adversary."""

from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.training.adversarial import Adversary, adaptive_weight, last_layer, random_slices
from fibldm.training.distributed import mean_over_ranks, part_of_mean
from fibldm.training.losses import AutoencoderLoss, Weighted
from fibldm.training.precision import ScaledTrainer


class AutoencoderTrainer(ScaledTrainer):
    """Train an autoencoder, alone or against discriminators.

    MONAI's ``AdversarialTrainer`` wants a tensor from the generator and knows no warm-up. Here, unlike there,
    ``BACKWARD_COMPLETED`` fires only before a step of the optimizer, when the gradient is whole and without the factor
    of the scaler, so what clips it then is right with accumulation and float16 as well. The output also has
    ``losses``: every term by name, scalars without gradient.

    Args:
        loss_function: gives the terms and their sum.
        adversary: discriminators; ``None`` trains without.
        scaler: of gradients in float16; ``None`` scales nothing.
        accumulation_steps: iterations whose gradients are averaged for one step of the optimizer. The last step of an
            epoch averages what is left.
        options: of `monai.engines.SupervisedTrainer`, which it is.

    Raises:
        FibldmError: ``accumulation_steps`` is less than 1.
    """

    loss_function: AutoencoderLoss

    def __init__(
        self,
        *,
        loss_function: AutoencoderLoss,
        adversary: Adversary | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulation_steps: int = 1,
        **options: Any,
    ) -> None:
        if accumulation_steps < 1:
            raise FibldmError(f"accumulation_steps must be at least 1; got {accumulation_steps}")
        super().__init__(scaler=scaler, loss_function=loss_function, accumulation_steps=accumulation_steps, **options)
        self.adversary = adversary
        self.gradient_scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> Any:
        inputs, target, args, kwargs = self._inputs(batchdata)
        output: dict[str, Any] = {CommonKeys.IMAGE: inputs, CommonKeys.LABEL: target}
        self.state.output = output
        position, count = self._place()
        adversary = self._active_adversary(position)
        self.network.train()
        if position == 0:
            for optimizer in self._optimizers(self.adversary):
                optimizer.zero_grad(set_to_none=self.optim_set_to_none)

        output[CommonKeys.PRED] = self.inferer(inputs, self.network, *args, **kwargs)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        positions = [] if adversary is None else self._positions(adversary, inputs, batchdata)
        self._losses(output, adversary, positions)
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        self.gradient_scaler.scale(output[CommonKeys.LOSS] / count).backward()
        if adversary is not None:
            discriminator_loss = adversary.discriminator_loss(
                output[CommonKeys.PRED].volume, target, positions, self.inferer
            )
            self.gradient_scaler.scale(discriminator_loss / count).backward()
            output["losses"]["discriminator"] = discriminator_loss.detach()
        if position == count - 1:
            self._step(adversary)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return [output]  # as MONAI's handlers expect, whose engines part a batch into items

    def _inputs(self, batchdata: dict[str, Tensor]) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        batch: Any = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        return batch if len(batch) == 4 else (*batch, (), {})

    def _place(self) -> tuple[int, int]:
        """Position of the iteration among those of one step of the optimizer, and how many these are."""
        length = self.state.epoch_length or self.accumulation_steps
        within = (self.state.iteration - 1) % length
        position = within % self.accumulation_steps
        return position, min(self.accumulation_steps, length - within + position)

    def _active_adversary(self, position: int) -> Adversary | None:
        """The adversary once it has begun; it does so with a step of the optimizer."""
        done = self.state.iteration - 1 - position
        return self.adversary if self.adversary is not None and done >= self.adversary.start else None

    def _optimizers(self, adversary: Adversary | None) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if adversary is None else [self.optimizer, adversary.optimizer]

    def _positions(self, adversary: Adversary, inputs: Tensor, batchdata: dict[str, Tensor]) -> list[Tensor]:
        if adversary.discriminators.slices is None:
            return []
        return random_slices(inputs.shape[2:], batchdata["seed"], adversary.discriminators.slices_per_axis)

    def _losses(self, output: dict[str, Any], adversary: Adversary | None, positions: list[Tensor]) -> None:
        """Put the loss and its terms into the output."""
        terms = self.loss_function.terms(output[CommonKeys.PRED], output[CommonKeys.LABEL])
        terms["reconstruction"] = part_of_mean(terms["reconstruction"], output[CommonKeys.LABEL].weight)
        loss = self.loss_function.objective(terms)
        if self.loss_function.log_variance is not None:
            terms["log_variance"] = self.loss_function.log_variance
        if adversary is not None:
            found = adversary.generator_terms(
                output[CommonKeys.PRED].volume, output[CommonKeys.LABEL], positions, self.inferer
            )
            weight = self._weight(adversary, loss, found["generator"])
            loss = loss + weight * found["generator"]
            if adversary.feature_weight:
                loss = loss + adversary.feature_weight * found["feature_matching"]
            terms |= {**found, "adversarial_weight": weight}
        elif self.adversary is not None:
            # the same names from the first epoch on
            terms |= {name: torch.zeros_like(loss) for name in self.adversary.names}
        output[CommonKeys.LOSS] = loss
        output["losses"] = {name: term.detach().clone() for name, term in terms.items()}

    def _weight(self, adversary: Adversary, loss: Tensor, generator: Tensor) -> Tensor:
        weight = torch.full_like(loss, adversary.discriminators.weight).detach()
        if not adversary.adaptive:
            return weight
        scale = float(self.gradient_scaler.get_scale())
        return weight * adaptive_weight(loss, generator, last_layer(self.network), scale=scale)

    def _step(self, adversary: Adversary | None) -> None:
        # the network's own gradients are averaged by what distributes it
        others = [*self.loss_function.parameters(), *(adversary.discriminators.parameters() if adversary else ())]
        for weight in others:
            if weight.grad is not None:
                weight.grad = mean_over_ranks(weight.grad)
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        for optimizer in self._optimizers(adversary):
            self.gradient_scaler.step(optimizer)
        self.gradient_scaler.update()
