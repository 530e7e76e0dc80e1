"""The latent space: the only place where latents are scaled."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior


@dataclass(frozen=True)
class LatentSpace:
    """Per-channel scale of the latents of one autoencoder.

    Attributes:
        mean: ``C`` channel means.
        std: ``C`` channel standard deviations, all above 0.
        autoencoder: fingerprint of the autoencoder whose latents these are.

    Raises:
        FibldmError: mean and std do not fit each other, or a std is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: str

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < value < math.inf for value in self.std):
            raise FibldmError(f"a latent space needs one std above 0 per channel; got mean {self.mean}, std {self.std}")

    @classmethod
    def fit(cls, posteriors: Iterable[Posterior], autoencoder: str) -> "LatentSpace":
        """Fit to the posteriors of the training split: ``Var(mean) + E[std^2]``, by the law of total variance.

        Args:
            posteriors: of any spatial sizes, each ``(B, C, x, y, z)`` or, of chosen cells, ``(B, C, n)``.
            autoencoder: fingerprint to carry along.

        Raises:
            FibldmError: there is no posterior, or a channel does not vary at all.
        """
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for mean, std in posteriors:
            channels_last = mean.double().movedim(1, -1).flatten(0, -2)
            noise = std.double().movedim(1, -1).flatten(0, -2)
            count += len(channels_last)
            total = total + channels_last.sum(0)
            square = square + (channels_last.square() + noise.square()).sum(0)
        if not count:
            raise FibldmError("a latent space must be fitted to at least one training latent; got none")
        variance = square / count - (total / count).square()
        if not bool((variance > 0).all()):
            raise FibldmError("every latent channel must vary; got a variance of 0", "train the autoencoder longer")
        return cls(tuple((total / count).tolist()), tuple(variance.sqrt().tolist()), autoencoder)

    @classmethod
    def constant(cls, scale: float, channels: int, autoencoder: str) -> "LatentSpace":
        """One factor for all channels, such as 0.18215 of Stable Diffusion: ``z = scale * latent``.

        Raises:
            FibldmError: the factor is not above 0.
        """
        if not 0 < scale < math.inf:
            raise FibldmError(f"the scale of latents must be a number above 0; got {scale}")
        return cls((0.0,) * channels, (1.0 / scale,) * channels, autoencoder)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "LatentSpace":
        """Inverse of `to_dict`."""
        return cls(tuple(value["mean"]), tuple(value["std"]), value["autoencoder"])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"mean": list(self.mean), "std": list(self.std), "autoencoder": self.autoencoder}

    def normalise(self, latent: Tensor) -> Tensor:
        """A latent ``(B, C, x, y, z)`` of the autoencoder at zero mean and unit variance per channel."""
        mean, std = self._like(latent)
        return (latent - mean) / std

    def normalise_posterior(self, posterior: Posterior) -> Posterior:
        """The posterior of the normalised latent."""
        mean, std = self._like(posterior.mean)
        return Posterior((posterior.mean - mean) / std, posterior.std / std)

    def denormalise(self, z: Tensor) -> Tensor:
        """The autoencoder's latent of a normalised one, ``(B, C, x, y, z)``."""
        mean, std = self._like(z)
        return z * std + mean

    def check_autoencoder(self, fingerprint: str, where: str) -> None:
        """Refuse latents that another autoencoder made.

        Raises:
            FibldmError: the fingerprints differ.
        """
        if fingerprint != self.autoencoder:
            raise FibldmError(
                f"the latents of {where} must come from the autoencoder of this run ({fingerprint[:12]}); "
                f"they were made by another one ({self.autoencoder[:12]})",
                "run `fibldm encode` again, or go back to the autoencoder they were made with",
            )

    def _like(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        if latent.shape[1] != len(self.mean):
            raise FibldmError(f"a latent of this space has {len(self.mean)} channels; got {latent.shape[1]}")
        shape = (1, len(self.mean)) + (1,) * (latent.ndim - 2)
        return latent.new_tensor(self.mean).view(shape), latent.new_tensor(self.std).view(shape)
