"""Stage 1 with the mask at hand, for first stages whose decoder sees it."""

from collections.abc import Sequence
from typing import Any

from monai.engines import PrepareBatch
from torch import Tensor

from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.transfer import to_device
from fibldm.training.losses import Weighted


class MaskedVolumePrepareBatch(PrepareBatch):
    """The volume is its own target, and the network gets the mask beside it: one-hot, with a channel for unknown.

    Args:
        labels: the label values of the dataset, background first.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.mask = MaskEncoding(tuple(labels), compression=1)

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Tensor], dict[str, Any]]:
        parts = (batchdata["image"], batchdata["valid"], self.mask.encode(batchdata["label"]))
        image, valid, mask = (to_device(part, device).to(device, **kwargs) for part in parts)
        return image, Weighted(image, valid), (mask,), {"seeds": batchdata["seed"]}
