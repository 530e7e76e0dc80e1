"""Transforms that MONAI lacks."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from fibldm import UNKNOWN_LABEL
from fibldm.volumes.grid import ModelGrid, Volume, resample


class ToModelGridd(MapTransform):
    """Bring an image and its labels to the model grid by the same map that synthesis uses.

    The image is interpolated linearly and padded with ``pad_value``; labels take the nearest voxel and are *unknown*
    (255) in the padding. ``valid`` (1 inside the field of view, 0 in the padding) is added.

    Args:
        grid: spacing and size to bring them to.
        image_key: a `MetaTensor` ``(C, X, Y, Z)``.
        label_key: a `MetaTensor` ``(1, X, Y, Z)``; a case without one is let through.
        pad_value: of the image, in its normalised range; -1 is air in CT.
    """

    def __init__(
        self, grid: ModelGrid, *, image_key: str = "image", label_key: str = "label", pad_value: float = -1.0
    ) -> None:
        super().__init__([image_key, label_key], allow_missing_keys=True)
        self.grid, self.image_key, self.label_key, self.pad_value = grid, image_key, label_key, pad_value

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        image = item[self.image_key]
        item[self.image_key] = self._moved(image, "image", self.pad_value)
        item["valid"] = self._moved(MetaTensor(torch.ones_like(image[:1]), meta=image.meta), "label", 0)
        if self.label_key in item:
            item[self.label_key] = self._moved(item[self.label_key], "label", UNKNOWN_LABEL)
        return item

    def _moved(self, tensor: MetaTensor, kind: Any, fill: float) -> MetaTensor:
        affine = np.asarray(tensor.affine, dtype=np.float64)
        channels = [Volume(channel, affine).canonical() for channel in tensor.numpy()]
        target = self.grid.training_grid(channels[0].grid)
        moved = [resample(channel, target, kind=kind, fill=fill).array for channel in channels]
        return MetaTensor(torch.from_numpy(np.stack(moved)), affine=torch.from_numpy(target.affine))


class AsPlainTensorsd(MapTransform):
    """Drop the metadata of tensors that go into a batch; collating it costs more than training on it tells."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        plain: dict[Hashable, Any] = {}
        for key in self.key_iterator(dict(data)):
            value = data[key]
            plain[key] = value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
        return plain
