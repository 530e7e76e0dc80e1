"""The first stage: volumes to latents and back, behind one small interface."""

import math
from typing import NamedTuple

import torch
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLDownsample
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.wavelet import HaarWavelet


class Posterior(NamedTuple):
    """What the encoder knows of a latent: a diagonal Gaussian.

    Attributes:
        mean: ``(B, C, x, y, z)``.
        std: ``(B, C, x, y, z)``, standard deviation.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise`` for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise


class Quantisation(NamedTuple):
    """What a codebook says of one training pass.

    Attributes:
        loss: codebook and commitment loss, a scalar.
        perplexity: how many codes are used, a scalar; ``exp`` of the entropy of their use.
    """

    loss: Tensor
    perplexity: Tensor


class Reconstruction(NamedTuple):
    """One training pass.

    Attributes:
        volume: decoded, ``(B, C, X, Y, Z)``.
        posterior: what the latent was drawn from.
        quantisation: of an autoencoder with a codebook, else ``None``.
    """

    volume: Tensor
    posterior: Posterior
    quantisation: Quantisation | None = None


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of every voxel by itself.

    Unlike `GroupNorm`, which takes its statistics over the whole input, it says the same of a voxel in a patch, in a
    tile and in the whole volume, so a network trained on patches decodes whole volumes without a shift.

    Args:
        channels: number of channels of the input ``(B, C, X, Y, Z)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        normalised: Tensor = self.norm(features.movedim(1, -1)).movedim(-1, 1)
        return normalised


class Autoencoder(nn.Module):
    """A KL autoencoder (Rombach et al. 2022, section 3.1) on MONAI's ``AutoencoderKL``.

    Args:
        network: the encoder and decoder; with ``wavelet`` it has 8 channels in and out per channel of the volume.
        wavelet: a Haar transform before the encoder and its inverse after the decoder halve every axis once at hardly
            any cost, instead of the most expensive level of the network (Agarwal et al. 2025, Cosmos tokenizer).
        local_norm: replace every `GroupNorm` of the network by a `ChannelNorm`.
    """

    def __init__(self, network: AutoencoderKL, *, wavelet: bool = False, local_norm: bool = False) -> None:
        super().__init__()
        self.network = network
        self.wavelet = HaarWavelet() if wavelet else None
        if local_norm:
            _localise_norms(network)

    @property
    def compression(self) -> int:
        """Voxels per latent cell along each axis."""
        halvings = sum(isinstance(block, AEKLDownsample) for block in self.network.encoder.modules())
        return int(2 ** (halvings + (self.wavelet is not None)))

    @property
    def latent_channels(self) -> int:
        return int(self.network.latent_channels)

    def encode(self, volume: Tensor) -> Posterior:
        """The posterior of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``.

        Raises:
            FibldmError: an axis is not divisible by the compression.
        """
        check_divisible(tuple(volume.shape[2:]), self.compression, "autoencoder compression")
        mean, std = self.network.encode(volume if self.wavelet is None else self.wavelet(volume))
        return Posterior(mean, std)

    def decode(self, latent: Tensor) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of a latent ``(B, C, x, y, z)`` in the autoencoder's own scale."""
        volume: Tensor = self.network.decode(latent)
        return volume if self.wavelet is None else self.wavelet.inverse(volume)

    def forward(self, volume: Tensor) -> Reconstruction:
        """Encode, draw one latent, decode: the pass that is trained."""
        posterior = self.encode(volume)
        latent = posterior.sample(torch.randn_like(posterior.mean))
        return Reconstruction(self.decode(latent), posterior)


class FrozenFirstStage(nn.Module):
    """An autoencoder that later stages can only read: no gradients, always in evaluation mode.

    Args:
        autoencoder: a trained autoencoder; it is frozen in place.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @property
    def compression(self) -> int:
        return self.autoencoder.compression

    def train(self, mode: bool = True) -> "FrozenFirstStage":
        """Does nothing: a frozen stage stays in evaluation mode."""
        return self

    @torch.no_grad()
    def encode(self, volume: Tensor) -> Posterior:
        """See `Autoencoder.encode`."""
        return self.autoencoder.encode(volume)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return self.autoencoder.decode(latent)


def check_divisible(size: tuple[int, ...], divisor: int, what: str) -> None:
    """Refuse a size that is not divisible by ``divisor``, showing the arithmetic.

    Raises:
        FibldmError: names the sizes that would do.
    """
    if any(axis % divisor for axis in size):
        padded = tuple(math.ceil(axis / divisor) * divisor for axis in size)
        remainders = ", ".join(f"{axis} = {axis // divisor} x {divisor} + {axis % divisor}" for axis in size)
        raise FibldmError(
            f"volume size {size} must be divisible by {divisor} ({what}): {remainders}",
            f"pad to {padded}, for example with DivisiblePadd(k={divisor})",
        )


def _localise_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, ChannelNorm(child.num_channels))
        else:
            _localise_norms(child)
