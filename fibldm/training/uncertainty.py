"""How large the error of a denoising network is expected to be at each time, learned beside the network."""

import math

import torch
from torch import Tensor, nn

from fibldm.models.process import LOG_SNR_LIMIT, Process
from fibldm.models.transfer import to_device


class LogVariance(nn.Module):
    """``u(t)``, the logarithm of the expected error at a time (Karras et al. 2024, "EDM2", section 2.1 and eq. 22).

    One layer on Fourier features of ``ln(sigma / alpha) / 4``, the noise level that EDM2 tells its network. It begins
    with 0 everywhere, which changes nothing. The loss ``e^-u error + u`` is least where ``u`` is the logarithm of the
    mean error; every time then pulls at the network alike, whatever the size of its error. It serves the training only:
    checkpoints keep it, the network and what is exported do not have it.

    Args:
        process: of the training.
        features: of the time; their frequencies are the same in every run.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, process: Process, *, features: int = 128) -> None:
        super().__init__()
        self.process = process
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.layer = nn.Linear(features, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """``u`` at times ``t`` (B,) in (0, 1], there or on the CPU; float32, shape (B,), on the module's device."""
        t = t.double()
        log_snr = 2 * (self.process.alpha(t).log() - self.process.sigma(t).log())
        noise = to_device((-log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT) / 8).float(), self.frequencies.device)
        features = (noise[:, None] * self.frequencies + self.phases).cos()
        features = features * math.sqrt(2 / len(self.frequencies))  # of a length of 1, whatever their number
        u: Tensor = self.layer(features)[:, 0]
        return u
