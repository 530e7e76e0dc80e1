"""What makes a part of a volume look the same as the whole to a network: shared statistics, and enough around it."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

Call = Callable[..., tuple[Tensor, ...]]
"""``call(network, *inputs) -> results``, inputs and results ``(B, C, x, y, z)`` of any channels."""

_PROBE_CELLS = (32, 128)
_PROBE_WIDTH = 4


class Source(NamedTuple):
    """An input of a network.

    Attributes:
        values: ``(B, C, X, Y, Z)``.
        grain: its voxels per cell of the latent along each axis.
    """

    values: Tensor
    grain: tuple[int, ...]

    @property
    def cells(self) -> tuple[int, ...]:
        """Size in cells."""
        return _divided(self.values.shape[2:], self.grain)


class StatisticsMissing(Exception):
    """A `SharedNorm` has seen its part and added it to the statistics, without which it cannot go on."""


class SharedNorm(nn.Module):
    """A `GroupNorm` or `InstanceNorm` whose mean and variance are those of the whole, seen part by part.

    Without ``inside`` it hands on what it gets. With it, and before `finish`, it adds up what is inside and raises
    `StatisticsMissing`; afterwards it normalises.

    Args:
        norm: the norm whose place it takes.

    Attributes:
        inside: the cells of the coming part that count, each of the whole once; None before the first.
        cells: size of the coming part.
        called: whether the network has come by.
    """

    def __init__(self, norm: nn.GroupNorm | _InstanceNorm) -> None:
        super().__init__()
        self.norm = norm
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
        self.inside: tuple[slice, ...] | None = None
        self.cells: tuple[int, ...] = ()
        self.called = False
        self._sums: list[Tensor] = []
        self._statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.called = True
        if self.inside is None:
            return features
        if self._statistics is None:
            self._add(features)
            raise StatisticsMissing
        return self._normalise(features, *self._statistics)

    def finish(self) -> None:
        """Make the statistics of what was added; nothing, if nothing was."""
        if self._sums:
            number, mean, square = self._sums
            self._statistics = (mean / number, square / number - (mean / number).square())
            self._sums = []

    def _add(self, features: Tensor) -> None:
        part = features[:, :, *scaled(self.inside or (), _divided(features.shape[2:], self.cells))]
        grouped = part.float().reshape(len(part), self.groups, -1)
        variance, mean = (value.double() for value in torch.var_mean(grouped, dim=2, correction=0))
        number = torch.full_like(mean, grouped.shape[2])
        sums = [number, number * mean, number * (variance + mean.square())]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def _normalise(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        batch, channels = features.shape[:2]
        # a batch norm of batch x channels is one call that needs no copy of the features
        means, variances = (value.repeat_interleave(channels // self.groups, dim=1) for value in (mean, variance))
        weight, bias = (None if value is None else value.repeat(batch) for value in (self.norm.weight, self.norm.bias))
        flat = features.reshape(1, batch * channels, *features.shape[2:])
        means, variances = means.flatten().to(flat), variances.flatten().to(flat)
        done = F.batch_norm(flat, means, variances, weight, bias, eps=self.norm.eps)
        return done.view_as(features)


def with_shared_norms(network: nn.Module) -> tuple[Any, list[SharedNorm]]:
    """A copy of a network in which every norm over space is a `SharedNorm`, and these; itself if there is none."""
    if not any(isinstance(module, nn.GroupNorm | _InstanceNorm) for module in network.modules()):
        return network, []
    shared = copy.deepcopy(network)
    _replace(shared)
    return shared, [module for module in shared.modules() if isinstance(module, SharedNorm)]


def halo(network: nn.Module, call: Call, sources: Sequence[Source]) -> tuple[int | None, ...]:
    """How many cells around a cell have to do with its results, along each axis; None is all of them.

    One cell of random inputs is replaced, once by values that are not a number, which nothing but a codebook hides,
    and once by large ones, which a codebook does not hide; the results that change lie within the halo. Along an
    axis of one cell there is nothing around it.

    Args:
        network: on the CPU, with norms that look at no more than their place, see `SharedNorm`.
        call: what is done with it.
        sources: inputs of the kind it is done to.
    """
    return tuple(_halo_along(axis, network, call, sources) for axis in range(len(sources[0].grain)))


def scaled(part: Sequence[slice], grain: Sequence[int]) -> tuple[slice, ...]:
    """Slices in cells as slices in voxels."""
    return tuple(slice(axis.start * n, axis.stop * n) for axis, n in zip(part, grain, strict=True))


def _halo_along(axis: int, network: nn.Module, call: Call, sources: Sequence[Source]) -> int | None:
    if sources[0].cells[axis] == 1:
        return 0
    generator = torch.Generator().manual_seed(0)
    for length in _PROBE_CELLS:
        # a network in two dimensions takes no more than one slice
        cells = [1 if count == 1 else _PROBE_WIDTH for count in sources[0].cells]
        cells[axis] = length
        sizes = [[count * n for count, n in zip(cells, source.grain, strict=True)] for source in sources]
        channels = [source.values.shape[1] for source in sources]
        plain = [torch.randn(1, n, *size, generator=generator) for n, size in zip(channels, sizes, strict=True)]
        before, reach = call(network, *plain), 0
        for value in (math.nan, 1e4):
            changed = [part.clone() for part in plain]
            for part, source in zip(changed, sources, strict=True):
                part.narrow(axis + 2, length // 2 * source.grain[axis], source.grain[axis]).fill_(value)
            after = call(network, *changed)
            reach = max(reach, *(_reach(old, new, axis, length) for old, new in zip(before, after, strict=True)))
        if reach < length // 2 - 1:
            return reach
    return None


def _reach(before: Tensor, after: Tensor, axis: int, length: int) -> int:
    """The distance from the middle cell to the farthest where results differ, in cells."""
    differs = (before != after).movedim(axis + 2, 0).flatten(1).any(1)
    cells = differs.nonzero().flatten() * length // len(differs)
    return int((cells - length // 2).abs().max()) if len(cells) else 0


def _divided(size: Sequence[int], by: Sequence[int]) -> tuple[int, ...]:
    return tuple(length // n for length, n in zip(size, by, strict=True))


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm | _InstanceNorm):
            setattr(module, name, SharedNorm(child))
        else:
            _replace(child)
