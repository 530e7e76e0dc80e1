"""Networks with one tensor in and one out, as exporters and MONAI's checks of bundles want them."""

import torch
from torch import Tensor, nn

from fibldm.models.autoencoder import Autoencoder


class OneTensorNetwork(nn.Module):
    """A denoising network whose latent, time and mask are channels of one tensor.

    Args:
        network: takes latent, time and mask, such as `fibldm.models.network.ConditionedNetwork`.
        channels: of the latent.
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, packed: Tensor) -> Tensor:
        """The network's output ``(B, C, x, y, z)`` of ``(B, C + 1 + M, x, y, z)``: latent, time everywhere, mask."""
        z_t, time, mask = torch.split(packed, [self.channels, 1, packed.shape[1] - self.channels - 1], dim=1)
        output: Tensor = self.network(z_t, time.flatten(1)[:, 0], mask)
        return output


class OneTensorEncoder(nn.Module):
    """The mean of an autoencoder's posterior.

    Args:
        autoencoder: `fibldm.models.autoencoder.Autoencoder`.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, volume: Tensor) -> Tensor:
        """The latent ``(B, C, x, y, z)`` of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``."""
        mean: Tensor = self.autoencoder.encode(volume).mean
        return mean


class OneTensorDecoder(nn.Module):
    """An autoencoder's decoder.

    Args:
        autoencoder: `fibldm.models.autoencoder.Autoencoder`, one that needs no mask.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of a latent ``(B, C, x, y, z)`` in the autoencoder's own scale."""
        volume: Tensor = self.autoencoder.decode(latent)
        return volume
