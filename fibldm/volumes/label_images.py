"""Masks in place of images: a channel for each label, for networks that draw masks."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.datalist import read_datalist

_BACKGROUND = 0


def datalist_of_masks(work: Path | str) -> dict[str, Any]:
    """The content of ``datalist.json`` whose image channels are the labels.

    Raises:
        FibldmError: the folder holds no datalist.
    """
    content = read_datalist(work)
    return content | {"channels": list(content["labels"].values())}


def channels_are_labels(facts: Mapping[str, Any]) -> bool:
    """Whether a run or a bundle was trained on masks in place of images, by its ``channels`` and ``labels``."""
    return sorted(facts.get("channels", ())) == sorted(facts["labels"].values())


def check_what_is_drawn(facts: Mapping[str, Any], where: object, *, masks: bool) -> None:
    """Refuse a generator of masks where one of volumes is wanted, or the other way round.

    Args:
        facts: of the run or bundle, see `channels_are_labels`.
        where: it lies.
        masks: whether masks are wanted.

    Raises:
        FibldmError: says what does it.
    """
    if masks and not channels_are_labels(facts):
        raise FibldmError(
            f"masks are drawn by a generator that was trained on masks; {where} draws volumes",
            "train one in a run folder of its own: --config masks --config masks_autoencoder (train autoencoder), "
            "--config masks (encode), --config masks_by_volume (train diffusion)",
        )
    if channels_are_labels(facts) and not masks:
        raise FibldmError(
            f"volumes are drawn by a generator that was trained on volumes; {where} draws masks",
            "draw them with `fibldm synthesize-masks`, and give them to a generator of volumes by --masks",
        )


class LabelsAsImaged(MapTransform):
    """Put the mask in place of the image: 1 in the channel of a voxel's label, -1 in the others.

    What lies beyond the field of view is background from here on, and counts, as a mask that is drawn from nothing has
    no field of view that it could be cut to. What is unknown inside of it has no channel, and does not count: ``valid``
    is 0. So is all of a case without a mask.

    Args:
        labels: values in the order of the channels, background among them.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__(["image", "label", "valid"], allow_missing_keys=True)
        self.labels = tuple(labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        affine, valid = item["valid"].affine, _plain(item["valid"])
        label = torch.full_like(valid, UNKNOWN_LABEL)
        if "label" in item:
            label = torch.where(valid > 0.5, _plain(item["label"]), _BACKGROUND)
            item["label"] = MetaTensor(label, affine=affine)
        item["valid"] = MetaTensor((label != UNKNOWN_LABEL).to(valid.dtype), affine=affine)
        item["image"] = MetaTensor(one_hot(label, self.labels), affine=affine)
        return item


class LabelsOfImaged(MapTransform):
    """Labels of an image as `LabelsAsImaged` makes it, after it was moved between voxels; and the image one-hot again.

    Borders stay smoother than those of labels that were moved to the nearest voxel.

    Args:
        labels: as there.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__(["image", "label", "valid"])
        self.labels = tuple(labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        label = labels_of(_plain(item["image"]), self.labels)
        item["label"] = torch.where(_plain(item["valid"]) > 0.5, label, UNKNOWN_LABEL)
        item["image"] = one_hot(item["label"], self.labels)
        return item


def one_hot(label: Tensor, labels: Sequence[int]) -> Tensor:
    """Labels ``(1, X, Y, Z)`` as ``(L, X, Y, Z)``, float32: 1 in the channel of the label, -1 in the others."""
    values = torch.tensor(labels).view(-1, 1, 1, 1)
    return (label.round().long() == values).float() * 2 - 1


def labels_of(image: Tensor, labels: Sequence[int]) -> Tensor:
    """The label of the largest channel of ``(L, X, Y, Z)``, ``(1, X, Y, Z)``; float32."""
    return torch.tensor(labels, dtype=torch.float32)[image.argmax(dim=0).cpu()][None]


def _plain(values: Tensor) -> Tensor:
    return values.as_tensor() if isinstance(values, MetaTensor) else values
