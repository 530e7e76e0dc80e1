"""Shares of processes that need not know each other, as tasks of an array: a folder that all of them see is enough."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fibldm.errors import FibldmError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Shard:
    """The share of one process: every ``ranks``-th part, beginning at ``rank``.

    Raises:
        FibldmError: the rank is none of them.
    """

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise FibldmError(
                f"the rank of a process must be from 0 to one less than their number; "
                f"got RANK={self.rank}, WORLD_SIZE={self.ranks}",
                "start them by torchrun, or set RANK and WORLD_SIZE for each",
            )

    @classmethod
    def from_environment(cls) -> "Shard":
        """The share that torchrun's ``RANK`` and ``WORLD_SIZE`` say; everything where they are not set.

        Raises:
            FibldmError: they are no whole numbers, or do not fit each other.
        """
        given = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        if not all(text.isdecimal() for text in given):
            raise FibldmError(
                f"RANK and WORLD_SIZE must be whole numbers; got {given[0]!r} and {given[1]!r}",
                "start the processes by torchrun, or unset both for a single one",
            )
        return cls(int(given[0]), int(given[1]))

    @property
    def local(self) -> int:
        """Rank among the processes of this machine, as torchrun says it; 0 where it says none."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def suffix(self) -> str:
        """What tells the files of this process from those of the others; nothing for the first."""
        return "" if self.is_first else f".part-{self.rank}"

    def take(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of this process, in their order."""
        return list(parts[self.rank :: self.ranks])
