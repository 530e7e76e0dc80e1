"""Latents larger than those of training, sampled as one from overlapping tiles.

Attention over a larger latent costs memory that grows with the square of its cells; a tile of the training's size does
not. A network that always saw a whole body draws a part of one less well, though, see ``docs/diffusion.md``. At every
call of the sampler each tile of the training's size is looked at by itself, and what is said of the cells that tiles
share is blended (Bar-Tal et al. 2023, "MultiDiffusion", eq. 5, there for images). There is one latent with one noise,
which the sampler moves as a whole: neighbours agree as they are drawn, and nothing is stitched together afterwards.
Memory beyond that latent is that of a few tiles, whatever its size.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fibldm.models.process import Prediction
from fibldm.models.samplers import Denoise

Window = tuple[slice, ...]
"""A tile's cells along each axis of the latent, end excluded."""

OVERLAP = 0.25
"""Least share of a tile's length that it has in common with the next one."""

AT_ONCE = 4
"""Tiles in one call of the network; the same on every machine, as rounding depends on it."""


@dataclass(frozen=True)
class JointTiles:
    """Overlapping tiles of one size that cover a latent.

    Attributes:
        cells: size of the latent.
        size: of a tile, in cells.
        windows: where the tiles lie.
    """

    cells: tuple[int, ...]
    size: tuple[int, ...]
    windows: tuple[Window, ...]

    @classmethod
    def plan(cls, cells: Sequence[int], trained: Sequence[int]) -> "JointTiles | None":
        """Tiles of the size of training, evenly spread; None where the latent is of that size itself.

        Args:
            cells: size of the latent.
            trained: that of training, nowhere larger.
        """
        if tuple(cells) == tuple(trained):
            return None
        size = tuple(min(pair) for pair in zip(cells, trained, strict=True))
        axes = [_starts(length, side) for length, side in zip(cells, size, strict=True)]
        windows = [
            tuple(slice(start, start + side) for start, side in zip(place, size, strict=True))
            for place in itertools.product(*axes)
        ]
        return cls(tuple(cells), size, tuple(windows))

    def around(self, within: Callable[[Sequence[Window]], Denoise]) -> Denoise:
        """A denoiser of the whole latent from one of some of its tiles.

        Args:
            within: given windows, what is said of a batch of latents cut out there: all of the first window, then all
                of the second, and so on.
        """

        def denoise(z_t: Tensor, t: Tensor) -> Prediction:
            totals: list[Tensor | None] = [None] * len(Prediction._fields)
            weights, total = self._weights(z_t.device), torch.zeros(self.cells, device=z_t.device)
            for first in range(0, len(self.windows), AT_ONCE):
                chosen = self.windows[first : first + AT_ONCE]
                parts = torch.cat([z_t[:, :, *window] for window in chosen])
                said = within(chosen)(parts, t.repeat(len(chosen)))
                for place, value in enumerate(said):
                    if value is None:
                        continue
                    if totals[place] is None:
                        totals[place] = value.new_zeros((len(z_t), value.shape[1], *self.cells))
                    for window, part in zip(chosen, value.split(len(z_t)), strict=True):
                        totals[place][:, :, *window] += weights * part  # type: ignore[index]
                for window in chosen:
                    total[window] += weights
            z_0, *others = (None if value is None else value.div_(total) for value in totals)
            return Prediction(cast(Tensor, z_0), *others)

        return denoise

    def told(self) -> dict[str, object]:
        """For the sidecar."""
        return {"number": len(self.windows), "cells": list(self.size), "overlap": OVERLAP}

    def _weights(self, device: torch.device) -> Tensor:
        """How much each cell of a tile counts: 1 inside, less towards its faces, nowhere 0."""
        weights = torch.ones((), device=device)
        for side in self.size:
            reach = max(1, round(OVERLAP * side))
            places = torch.arange(side, dtype=torch.float32, device=device) + 0.5
            depth = (torch.minimum(places, side - places) / reach).clamp(max=1)
            weights = weights[..., None] * torch.sin(depth * math.pi / 2).square()
        return weights


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin along an axis: at both ends, evenly between, with at least `OVERLAP` in common."""
    step = max(1, side - math.ceil(OVERLAP * side))
    count = 1 + math.ceil((length - side) / step)
    return [round(place * (length - side) / max(1, count - 1)) for place in range(count)]
