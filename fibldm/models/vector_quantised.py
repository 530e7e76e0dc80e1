"""First stages with a codebook: every latent vector is replaced by the nearest of a learned set of codes."""

from typing import Any

import torch
from torch import Tensor, nn

from fibldm.models.autoencoder import Autoencoder, Posterior, Quantisation, Reconstruction, deterministic


class VectorQuantisedAutoencoder(Autoencoder):
    """A VQ autoencoder (van den Oord et al. 2017) whose codes are moving averages of what is assigned to them.

    Codes that hardly anything is assigned to are revived: they take the place of vectors that the encoder gave in this
    pass (Dhariwal et al. 2020, Jukebox, section 3.1). In the first pass no code was used, so the codebook starts with
    outputs of the encoder. All that this keeps lies in buffers, so a checkpoint and an average of the weights hold it.

    Args:
        network: ``VQVAE`` of MONAI or of monai-generative.
        wavelet: see `Autoencoder`.
        quantised_latents: latents are codes (van den Oord et al.) and not what the encoder gives before it is
            quantised (Rombach et al. 2022, section 3.1). `decode` takes both, as a code is its own nearest code.
        revive_below: a code is dead when it is used less than this part of the mean use of all codes; 0 revives none.
    """

    passes: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        wavelet: bool = False,
        quantised_latents: bool = False,
        revive_below: float = 0.1,
    ) -> None:
        super().__init__(network, wavelet=wavelet)
        self.quantised_latents, self.revive_below = quantised_latents, revive_below
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        _move_codebook_to_buffers(self._codebook)

    @property
    def latent_channels(self) -> int:
        return int(self.network.embedding_dim)

    def encode(self, volume: Tensor) -> Posterior:
        """The latent of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``, as a posterior of standard deviation 0.

        Raises:
            FibldmError: an axis is not divisible by the compression.
        """
        encoded = self.network.encode(self._to_bands(volume))
        return deterministic(self._with_z(self._nearest_codes(encoded) if self.quantised_latents else encoded))

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """The volume of a latent ``(B, C, x, y, z)``, which is quantised first; no gradient goes back to the latent."""
        return self._to_volume(self.network.decode(self._nearest_codes(self._without_z(latent))))

    def forward(self, volume: Tensor, mask: Tensor | None = None, *, seeds: Tensor | None = None) -> Reconstruction:
        """Encode, quantise with a straight-through gradient, decode; in training, the codebook moves.

        Nothing is drawn, so ``seeds`` change nothing.
        """
        encoded = self.network.encode(self._to_bands(volume)).float()
        if self.training and self.revive_below:
            self._revive(encoded.detach())
        # in half precision the sums of what is assigned to a code would be rounded
        with torch.autocast(volume.device.type, enabled=False):
            codes, loss = self.network.quantize(encoded)
        decoded = self._to_volume(self.network.decode(codes))
        return Reconstruction(
            decoded, deterministic(self._with_z(encoded)), Quantisation(loss, self.network.quantizer.perplexity)
        )

    @property
    def _codebook(self) -> Any:
        return self.network.quantizer.quantizer

    @torch.no_grad()
    def _nearest_codes(self, latent: Tensor) -> Tensor:
        with torch.autocast(latent.device.type, enabled=False):
            codes: Tensor = self._codebook.embed(self._codebook.quantize(latent.float())[2])
        return codes

    @torch.no_grad()
    def _revive(self, encoded: Tensor) -> None:
        self.passes += 1
        vectors = encoded.movedim(1, -1).flatten(0, -2)
        mean_use = len(vectors) * _world_size() / self._codebook.num_embeddings
        dead = (self._codebook.ema_cluster_size < self.revive_below * mean_use).nonzero().flatten()
        if not len(dead):
            return
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(int(self.passes)))
        chosen = vectors[order[torch.arange(len(dead)) % len(order)].to(vectors.device)]
        if _world_size() > 1:
            torch.distributed.broadcast(chosen, src=0)
        self._codebook.embedding.weight[dead] = chosen
        self._codebook.ema_w[dead] = chosen * mean_use
        self._codebook.ema_cluster_size[dead] = mean_use


def _move_codebook_to_buffers(codebook: Any) -> None:
    # MONAI's is a parameter without a gradient, which an average of the trained weights leaves where it began
    embedding = codebook.embedding
    weight = embedding.weight.detach()
    del embedding.weight
    embedding.register_buffer("weight", weight)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
