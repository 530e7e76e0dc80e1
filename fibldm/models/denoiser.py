"""From a network and a condition to a denoiser, the only thing samplers know."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Prediction, Process, Target
from fibldm.models.samplers import Denoise


@dataclass(frozen=True)
class Denoiser:
    """What a network says of the latent behind ``z_t``.

    Attributes:
        network: in evaluation mode.
        process: the one it was trained on.
        target: what its output means.
        mask: encoded mask ``(B, M, x, y, z)``; None for the base network alone.
    """

    network: ConditionedNetwork
    process: Process
    target: Target
    mask: Tensor | None = None

    def __call__(self, z_t: Tensor, t: Tensor) -> Prediction:
        """The expected latent at ``z_t`` ``(B, C, x, y, z)`` and times ``t`` ``(B,)`` in (0, 1]."""
        output = self.network(z_t, self.process.network_time(t), self.mask)
        return Prediction(self.process.to_z_0(self.target, output, z_t, t))


def guided(conditional: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), in terms of ``z_0``.

    Args:
        conditional: with the condition.
        unconditional: with its null, the same that dropout trains.
        scale: 1 is no guidance and costs no second call; 2 goes as far again beyond the condition.
    """
    if scale == 1:
        return conditional

    def denoise(z_t: Tensor, t: Tensor) -> Prediction:
        given, null = conditional(z_t, t).z_0, unconditional(z_t, t).z_0
        return Prediction(torch.lerp(null, given, scale))

    return denoise
