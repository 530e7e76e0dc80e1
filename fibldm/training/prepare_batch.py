"""From a collated batch to what the network sees and is asked for: MONAI's `PrepareBatch` seam."""

from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from fibldm.models.autoencoder import Posterior
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.process import Process, Target
from fibldm.models.timesteps import GridTimes, TrainingTimes
from fibldm.training.losses import Weighted


class VolumePrepareBatch(PrepareBatch):
    """Stage 1: the volume is its own target; padding does not count."""

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted]:
        image = batchdata["image"].to(device, non_blocking=non_blocking, **kwargs)
        valid = batchdata["valid"].to(device, non_blocking=non_blocking, **kwargs)
        return image, Weighted(image, valid)


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

    Raises:
        FibldmError: the target is not regular on the process.
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
    ) -> None:
        process.check_target(target)
        self.process, self.target, self.times, self.mask = process, target, times, mask
        self.mask_dropout, self.label_dropout = mask_dropout, label_dropout

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Tensor, ...], dict[str, Any]]:
        posterior = Posterior(batchdata["mean"].float(), batchdata["std"].float())
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batchdata["seed"]]
        z_0 = posterior.sample(self._noise(posterior.mean, generators))
        t = self._times(batchdata["view"], generators)
        noise = self._noise(z_0, generators)
        target = Weighted(self.process.target(self.target, z_0, noise, t), batchdata["valid"].float())
        inputs = (self.process.diffuse(z_0, noise, t), self.process.network_time(t), *self._mask(batchdata, generators))
        moved = [part.to(device, non_blocking=non_blocking, **kwargs) for part in (*target, *inputs)]
        return moved[2], Weighted(moved[0], moved[1]), tuple(moved[3:]), {}

    def _noise(self, like: Tensor, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])

    def _times(self, views: Tensor, generators: list[torch.Generator]) -> Tensor:
        if isinstance(self.times, GridTimes):
            return torch.cat([self.times.at(int(view)) for view in views])
        return torch.cat([self.times.sample(generator) for generator in generators])

    def _mask(self, batchdata: dict[str, Tensor], generators: list[torch.Generator]) -> list[Tensor]:
        if self.mask is None:
            return []
        fractions = batchdata["mask"].float()
        chances = torch.stack([torch.rand(len(self.mask.labels) + 1, generator=generator) for generator in generators])
        dropped = chances[:, :-1] < self.label_dropout
        dropped[:, 0] = False  # background is no label of its own: it goes with the others
        dropped |= chances[:, -1:] < self.mask_dropout
        return [self.mask.drop_labels(fractions, dropped)]
