"""A first stage of masks: labels to latents, and back to the probability of each label."""

from torch import Tensor

from fibldm.models.autoencoder import Autoencoder, Reconstruction, seeded_noise


class LabelAutoencoder(Autoencoder):
    """An `Autoencoder` of volumes with a channel for each label, 1 where a voxel has it and -1 elsewhere.

    Training sees logits, for cross entropy. Whoever decodes a latent gets probabilities in the range of what was
    encoded, ``2 p - 1``, which add up to 1 over the labels; the largest is the label.
    """

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the labels ``(B, L, X, Y, Z)``, as ``2 p - 1``, of a latent in the autoencoder's own scale.

        Args:
            latent: ``(B, C, x, y, z)``.
            mask: is not looked at.
        """
        return 2 * self._logits(latent).float().softmax(dim=1) - 1

    def forward(self, volume: Tensor, mask: Tensor | None = None, *, seeds: Tensor | None = None) -> Reconstruction:
        """As `Autoencoder.forward`; the volume is logits."""
        posterior = self.encode(volume)
        return Reconstruction(self._logits(posterior.sample(seeded_noise(posterior.mean, seeds))), posterior)

    def _logits(self, latent: Tensor) -> Tensor:
        return super().decode(latent)
