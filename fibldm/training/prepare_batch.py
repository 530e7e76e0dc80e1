"""From a collated batch to what the network sees and is asked for: MONAI's `PrepareBatch` seam."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.covariates import CovariateEncoding
from fibldm.models.process import Process, Target
from fibldm.models.timesteps import GridTimes, TrainingTimes, check_gamma, min_snr_weight
from fibldm.training.losses import Weighted


class VolumePrepareBatch(PrepareBatch):
    """Stage 1: the volume is its own target; padding does not count. Each sample's noise has the seed of its draw."""

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        image = batchdata["image"].to(device, non_blocking=non_blocking, **kwargs)
        valid = batchdata["valid"].to(device, non_blocking=non_blocking, **kwargs)
        return image, Weighted(image, valid), (), {"seeds": batchdata["seed"]}


class SegmentationPrepareBatch(PrepareBatch):
    """Segmentation: every voxel is asked for the channel of its label; unknown voxels and padding do not count.

    Args:
        labels: label values, distinct, in the order of the network's output channels; others count as unknown.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.channels = torch.full((UNKNOWN_LABEL + 1,), UNKNOWN_LABEL, dtype=torch.long)
        self.channels[list(labels)] = torch.arange(len(labels))

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted]:
        channel = self.channels[batchdata["label"].long()]
        known = channel != UNKNOWN_LABEL
        parts = (batchdata["image"], torch.where(known, channel, 0), known * batchdata["valid"].float())
        image, value, weight = (part.to(device, non_blocking=non_blocking, **kwargs) for part in parts)
        return image, Weighted(value, weight)


class LatentPrepareBatch(PrepareBatch):
    """Stages 2 and 3: draw a latent, a time and one noise per sample; that noise is both added and predicted.

    Each sample draws from a generator of its own, seeded by its draw, so a batch is only a way of grouping.

    Args:
        process: the diffusion process.
        target: the training target, one that is regular on the process.
        times: where training looks; a `GridTimes` looks at the time of the sample's view.
        mask: how masks are encoded; None trains without a mask.
        mask_dropout: probability that the whole mask is unknown.
        label_dropout: probability of every single label to become unknown.
        label_weights: of the loss where a label is, by label value; 1 where none is named (Guo et al. 2025, MAISI,
            weigh tumours so). A latent cell weighs as the labels that fill it.
        snr_gamma: weigh the error of each sample by its time, see `min_snr_weight`; None weighs all times alike.
        covariates: how covariates are encoded; None trains without any.
        covariate_dropout: probability of every single covariate to become unknown, and of all together. With the whole
            mask they all are, as guidance asks for nothing.

    Raises:
        FibldmError: the target is not regular on the process, a weight has no label or mask, or ``snr_gamma`` is not
            positive.
    """

    def __init__(
        self,
        process: Process,
        *,
        target: Target,
        times: TrainingTimes,
        mask: MaskEncoding | None = None,
        mask_dropout: float = 0.0,
        label_dropout: float = 0.0,
        label_weights: Mapping[int, float] | None = None,
        snr_gamma: float | None = None,
        covariates: CovariateEncoding | None = None,
        covariate_dropout: float = 0.0,
    ) -> None:
        process.check_target(target)
        if snr_gamma is not None:
            check_gamma(snr_gamma)
        self.process, self.target, self.times, self.mask = process, target, times, mask
        self.mask_dropout, self.label_dropout = mask_dropout, label_dropout
        self.label_weights, self.snr_gamma = _weights(label_weights or {}, mask), snr_gamma
        self.covariates, self.covariate_dropout = covariates, covariate_dropout

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Tensor, ...], dict[str, Any]]:
        posterior = Posterior(batchdata["mean"].float(), batchdata["std"].float())
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batchdata["seed"]]
        z_0 = posterior.sample(self._noise(posterior.mean, generators))
        t = self._times(batchdata["view"], generators)
        noise = self._noise(z_0, generators)
        target = (self.process.target(self.target, z_0, noise, t), self._weight(batchdata), *self._factor(t, z_0.ndim))
        mask, nothing = self._mask(batchdata, generators)
        inputs = (self.process.diffuse(z_0, noise, t), self.process.network_time(t), *mask)
        known = self._covariates(batchdata, generators, nothing)
        moved = [part.to(device, non_blocking=non_blocking, **kwargs) for part in (*target, *inputs, *known)]
        asked, given = moved[: len(target)], moved[len(target) : len(target) + len(inputs)]
        more = {"covariates": moved[-1]} if known else {}
        return given[0], Weighted(*asked), tuple(given[1:]), more

    def _weight(self, batchdata: dict[str, Tensor]) -> Tensor:
        weight = batchdata["valid"].float()
        if self.mask is not None and self.label_weights is not None:
            shares = self.mask.shares(batchdata["mask"].float())
            weight = weight * torch.einsum("blxyz,l->bxyz", shares, self.label_weights)[:, None]
        return weight

    def _factor(self, t: Tensor, axes: int) -> list[Tensor]:
        if self.snr_gamma is None:
            return []
        return [min_snr_weight(self.process, self.target, t, self.snr_gamma).view(-1, *[1] * (axes - 1))]

    def _noise(self, like: Tensor, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])

    def _times(self, views: Tensor, generators: list[torch.Generator]) -> Tensor:
        if isinstance(self.times, GridTimes):
            return torch.cat([self.times.at(int(view)) for view in views])
        return torch.cat([self.times.sample(generator) for generator in generators])

    def _mask(self, batchdata: dict[str, Tensor], generators: list[torch.Generator]) -> tuple[list[Tensor], Tensor]:
        """The encoded mask, if any, and of which samples nothing of it is known ``(B,)``."""
        if self.mask is None:
            return [], torch.zeros(len(generators), dtype=torch.bool)
        fractions = batchdata["mask"].float()
        chances = torch.stack([torch.rand(len(self.mask.labels) + 1, generator=generator) for generator in generators])
        dropped = chances[:, :-1] < self.label_dropout
        dropped[:, 0] = False  # background is no label of its own: it goes with the others
        dropped |= chances[:, -1:] < self.mask_dropout
        return [self.mask.drop_labels(fractions, dropped)], dropped.all(dim=1)

    def _covariates(
        self, batchdata: dict[str, Tensor], generators: list[torch.Generator], nothing: Tensor
    ) -> list[Tensor]:
        if self.covariates is None:
            return []
        encoded = batchdata["covariates"]
        # after all other draws, which are then the same as without covariates
        chances = torch.stack([torch.rand(encoded.shape[1] + 1, generator=generator) for generator in generators])
        dropped = chances < self.covariate_dropout
        return [self.covariates.drop(encoded, dropped[:, :-1] | dropped[:, -1:] | nothing[:, None])]


def _weights(by_label: Mapping[int, float], mask: MaskEncoding | None) -> Tensor | None:
    """Weights of the labels of a mask and of unknown, in the order of its channels; None where all weigh the same."""
    if not by_label:
        return None
    known = mask.labels if mask is not None else ()
    given = {int(label): float(weight) for label, weight in by_label.items()}
    if wrong := {label: weight for label, weight in given.items() if label not in known or not weight > 0}:
        raise FibldmError(
            f"label weights must be positive numbers for the labels {list(known)}; got {wrong}", "change label_weights"
        )
    return torch.tensor([given.get(label, 1.0) for label in known] + [1.0])
