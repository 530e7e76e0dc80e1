"""Mask files that volumes are drawn from, each read and hashed once for all volumes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fibldm.errors import FibldmError
from fibldm.synthesis.request import UNCONDITIONAL
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import as_labels, hash_mask, mask_stem, read_mask


@dataclass(eq=False)
class MaskSource:
    """A mask file, with what was read of it.

    Attributes:
        file: a label map, or a segmentation whose segments have the names of labels.
        names: of the generator's labels by value.
    """

    file: Path
    names: Mapping[int, str]
    _labels: Volume | None = field(default=None, init=False, repr=False)
    _released: bool = field(default=False, init=False, repr=False)

    @property
    def stem(self) -> str:
        """The file name without its suffix, which names the volumes and decides their noise."""
        return mask_stem(self.file)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, or of all files of it."""
        return hash_mask(self.file)

    @property
    def labels(self) -> Volume:
        """The labels, uint8, in the axis order of the file (RAS+ of DICOM); kept until they are released.

        Raises:
            FibldmError: the file cannot be read, holds something else than labels, or is another one than before.
        """
        if self._labels is None:
            labels = self._read()
            if (hash_mask(self.file) if self._released else self.sha256) != self.sha256:
                raise FibldmError(
                    f"a mask must stay as it is while volumes are made of it; {self.file} was changed meanwhile",
                    "give the same command again, with another `out` where volumes of the mask are there already",
                )
            self._labels = labels
        return self._labels

    @property
    def nbytes(self) -> int:
        """The memory that its labels take."""
        return 0 if self._labels is None else self._labels.array.nbytes

    def expect(self, sha256: str) -> None:
        """Take it for granted what the file held when another process looked at it; it must still hold that."""
        self.__dict__["sha256"], self._released = sha256, True

    def release(self) -> None:
        """Give the labels' memory back; they are read again when they are asked for again."""
        self._released, self._labels = self._released or self._labels is not None, None

    def _read(self) -> Volume:
        mask = read_mask(self.file, self.names)
        try:
            return as_labels(mask)
        except FibldmError as error:
            raise FibldmError(f"{self.stem}: {error.message}", error.remedy) from error


@dataclass(eq=False)
class RecentMasks:
    """The masks that were used last; the others give their memory back.

    Attributes:
        limit: bytes of labels that are held; those of one mask are held in any case.
    """

    limit: int
    _masks: list[MaskSource] = field(default_factory=list, init=False, repr=False)

    def forget(self, mask: MaskSource) -> None:
        """Give up a mask whose turn is over."""
        self._masks = [other for other in self._masks if other is not mask]

    def use(self, mask: MaskSource) -> list[MaskSource]:
        """Note that a mask was used; gives those that were released for it."""
        self._masks = [*(other for other in self._masks if other is not mask), mask]
        released = []
        while len(self._masks) > 1 and sum(other.nbytes for other in self._masks) > self.limit:
            released.append(self._masks.pop(0))
            released[-1].release()
        return released


class Job(NamedTuple):
    """One volume to write.

    Attributes:
        mask: what it follows; None for a volume that follows no mask.
        number: which of the volumes of this mask.
    """

    mask: MaskSource | None
    number: int

    @property
    def name(self) -> str:
        """Of the volume, without its suffix."""
        return f"{stem_of(self.mask)}_{self.number:03d}"


def stem_of(mask: MaskSource | None) -> str:
    """The name of a mask, also of none."""
    return UNCONDITIONAL if mask is None else mask.stem


def together(jobs: Iterable[Job]) -> dict[MaskSource | None, list[int]]:
    """The numbers of the volumes of each mask."""
    numbers: dict[MaskSource | None, list[int]] = {}
    for mask, number in jobs:
        numbers.setdefault(mask, []).append(number)
    return numbers


def jobs_of(files: Iterable[Path | None], names: Mapping[int, str], count: int) -> list[Job]:
    """``count`` volumes of every mask file, None being no mask; those of one file share its `MaskSource`.

    Args:
        files: see `fibldm.volumes.masks.find_masks`.
        names: of the generator's labels by value.
        count: volumes of every mask.
    """
    masks = [None if file is None else MaskSource(file, names) for file in files]
    return [Job(mask, number) for mask in masks for number in range(count)]
