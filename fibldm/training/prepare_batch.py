"""From a collated batch to what the network sees and is asked for: MONAI's `PrepareBatch` seam."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.loss_aware_times import following
from fibldm.models.process import Process, Target
from fibldm.models.samplers import draw_noise
from fibldm.models.timesteps import GridTimes, TrainingTimes, check_gamma, min_snr_weight
from fibldm.models.transfer import to_device
from fibldm.training.losses import Weighted

SAMPLE_WEIGHT = "sample_weight"
"""What an item may hold beside its latent: how much its sample weighs in the loss, a scalar."""


class VolumePrepareBatch(PrepareBatch):
    """Stage 1: the volume is its own target; padding does not count. Each sample's noise has the seed of its draw."""

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        image, valid = (to_device(batchdata[name], device).to(device, **kwargs) for name in ("image", "valid"))
        return image, Weighted(image, valid), (), {"seeds": batchdata["seed"]}


class SegmentationPrepareBatch(PrepareBatch):
    """Segmentation: every voxel is asked for the channel of its label; unknown voxels and padding do not count.

    Of a case of which not all labels were annotated, the batch holds ``annotated`` (see `with_annotation`): its unknown
    voxels are the background or one of the labels that nobody drew, and that is what is asked for.

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
        merged = self._merged(batchdata.get("annotated"))
        if merged is not None:
            merged = to_device(merged, device)
            partly = merged[:, 1:].any(dim=1)
            known = known | (label == UNKNOWN_LABEL) & partly.view(-1, *[1] * (label.ndim - 1))
            channel = torch.where(channel == UNKNOWN_LABEL, 0, channel)
        parts = (image, torch.where(known, channel, 0), known * valid.float())
        image, value, weight = (part.to(device, **kwargs) for part in parts)
        return image, Weighted(value, weight, merged=merged)

    def _merged(self, annotated: Tensor | None) -> Tensor | None:
        """Classes that are not told from the background, ``(B, L)``; None where there are none, which the CPU knows."""
        if annotated is None or bool(annotated.all()):
            return None
        merged = annotated == 0
        merged[:, 0] = True
        return merged


class _Drawn(NamedTuple):
    """All that is random about a batch, on the CPU.

    Attributes:
        from_posterior: standard normal, ``(B, C, x, y, z)``; draws the latent.
        t: times in (0, 1], ``(B,)``.
        noise: standard normal, ``(B, C, x, y, z)``; is added and predicted.
        dropped: parts that become unknown, by name of the condition, booleans ``(B, P)``.
    """

    from_posterior: Tensor
    t: Tensor
    noise: Tensor
    dropped: Mapping[str, Tensor]


class LatentPrepareBatch(PrepareBatch):
    """Stages 2 and 3: draw a latent, a time and one noise per sample; that noise is both added and predicted.

    Each sample draws from a generator of its own, seeded by its draw, so a batch is only a way of grouping. That is
    done on the CPU, as is what depends on the time alone, so the numbers are the same for any device. The rest is
    computed on the device, which nothing here waits for.

    Args:
        process: the diffusion process.
        target: the training target, one that is regular on the process.
        times: where training looks; a `GridTimes` looks at the time of the sample's view, and what is drawn more often
            where the loss is large weighs as much less, see `LossAwareTimes`.
        conditions: what training shows, by name, in the order of their draws; None of one leaves it out.
        dropout: probabilities by name of the condition that it, or parts of it, become unknown, see
            `Condition.chances`; 0 by default. Where the first condition is wholly unknown all of them are that are
            `dropped_with_all`, as guidance asks for nothing.
        label_weights: of the loss where a label is, by label value; 1 where none is named (Guo et al. 2025, MAISI,
            weigh tumours so). A latent cell weighs as the labels that fill it.
        snr_gamma: weigh the error of each sample by its time, see `min_snr_weight`; None weighs all times alike.

    Raises:
        FibldmError: the target is not regular on the process, a weight has no label or mask, ``snr_gamma`` is not
            positive, or a dropout is no probability or of nothing that there is.
    """

    def __init__(
        self,
        process: Process,
        *,
        target: Target,
        times: TrainingTimes,
        conditions: Mapping[str, Condition | None] | None = None,
        dropout: Mapping[str, float | Mapping[str, float]] | None = None,
        label_weights: Mapping[int, float] | None = None,
        snr_gamma: float | None = None,
    ) -> None:
        process.check_target(target)
        if snr_gamma is not None:
            check_gamma(snr_gamma)
        self.process, self.target, self.times = process, target, times
        self.following = following(times)
        self.conditions: dict[str, Condition] = present(conditions)
        if strange := (dropout or {}).keys() - (conditions or {}).keys():
            raise FibldmError(f"dropout must be of {', '.join(conditions or {}) or 'nothing'}; got {strange}")
        self.chances = {name: part.chances((dropout or {}).get(name, 0.0)) for name, part in self.conditions.items()}
        self.label_weights, self.snr_gamma = _weights(label_weights or {}, self.mask), snr_gamma

    @property
    def mask(self) -> MaskEncoding | None:
        """How masks are encoded; None where training shows none."""
        return cast(MaskEncoding | None, self.conditions.get("mask"))

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        drawn = self._draw(batchdata)
        mean, std, valid, from_posterior, noise = (
            to_device(part, device).float()
            for part in (batchdata["mean"], batchdata["std"], batchdata["valid"], drawn.from_posterior, drawn.noise)
        )
        z_0 = Posterior(mean, std).sample(from_posterior)
        z_t, target = self.process.diffuse(z_0, noise, drawn.t), self.process.target(self.target, z_0, noise, drawn.t)
        # copies that may be changed; they move in the precision in which they are kept
        shown = {name: to_device(batchdata[name], device).to(torch.float32, copy=True) for name in self.conditions}
        weight, factors = self._weight(valid, shown), self._factors(drawn.t, z_0, batchdata.get(SAMPLE_WEIGHT))
        for name, dropped in drawn.dropped.items():  # only now, as the weight is that of all labels
            _drop(self.conditions[name], shown[name], dropped)

        def as_wanted(part: Tensor) -> Tensor:
            return part.to(device, **kwargs)

        time = as_wanted(to_device(self.process.network_time(drawn.t), device))
        given = [{name: as_wanted(part) for name, part in shown.items()}] if shown else []
        factor, importance = (None if part is None else as_wanted(part) for part in factors)
        asked = Weighted(as_wanted(target), as_wanted(weight), factor, t=drawn.t, importance=importance)
        return as_wanted(z_t), asked, (time, *given), {}

    def _draw(self, batchdata: dict[str, Tensor]) -> _Drawn:
        """What each sample draws from its generator, one thing after the other; a new one must be drawn last."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batchdata["seed"]]
        from_posterior = draw_noise(batchdata["mean"].shape[1:], generators)
        t = self._times(batchdata["view"], generators)
        noise = draw_noise(batchdata["mean"].shape[1:], generators)
        return _Drawn(from_posterior, t, noise, self._dropped(generators))

    def _times(self, views: Tensor, generators: list[torch.Generator]) -> Tensor:
        if isinstance(self.times, GridTimes):
            return torch.cat([self.times.at(int(view)) for view in views])
        return torch.cat([self.times.sample(generator) for generator in generators])

    def _dropped(self, generators: list[torch.Generator]) -> dict[str, Tensor]:
        dropped: dict[str, Tensor] = {}
        for name, chances in self.chances.items():
            drawn = torch.stack([torch.rand(len(chances), generator=generator) for generator in generators]) < chances
            first = next(iter(dropped.values()), torch.zeros(len(drawn), 1, dtype=torch.bool))
            dropped[name] = drawn[:, :-1] | drawn[:, -1:]
            if self.conditions[name].dropped_with_all:
                dropped[name] |= first.all(dim=1, keepdim=True)
        return dropped

    def _weight(self, valid: Tensor, shown: Mapping[str, Tensor]) -> Tensor:
        if self.mask is None or self.label_weights is None:
            return valid
        shares = self.mask.shares(shown["mask"])
        return valid * torch.einsum("blxyz,l->bxyz", shares, to_device(self.label_weights, valid.device))[:, None]

    def _factors(self, t: Tensor, z_0: Tensor, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of the errors of each sample, and its importance, ``(B, 1, ...)``; None for 1.

        Args:
            t: times ``(B,)``.
            z_0: latents.
            weights: of the samples, ``(B,)``; None for 1.
        """

        def per_sample(values: Tensor) -> Tensor:
            return to_device(values, z_0.device).view(-1, *[1] * (z_0.ndim - 1))

        gamma, follows = self.snr_gamma, self.following
        factor = None if gamma is None else per_sample(min_snr_weight(self.process, self.target, t, gamma))
        importance = [] if follows is None else [per_sample(follows.importance(t))]
        importance += [] if weights is None else [per_sample(weights.to(z_0.dtype))]
        return factor, math.prod(importance[1:], start=importance[0]) if importance else None


def _drop(condition: Condition, encoded: Tensor, dropped: Tensor) -> None:
    """Change the samples that lose something; the others cost nothing, as ``dropped`` is on the CPU."""
    away = to_device(dropped, encoded.device)
    for sample in dropped.any(dim=1).nonzero().flatten().tolist():
        condition.drop_(encoded[sample : sample + 1], away[sample : sample + 1])


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
