"""From a collated batch to what the network sees and is asked for: MONAI's `PrepareBatch` seam."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.covariates import CovariateEncoding
from fibldm.models.process import Process, Target
from fibldm.models.samplers import draw_noise
from fibldm.models.timesteps import GridTimes, TrainingTimes, check_gamma, min_snr_weight
from fibldm.models.transfer import to_device
from fibldm.training.losses import Weighted

_ALL = "all"  # covariates together


class VolumePrepareBatch(PrepareBatch):
    """Stage 1: the volume is its own target; padding does not count. Each sample's noise has the seed of its draw."""

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        image, valid = (to_device(batchdata[name], device).to(device, **kwargs) for name in ("image", "valid"))
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
        image, label, valid = (to_device(batchdata[name], device) for name in ("image", "label", "valid"))
        channel = to_device(self.channels, device)[label.long()]
        known = channel != UNKNOWN_LABEL
        parts = (image, torch.where(known, channel, 0), known * valid.float())
        image, value, weight = (part.to(device, **kwargs) for part in parts)
        return image, Weighted(value, weight)


class _Drawn(NamedTuple):
    """All that is random about a batch, on the CPU.

    Attributes:
        from_posterior: standard normal, ``(B, C, x, y, z)``; draws the latent.
        t: times in (0, 1], ``(B,)``.
        noise: standard normal, ``(B, C, x, y, z)``; is added and predicted.
        labels: those that become unknown, booleans ``(B, L)``; None where there is no mask.
        covariates: those that become unknown, booleans ``(B, T)``; None where there are none.
    """

    from_posterior: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None
    covariates: Tensor | None


class LatentPrepareBatch(PrepareBatch):
    """Stages 2 and 3: draw a latent, a time and one noise per sample; that noise is both added and predicted.

    Each sample draws from a generator of its own, seeded by its draw, so a batch is only a way of grouping. That is
    done on the CPU, as is what depends on the time alone, so the numbers are the same for any device. The rest is
    computed on the device, which nothing here waits for.

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
        covariate_dropout: probability of every single covariate to become unknown, and of all together; or
            probabilities by name, 0 where one is not named, and under ``all`` that of all together. With the whole
            mask they all are, as guidance asks for nothing.

    Raises:
        FibldmError: the target is not regular on the process, a weight has no label or mask, ``snr_gamma`` is not
            positive, or a covariate's dropout is no probability or not of a covariate.
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
        covariate_dropout: float | Mapping[str, float] = 0.0,
    ) -> None:
        process.check_target(target)
        if snr_gamma is not None:
            check_gamma(snr_gamma)
        self.process, self.target, self.times, self.mask = process, target, times, mask
        self.mask_dropout, self.label_dropout = mask_dropout, label_dropout
        self.label_weights, self.snr_gamma = _weights(label_weights or {}, mask), snr_gamma
        self.covariates, self.covariate_dropout = covariates, _dropouts(covariate_dropout, covariates)

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Tensor, ...], dict[str, Any]]:
        drawn = self._draw(batchdata)
        mean, std, valid, from_posterior, noise = (
            to_device(part, device).float()
            for part in (batchdata["mean"], batchdata["std"], batchdata["valid"], drawn.from_posterior, drawn.noise)
        )
        z_0 = Posterior(mean, std).sample(from_posterior)
        z_t, target = self.process.diffuse(z_0, noise, drawn.t), self.process.target(self.target, z_0, noise, drawn.t)
        mask = self._mask(batchdata, device)
        asked = (target, self._weight(valid, mask), *self._factor(drawn.t, z_0))
        if self.mask is not None and mask is not None and drawn.labels is not None:
            _drop_labels(self.mask, mask, drawn.labels)  # only now, as the weight is that of all labels
        given = (to_device(self.process.network_time(drawn.t), device), *([] if mask is None else [mask]))
        known = self._covariates(batchdata, drawn.covariates, device)

        def as_wanted(part: Tensor) -> Tensor:
            return part.to(device, **kwargs)

        more = {name: as_wanted(part) for name, part in known.items()}
        return as_wanted(z_t), Weighted(*map(as_wanted, asked)), tuple(map(as_wanted, given)), more

    def _draw(self, batchdata: dict[str, Tensor]) -> _Drawn:
        """What each sample draws from its generator, one thing after the other; a new one must be drawn last."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batchdata["seed"]]
        from_posterior = draw_noise(batchdata["mean"].shape[1:], generators)
        t = self._times(batchdata["view"], generators)
        noise = draw_noise(batchdata["mean"].shape[1:], generators)
        labels = self._dropped_labels(generators)
        return _Drawn(from_posterior, t, noise, labels, self._dropped_covariates(batchdata, generators, labels))

    def _times(self, views: Tensor, generators: list[torch.Generator]) -> Tensor:
        if isinstance(self.times, GridTimes):
            return torch.cat([self.times.at(int(view)) for view in views])
        return torch.cat([self.times.sample(generator) for generator in generators])

    def _dropped_labels(self, generators: list[torch.Generator]) -> Tensor | None:
        if self.mask is None:
            return None
        chances = _chances(len(self.mask.labels) + 1, generators)
        dropped = chances[:, :-1] < self.label_dropout
        dropped[:, 0] = False  # background is no label of its own: it goes with the others
        return dropped | (chances[:, -1:] < self.mask_dropout)

    def _dropped_covariates(
        self, batchdata: dict[str, Tensor], generators: list[torch.Generator], labels: Tensor | None
    ) -> Tensor | None:
        if self.covariates is None:
            return None
        dropped = _chances(batchdata["covariates"].shape[1] + 1, generators) < self.covariate_dropout
        all_of_them = dropped[:, -1:] if labels is None else dropped[:, -1:] | labels.all(dim=1, keepdim=True)
        return dropped[:, :-1] | all_of_them

    def _mask(self, batchdata: dict[str, Tensor], device: Any) -> Tensor | None:
        """The encoded mask, as a copy that may be changed; it moves in the half precision in which it is kept."""
        return None if self.mask is None else to_device(batchdata["mask"], device).to(torch.float32, copy=True)

    def _weight(self, valid: Tensor, mask: Tensor | None) -> Tensor:
        if self.mask is None or mask is None or self.label_weights is None:
            return valid
        shares = self.mask.shares(mask)
        return valid * torch.einsum("blxyz,l->bxyz", shares, to_device(self.label_weights, valid.device))[:, None]

    def _factor(self, t: Tensor, z_0: Tensor) -> list[Tensor]:
        if self.snr_gamma is None:
            return []
        factor = to_device(min_snr_weight(self.process, self.target, t, self.snr_gamma), z_0.device)
        return [factor.view(-1, *[1] * (z_0.ndim - 1))]

    def _covariates(self, batchdata: dict[str, Tensor], dropped: Tensor | None, device: Any) -> dict[str, Tensor]:
        if self.covariates is None or dropped is None:
            return {}
        encoded = to_device(batchdata["covariates"], device)
        return {"covariates": self.covariates.drop(encoded, to_device(dropped, device))}


