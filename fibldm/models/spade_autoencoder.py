"""A first stage whose decoder sees the mask."""

from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder


class SpadeAutoencoder(Autoencoder):
    """A KL autoencoder whose decoder is normalised by the mask (Park et al. 2019, SPADE).

    The latent need not say where the organs lie, and boundaries come out where the mask has them.

    Args:
        network: MONAI's ``SPADEAutoencoderKL`` with one ``label_nc`` per label and one for unknown.
    """

    needs_mask = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of a latent ``(B, C, x, y, z)`` and its mask.

        Args:
            latent: in the autoencoder's own scale.
            mask: ``(B, L + 1, X, Y, Z)``, as `MaskEncoding` with compression 1 gives it.

        Raises:
            FibldmError: there is no mask, or it has another size or other labels than the network.
        """
        if mask is None:
            raise FibldmError(
                "this autoencoder decodes with the mask at hand; got a latent alone",
                "give decode the mask at full size, as MaskEncoding(labels, compression=1) encodes it",
            )
        size = tuple(cells * step for cells, step in zip(latent.shape[2:], self.compression, strict=True))
        wanted = (len(latent), self.network.decoder.label_nc, *size)
        if tuple(mask.shape) != wanted:
            raise FibldmError(f"the mask of this latent must have the shape {wanted}; it has {tuple(mask.shape)}")
        return self._to_volume(self.network.decode(self._without_z(latent), self._without_z(mask)))
