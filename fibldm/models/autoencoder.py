"""The first stage: volumes to latents and back, behind one small interface."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.models.principal_components import PrincipalComponents
from fibldm.models.strides import set_strides, total_stride
from fibldm.models.transfer import to_device
from fibldm.models.wavelet import HaarWavelet

_AXES = 3


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


def deterministic(latent: Tensor) -> Posterior:
    """The posterior of a latent without noise, of standard deviation 0."""
    return Posterior(latent, torch.zeros_like(latent))


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
        channels: number of channels of the input ``(B, C, ...)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        normalised: Tensor = self.norm(features.movedim(1, -1)).movedim(-1, 1)
        return normalised


class Autoencoder(nn.Module):
    """A KL autoencoder (Rombach et al. 2022, section 3.1); other first stages change what happens in between.

    Every first stage has ``encode``, ``decode``, ``forward``, ``compression``, ``latent_channels``, ``needs_mask`` and
    ``is_identity``.
    Volumes have three axes for a network in two dimensions, too: it takes slices ``(B, C, X, Y, 1)``, which it neither
    compresses nor looks beyond along Z.

    Args:
        network: MONAI's ``AutoencoderKL`` or one with its methods, such as that of monai-generative; with ``wavelet``
            it has 8 channels in and out (4 in two dimensions) per channel of the volume.
        wavelet: levels of a Haar transform before the encoder and of its inverse after the decoder, each of which
            halves every axis at hardly any cost, instead of the most expensive levels of the network (Agarwal et al.
            2025, Cosmos tokenizer); True is one, False none. With two it has 64 channels in and out (16 in two
            dimensions).
        principal_components: the network adds to a linear autoencoder of every cell, which is fitted in closed form
            before training (`principal_components`) and trained with the network; for networks without strides of their
            own.
        local_norm: replace every `GroupNorm` of the network by a `ChannelNorm`.
        strides: how far each level of the network but the last shrinks each axis, see `set_strides`; None for 2.

    Raises:
        FibldmError: the strides do not fit the network, or a network with strides is to add to principal components.
    """

    needs_mask = False
    is_identity = False

    def __init__(
        self,
        network: nn.Module,
        *,
        wavelet: bool | int = False,
        principal_components: bool = False,
        local_norm: bool = False,
        strides: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        # the autoencoders of MONAI have no base class that knows of encode and decode
        self.network: Any = network
        if strides is not None:
            set_strides(network, strides)
        self.wavelet = HaarWavelet(len(self._strides), int(wavelet)) if wavelet else None
        if local_norm:
            _localise_norms(network)
        self.linear = PrincipalComponents.beside(network, self._strides) if principal_components else None

    @property
    def compression(self) -> tuple[int, ...]:
        """Voxels per latent cell along each of three axes."""
        outer = 1 if self.wavelet is None else self.wavelet.step
        return (*(outer * stride for stride in self._strides), *(1,) * (_AXES - len(self._strides)))

    @property
    def latent_channels(self) -> int:
        return int(self.network.latent_channels)

    def encode(self, volume: Tensor) -> Posterior:
        """The posterior of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``.

        Raises:
            FibldmError: an axis is not divisible by the compression, or a network in two dimensions gets more than one
                slice.
        """
        bands = self._to_bands(volume)
        mean, std = self.network.encode(bands)
        if self.linear is not None:
            mean = mean + self.linear.encode(bands)
        return Posterior(self._with_z(mean), self._with_z(std))

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of a latent in the autoencoder's own scale.

        Args:
            latent: ``(B, C, x, y, z)``.
            mask: for a first stage with ``needs_mask``: ``(B, L + 1, X, Y, Z)``, as `MaskEncoding` with compression 1
                gives it; others do not look at it.
        """
        latent = self._without_z(latent)
        bands = self.network.decode(latent)
        return self._to_volume(bands if self.linear is None else bands + self.linear.decode(latent))

    @torch.no_grad()
    def fit(self, volumes: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit the principal components, so that training begins with the best linear autoencoder.

        Args:
            volumes: pairs of volumes ``(B, C, X, Y, Z)`` in ``[-1, 1]`` and which voxels count ``(B, 1, X, Y, Z)``.

        Raises:
            FibldmError: there are no principal components, or too few cells that count.
        """
        if self.linear is None:
            raise FibldmError("only an autoencoder with principal_components can be fitted", "set them to true")
        bands = self.linear.decode.out_channels
        scale = torch.ones(1) if self.wavelet is None else self.wavelet.scale
        cells = ((self._to_bands(volume), self._to_cells(valid)) for volume, valid in volumes)
        self.linear.fit(cells, scale.repeat(bands // len(scale)))

    def _to_cells(self, valid: Tensor) -> Tensor:
        """Which cells count, ``(B, x, y, z)`` booleans: those that more than half of the voxels of count."""
        return self._without_z(F.avg_pool3d(valid.float(), self.compression))[:, 0] > 0.5

    def forward(self, volume: Tensor, mask: Tensor | None = None, *, seeds: Tensor | None = None) -> Reconstruction:
        """Encode, draw one latent, decode: the pass that is trained.

        Args:
            volume: ``(B, C, X, Y, Z)`` in ``[-1, 1]``.
            mask: see `decode`.
            seeds: ``(B,)``, of each sample's noise, so that a batch is only a way of grouping; None draws from torch's
                own generator.
        """
        posterior = self.encode(volume)
        return Reconstruction(self.decode(posterior.sample(seeded_noise(posterior.mean, seeds)), mask), posterior)

    @property
    def _strides(self) -> tuple[int, ...]:
        return total_stride(self.network.encoder)

    def _to_bands(self, volume: Tensor) -> Tensor:
        check_divisible(tuple(volume.shape[2:]), self.compression, "autoencoder compression")
        own = self._without_z(volume)
        return own if self.wavelet is None else self.wavelet(own)

    def _to_volume(self, bands: Tensor) -> Tensor:
        return self._with_z(bands if self.wavelet is None else self.wavelet.inverse(bands))

    def _without_z(self, values: Tensor) -> Tensor:
        """``(B, C, x, y, z)`` as the network takes it."""
        return values if len(self._strides) == _AXES else single_slice(values)

    def _with_z(self, values: Tensor) -> Tensor:
        """What the network gives as ``(B, C, x, y, z)``."""
        return values if len(self._strides) == _AXES else values[..., None]


class FrozenFirstStage(nn.Module):
    """An autoencoder that later stages can only read: no gradients, always in evaluation mode.

    Args:
        autoencoder: a trained autoencoder; it is frozen in place.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @property
    def compression(self) -> tuple[int, ...]:
        """See `Autoencoder.compression`."""
        return self.autoencoder.compression

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.latent_channels

    @property
    def needs_mask(self) -> bool:
        """Whether `decode` must be given the mask."""
        return self.autoencoder.needs_mask

    @property
    def is_identity(self) -> bool:
        """Whether latents are the volumes themselves."""
        return self.autoencoder.is_identity

    def train(self, mode: bool = True) -> "FrozenFirstStage":
        """Does nothing: a frozen stage stays in evaluation mode."""
        return self

    @torch.no_grad()
    def encode(self, volume: Tensor) -> Posterior:
        """See `Autoencoder.encode`."""
        return self.autoencoder.encode(volume)

    @torch.no_grad()
    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Autoencoder.decode`."""
        return self.autoencoder.decode(latent, mask)


def check_divisible(size: Sequence[int], divisor: int | Sequence[int], what: str) -> None:
    """Refuse a size that is not divisible by ``divisor``, showing the arithmetic.

    Args:
        size: of the spatial axes.
        divisor: of every axis, or one for each.
        what: where the divisor comes from.

    Raises:
        FibldmError: names the sizes that would do.
    """
    divisors = (divisor,) * len(size) if isinstance(divisor, int) else tuple(divisor)
    pairs = list(zip(size, divisors, strict=True))
    if any(axis % by for axis, by in pairs):
        padded = tuple(math.ceil(axis / by) * by for axis, by in pairs)
        remainders = ", ".join(f"{axis} = {axis // by} x {by} + {axis % by}" for axis, by in pairs)
        shown = shown_per_axis(divisors)
        raise FibldmError(
            f"volume size {tuple(size)} must be divisible by {shown} ({what}): {remainders}",
            f"pad to {padded}, for example with DivisiblePadd(k={shown})",
        )


def single_slice(values: Tensor) -> Tensor:
    """``(B, C, x, y)`` of ``(B, C, x, y, 1)``, for networks in two dimensions.

    Raises:
        FibldmError: there is more than one slice.
    """
    if values.shape[-1] != 1:
        raise FibldmError(
            f"a network in two dimensions takes single slices (X, Y, 1); got the size {tuple(values.shape[2:])}",
            "cut volumes with `fibldm slices`, or train networks in three dimensions",
        )
    return values[..., 0]


def shown_per_axis(factors: Sequence[int]) -> str:
    """One number where all axes have the same, else all of them."""
    return str(factors[0]) if len({*factors}) == 1 else str(tuple(factors))


@torch.compiler.disable  # generators are no part of a graph
def seeded_noise(like: Tensor, seeds: Tensor | None) -> Tensor:
    """Standard normal, of the shape of ``like``, by the seed of each sample; None draws from torch's own generator."""
    if seeds is None:
        return torch.randn_like(like)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    drawn = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])
    return to_device(drawn, like.device).to(like.dtype)


def _localise_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, ChannelNorm(child.num_channels))
        else:
            _localise_norms(child)
