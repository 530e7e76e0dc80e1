"""Low-rank adaptation: further training that moves a network by few numbers, so that few scans do not spoil it.

Hu et al. 2022, "LoRA: low-rank adaptation of large language models", section 4.1. A weight ``W`` stays as it is and an
update of low rank is learned beside it, ``W + B A``; the weights that a stage ends with are those sums, under the names
they always had.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fibldm.errors import FibldmError

_WRAPPED = "_checkpoint_wrapped_module."  # as torch's activation checkpointing calls what is inside
_PARTS = re.compile(r"\.parametrizations\.weight\.(original|0\.lora_[ab])$")


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
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum that is kept is one of float32
            return weight + (self.lora_b @ self.lora_a).view_as(weight)


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
        FibldmError: the rank is no whole number of at least 1, or a pattern fits no weight.
    """
    if not isinstance(rank, int) or rank < 1:
        raise FibldmError(f"lora_rank must be a whole number of at least 1, or 0 for none; got {rank!r}")
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    require_fits("lora_full", full, trained)
    layers = {name: layer for name, layer in _layers(network) if name in trained and not fits(name, full)}
    require_fits("lora_weights", patterns, layers, "weights of linear or convolutional layers")
    for name, weight in trained.items():
        weight.requires_grad_(fits(name, full))
    for name, layer in layers.items():
        if fits(name, patterns):
            parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight.shape, rank))
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network with its updates added in, under the names of a network without any."""
    state: dict[str, Tensor] = dict(network.state_dict())
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            name = plain_name(name + ".")
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}parametrizations.")}
            state[f"{name}weight"] = layer.weight.detach()
    return state


def plain_name(name: str) -> str:
    """The name of a weight in a network without updates of low rank and without activation checkpointing."""
    return _PARTS.sub(".weight", name.replace(_WRAPPED, ""))


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of shell-style patterns fits the name of a weight."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_fits(key: str, patterns: Sequence[str], names: Iterable[str], what: str = "weights") -> None:
    """Make sure that every pattern of a configuration's key fits a name.

    Raises:
        FibldmError: one does not, or the patterns are a text.
    """
    names = list(names)
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise FibldmError(f"{key} must be a list of names; got {patterns!r}", "write it in brackets")
    for pattern in patterns:
        if not any(fits(name, [pattern]) for name in names):
            raise FibldmError(
                f"{key} must name {what} of the network that are trained; {pattern!r} fits none",
                f"they have names such as {', '.join(names[:5])}" if names else "unfreeze some",
            )


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear | _ConvNd]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | _ConvNd):
            yield f"{name}.weight", layer
