"""Distance of volumes in the features of a trained network, whose weights are a local file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import ResNetFeatures, resnet_params
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.transfer import to_device
from fibldm.training.losses import Weighted


class PerceptualDistance:
    """LPIPS without its learned weights: distance of normalised features (Zhang et al. 2018, equation 1, w = 1).

    The kernels in the file decide: those of three axes (MedicalNet, Chen et al. 2019) look at whole volumes, those of
    two (RadImageNet, ImageNet) at slices along every axis. Nothing is ever downloaded. It is no `Module`, as its
    frozen weights belong to no optimizer and no checkpoint.

    Args:
        weights: state dict of a ResNet as MONAI or torchvision names its layers, with or without its classifier.
        network: "resnet10", "resnet50", ... as the file was trained; None tells it by the layers in the file.
        slices_per_axis: evenly spaced, for kernels of two axes.

    Raises:
        FibldmError: the network is unknown, there is no file, it is no state dict, or it is that of another network.
    """

    def __init__(
        self, weights: str | Path | None, *, network: str | None = "resnet10", slices_per_axis: int = 4
    ) -> None:
        if network not in (None, *resnet_params):
            raise unknown_choice("network", network, resnet_params)
        state = _read(weights)
        self.network = network or _network_of(state, weights)
        self.kernel_axes, self.channels = state["conv1.weight"].ndim - 2, state["conv1.weight"].shape[1]
        features = ResNetFeatures(
            self.network, pretrained=False, spatial_dims=self.kernel_axes, in_channels=self.channels
        )
        _check_same(state, features.state_dict(), f"{weights} must hold the weights of {self.network}")
        features.load_state_dict(state)
        self.features: Any = features.eval().requires_grad_(False)
        self.slices_per_axis = slices_per_axis

    def __call__(self, volume: Tensor, target: Weighted) -> Tensor:
        """A scalar, for volumes ``(B, C, X, Y, Z)``; where the weight is 0 they count as equal."""
        return torch.stack(self.views(volume, target)).mean()

    def views(self, volume: Tensor, target: Weighted, *, axes: Sequence[int] | None = None) -> list[Tensor]:
        """Scalars: the distance of slices across each of these spatial axes (None: all), or one of whole volumes."""
        inside = target.weight > 0
        pair = _standardised(torch.where(inside, volume, target.value), target.value, inside)
        if volume.ndim - 2 == self.kernel_axes:
            return [self._view(*pair)]
        across = range(volume.ndim - 2) if axes is None else axes
        return [self._view(*(_spaced(part, axis + 2, self.slices_per_axis) for part in pair)) for axis in across]

    def _view(self, volume: Tensor, target: Tensor) -> Tensor:
        features = self.features.to(volume.device)
        pairs = zip(features(self._channels(volume)), features(self._channels(target)), strict=True)
        return torch.stack([(_unit(ours) - _unit(theirs)).square().sum(dim=1).mean() for ours, theirs in pairs]).mean()

    def _channels(self, volume: Tensor) -> Tensor:
        """Every channel by itself, as grey: ``(B * C, channels of the network, ...)``."""
        return volume.flatten(0, 1)[:, None].expand(-1, self.channels, *volume.shape[2:])


def _read(weights: str | Path | None) -> dict[str, Tensor]:
    if weights is None or not Path(weights).is_file():
        raise FibldmError(
            f"a perceptual loss needs a local file of weights; got {weights}",
            "set perceptual_weights to that of a MedicalNet, RadImageNet or ImageNet ResNet, or perceptual_weight to 0",
        )
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        state = {name.removeprefix("module."): value for name, value in state.items() if not _is_classifier(name)}
        state["conv1.weight"]
    except Exception as error:
        raise FibldmError(
            f"{weights} must be a state dict of a ResNet; {error!r}", "check perceptual_weights"
        ) from error
    return state


def _check_same(state: Mapping[str, Tensor], own: Mapping[str, Tensor], message: str) -> None:
    names = sorted(state.keys() | own.keys())
    wrong = [name for name in names if not (name in state and name in own and state[name].shape == own[name].shape)]
    if wrong:
        raise FibldmError(f"{message}; {len(wrong)} names or shapes differ, {wrong[0]} first", "change network")


def _network_of(state: Mapping[str, Tensor], weights: str | Path | None) -> str:
    """The network whose kind and number of blocks a file has."""
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"layer{k}.")}) for k in range(1, 5)]
    block = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    for name, (kind, layers, *_) in resnet_params.items():
        if (kind, layers) == (block, blocks):
            return str(name)
    raise FibldmError(f"{weights} must hold one of {', '.join(resnet_params)}; its layers have {blocks} blocks")


def _is_classifier(name: str) -> bool:
    return name.removeprefix("module.").startswith("fc.")


def _standardised(volume: Tensor, target: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and standard deviation of the target where it counts, as these networks were trained."""
    axes = tuple(range(2, target.ndim))
    count = inside.sum(axes, keepdim=True).clamp(min=1)
    mean = (target * inside).sum(axes, keepdim=True) / count
    std = (((target - mean) * inside).square().sum(axes, keepdim=True) / count).sqrt().clamp(min=1e-3)
    return (volume - mean) / std, (target - mean) / std


def _spaced(volume: Tensor, axis: int, count: int) -> Tensor:
    """Evenly spaced slices ``(B * N, C, ...)``, each in the middle of its share of the axis."""
    length = volume.shape[axis]
    chosen = ((torch.arange(min(count, length)) + 0.5) * length / min(count, length)).long()
    return volume.movedim(axis, 1)[:, to_device(chosen, volume.device)].flatten(0, 1)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
