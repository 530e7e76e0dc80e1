"""The network that Ignite, the checkpoint and the sampler see: a UNet with its ControlNet."""

from monai.networks.nets import ControlNet, DiffusionModelUNet
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.controlnet import copy_base_weights


class ConditionedNetwork(nn.Module):
    """A denoising UNet, alone or steered by a ControlNet on the mask.

    Args:
        unet: the base network.
        controlnet: starts as a copy of the base network's encoder; None for stage 2.
        freeze_base: the base network gets no gradient and stays as it is.
    """

    def __init__(
        self, unet: DiffusionModelUNet, controlnet: ControlNet | None = None, *, freeze_base: bool = False
    ) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = None if controlnet is None else copy_base_weights(controlnet, unet)
        if freeze_base:
            self.unet.requires_grad_(False)

    @property
    def multiple(self) -> int:
        """What every axis of the latent must be divisible by: the UNet halves it once per level but the last."""
        return int(2 ** (len(self.unet.block_out_channels) - 1))

    def forward(self, z_t: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The network's output ``(B, C, x, y, z)`` in the terms of its training target.

        Args:
            z_t: noisy latent ``(B, C, x, y, z)``.
            timesteps: ``(B,)``, the process's own network time.
            mask: encoded mask ``(B, M, x, y, z)``; None turns the ControlNet's residuals off.

        Raises:
            FibldmError: an axis of the latent is not divisible by `multiple`.
        """
        size = tuple(z_t.shape[2:])
        if any(length % self.multiple for length in size):
            raise FibldmError(
                f"latent size {size} must be divisible by {self.multiple} (2^{len(self.unet.block_out_channels) - 1}: "
                f"{len(self.unet.block_out_channels)} UNet levels)",
                "choose a model grid whose size is divisible by that times the autoencoder's compression",
            )
        if self.controlnet is None or mask is None:
            return self.unet(z_t, timesteps)
        down, mid = self.controlnet(z_t, timesteps, controlnet_cond=mask)
        return self.unet(z_t, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=mid)
