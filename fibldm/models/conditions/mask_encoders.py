"""What a network sees of an encoded mask: modules from `MaskEncoding`'s channels to the channels of a condition.

All take ``(B, mask.channels, x, y, z)`` and give ``(B, channels, x, y, z)`` of the same size. Those with weights are
trained with the network they belong to, and are averaged and saved with it.
"""

import math

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.mask import MaskEncoding


class AsEncoded(nn.Module):
    """The encoded mask as it is: one-hot fractions, and the feature where there is one."""

    def __init__(self, mask: MaskEncoding) -> None:
        super().__init__()
        self.channels = mask.channels

    def forward(self, encoded: Tensor) -> Tensor:
        return encoded


class FeatureOnly(nn.Module):
    """The mask's feature (signed distance or contour) and *unknown*, without the fractions of the labels.

    Raises:
        FibldmError: the mask is encoded without a feature.
    """

    def __init__(self, mask: MaskEncoding) -> None:
        super().__init__()
        if mask.feature is None:
            raise FibldmError("FeatureOnly needs a mask with a feature; it has none", "set mask_feature")
        self.start = mask.known_channels - math.prod(mask.pieces)
        self.channels = mask.channels - self.start

    def forward(self, encoded: Tensor) -> Tensor:
        return encoded[:, self.start :]


class LabelValue(nn.Module):
    """One grey value for all labels, as an image of labels has it, and *unknown*; few channels for many labels.

    Labels are numbered in their order from 0 to 1. A part of a cell that two labels share looks like one between them.
    """

    values: Tensor

    def __init__(self, mask: MaskEncoding) -> None:
        super().__init__()
        self.known_channels = mask.known_channels
        self.register_buffer("values", torch.linspace(0, 1, len(mask.labels)), persistent=False)
        self.channels = 2 * math.prod(mask.pieces)

    def forward(self, encoded: Tensor) -> Tensor:
        known = encoded[:, : self.known_channels].unflatten(1, (len(self.values) + 1, -1))
        value = torch.einsum("blp...,l->bp...", known[:, :-1], self.values.to(known.dtype))
        return torch.cat([value, known[:, -1]], dim=1)


class MaskRescaler(nn.Module):
    """A learned mixture of the channels of every cell (Rombach et al. 2022, ``SpatialRescaler``): many labels in few.

    Resizing comes first, by `MaskEncoding`; this is the 1x1x1 convolution after it.

    Args:
        mask: how masks are encoded.
        channels: of the condition.
    """

    def __init__(self, mask: MaskEncoding, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv3d(mask.channels, channels, kernel_size=1)

    def forward(self, encoded: Tensor) -> Tensor:
        mixed: Tensor = self.mix(encoded)
        return mixed


class MaskConvolutions(nn.Module):
    """A small network from the parts of a cell, laid out as the finer grid they are, down to the latent's size.

    Args:
        mask: with ``detail`` a power of 2, best ``compression``; without a feature.
        channels: of the condition.
        hidden: channels in between, doubled at every halving.

    Raises:
        FibldmError: the mask's detail is no power of 2, or it has a feature.
    """

    def __init__(self, mask: MaskEncoding, channels: int, hidden: int = 16) -> None:
        super().__init__()
        levels = int(math.log2(mask.detail))
        if 2**levels != mask.detail or mask.feature is not None:
            raise FibldmError(
                f"MaskConvolutions need a mask_detail that is a power of 2 and no mask_feature; got {mask.detail} "
                f"and {mask.feature}",
                "set mask_detail to the compression and mask_feature to null",
            )
        self.channels, self.groups, self.parts = channels, len(mask.labels) + 1, mask.pieces
        x, y, z = (min(part, 2) for part in mask.pieces)
        widths = [hidden * 2**level for level in range(levels + 1)]
        layers: list[nn.Module] = [nn.Conv3d(self.groups, hidden, 3, padding=1), nn.SiLU()]
        for inside, outside in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv3d(inside, outside, 3, stride=(x, y, z), padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], channels, 3, padding=1))

    def forward(self, encoded: Tensor) -> Tensor:
        cells = encoded.unflatten(1, (self.groups, *self.parts))
        fine = cells.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        condition: Tensor = self.layers(fine)
        return condition
