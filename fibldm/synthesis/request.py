"""What is asked of a synthesizer, and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fibldm.errors import FibldmError
from fibldm.files import hash_value
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.interchange import to_sitk, to_torchio

if TYPE_CHECKING:
    import SimpleITK
    import torchio

UNCONDITIONAL = "unconditional"
"""The name of volumes that no mask was given for."""


@dataclass(frozen=True)
class SynthesisRequest:
    """One volume to make.

    Attributes:
        mask: integer labels ``(X, Y, Z)`` in any axis order; None asks for nothing: any volume, on the model grid.
        name: of the mask; with the seed and ``number`` it decides the noise.
        number: which of the volumes of this mask.
        conditions: what is asked beside the mask, by condition, such as ``{"covariates": {"age": 63}}``; all else is
            unknown.
    """

    mask: Volume | None
    name: str = "mask"
    number: int = 0
    conditions: Mapping[str, object] = field(default_factory=dict)

    def generator(self, seed: int) -> torch.Generator:
        """Of all that is random about it; on the CPU, so that it is the same on any device."""
        key = hash_value((seed, self.name, self.number))
        return torch.Generator().manual_seed(int(key[:15], 16))


@dataclass(frozen=True)
class PreparedMask:
    """A request whose mask was checked and placed, once for any number of volumes; made by `Synthesizer.prepare`.

    Attributes:
        request: what was asked.
        source: its labels in RAS+ order.
        grid: the model grid for it.
        asked: what is asked beside the mask, by the names of the conditions, as read and placed on the model grid.
        outside: what of them lies outside what the training data covered, in words.
    """

    request: SynthesisRequest
    source: Volume
    grid: Grid
    asked: dict[str, Any]
    outside: list[str]

    def numbered(self, number: int) -> "PreparedMask":
        """The same for another of the volumes of this mask."""
        return replace(self, request=replace(self.request, number=number))


@dataclass(frozen=True)
class Synthesis:
    """A synthetic volume in its units on disk, one `Volume` for each channel, and where it comes from."""

    channels: tuple[Volume, ...]
    provenance: dict[str, Any]

    @property
    def volume(self) -> Volume:
        """The volume of a run with one channel.

        Raises:
            FibldmError: the run has several.
        """
        if len(self.channels) > 1:
            raise FibldmError(f"this volume has {len(self.channels)} channels, not one", "take Synthesis.channels")
        return self.channels[0]

    def to_sitk(self) -> "SimpleITK.Image":
        """As an image of SimpleITK, of several channels with vector pixels; no header says that it is synthetic.

        Raises:
            FibldmError: the mask's axes were not at right angles.
        """
        return to_sitk(self.channels)

    def to_torchio(self) -> "torchio.ScalarImage":
        """As an image of TorchIO; no header says that it is synthetic."""
        return to_torchio(self.channels)
