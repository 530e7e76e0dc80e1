"""Randomness keyed by (seed, epoch, case, view): the same draw in any order, batch, worker or rank, after a resume."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ignite.distributed as idist
import numpy as np
from monai.data import CacheDataset
from monai.transforms import Randomizable
from torch.utils.data import Sampler

from fibldm.errors import FibldmError

Item = TypeVar("Item", bound=Mapping[str, Any])


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


def take_subset(items: Sequence[Item], share: float) -> list[Item]:
    """The cases of a share of the patients, for a quick try; a larger share holds all of a smaller one.

    Args:
        items: with "case" and "subject"; their order is kept.
        share: of the patients, in (0, 1]; rounded up to whole patients, chosen by a hash of the name of their first
            case: that of a patient has another salt in every preparation of a dataset.

    Raises:
        FibldmError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise FibldmError(f"subset must be a share above 0 and at most 1; got {share}", "1.0 takes all cases")
    first: dict[str, str] = {}
    for item in sorted(items, key=lambda item: str(item["case"])):
        first.setdefault(str(item["subject"]), str(item["case"]))
    by_hash = sorted(first, key=lambda patient: hashlib.sha256(first[patient].encode()).digest())
    # as a decimal a share has few digits; its product has rounding errors, which must not add a patient
    chosen = set(by_hash[: math.ceil(round(share * len(first), 6))])
    return [item for item in items if str(item["subject"]) in chosen]


class EpochSampler(Sampler[Draw]):
    """Every view of every case once an epoch, in an order that depends on seed and epoch alone.

    Of several ranks each takes every world-th draw, so that the batches of all ranks together are those of one process.
    In training the order is filled up from its beginning until all ranks have as many draws. In validation nothing
    is seen twice, unless there are fewer draws than ranks: then every rank sees all of them.

    Args:
        length: number of cases.
        seed: seed of the run.
        views: draws of every case in one epoch.
        shuffle: False keeps the order and draws the same in every epoch, as validation needs it.
        repeats: passes after which the same seeds come again, in another order; None always has new ones.

    Raises:
        FibldmError: ``repeats`` is no whole number of at least 1.
    """

    def __init__(
        self, length: int, *, seed: int, views: int = 1, shuffle: bool = True, repeats: int | None = None
    ) -> None:
        if repeats is not None and (isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1):
            raise FibldmError(
                f"seeds repeat after a whole number of passes, at least 1; got {repeats!r}", "null never repeats them"
            )
        self.length, self.seed, self.views, self.shuffle = length, seed, views, shuffle
        self.repeats = repeats
        self.epoch = 0
        self.draws: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws come next."""
        self.epoch = epoch

    def cut(self, draws: int) -> None:
        """Let an epoch be less than a pass through the data: so many draws of this rank.

        Epochs, from 1, then follow each other through pass after pass, whose orders and seeds are those of whole
        epochs: every view of every case still comes once a pass, and what an epoch holds depends on its number alone.

        Args:
            draws: of a rank in an epoch, at least 1; of training only.
        """
        self.draws = draws

    def __len__(self) -> int:
        return self._pass_length if self.draws is None else self.draws

    def __iter__(self) -> Iterator[Draw]:
        if self.draws is None:
            yield from self._pass(self.epoch if self.shuffle else 0)
            return
        passes, skipped = divmod((self.epoch - 1) * self.draws, self._pass_length)
        left = self.draws
        while left:
            passes += 1
            drawn = list(self._pass(passes, skipped, skipped + left))
            yield from drawn
            left, skipped = left - len(drawn), 0

    @property
    def _pass_length(self) -> int:
        return len(self._of_rank(np.arange(self.length * self.views)))

    def _pass(self, number: int, first: int = 0, end: int | None = None) -> Iterator[Draw]:
        order = np.arange(self.length * self.views)
        if self.shuffle:
            np.random.default_rng([self.seed, number]).shuffle(order)
        seeds = number if self.repeats is None else number % self.repeats
        for position in self._of_rank(order)[first:end]:
            index, view = divmod(int(position), self.views)
            yield Draw(index, view, key_seed(self.seed, seeds, index, view))

    def _of_rank(self, order: np.ndarray) -> np.ndarray:
        rank, ranks = idist.get_rank(), idist.get_world_size()
        if self.shuffle:
            order = np.resize(order, math.ceil(len(order) / ranks) * ranks)
        return order[rank::ranks] if len(order) >= ranks else order


class KeyedDataset(CacheDataset):
    """MONAI's `CacheDataset` read by `Draw`: random transforms follow the draw's seed.

    An item also holds ``seed`` and ``view``, from which the batch draws its noise and times.
    """

    def __getitem__(self, draw: Draw) -> dict[str, Any]:  # type: ignore[override]
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=draw.seed)
        item: dict[str, Any] = dict(self._transform(draw.index))
        return {**item, "seed": draw.seed, "view": draw.view}
