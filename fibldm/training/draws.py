"""Randomness keyed by (seed, epoch, case, view): the same draw in any order, batch, worker, or after a resume."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.data import CacheDataset
from monai.transforms import Randomizable
from torch.utils.data import Sampler

from fibldm.errors import FibldmError


@dataclass(frozen=True)
class Draw:
    """One training example: which case, which view of it, and the seed of all that is random about it."""

    index: int
    view: int
    seed: int


def key_seed(*key: int) -> int:
    """A 32-bit seed of a key of integers, by NumPy's `SeedSequence`.

    Raises:
        FibldmError: one of them is negative.
    """
    if min(key) < 0:
        raise FibldmError(f"seeds must be whole numbers of at least 0; got {min(key)}", "choose another seed")
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class EpochSampler(Sampler[Draw]):
    """Every view of every case once an epoch, in an order that depends on seed and epoch alone.

    Args:
        length: number of cases.
        seed: seed of the run.
        views: draws of every case in one epoch.
        shuffle: False keeps the order and draws the same in every epoch, as validation needs it.
    """

    def __init__(self, length: int, *, seed: int, views: int = 1, shuffle: bool = True) -> None:
        self.length, self.seed, self.views, self.shuffle = length, seed, views, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length * self.views

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch if self.shuffle else 0
        order = np.arange(len(self))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        for position in order:
            index, view = divmod(int(position), self.views)
            yield Draw(index, view, key_seed(self.seed, epoch, index, view))


class KeyedDataset(CacheDataset):
    """MONAI's `CacheDataset` read by `Draw`: random transforms follow the draw's seed.

    An item also holds ``seed`` and ``view``, from which the batch draws its noise and times.
    """

    def __getitem__(self, draw: Draw) -> dict[str, Any]:  # type: ignore[override]
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=draw.seed)
        item: dict[str, Any] = dict(self._transform(draw.index))
        return {**item, "seed": draw.seed, "view": draw.view}
