"""Discriminators of reconstructions, and what they and the autoencoder minimise against each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.transfer import to_device
from fibldm.training.distributed import mean_over_ranks
from fibldm.training.losses import Weighted

Kind = Literal["hinge", "bce", "least_squares"]


class DiscriminatorOutput(NamedTuple):
    """What one discriminator says of a batch.

    Attributes:
        logits: ``(N, 1, ...)``, one per patch; large where it looks real.
        features: of the layers before, each ``(N, C, ...)``.
        weight: ``(N, 1, ...)`` of the places that it looked at; padding weighs 0.
    """

    logits: Tensor
    features: list[Tensor]
    weight: Tensor


# Runs a network under the precision of the training: network, then what it is called with after the volume.
Inferer = Callable[..., list[DiscriminatorOutput]]


class Discriminators(nn.Module):
    """A discriminator of whole patches, one of slices along every axis, or both.

    Args:
        volume: like MONAI's ``PatchDiscriminator``: from ``(B, C, X, Y, Z)``, or from ``(B, C, X, Y)`` of single
            slices, to a list of features, logits last.
        slices: the same in one dimension less, for slices along any axis.
        volume_weight: of the first in the loss.
        slice_weight: of the second, shared by the axes.
        slices_per_axis: of every sample in every step.

    Raises:
        FibldmError: a weight is negative, both are 0, or one comes without its network.
    """

    def __init__(
        self,
        volume: nn.Module | None = None,
        slices: nn.Module | None = None,
        *,
        volume_weight: float = 0.0,
        slice_weight: float = 0.0,
        slices_per_axis: int = 1,
    ) -> None:
        super().__init__()
        _check_weights(volume_weight, slice_weight)
        for name, network, weight in (("volume", volume, volume_weight), ("slices", slices, slice_weight)):
            if weight and network is None:
                raise FibldmError(f"a discriminator with weight {weight} needs its network; {name} is null")
        self.volume = volume if volume_weight else None
        self.slices = slices if slice_weight else None
        self.volume_weight, self.slice_weight, self.slices_per_axis = volume_weight, slice_weight, slices_per_axis

    @property
    def weight(self) -> float:
        """Of all discriminators together."""
        return self.volume_weight + self.slice_weight

    def shares(self, axes: int) -> list[float]:
        """What each output counts, for volumes of so many axes; the sum is 1."""
        volume = [self.volume_weight / self.weight] if self.volume is not None else []
        slices = [self.slice_weight / self.weight / axes] * axes if self.slices is not None else []
        return [*volume, *slices]

    def forward(self, volume: Tensor, weight: Tensor, positions: Sequence[Tensor]) -> list[DiscriminatorOutput]:
        """See volumes ``(B, C, X, Y, Z)``.

        Args:
            volume: real or reconstructed.
            weight: ``(B, 1, X, Y, Z)``.
            positions: of the slices along every axis, integers ``(B, N)``; see `random_slices`.

        Raises:
            FibldmError: there is a discriminator of slices, and the volume is one itself.
        """
        is_slice = volume.shape[-1] == 1
        if is_slice and self.slices is not None:
            raise FibldmError(
                "slices along three axes need volumes; these are single slices",
                "set slice_adversarial_weight to 0 and volume_adversarial_weight above it",
            )
        whole = (volume[..., 0], weight[..., 0]) if is_slice else (volume, weight)
        outputs = [] if self.volume is None else [_discriminate(self.volume, *whole)]
        if self.slices is not None:
            for axis, chosen in enumerate(positions):
                parts = (take_slices(values, chosen, axis) for values in (volume, weight))
                outputs.append(_discriminate(self.slices, *parts))
        return outputs


@dataclass(frozen=True)
class Adversary:
    """The discriminators of a training, their optimizer, and how both sides play.

    Attributes:
        discriminators: all that look at the volumes.
        optimizer: of their parameters.
        kind: "hinge" (Lim & Ye 2017), "bce" (Goodfellow et al. 2014, not saturating) or "least_squares" (Mao et al.
            2017).
        start: iterations before it begins; until then no discriminator runs.
        adaptive: multiply the weight by `adaptive_weight`.
        feature_weight: of `feature_distance`; 0 leaves it out.
    """

    discriminators: Discriminators
    optimizer: torch.optim.Optimizer
    kind: Kind = "hinge"
    start: int = 0
    adaptive: bool = True
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_choice("kind of adversarial loss", self.kind, get_args(Kind))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms that it adds to a training."""
        matching = ("feature_matching",) if self.feature_weight else ()
        return ("generator", *matching, "adversarial_weight", "discriminator")

    def generator_terms(
        self, volume: Tensor, target: Weighted, positions: Sequence[Tensor], inferer: Inferer
    ) -> dict[str, Tensor]:
        """The terms of the autoencoder: ``generator``, and ``feature_matching`` where it has a weight."""
        with _frozen(self.discriminators):
            fake = inferer(_as_seen(volume, target), self.discriminators, target.weight, positions)
        terms = {"generator": self._mean(volume, [generator_loss(one, self.kind) for one in fake])}
        if self.feature_weight:
            with torch.no_grad():
                real = inferer(target.value, self.discriminators, target.weight, positions)
            distances = [feature_distance(*pair) for pair in zip(fake, real, strict=True)]
            terms["feature_matching"] = self._mean(volume, distances)
        return terms

    def discriminator_loss(
        self, volume: Tensor, target: Weighted, positions: Sequence[Tensor], inferer: Inferer
    ) -> Tensor:
        """What the discriminators minimise, a scalar; the autoencoder has no part in it."""
        real = inferer(target.value, self.discriminators, target.weight, positions)
        fake = inferer(_as_seen(volume.detach(), target), self.discriminators, target.weight, positions)
        pairs = zip(real, fake, strict=True)
        return self._mean(volume, [discriminator_loss(*pair, self.kind) for pair in pairs])

    def _mean(self, volume: Tensor, losses: list[Tensor]) -> Tensor:
        shares = self.discriminators.shares(volume.ndim - 2)
        return torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()


