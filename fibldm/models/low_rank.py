"""Low-rank adaptation: further training that moves a network by few numbers, so that few scans do not spoil it.

Hu et al. 2022, "LoRA: low-rank adaptation of large language models", section 4.1. A weight ``W`` stays as it is and an
update of low rank is learned beside it, ``W + B A``; the weights that a stage ends with are those sums, under the names
they always had.
"""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fibldm.errors import FibldmError


class LowRankUpdate(nn.Module):
    """``W + B A``, where ``B`` begins with zeros, so that the network begins as it was.

    Args:
        shape: of the weight; all axes but the first count as one.
        rank: of the update; never more than the weight itself can have.
    """

    def __init__(self, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.empty(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum that is kept is one of float32
            return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(network: nn.Module, rank: int, patterns: Sequence[str], full: Sequence[str] = ()) -> int:
    """Train updates of low rank in place of the weights of linear and convolutional layers; all else is frozen.

    Args:
        network: changed in place; weights that are not trained stay out of it.
        rank: of the updates, at least 1.
        patterns: shell-style names of weights that get an update.
        full: shell-style names of weights that are trained as they are, such as those of new inputs.

    Returns:
        How many numbers are trained.

    Raises:
        FibldmError: the rank is less than 1, or patterns fit no weight.
    """
    if rank < 1:
        raise FibldmError(f"lora_rank must be at least 1, or 0 for none; got {rank}")
    layers = {f"{name}.weight": layer for name, layer in _layers(network) if layer.weight.requires_grad}
    chosen = {name: layer for name, layer in layers.items() if _fits(name, patterns) and not _fits(name, full)}
    if not chosen:
        raise FibldmError(
            f"lora_weights must name weights of linear or convolutional layers; {list(patterns)} fits none",
            f"they have names such as {', '.join(list(layers)[:5])}" if layers else "unfreeze some",
        )
    for name, weight in network.named_parameters():
        weight.requires_grad_(weight.requires_grad and _fits(name, full))
    for layer in chosen.values():
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight.shape, rank))
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network with its updates added in, under the names of a network without any."""
    state: dict[str, Tensor] = dict(network.state_dict())
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            before = f"{name}.parametrizations.weight."
            state = {key: value for key, value in state.items() if not key.startswith(before)}
            state[f"{name}.weight"] = layer.weight.detach()
    return state


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear | _ConvNd]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | _ConvNd):
            yield name, layer


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
