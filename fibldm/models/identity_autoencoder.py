"""The first stage of diffusion in pixel space: none."""

from torch import Tensor, nn

from fibldm.models.autoencoder import Autoencoder, Posterior, Reconstruction, deterministic


class IdentityAutoencoder(Autoencoder):
    """Latents are the volumes themselves: a baseline, and for small volumes that must follow the mask to the voxel.

    It has no weights and nothing to learn.

    Args:
        channels: of the volume.
    """

    is_identity = True

    def __init__(self, channels: int = 1) -> None:
        nn.Module.__init__(self)
        self.channels = channels

    @property
    def compression(self) -> tuple[int, ...]:
        """1 along each axis."""
        return (1, 1, 1)

    @property
    def latent_channels(self) -> int:
        return self.channels

    def encode(self, volume: Tensor) -> Posterior:
        """The volume ``(B, C, X, Y, Z)`` as its own latent, without noise."""
        return deterministic(volume)

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """The latent ``(B, C, X, Y, Z)`` as the volume."""
        return latent

    def forward(self, volume: Tensor, mask: Tensor | None = None, *, seeds: Tensor | None = None) -> Reconstruction:
        """The volume, which is its own reconstruction."""
        return Reconstruction(volume, deterministic(volume))
