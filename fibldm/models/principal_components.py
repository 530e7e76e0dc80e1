"""The best linear autoencoder of the cells of a volume, in closed form: where training may begin."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
# Of the posterior at the start, beside latents of unit variance: training moves it, and noise of 1 would hide them.
_LOG_VARIANCE = -7.0


class PrincipalComponents(nn.Module):
    """Principal component analysis of the vectors of all cells (Hotelling 1933), as two convolutions of kernel size 1.

    Of all linear autoencoders with as few numbers per cell it loses least (Baldi & Hornik 1989).

    Args:
        spatial_dims: 3 or 2.
        bands: numbers per cell.
        components: of them that are kept, scaled to unit variance.
    """

    def __init__(self, spatial_dims: int, bands: int, components: int) -> None:
        super().__init__()
        self.encode = _CONVOLUTIONS[spatial_dims](bands, components, kernel_size=1)
        self.decode = _CONVOLUTIONS[spatial_dims](components, bands, kernel_size=1)

    @classmethod
    def beside(cls, network: Any, strides: Sequence[int]) -> "PrincipalComponents":
        """For a network whose outputs are added to theirs, and which is changed to begin as no change.

        Args:
            network: MONAI's ``AutoencoderKL`` or one with its parts.
            strides: of the network along each axis.

        Raises:
            FibldmError: the network has strides, so that a cell it sees is not one of its latent.
        """
        if any(stride != 1 for stride in strides):
            raise FibldmError(
                f"principal components need a network without strides; this one shrinks the axes by {tuple(strides)}",
                "give it one level (autoencoder_channels) and let the wavelet shrink them, or set "
                "principal_components to false",
            )
        last, mean, variance = (
            network.decoder.blocks[-1].conv,
            network.quant_conv_mu.conv,
            network.quant_conv_log_sigma.conv,
        )
        for layer in (last, mean, variance):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(variance.bias, _LOG_VARIANCE)
        return cls(len(strides), last.out_channels, int(network.latent_channels))

    @torch.no_grad()
    def fit(self, cells: Iterable[tuple[Tensor, Tensor]], scale: Tensor) -> None:
        """Take the components of largest variance.

        Args:
            cells: pairs of bands ``(B, C, x, y, z)`` and which cells count ``(B, x, y, z)``, booleans.
            scale: of every band ``(C,)``; divided by it, they are coordinates of an orthonormal basis, in which least
                is lost of the volume.

        Raises:
            FibldmError: fewer cells count than there are bands.
        """
        bands, components = self.decode.out_channels, self.encode.out_channels
        scale = scale.double().cpu()
        count, total, square = 0, torch.zeros(bands).double(), torch.zeros(bands, bands).double()
        for values, inside in cells:
            vectors = values.movedim(1, -1)[inside].double().cpu() / scale
            count, total, square = count + len(vectors), total + vectors.sum(0), square + vectors.T @ vectors
        if count < bands:
            raise FibldmError(
                f"principal components of {bands} bands need at least as many cells that count; got {count}",
                "check the training volumes, or set principal_components to false",
            )
        mean = total / count
        variances, directions = torch.linalg.eigh(square / count - mean.outer(mean))
        kept, deviations = directions.flip(1)[:, :components], variances.flip(0)[:components].clamp_min(1e-12).sqrt()
        _set(self.encode, (kept / deviations).T / scale, -(kept / deviations).T @ mean)
        _set(self.decode, kept * deviations * scale[:, None], mean * scale)


def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(bias)
