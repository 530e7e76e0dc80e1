"""Transforms that MONAI lacks."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from fibldm import UNKNOWN_LABEL
from fibldm.volumes.grid import Grid, ModelGrid, Volume, resample


class ToModelGridd(MapTransform):
    """Bring an image and its labels to the model grid by the same map that synthesis uses.

    The image is interpolated linearly and padded with ``pad_value``; labels take the nearest voxel and are *unknown*
    (255) in the padding. ``valid`` (1 inside the field of view, 0 in the padding) is added.

    Args:
        grid: spacing and size to bring them to.
        image_key: a `MetaTensor` ``(C, X, Y, Z)``.
        label_key: a `MetaTensor` ``(1, X, Y, Z)``; a case without a mask has none.
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
        target = self.grid.training_grid(_channels(image)[0].canonical().grid)
        item[self.image_key] = _moved(image, target, "image", self.pad_value)
        item["valid"] = _moved(MetaTensor(torch.ones_like(image[:1]), meta=image.meta), target, "label", 0)
        if self.label_key in item:
            item[self.label_key] = _moved(item[self.label_key], target, "label", UNKNOWN_LABEL)
        return item


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


def _channels(tensor: MetaTensor) -> list[Volume]:
    affine = np.asarray(tensor.affine, dtype=np.float64)
    return [Volume(channel, affine) for channel in tensor.numpy()]


def _moved(tensor: MetaTensor, target: Grid, kind: Literal["image", "label"], fill: float) -> MetaTensor:
    # turned first: a voxel that lies between two others then goes to the same one in every axis order
    moved = [resample(channel.canonical(), target, kind=kind, fill=fill).array for channel in _channels(tensor)]
    return MetaTensor(torch.from_numpy(np.stack(moved)), affine=torch.from_numpy(target.affine))
