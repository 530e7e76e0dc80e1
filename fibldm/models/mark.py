"""A mark in drawn noise that is still there when another tool has saved the volume anew.

A key gives a tile of signs, as coin flips would. Signs of white noise agree with the tile, repeated in all three axes,
a little more often than not. What is changed is which of two equally likely signs a voxel has: every voxel stays normal
with variance 1, and as the tile begins at a random place with a random sign, so that no two volumes share it, mean and
covariance over volumes stay those of white noise, but for a correlation of ``(0.8 strength)²`` between voxels that lie
whole periods apart. `fibldm.evaluation.recognition` finds it again.

The tile that everybody may look for is that of `PUBLIC_KEY`. A site may have another one of its own beside it, of a key
that only it knows.
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fibldm.errors import FibldmError

PERIOD = 16
"""Voxels along each axis after which the tile repeats."""

PUBLIC_KEY = "FibLDM mark 1"
SITE_KEY = "FIBLDM_MARK_KEY"
"""The variable of the environment that holds the key of a site."""

_STRENGTH = 0.2
_SHORTEST = 16  # characters of a site's key


@dataclass(frozen=True)
class Mark:
    """What noise is marked with.

    Attributes:
        site_key: of the site, at least 16 characters; None has the public mark only. It is written nowhere.
        strength: how many voxels, in (0, 1], take the sign of the tile; of the others half have it by chance.

    Raises:
        FibldmError: the key is too short, so that it could be guessed, or the strength is out of range.
    """

    site_key: str | None = field(default=None, repr=False)
    strength: float = _STRENGTH

    def __post_init__(self) -> None:
        if self.site_key is not None and len(self.site_key) < _SHORTEST:
            raise FibldmError(
                f"the key of a site must have at least {_SHORTEST} characters; it has {len(self.site_key)}",
                f"set {SITE_KEY} to a longer one, such as `openssl rand -hex 16` gives, or unset it",
            )
        if not 0 < self.strength <= 1:
            raise FibldmError(f"the strength of a mark must lie in (0, 1]; got {self.strength}")

    @classmethod
    def from_environment(cls) -> "Mark":
        """The public mark, and that of the site where ``FIBLDM_MARK_KEY`` is set.

        Raises:
            FibldmError: the key is too short.
        """
        return cls(site_key())

    def imprint(self, white: Tensor, generator: torch.Generator) -> Tensor:
        """White noise ``(C, X, Y, Z)`` with the mark; sizes of its numbers stay, signs change.

        Args:
            white: normal, of the CPU.
            generator: of the CPU.
        """
        for key in ([] if self.site_key is None else [self.site_key]) + [PUBLIC_KEY]:
            tile = torch.from_numpy(tile_of(key)).to(white.dtype)
            pattern = torch.stack([_laid_out(tile, white.shape[1:], generator) for _ in white])
            takes = torch.rand(white.shape, generator=generator) < self.strength
            white = torch.where(takes, white.abs() * pattern, white)
        return white

    def recorded(self) -> dict[str, Any]:
        """For the sidecar."""
        own = {} if self.site_key is None else {"site_key": key_name(self.site_key)}
        return {"voxels": True, "key": PUBLIC_KEY, "strength": self.strength, **own}


def site_key() -> str | None:
    """The key in the environment; None where there is none."""
    return os.environ.get(SITE_KEY) or None


@lru_cache
def key_name(key: str) -> str:
    """What a site's key may be called: tells two keys apart, and a guess of the key costs a while to try."""
    return hashlib.scrypt(key.encode(), salt=PUBLIC_KEY.encode(), n=2**14, r=8, p=1, dklen=4).hex()


def tile_of(key: str) -> NDArray[np.int8]:
    """Signs of a key, ``(P, P, P)`` of -1 and 1: the bits of SHA-256 of the key with a counter."""
    blocks = PERIOD**3 // 256
    digests = [hashlib.sha256(f"{key}:{block}".encode()).digest() for block in range(blocks)]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), dtype=np.uint8))
    return (bits.astype(np.int8) * 2 - 1).reshape((PERIOD,) * 3)


def _laid_out(tile: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tile over ``shape``, from a random place in it and with a random sign."""
    *start, sign = torch.randint(0, PERIOD, (4,), generator=generator).tolist()
    for axis, (first, length) in enumerate(zip(start, shape, strict=True)):
        tile = tile.index_select(axis, (torch.arange(length) + first) % PERIOD)
    return tile if sign % 2 else -tile
