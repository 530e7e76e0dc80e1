"""How well grain agrees with a key, and how likely chance does as well.

Of a volume, whatever it shows, grain is folded to ``R`` of as many numbers as the tile of a key has signs ``s``, and
``t = sum(s R)`` is compared with what other keys would give. Signs of a key that was drawn without looking at the
volume are coin flips, so that by Hoeffding 1963, "Probability inequalities for sums of bounded random variables",
theorem 2::

    P(|t| >= t_0) <= 2 exp(-t_0² / (2 sum(R²)))

for any ``R``: nothing is assumed of the volume, its noise or its correlations. As the tile is tried at every place, in
all 48 turns and mirrorings, of every channel, and at several sizes of its voxels, the bound is multiplied by the number
of all that is tried (Bonferroni). It holds of volumes that were there before the key, or made without knowledge of it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from fibldm.evaluation.recognition.folding import Sizes, folded, folded_at, ladder
from fibldm.evaluation.recognition.grain import Grain, grain
from fibldm.models.mark import PUBLIC_KEY, tile_of

SYNTHETIC = 1e-4
"""The largest p of a volume that is called synthetic: of real ones, at most one in ten thousand is."""

_LONGEST = 192  # voxels along an axis; of a larger volume, the middle is looked at
_PART = 32  # side of parts that are looked at by themselves
_NEAR = (0.85, 1.18)
_ANY = (0.6, 6.0)
_SMALLEST = np.finfo(float).tiny


@dataclass(frozen=True)
class Recognition:
    """Whether a volume has the mark of a key.

    Attributes:
        log10_p: of the bound on how likely a volume without the mark agrees as well with the key; at most 0.
        way: how it agrees best.
        sizes: voxels of the volume that a voxel of the mark measures along each axis, where it agrees best.
    """

    log10_p: float
    way: str
    sizes: Sizes

    @property
    def p(self) -> float:
        """The bound itself; 0 where it is too small for a number."""
        return 10.0**self.log10_p

    @property
    def synthetic(self) -> bool:
        """Whether that is too little for chance; otherwise no mark was found, which does not make a volume real."""
        return self.log10_p <= math.log10(SYNTHETIC)

    @property
    def described(self) -> str:
        """In words."""
        told = f"p = {self.p:.1g}" if self.p > _SMALLEST else "p < 1e-300"
        return f"synthetic ({told})" if self.synthetic else f"no mark found ({told})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"p": self.p, "log10_p": self.log10_p, "way": self.way, "voxel_of_mark": list(self.sizes)}


@dataclass(frozen=True)
class _Way:
    """Foldings that are tried together.

    Attributes:
        name: in words.
        share: of the chance of an error that all ways may have together.
        tried: sizes of the mark's voxels, and for each of the channels what is folded at these, ``(N, P, P, P)``.
    """

    name: str
    share: float
    tried: Iterable[tuple[Sizes, Grain]]


def recognise(channels: Sequence[NDArray[Any]], spacing: Sizes | None = None, key: str = PUBLIC_KEY) -> Recognition:
    """Whether a volume has the mark of a key; ways to look for it are tried until it is recognised.

    Args:
        channels: of the volume, each ``(X, Y, Z)``, in any units, order of axes and type.
        spacing: of its voxels; None where it is not known, and voxels may have any shape.
        key: public or of a site.
    """
    best = Recognition(0.0, "not at all", (1.0, 1.0, 1.0))
    tiles = _turned(key)
    for way in _ways([grain(_middle(channel)) for channel in channels], spacing or (1.0, 1.0, 1.0)):
        found = _best(way, tiles)
        best = min(best, found, key=lambda each: each.log10_p)
        if best.synthetic:
            break
    return best


def log_chance(t: float, squares: float) -> float:
    """Logarithm of the bound on the chance that coin flips give a sum as far from 0 as ``t`` either way.

    Args:
        t: ``sum(s R)``.
        squares: ``sum(R²)``.
    """
    return math.log(2) - t * t / (2 * squares) if squares > 0 else 0.0


def _ways(grains: Sequence[Grain], spacing: Sizes) -> Iterator[_Way]:
    shape = grains[0].shape
    one = (1.0, 1.0, 1.0)
    yield _Way("as it is", 1 / 2, ((one, folded(part)[None]) for part in grains))
    scaled = [(size,) * 3 for size in ladder(shape, *_NEAR)]
    yield _Way("scaled", 1 / 4, _at(grains, scaled))
    anywhere = [(size,) * 3 for size in ladder(shape, *_ANY)]
    finest = min(spacing)
    if max(spacing) > finest * 1.01:  # cubes of millimetres are none of voxels
        x, y, z = (finest / step for step in spacing)
        millimetres = [(size * x, size * y, size * z) for size in ladder(shape, *_ANY)]
        anywhere += [sizes for sizes in millimetres if min(sizes) >= _ANY[0] / 2]
    yield _Way("on another grid", 1 / 8, _at(grains, anywhere, quick=True))
    some = [axes for count in (1, 2) for axes in _subsets(count) if any(shape[axis] > 1 for axis in axes)]
    stretched = [
        tuple(size if axis in axes else 1.0 for axis in range(3))
        for axes in some
        for size in ladder(shape, *_NEAR, axes=axes)
    ]
    yield _Way("scaled along some axes", 1 / 16, _at(grains, stretched))
    yield _Way("in a part", 1 / 16, ((one, np.stack([folded(part) for part in _parts(each)])) for each in grains))


def _at(grains: Sequence[Grain], tried: Sequence[Any], *, quick: bool = False) -> Iterator[tuple[Sizes, Grain]]:
    return ((sizes, folded_at(part, sizes, quick=quick)) for sizes in tried for part in grains)


def _best(way: _Way, tiles: NDArray[np.complex64]) -> Recognition:
    """Of all that is tried in one way."""
    best, sizes, tries = 0.0, (1.0, 1.0, 1.0), 0
    for at, batch in way.tried:
        for one in batch:
            chance = _least_chance(one, tiles)
            tries += len(tiles) * one.size
            if chance < best:
                best, sizes = chance, at
    log_p = best + math.log(max(tries, 1) / way.share)
    return Recognition(min(log_p / math.log(10), 0.0), way.name, sizes)


def _least_chance(values: Grain, tiles: NDArray[np.complex64]) -> float:
    """The least of `log_chance` over all places and turns of a tile on folded grain."""
    sums = fft.irfftn(fft.rfftn(values)[None] * tiles, s=values.shape, axes=(1, 2, 3))
    return log_chance(float(np.abs(sums).max()), float(np.square(values, dtype=np.float64).sum()))


@lru_cache(maxsize=4)
def _turned(key: str) -> NDArray[np.complex64]:
    """The conjugate transform of a key's tile in all turns and mirrorings, ``(48, P, P, P // 2 + 1)``."""
    tile = tile_of(key).astype(np.float32)
    turned = [
        np.flip(tile.transpose(order), tuple(axis for axis in range(3) if mirrored[axis]))
        for order in permutations(range(3))
        for mirrored in product((False, True), repeat=3)
    ]
    return np.conj(fft.rfftn(np.stack(turned), axes=(1, 2, 3))).astype(np.complex64)


def _subsets(count: int) -> list[tuple[int, ...]]:
    return [(axis,) for axis in range(3)] if count == 1 else [(0, 1), (0, 2), (1, 2)]


def _middle(volume: NDArray[Any]) -> NDArray[np.float32]:
    start = [max(length - _LONGEST, 0) // 2 for length in volume.shape]
    return volume[tuple(slice(first, first + _LONGEST) for first in start)].astype(np.float32)


def _parts(grain: Grain) -> list[Grain]:
    """Overlapping cubes; the volume itself where it is no larger."""
    starts = [range(0, max(length - _PART, 0) + 1, _PART // 2) for length in grain.shape]
    return [grain[tuple(slice(first, first + _PART) for first in place)] for place in product(*starts)]
