"""A second image of the patient as a condition: of another modality (MR for CT), sequence (T1 for FLAIR) or day.

Its voxels are folded, cell by cell, into channels of the latent's size, so that nothing of it is lost and no second
autoencoder has to be trained. `image_latents` encodes it by the autoencoder of the volumes instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.errors import FibldmError, shown
from fibldm.models.autoencoder import check_divisible
from fibldm.models.conditions.condition import Case, Condition

SECOND_IMAGE = "second_image"
"""What the image is called in tables, work folders, latents and `Case.images`."""


@runtime_checkable
class OpenedScan(Protocol):
    """An image that somebody asks for, not yet on a model grid."""

    @property
    def name(self) -> str:
        """Of the file; nothing that may tell a patient."""

    @property
    def sha256(self) -> str:
        """Of its content."""

    @property
    def grid(self) -> Any:
        """Where its voxels lie, in RAS+ order."""

    def on(self, grid: Any, *, modality: str, intensity: Mapping[str, Any]) -> Tensor:
        """As `Case.images` are, on a model grid.

        Raises:
            FibldmError: it is no sound image of this modality, or does not lie there.
        """


class PlacedImage(NamedTuple):
    """An image, or none, on the model grid of one volume; its voxels are asked for when they are needed."""

    image: "ImageEncoding"
    scan: OpenedScan | None
    grid: Any

    @property
    def voxels(self) -> Tensor:
        """``(2, X, Y, Z)``, see `Case.images`."""
        if self.scan is None:
            return torch.zeros(2, *self.grid.shape)
        return self.scan.on(self.grid, modality=self.image.modality, intensity=self.image.intensity)


@dataclass(frozen=True)
class ImageEncoding(Condition):
    """The voxels of an image, each part of a latent cell a channel, and the known share of the cell as the last one.

    Where the image says nothing (outside its field of view, or there is none) all of them are 0.

    Attributes:
        compression: voxels per latent cell along each axis.
        modality: of the image, ``ct``, ``mr``, ``pt`` or ``other``.
        intensity: how it is normalised, as `fibldm.volumes.intensity.Intensity.to_dict` tells it.
    """

    compression: Sequence[int]
    modality: str
    intensity: Mapping[str, Any]

    what = "an image"
    kept_as = torch.float16  # as many numbers as the image has voxels
    of_scan = True

    @classmethod
    def fit(cls, facts: Mapping[str, Any], compression: Sequence[int]) -> "ImageEncoding":
        """As the second images of a run's latents are.

        Args:
            facts: content of ``latents.json``.
            compression: voxels per latent cell along each axis.

        Raises:
            FibldmError: the data have no second images.
        """
        about = facts.get(SECOND_IMAGE)
        if about is None:
            raise FibldmError(
                "an image as a condition needs latents of data with second images; these have none",
                f"prepare a table with the column {SECOND_IMAGE} (--second-modality), and encode it",
            )
        return cls(tuple(compression), str(about["modality"]), dict(about["intensity"]))

    @property
    def parts(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def channels(self) -> int:
        """Voxels of a cell, and one for how much of it is known."""
        return math.prod(self.compression) + 1

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (self.channels, *cells)

    def read(self, asked: Any) -> OpenedScan | None:
        if asked is None or isinstance(asked, OpenedScan):
            return asked
        raise FibldmError(f"{self.what} must be asked for by a scan; got {shown(asked)}", "give a file or a Volume")

    def place(self, value: OpenedScan | None, grid: Any) -> PlacedImage:
        placed = PlacedImage(self, value, grid)
        _ = placed.voxels  # refused before the first volume is drawn
        return placed

    def brings_grid(self, value: OpenedScan | None) -> Any:
        return None if value is None else value.grid

    def encode(self, values: Sequence[PlacedImage | Tensor]) -> Tensor:
        """``(B, channels, x, y, z)`` of images of one size, placed, or as `Case.images` are; within ``[-1, 1]``.

        Raises:
            FibldmError: an axis is not divisible by the compression, or an image is refused.
        """
        seen = torch.stack([value.voxels if isinstance(value, PlacedImage) else value for value in values]).float()
        check_divisible(seen.shape[2:], self.compression, "autoencoder compression")
        known = F.avg_pool3d(seen[:, 1:], tuple(self.compression))
        return torch.cat([self._cells(seen), known], dim=1)

    def _cells(self, seen: Tensor) -> Tensor:
        """All channels but the last, ``(B, N, x, y, z)``, of voxels and where they are known."""
        cells = seen[:, 0] * seen[:, 1]
        for axis, factor in zip((3, 2, 1), reversed(self.compression), strict=True):
            cells = cells.unflatten(axis, (-1, factor))
        return cells.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)

    def encode_case(self, case: Case) -> Tensor:
        image = case.images.get(SECOND_IMAGE)
        return self.encode([torch.zeros(2, *case.labels.shape[1:]) if image is None else image])[0]

    def own(self, known: Mapping[str, object]) -> Any:
        return known.get(SECOND_IMAGE)

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        return encoded.masked_fill_(dropped.view(-1, 1, 1, 1, 1), 0.0)

    def recorded(self, value: OpenedScan | PlacedImage | None) -> dict[str, str] | None:
        scan = value.scan if isinstance(value, PlacedImage) else value
        return None if scan is None else {"name": scan.name, "sha256": scan.sha256}

    def told(self, value: OpenedScan | PlacedImage | None) -> str:
        scan = value.scan if isinstance(value, PlacedImage) else value
        return "unknown" if scan is None else scan.name

    def facts(self) -> dict[str, Any]:
        told = {name: value for name, value in self.intensity.items() if not name.startswith("output_")}
        return {"scan": {"ct": "CT", "mr": "MR", "pt": "PET"}.get(self.modality, "image"), **told}


class ImageMixture(nn.Module):
    """A learned mixture of the channels of every cell, as `mask_encoders.MaskRescaler` makes of masks.

    Args:
        image: how images are encoded.
        channels: of the condition.

    Raises:
        FibldmError: an image is encoded in another way.
    """

    def __init__(self, image: ImageEncoding, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv3d(image.channels, channels, kernel_size=1)

    def forward(self, encoded: Tensor) -> Tensor:
        if encoded.shape[1] != self.mix.in_channels:
            raise FibldmError(
                f"this network sees an image in {self.mix.in_channels} channels of a cell; got {encoded.shape[1]}",
                "put image_latents after the configurations of both stages 2 and 3, or after neither",
            )
        return cast(Tensor, self.mix(encoded))