def _drop_labels(encoding: MaskEncoding, mask: Tensor, dropped: Tensor) -> None:
    """Take labels out of the samples that lose some; the others cost nothing, as ``dropped`` is on the CPU."""
    away = to_device(dropped, mask.device)
    for sample in dropped.any(dim=1).nonzero().flatten().tolist():
        encoding.drop_labels_(mask[sample : sample + 1], away[sample : sample + 1])


def _chances(count: int, generators: list[torch.Generator]) -> Tensor:
    """Uniform in [0, 1), ``(B, count)``."""
    return torch.stack([torch.rand(count, generator=generator) for generator in generators])


def _dropouts(given: float | Mapping[str, float], covariates: CovariateEncoding | None) -> Tensor:
    """Probabilities of the covariates in the order of their tokens, and of all together."""
    names = [] if covariates is None else list(covariates.kinds)
    by_name = given if isinstance(given, Mapping) else dict.fromkeys([*names, _ALL], given)
    if isinstance(given, Mapping) and (strange := [name for name in given if name not in (*names, _ALL)]):
        raise FibldmError(
            f"covariate_dropout must name covariates ({', '.join(names) or 'there are none'}) or {_ALL}; "
            f"got {', '.join(map(str, strange))}",
            "change covariate_dropout, or name them in covariates",
        )
    wrong = {name: value for name, value in by_name.items() if not _is_probability(value)}
    if wrong:
        raise FibldmError(f"covariate_dropout must be probabilities, 0 to 1; got {wrong}", "0.1 is usual")
    return torch.tensor([float(by_name.get(name, 0.0)) for name in (*names, _ALL)])


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


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
