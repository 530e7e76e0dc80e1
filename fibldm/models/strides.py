"""How much an encoder shrinks each axis, and networks that shrink the axes differently."""

import math
from collections.abc import Sequence
from typing import Any

from monai.networks.blocks import Upsample
from monai.networks.nets.autoencoderkl import AEKLDownsample
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fibldm.errors import FibldmError


def total_stride(encoder: nn.Module) -> tuple[int, ...]:
    """Voxels per latent cell along each axis: the product of the strides of the encoder's convolutions.

    Args:
        encoder: a chain of blocks, whose side ways have no stride, as in every autoencoder of MONAI.
    """
    strides = [layer.stride for layer in encoder.modules() if isinstance(layer, _ConvNd)]
    return tuple(math.prod(along) for along in zip(*strides, strict=True))


def set_strides(network: Any, strides: Sequence[Sequence[int]]) -> None:
    """Let the levels of MONAI's ``AutoencoderKL`` or ``SPADEAutoencoderKL`` halve some axes only.

    Thick slices need it: where they lie 5 mm apart with pixels of 0.7 mm, the plane is compressed first. The weights
    keep their names and shapes; with all strides at 2 it is MONAI's network to the bit.

    Args:
        network: changed in place.
        strides: for each halving, outermost first, 2 (halve) or 1 (keep) along each axis ``X Y Z``.

    Raises:
        FibldmError: the network's levels are not MONAI's, or there is not one stride per halving and axis.
    """
    down = [block for block in network.encoder.modules() if isinstance(block, AEKLDownsample)]
    up = [block for block in network.decoder.modules() if isinstance(block, Upsample)]
    if not down or len(down) != len(up) or not all(hasattr(block, "upsample_non_trainable") for block in up):
        raise FibldmError(
            "strides per axis need the levels of MONAI's AutoencoderKL without use_convtranspose; "
            f"got {type(network).__module__}.{type(network).__name__}",
            "leave strides out, or use monai.networks.nets.AutoencoderKL",
        )
    axes = len(total_stride(network.encoder))
    if len(strides) != len(down) or any(len(stride) != axes or not {*stride} <= {1, 2} for stride in strides):
        raise FibldmError(
            f"strides must be {len(down)} lists (levels but the last) of {axes} numbers (axes), each 1 or 2; "
            f"got {[list(stride) for stride in strides]}",
            "change network_def::strides or the number of autoencoder_channels",
        )
    for halving, doubling, stride in zip(down, reversed(up), strides, strict=True):
        _set_stride(halving, doubling, stride)


def _set_stride(halving: Any, doubling: Any, stride: Sequence[int]) -> None:
    halving.conv.conv.stride = tuple(stride)
    # F.pad takes the last axis first
    halving.pad.pad = tuple(side for step in reversed(stride) for side in ((0, 1) if step == 2 else (1, 1)))
    doubling.upsample_non_trainable.scale_factor = tuple(float(step) for step in stride)
