"""A second image of the patient as latents of the autoencoder of the volumes, in place of its voxels.

That asks little of the network, which sees the image in the terms of what it makes. What the autoencoder does not keep
of an image of another modality is lost: it never saw one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.models.conditions.image import ImageEncoding
from fibldm.models.latents import LatentSpace
from fibldm.models.tiling import tiled_encode
from fibldm.runs import StageFolder

_LOWEST = -1.0  # of normalised voxels: air of a CT, nothing of an MR


@dataclass(frozen=True)
class ImageLatents(ImageEncoding):
    """The middle of the posterior of every cell, normalised, and the known share of the cell as the last channel.

    The autoencoder is given the lowest value where the image says nothing; cells of which nothing is known are 0.

    Attributes:
        mean: of the latent space by which they are normalised, one number for each channel.
        std: the same.
    """

    mean: Sequence[float]
    std: Sequence[float]
    _opened: Callable[[], FrozenFirstStage] | None = field(init=False, repr=False, compare=False, default=None)

    kept_as = torch.float32

    @classmethod
    def fit(
        cls,
        facts: Mapping[str, Any],
        compression: Sequence[int],
        run_dir: str | Path = "",
        device: str | torch.device = "cpu",
    ) -> "ImageLatents":
        """By the autoencoder of a run, which is opened when the first image is encoded.

        Args:
            facts: content of ``latents.json``.
            compression: voxels per latent cell along each axis.
            run_dir: the run folder.
            device: to encode on.

        Raises:
            FibldmError: the data have no second images, or the autoencoder takes several channels.
        """
        image = ImageEncoding.fit(facts, compression)
        channels = list(facts.get("channels", ["image"]))
        if len(channels) != 1:
            raise FibldmError(
                "latents of a second image, which has one channel, need an autoencoder of one channel; that of this "
                f"run takes {', '.join(channels)}",
                "leave image_latents out, for an image that is seen as voxels",
            )
        space = LatentSpace.from_dict(facts["space"])
        made = cls(image.compression, image.modality, image.intensity, space.mean, space.std)
        return made._by(partial(_opened, Path(run_dir), torch.device(device)))

    @property
    def channels(self) -> int:
        """Channels of the latent, and one for how much of a cell is known."""
        return len(self.mean) + 1

    def with_first_stage(self, first_stage: FrozenFirstStage) -> "ImageLatents":
        return replace(self)._by(lambda: first_stage)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "seen_as": "latents"}

    def _by(self, opened: Callable[[], FrozenFirstStage]) -> "ImageLatents":
        object.__setattr__(self, "_opened", opened)
        return self

    def _cells(self, seen: Tensor) -> Tensor:
        known = seen[:, 1:] > 0
        cells = F.max_pool3d(known.float(), tuple(self.compression))
        if not known.any():  # nothing to encode, as where there is no image
            return cells.expand(-1, len(self.mean), -1, -1, -1)
        if self._opened is None:
            raise FibldmError(
                "latents of an image need its autoencoder, which was not loaded", "load the run or bundle"
            )
        first_stage = self._opened()
        device = next((weight.device for weight in first_stage.parameters()), seen.device)
        mean = tiled_encode(first_stage, torch.where(known, seen[:, :1], _LOWEST).to(device)).mean.to(seen.device)
        return LatentSpace(tuple(self.mean), tuple(self.std), "").normalise(mean) * cells


_FIRST_STAGES: dict[tuple[Path, torch.device, str], FrozenFirstStage] = {}


def _opened(run_dir: Path, device: torch.device) -> FrozenFirstStage:
    """The autoencoder of a run, loaded once for all cases; only the last one is held."""
    stage = StageFolder(run_dir, "autoencoder")
    key = (run_dir.resolve(), device, str(stage.require()["weights"]))
    if key not in _FIRST_STAGES:
        made = FrozenFirstStage(stage.trained(device="cpu")).to(device)
        _FIRST_STAGES.clear()
        _FIRST_STAGES[key] = made
    return _FIRST_STAGES[key]
