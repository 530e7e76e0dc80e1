"""Low-rank adaptation: further training that moves a network by few numbers, so that few scans do not spoil it.

Hu et al. 2022, "LoRA: low-rank adaptation of large language models", section 4.1. A weight ``W`` stays as it is and an
update of low rank is learned beside it, ``W + alpha / rank B A``; the weights that a stage ends with are those sums,
under the names they always had. `fibldm.models.adapters` keeps the updates apart as well.

The kernel of a convolution, ``(out, in, k, k, k)`` in three dimensions, is taken as the matrix of its output channels
and everything that one of them sees, ``(out, in k^3)``. So ``A`` is a convolution with the kernel's own size to
``rank`` channels and ``B`` one of 1 x 1 x 1 back: LoCon of Yeh et al. 2024, "Navigating text-to-image customization:
from LyCORIS fine-tuning to model evaluation", and what Hugging Face's PEFT does for convolutions. Hu et al.'s own
code, loralib, folds the kernel's axes into both matrices instead and has ``rank k`` in place of ``rank``.
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
_FACTORS = (".lora_a", ".lora_b")
_PARTS = re.compile(r"\.parametrizations\.weight\.(original|0\.lora_[ab])$")


class LowRankUpdate(nn.Module):
    """``W + scale B A``, where ``B`` begins with zeros, so that the network begins as it was.

    Args:
        shape: of the weight; all axes but the first count as one.
        rank: of the update; never more than the weight itself can have.
        scale: of the update.
    """

    def __init__(self, shape: Sequence[int], rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(rank, rows, columns)
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return moved(weight, self.lora_a, self.lora_b, self.scale)


def moved(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``W + scale B A`` in the precision of the weight."""
    with torch.autocast(weight.device.type, enabled=False):  # the sum that is kept is one of float32
        update = (lora_b @ lora_a).view_as(weight)
        return weight + (update if scale == 1 else scale * update)


def scale_of(rank: int, alpha: float | None) -> float:
    """``alpha / rank`` (Hu et al. 2022, section 4.1), by which another rank needs no other learning rate.

    Args:
        rank: of the updates, as it was asked for.
        alpha: None is the rank, which scales nothing.

    Raises:
        FibldmError: alpha is no number above 0.
    """
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise FibldmError(
            f"lora_alpha must be a number above 0; got {alpha!r}", "null is the rank, which scales nothing"
        )
    return alpha / rank


def add_low_rank(
    network: nn.Module, rank: int, patterns: Sequence[str], full: Sequence[str] = (), *, alpha: float | None = None
) -> int:
    """Train updates of low rank in place of the weights of linear and convolutional layers; all else is frozen.

    Args:
        network: changed in place; weights that are not trained stay out of it.
        rank: of the updates, at least 1.
        patterns: shell-style names of weights that get an update.
        full: shell-style names of weights that are trained as they are, such as those of new inputs.
        alpha: see `scale_of`.

    Returns:
        How many numbers are trained.

    Raises:
        FibldmError: the rank is no whole number of at least 1, alpha no number above 0, or a pattern fits no weight.
    """
    if not isinstance(rank, int) or rank < 1:
        raise FibldmError(f"lora_rank must be a whole number of at least 1, or 0 for none; got {rank!r}")
    scale = scale_of(rank, alpha)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    require_fits("lora_full", full, trained)
    layers = {name: layer for name, layer in _layers(network) if name in trained and not fits(name, full)}
    require_fits("lora_weights", patterns, layers, "weights of linear or convolutional layers")
    for name, weight in trained.items():
        weight.requires_grad_(fits(name, full))
    for name, layer in layers.items():
        if fits(name, patterns):
            parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight.shape, rank, scale))
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def train_only(network: nn.Module, names: Sequence[str]) -> int:
    """Train some weights as they are and freeze all others; how many numbers are trained."""
    for name, weight in network.named_parameters():
        weight.requires_grad_(weight.requires_grad and name in names)
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network with its updates added in, on the CPU, under the names of a network without any.

    They are added there wherever the network is, as they are where they are put on its base again.
    """
    state = base_state(network)
    for name, update in _updates(network):
        state[name] = moved(state[name], update.lora_a.detach().cpu(), update.lora_b.detach().cpu(), update.scale)
    return state


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The same without its updates."""
    state = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    names = {name: plain_name(name) for name in state if not name.endswith(_FACTORS)}
    return {plain: state[name] for name, plain in names.items()}


def updates_of(network: nn.Module) -> dict[str, Tensor]:
    """``A`` and ``B`` of every update, as ``<layer>.lora_a`` and ``<layer>.lora_b``, on the CPU."""
    return {
        f"{name.removesuffix('weight')}{part}": getattr(update, part).detach().cpu().clone()
        for name, update in _updates(network)
        for part in ("lora_a", "lora_b")
    }


def _updates(network: nn.Module) -> Iterator[tuple[str, LowRankUpdate]]:
    """By the plain names of the weights."""
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            yield plain_name(f"{name}.weight"), layer.parametrizations.weight[0]  # type: ignore[union-attr,index]


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
