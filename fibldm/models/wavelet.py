"""The Haar wavelet: bands of a volume at a fraction of its size, and the volume again, without loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HaarWavelet(nn.Module):
    """The Haar transform (Haar 1910) along every axis; band 0 is the mean, the others are differences.

    The mean band has the range of the volume, the bands of differences keep the orthonormal scale. Further levels
    transform every band again (a wavelet packet), so that all bands have the same size.

    Args:
        spatial_dims: 3 for volumes ``(B, C, X, Y, Z)`` with 8 bands per channel, 2 for slices ``(B, C, X, Y)`` with 4.
        levels: how often every axis is halved; each multiplies the number of bands by 8, of slices by 4.
    """

    kernel: Tensor
    scale: Tensor

    def __init__(self, spatial_dims: int = 3, levels: int = 1) -> None:
        super().__init__()
        self.step = 2**levels
        along = torch.ones(1, 1)
        for _ in range(levels):
            along = torch.cat([torch.kron(along, torch.tensor([[1.0, sign]])) for sign in (1.0, -1.0)]) / 2**0.5
        kernel = torch.ones(1)
        for _ in range(spatial_dims):
            kernel = torch.einsum("a...,bi->ab...i", kernel, along).flatten(0, 1)
        scale = torch.ones(len(kernel))
        scale[0] = self.step ** (-spatial_dims / 2)
        self.register_buffer("kernel", kernel[:, None], persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._convolve = {2: F.conv2d, 3: F.conv3d}[spatial_dims]
        self._convolve_transposed = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial_dims]

    @property
    def bands(self) -> int:
        """Bands per channel."""
        return len(self.kernel)

    def forward(self, volume: Tensor) -> Tensor:
        """Bands ``(B, 8 C, X/2, Y/2, Z/2)`` of a volume ``(B, C, X, Y, Z)`` with even axes, at one level."""
        kernel, scale = self._for(channels=volume.shape[1])
        return self._convolve(volume, kernel, stride=self.step, groups=volume.shape[1]) * scale

    def inverse(self, bands: Tensor) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of bands ``(B, 8 C, X/2, Y/2, Z/2)``, at one level."""
        channels = bands.shape[1] // self.bands
        kernel, scale = self._for(channels)
        return self._convolve_transposed(bands / scale, kernel, stride=self.step, groups=channels)

    def _for(self, channels: int) -> tuple[Tensor, Tensor]:
        ones = [1] * (self.kernel.ndim - 2)
        return self.kernel.repeat(channels, 1, *ones), self.scale.repeat(channels).view(-1, *ones)
