"""Encoding and decoding tile by tile: volumes of any size in bounded memory, without seams.

How a network allows it is measured and not assumed:

* Convolutions are local. A tile with as much around it as the network sees (`locality.halo`) says the same as the
  whole; what is around is cropped.
* `GroupNorm` and `InstanceNorm` look at everything. Their statistics are gathered over all tiles first, one norm after
  the other (`locality.SharedNorm`), each at the cost of a pass up to it; what is left is local.
* Attention looks at everything, too: in tiles it sees less than in the whole. Overlapping tiles are blended.

A *cell* is a voxel of the latent, see `tiles`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage, Posterior, check_divisible
from fibldm.models.receptive_field import Call, SharedNorm, Source, StatisticsMissing, halo, scaled, with_shared_norms
from fibldm.models.tiles import Tile, plan_tiles
from fibldm.progress import bar

FirstStage = Autoencoder | FrozenFirstStage

MAX_VOXELS = 128**3

_BLENDED_CELLS = 4


@torch.no_grad()
def tiled_decode(
    first_stage: FirstStage,
    latent: Tensor,
    *,
    mask: Tensor | None = None,
    max_voxels: int = MAX_VOXELS,
    out: Tensor | None = None,
) -> Tensor:
    """The volume of a latent, as ``first_stage.decode``, with no more memory than tiles of ``max_voxels`` need.

    Args:
        first_stage: the autoencoder, on any device.
        latent: ``(B, C, x, y, z)`` in the autoencoder's own scale, on any device.
        mask: ``(B, L + 1, X, Y, Z)`` for a first stage with ``needs_mask``, see `Autoencoder.decode`.
        max_voxels: of the volume, to be decoded at once; a volume that has no more is decoded whole.
        out: gets the volume ``(B, C, X, Y, Z)``, for example one over a `numpy.memmap`; None makes one on the CPU.

    Returns:
        ``out``, or float32 on the CPU.

    Raises:
        FibldmError: ``max_voxels`` is too small for a tile of this network, or ``out`` has another shape.
    """
    grain = first_stage.compression
    sources = [Source(latent, (1,) * len(grain)), *([] if mask is None else [Source(mask, grain)])]
    job = _Job(first_stage, lambda network, *parts: (network.decode(*parts),), sources, grain)
    return job.run(max_voxels, [out], "decode")[0]


@torch.no_grad()
def tiled_encode(
    first_stage: FirstStage, volume: Tensor, *, max_voxels: int = MAX_VOXELS, out: Posterior | None = None
) -> Posterior:
    """The posterior of a volume, as ``first_stage.encode``, with no more memory than tiles of ``max_voxels`` need.

    Args:
        first_stage: the autoencoder, on any device.
        volume: ``(B, C, X, Y, Z)`` in ``[-1, 1]``, on any device, for example one over a `numpy.memmap`.
        max_voxels: to be encoded at once; a volume that has no more is encoded whole.
        out: gets mean and standard deviation, each ``(B, C, x, y, z)``; None makes them on the CPU.

    Returns:
        ``out``, or float32 on the CPU.

    Raises:
        FibldmError: an axis is not divisible by the compression, ``max_voxels`` is too small for a tile of this
            network, or ``out`` has another shape.
    """
    grain = first_stage.compression
    check_divisible(tuple(volume.shape[2:]), grain, "autoencoder compression")
    sources = [Source(volume, grain)]
    job = _Job(first_stage, lambda network, part: tuple(network.encode(part)), sources, (1,) * len(grain))
    return Posterior(*job.run(max_voxels, list(out or (None, None)), "encode"))


@dataclass(frozen=True)
class _Job:
    """What is called on what, and voxels per cell of its results."""

    network: FirstStage
    call: Call
    sources: Sequence[Source]
    result_grain: tuple[int, ...]
    norms: tuple[SharedNorm, ...] = ()

    def run(self, max_voxels: int, outs: Sequence[Tensor | None], name: str) -> list[Tensor]:
        """The results, in ``outs`` where given; whole, or tile by tile with a progress bar."""
        cells = self.sources[0].cells
        max_cells = max_voxels // max(math.prod(self.sources[0].grain), math.prod(self.result_grain))
        whole = tuple(slice(0, length) for length in cells)
        if math.prod(cells) <= max_cells:
            return self._results([Tile(whole, whole)], cells, outs, blend=False, done=lambda: None)
        network, norms = with_shared_norms(self.network)
        reach, passes = self._probe(network)
        # a network that attends along one axis is blended along all: no result of it is exact
        blend = None in reach
        sides = [_BLENDED_CELLS if blend else side or 0 for side in reach]
        tiles = plan_tiles(cells, sides, max_cells, smallest=[2 * _BLENDED_CELLS if blend else 1] * len(cells))
        job = replace(self, network=network, norms=tuple(norms))
        with bar() as progress:
            task = progress.add_task(name, total=passes * len(tiles))
            for _ in range(passes - 1):
                job._add_statistics(tiles, done=lambda: progress.advance(task))
            return job._results(tiles, cells, outs, blend=blend, done=lambda: progress.advance(task))

    def _probe(self, network: FirstStage) -> tuple[tuple[int | None, ...], int]:
        """How far the network sees, and passes over the tiles: one for each norm it calls, and the last."""
        probe = copy.deepcopy(network).cpu()
        reach = halo(probe, self.call, self.sources)
        return reach, 1 + sum(isinstance(module, SharedNorm) and module.called for module in probe.modules())

    def _on(self, tile: Tile) -> tuple[Tensor, ...]:
        for norm in self.norms:
            norm.inside, norm.cells = tile.inside, tuple(part.stop - part.start for part in tile.read)
        own = next(self.network.parameters(), None)
        device = self.sources[0].values.device if own is None else own.device
        parts = (source.values[:, :, *scaled(tile.read, source.grain)].to(device) for source in self.sources)
        return self.call(self.network, *parts)

    def _add_statistics(self, tiles: Sequence[Tile], *, done: Callable[[], None]) -> None:
        for tile in tiles:
            with suppress(StatisticsMissing):
                self._on(tile)
            done()
        for norm in self.norms:
            norm.finish()

    def _results(
        self,
        tiles: Sequence[Tile],
        cells: tuple[int, ...],
        outs: Sequence[Tensor | None],
        *,
        blend: bool,
        done: Callable[[], None],
    ) -> list[Tensor]:
        size = [count * grain for count, grain in zip(cells, self.result_grain, strict=True)]
        results: list[Tensor] = []
        for tile in tiles:
            parts = self._on(tile)
            if not results:
                results = [_result(out, (*part.shape[:2], *size)) for out, part in zip(outs, parts, strict=True)]
            for result, part in zip(results, parts, strict=True):
                self._write(result, part, tile, blend=blend)
            done()
        return results

    def _write(self, result: Tensor, part: Tensor, tile: Tile, *, blend: bool) -> None:
        if blend:
            result[:, :, *scaled(tile.read, self.result_grain)] += part.to(result) * tile.weights(self.result_grain)
        else:
            core = part[:, :, *scaled(tile.inside, self.result_grain)]
            result[:, :, *scaled(tile.core, self.result_grain)] = core.to(result)


def _per_axis(compression: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Voxels per cell along each axis; one number counts for all."""
    return (compression,) * axes if isinstance(compression, int) else tuple(compression)


def _result(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return torch.zeros(shape)
    if tuple(out.shape) != shape:
        raise FibldmError(f"out must have the shape of the result, {shape}; it has {tuple(out.shape)}")
    return out.zero_()
