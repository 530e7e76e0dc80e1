"""The grid of a latent cut into tiles.

A *cell* is a voxel of the latent. Tiles begin and end on cells; their slices are in cells, in the axis order of the
tensors, ends excluded.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fibldm.errors import FibldmError


@dataclass(frozen=True)
class Tile:
    """A part of the grid.

    Attributes:
        core: the cells it is responsible for; the cores of all tiles fill the grid once.
        read: the cells it sees: the core and its surroundings, as far as the grid goes.
    """

    core: tuple[slice, ...]
    read: tuple[slice, ...]

    @property
    def inside(self) -> tuple[slice, ...]:
        """The core within what is read."""
        pairs = zip(self.core, self.read, strict=True)
        return tuple(slice(core.start - read.start, core.stop - read.start) for core, read in pairs)

    def weights(self, grain: Sequence[int]) -> Tensor:
        """How much each voxel read counts where tiles overlap: ramps that add up to 1 over all tiles.

        Args:
            grain: voxels per cell along each axis.

        Returns:
            Float32 of the size of what is read, in voxels.
        """
        total = torch.ones(())
        for core, read, voxels in zip(self.core, self.read, grain, strict=True):
            ramps = torch.minimum(
                _ramp(read, core.start - read.start, voxels), _ramp(read, read.stop - core.stop, voxels).flip(0)
            )
            total = total[..., None] * ramps
        return total


def plan_tiles(cells: Sequence[int], halo: Sequence[int], max_cells: int, *, smallest: Sequence[int]) -> list[Tile]:
    """Tiles that read at most ``max_cells`` each and as little as possible together.

    Args:
        cells: size of the grid.
        halo: cells that a tile reads on each side of its core.
        max_cells: that a tile may read, its surroundings included.
        smallest: core of a tile along each axis; where the grid is smaller, a tile spans it.

    Raises:
        FibldmError: the smallest core with its halo is already larger; shows the arithmetic.
    """
    axes = list(zip(cells, halo, smallest, strict=True))
    fitting = []
    for counts in itertools.product(*(_counts(length, least) for length, _, least in axes)):
        sizes = [
            min(math.ceil(length / n) + 2 * side, length) for (length, side, _), n in zip(axes, counts, strict=True)
        ]
        if math.prod(sizes) <= max_cells:
            fitting.append((math.prod(sizes) * math.prod(counts), counts))
    if not fitting:
        arithmetic = " x ".join(f"min({least} + 2 x {side}, {length})" for length, side, least in axes)
        needed = math.prod(min(least + 2 * side, length) for length, side, least in axes)
        raise FibldmError(
            f"a tile must hold {arithmetic} = {needed} cells of the latent; max_voxels allows {max_cells}",
            "raise max_voxels",
        )
    _, counts = min(fitting)
    intervals = [_intervals(length, n) for length, n in zip(cells, counts, strict=True)]
    return [Tile(core, _with_halo(core, halo, cells)) for core in itertools.product(*intervals)]


def _counts(length: int, least: int) -> list[int]:
    """Numbers of parts whose size is at least ``least``; of those with the same largest part the smallest."""
    return sorted({math.ceil(length / n): n for n in range(max(1, length // least), 0, -1)}.values())


def _intervals(length: int, count: int) -> list[slice]:
    bounds = [length * n // count for n in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _with_halo(core: tuple[slice, ...], halo: Sequence[int], cells: Sequence[int]) -> tuple[slice, ...]:
    grown = zip(core, halo, cells, strict=True)
    return tuple(slice(max(0, part.start - side), min(length, part.stop + side)) for part, side, length in grown)


def _ramp(read: slice, side: int, voxels: int) -> Tensor:
    """From 0 to 1 over the ``side`` cells before the core begins and as many after."""
    places = torch.arange((read.stop - read.start) * voxels, dtype=torch.float32) + 0.5
    return (places / (2 * side * voxels)).clamp(max=1) if side else torch.ones_like(places)
