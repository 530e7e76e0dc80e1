"""MONAI's diffusion UNet without its most expensive convolutions."""

from typing import Any

from monai.networks.blocks import UpSample
from monai.networks.nets import DiffusionModelUNet


class LeanUNet(DiffusionModelUNet):
    """`DiffusionModelUNet` whose convolutions after upsampling have kernel size 1 instead of 3.

    The blocks after them look at neighbours anyway; at the finest level of a small network that convolution is a fifth
    of all the arithmetic. Everything else, names included, is MONAI's.

    Args:
        settings: of `monai.networks.nets.DiffusionModelUNet`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for block in self.up_blocks:
            for upsampling in (part for part in block.modules() if isinstance(part, UpSample)):
                after: Any = upsampling.postconv
                after.conv = type(after.conv)(after.conv.in_channels, after.conv.out_channels, kernel_size=1)
