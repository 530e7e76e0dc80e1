"""Tokens that came with adapters, on a network that was trained before there were any."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.token import TOKEN, TokenNames, TokenVectors
from fibldm.models.control import Control
from fibldm.models.network import ConditionedNetwork
from fibldm.models.time_vectors import time_width

if TYPE_CHECKING:
    from fibldm.models.adapters import Adapter

VECTORS = f"vectors_{TOKEN}.vectors"
"""The name of their vectors in a network that has some."""


def tokens_of(adapters: Sequence[tuple["Adapter", float]]) -> dict[str, Tensor]:
    """The vector of each token by its name, in the order of names, times the strength of its adapter.

    Raises:
        FibldmError: two adapters have tokens of one name.
    """
    pairs = [(name, strength * vector) for adapter, strength in adapters for name, vector in adapter.tokens.items()]
    if twice := sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}):
        raise FibldmError(
            f"tokens of adapters that are put on together must have names of their own; two have {', '.join(twice)}",
            "put one of them on, or learn one of them again with another token_name",
        )
    return dict(sorted(pairs))


def with_tokens(network: ConditionedNetwork, tokens: Mapping[str, Tensor]) -> ConditionedNetwork:
    """A network that knows tokens, without which it is as before.

    Args:
        network: that knows none; its parts become those of the new one.
        tokens: vectors ``(width,)`` of its time embedding, by name.

    Raises:
        FibldmError: they have another width, or the network has a table of classes of its own.
    """
    like = next(network.parameters())
    made = TokenVectors(TokenNames(tuple(tokens)), time_width(network.unet))
    widths = {name: tuple(vector.shape) for name, vector in tokens.items()}
    if set(widths.values()) != {(made.width,)}:
        raise FibldmError(
            f"tokens must have the width of the network's time embedding, {made.width}; got {widths}",
            "take the run or the bundle that was init_from of their training",
        )
    made.vectors = nn.Parameter(torch.stack([*tokens.values()]).to(like.device, like.dtype), requires_grad=False)
    parts = {route: network.parts(route) for route in network.routes}
    parts["time"] = {**parts["time"], TOKEN: made}
    controls = [cast(Control, control) for control in network.controls]
    told = ConditionedNetwork(network.unet, controls, variance=network.variance, **parts)
    told.strengths = network.strengths
    return told.train(network.training)


def has_tokens(network: nn.Module) -> bool:
    """Whether it has vectors of tokens."""
    return VECTORS in dict(network.named_parameters())