def generator_loss(fake: DiscriminatorOutput, kind: Kind) -> Tensor:
    """What the autoencoder minimises: low where its volume looks real; a scalar."""
    if kind == "hinge":
        values = -fake.logits
    elif kind == "bce":
        values = F.softplus(-fake.logits)
    else:
        values = 0.5 * (fake.logits - 1).square()
    return _weighted_mean(values, fake.weight)


def discriminator_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput, kind: Kind) -> Tensor:
    """What a discriminator minimises: half the error on real volumes and half that on reconstructions; a scalar."""
    if kind == "hinge":
        errors = F.relu(1 - real.logits), F.relu(1 + fake.logits)
    elif kind == "bce":
        errors = F.softplus(-real.logits), F.softplus(fake.logits)
    else:
        errors = (real.logits - 1).square(), fake.logits.square()
    return 0.5 * (_weighted_mean(errors[0], real.weight) + _weighted_mean(errors[1], fake.weight))


def feature_distance(fake: DiscriminatorOutput, real: DiscriminatorOutput) -> Tensor:
    """L1 distance of a discriminator's features, averaged over its layers (Wang et al. 2018, pix2pixHD, eq. 4)."""
    pairs = zip(fake.features, real.features, strict=True)
    distances = [_weighted_mean((ours - theirs.detach()).abs(), fake.weight) for ours, theirs in pairs]
    return torch.stack(distances).mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor, *, scale: float = 1.0) -> Tensor:
    """How much the adversarial loss must weigh to pull as hard as the rest (Esser et al. 2021, VQGAN, equation 7).

    Args:
        loss: all the rest, a scalar.
        adversarial: of the autoencoder, a scalar.
        last_layer: weights at whose gradient both are compared.
        scale: both are multiplied by it on the way back, so that gradients in float16 do not vanish.

    Returns:
        The ratio of the gradients' norms, a scalar of 0..10 000; the gradients are averaged over processes.
    """
    norms = []
    for part in (loss, adversarial):
        (gradient,) = torch.autograd.grad(scale * part, last_layer, retain_graph=True)
        norms.append(mean_over_ranks(gradient / scale).norm())
    # as in the authors' code, whose delta is 1e-4; a step that overflows in float16 is skipped by the scaler
    return torch.nan_to_num(norms[0] / (norms[1] + 1e-4), nan=0.0).clamp(0, 1e4).detach()


def last_layer(network: nn.Module) -> Tensor:
    """The weights that write the volume: ``network.last_layer``, or the last convolution of its decoder.

    Raises:
        FibldmError: the network has no convolution.
    """
    bare: Any = network.module if isinstance(network, DistributedDataParallel) else network
    if isinstance(named := getattr(bare, "last_layer", None), Tensor):
        return named
    kernels = {name: weight for name, weight in bare.named_parameters() if weight.ndim > 2}
    decoder = [weight for name, weight in kernels.items() if "decoder" in name.split(".")]
    if not kernels:
        raise FibldmError(
            f"an adaptive adversarial weight needs a convolution that writes the volume; {type(bare).__name__} has "
            "none",
            "give the network an attribute last_layer, or set adaptive: false",
        )
    return (decoder or list(kernels.values()))[-1]


def random_slices(size: Sequence[int], seeds: Tensor, count: int) -> list[Tensor]:
    """Positions of slices along every axis, integers ``(B, count)`` each, from one generator per sample.

    Args:
        size: voxels along each axis.
        seeds: one per sample, so the slices of a sample are the same in any batch.
        count: slices per axis.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return [
        torch.stack([torch.randint(length, (count,), generator=generator) for generator in generators])
        for length in size
    ]


def take_slices(volume: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Slices ``(B * N, C, ...)`` of volumes ``(B, C, X, Y, Z)`` at ``positions`` ``(B, N)`` along a spatial axis."""
    samples = torch.arange(len(volume), device=volume.device)[:, None]
    return volume.movedim(2 + axis, 1)[samples, to_device(positions, volume.device)].flatten(0, 1)


def _discriminate(network: nn.Module, volume: Tensor, weight: Tensor) -> DiscriminatorOutput:
    *features, logits = network(volume)
    return DiscriminatorOutput(logits, features, weight)


def _as_seen(volume: Tensor, target: Weighted) -> Tensor:
    # padding looks the same in both, so nobody can tell by it
    return torch.where(target.weight > 0, volume, target.value)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over places, each weighing as much as the part of the volume that it stands for."""
    pool: Any = F.adaptive_avg_pool2d if values.ndim == 4 else F.adaptive_avg_pool3d
    share = pool(weight.to(values.dtype), tuple(values.shape[2:])).expand_as(values)
    return (values * share).sum() / share.sum().clamp(min=1e-6)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def _check_weights(volume: float, slices: float) -> None:
    if volume < 0 or slices < 0 or not volume + slices:
        raise FibldmError(
            f"weights of discriminators must be at least 0, and one above; got {volume} (volume) and {slices} (slices)",
            "leave the adversarial configuration out to train without them",
        )
