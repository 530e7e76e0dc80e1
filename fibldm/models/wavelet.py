"""The Haar wavelet: eight half-size bands of a volume, and the volume again, without loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HaarWavelet(nn.Module):
    """One level of the three-dimensional Haar transform (Haar 1910); band 0 is the mean, the others are differences.

    The mean band has the range of the volume, the bands of differences keep the orthonormal scale.
    """

    kernel: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        kernel = torch.einsum("ai,bj,ck->abcijk", pair, pair, pair).reshape(8, 1, 2, 2, 2)
        scale = torch.ones(8)
        scale[0] = 8**-0.5
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, volume: Tensor) -> Tensor:
        """Bands ``(B, 8 C, X/2, Y/2, Z/2)`` of a volume ``(B, C, X, Y, Z)`` with even axes."""
        channels = volume.shape[1]
        bands = F.conv3d(volume, self.kernel.repeat(channels, 1, 1, 1, 1), stride=2, groups=channels)
        return bands * self.scale.repeat(channels).view(-1, 1, 1, 1)

    def inverse(self, bands: Tensor) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of bands ``(B, 8 C, X/2, Y/2, Z/2)``."""
        channels = bands.shape[1] // 8
        unscaled = bands / self.scale.repeat(channels).view(-1, 1, 1, 1)
        return F.conv_transpose3d(unscaled, self.kernel.repeat(channels, 1, 1, 1, 1), stride=2, groups=channels)
