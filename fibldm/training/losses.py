"""What the stages minimise."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.autoencoder import Posterior, Reconstruction
from fibldm.models.process import Process, Target, Variance, VariancePreserving
from fibldm.training.variational_bound import VariationalBound

Norm = Literal["l1", "l2", "huber", "charbonnier"]

# Where the Charbonnier error turns from square to straight, in the range of [-1, 1].
CHARBONNIER_EPSILON = 1e-3


class Weighted(NamedTuple):
    """A target and how much its places count.

    Attributes:
        value: ``(B, C, ...)``.
        weight: of its places in a mean over them, ``(B, 1, ...)``; padding weighs 0.
        factor: of the errors of a sample, ``(B, 1, ...)``, whatever the other samples of the batch have; None for 1.
        t: times of the samples in (0, 1], ``(B,)``, on the CPU; None where there are none.
        importance: how much less often the time of a sample is drawn than all times alike, times what a sample of a
            prior weighs, ``(B, 1, ...)``; weighs everything of it; None for 1.
        merged: of a segmentation, classes that nobody told from the first one, ``(B, L)`` booleans; None where all are
            told apart.
    """

    value: Tensor
    weight: Tensor
    factor: Tensor | None = None
    t: Tensor | None = None
    importance: Tensor | None = None
    merged: Tensor | None = None

    def times(self) -> Tensor:
        """The times of the samples, where the loss needs them.

        Raises:
            FibldmError: there are none.
        """
        if self.t is None:
            raise FibldmError("a loss that depends on time needs the times of the samples; got none")
        return self.t

    def sample(self, number: int) -> "Weighted":
        """One sample, as a batch of one."""
        return Weighted(*(None if part is None else part[number : number + 1] for part in self))  # type: ignore[arg-type]


def weighted_error(prediction: Tensor, target: Weighted, norm: Norm) -> Tensor:
    """The mean error over places, each weighing as its weight says; a scalar."""
    if norm == "l1":
        error = (prediction - target.value).abs()
    elif norm == "l2":
        error = (prediction - target.value).square()
    elif norm == "huber":
        error = F.huber_loss(prediction, target.value, reduction="none")
    elif norm == "charbonnier":
        # Charbonnier et al. 1994
        error = ((prediction - target.value).square() + CHARBONNIER_EPSILON**2).sqrt()
    else:
        raise unknown_choice("norm", norm, get_args(Norm))
    return _mean(error, target)


def cross_entropy(logits: Tensor, target: Weighted) -> Tensor:
    """In nats per place, each weighing as its weight says; a scalar.

    Args:
        logits: ``(B, L, ...)``.
        target: shares of the labels, as ``2 p - 1``.
    """
    shares = (target.value + 1) / 2
    return _mean(-(shares * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True), target)


def _mean(values: Tensor, target: Weighted) -> Tensor:
    weight = target.weight.expand_as(values)
    for factor in (target.factor, target.importance):
        values = values if factor is None else values * factor
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)


def kl_divergence(posterior: Posterior) -> Tensor:
    """KL divergence from the standard normal per latent value, averaged (Kingma & Welling 2014, appendix B)."""
    mean, std = posterior
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.clamp(min=1e-12).log()).mean()


class AutoencoderLoss(nn.Module):
    """What stage 1 minimises: the error of the volume, and how far its latents are from what later stages want.

    A term of weight 0 is neither computed nor built.

    Args:
        norm: of the reconstruction error; "cross_entropy" is that of masks, see `fibldm.models.label_autoencoder`.
        kl_weight: of the KL divergence; small, as in Rombach et al. 2022, appendix G.
        codebook_weight: of the codebook and commitment loss, where the autoencoder has a codebook instead.
        spectral_weight: of the L1 distance between the amplitudes of the Fourier transforms, which keeps texture that
            a plain L1 loss blurs away.
        perceptual: distance of volume and target in features, see `fibldm.training.perceptual`.
        perceptual_weight: of that distance.
        log_variance: learn one logarithm of the variance of the volume's error, which balances it against the other
            terms (Rombach et al. 2022, released code).

    Raises:
        FibldmError: a perceptual weight comes without a distance.
    """

    def __init__(
        self,
        norm: Norm | Literal["cross_entropy"] = "l1",
        *,
        kl_weight: float = 1e-6,
        codebook_weight: float = 1.0,
        spectral_weight: float = 0.0,
        perceptual: Callable[[Tensor, Weighted], Tensor] | None = None,
        perceptual_weight: float = 0.0,
        log_variance: bool = False,
    ) -> None:
        super().__init__()
        if perceptual_weight and perceptual is None:
            raise FibldmError(f"a perceptual weight of {perceptual_weight} needs a perceptual distance; got none")
        self.norm: Norm | Literal["cross_entropy"] = norm
        self.perceptual = perceptual
        self.of_volume = {"spectral": spectral_weight, "perceptual": perceptual_weight}
        self.of_latent = {"kl": kl_weight, "codebook": codebook_weight}
        # without axes, so that it may stay where it is when the volumes are on another device
        self.log_variance = nn.Parameter(torch.zeros(())) if log_variance else None

    def terms(self, prediction: Reconstruction, target: Weighted) -> dict[str, Tensor]:
        """Every term without its weight, by name, for a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``; scalars."""
        if self.norm == "cross_entropy":
            terms = {"reconstruction": cross_entropy(prediction.volume, target)}
        else:
            terms = {"reconstruction": weighted_error(prediction.volume, target, self.norm)}
        if prediction.quantisation is not None:
            terms["codebook"], terms["perplexity"] = prediction.quantisation
        elif self.of_latent["kl"]:
            terms["kl"] = kl_divergence(prediction.posterior)
        if self.of_volume["spectral"]:
            terms["spectral"] = spectral_distance(prediction.volume, target)
        if self.perceptual is not None and self.of_volume["perceptual"]:
            terms["perceptual"] = self.perceptual(prediction.volume, target)
        return terms

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """What is trained on, a scalar."""
        volume = _weighted_sum(terms["reconstruction"], self.of_volume, terms)
        if self.log_variance is not None:
            volume = volume / self.log_variance.exp() + self.log_variance
        return _weighted_sum(volume, self.of_latent, terms)

    def forward(self, prediction: Reconstruction, target: Weighted) -> Tensor:
        """What validation compares epochs by: the weighted sum without the learned variance; a scalar."""
        terms = self.terms(prediction, target)
        return _weighted_sum(terms["reconstruction"], {**self.of_volume, **self.of_latent}, terms)


def _weighted_sum(start: Tensor, weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    for name, weight in weights.items():
        start = start + weight * terms[name] if name in terms and weight else start
    return start


def spectral_distance(volume: Tensor, target: Weighted) -> Tensor:
    """L1 distance of Fourier amplitudes over the three axes, where the weight is not 0."""
    inside = (target.weight > 0).to(volume.dtype)
    axes = tuple(range(2, volume.ndim))
    amplitudes = [
        torch.fft.rfftn(part.float() * inside, dim=axes, norm="ortho").abs() for part in (volume, target.value)
    ]
    return F.l1_loss(*amplitudes)


class DenoisingLoss(nn.Module):
    """The error of the network's output against the training target, and how well the network knows that error.

    With a variance to learn, the second half of the network's 2C channels is trained by a likelihood with the mean held
    (the hybrid objective of Nichol & Dhariwal 2021, section 3.1), in one of two ways:

    * free: ``log Var[target | z_t]``, by the Gaussian likelihood of ``z_0``, so that any grid of sampling times can use
      it, as in Bao et al. 2022. ``z_0`` is affine in the target, so the likelihood is the target's own but for a
      constant, and what the network has to say stays near 0, where that of ``z_0`` falls with sigma.
    * interpolated: through a sigmoid the share ``v`` of the way from ``beta-tilde`` to ``beta`` of a step, by the
      variational bound of all steps, in bits per value (theirs; they let ``v`` leave [0, 1]). The part of the bound
      that no weight changes, that of the last noise, is left out. It is the mean over times times the number of steps,
      which is the bound where times are uniform.

    Args:
        norm: "l2" is that of the papers; "l1" and "huber" care less about outliers.
        variance_weight: of that likelihood; 0 learns no variance, 0.001 is that of Nichol & Dhariwal.
        process: the diffusion process; needed where a variance is learned.
        variance: "free" or "interpolated".
        target: the training target; needed for the bound.
        vlb_steps: of the bound; None takes those of the process.
        log_variance: of the error by time, see `fibldm.training.uncertainty.LogVariance`, by which times are weighed;
            None leaves it out.

    Raises:
        FibldmError: the weight is negative, the process is not variance-preserving, there is no such variance, or the
            bound lacks something.
    """

    def __init__(
        self,
        norm: Norm = "l2",
        *,
        variance_weight: float = 0.0,
        process: Process | None = None,
        variance: Variance = "free",
        target: Target | None = None,
        vlb_steps: int | None = None,
        log_variance: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= variance_weight < math.inf:
            raise FibldmError(f"variance_weight must be a number of at least 0; got {variance_weight}")
        if variance_weight and not isinstance(process, VariancePreserving):
            raise FibldmError(
                f"a learned variance needs a variance-preserving process; got {type(process).__name__}",
                "choose fibldm.models.process.VariancePreserving, or variance_weight 0",
            )
        self.norm: Norm = norm
        self.variance_weight, self.variance = variance_weight, _checked(variance)
        self.log_variance = log_variance
        self.bound: VariationalBound | None = None
        if variance == "interpolated" and isinstance(process, VariancePreserving):
            self.bound = VariationalBound(process, target, process.steps if vlb_steps is None else vlb_steps)

    def terms(self, prediction: Tensor, target: Weighted) -> dict[str, Tensor]:
        """Every term without its weight, by name, for outputs ``(B, C or 2C, x, y, z)``; scalars.

        ``denoising`` is the error; ``scaled`` the same over what is expected of it at its time, ``log_variance`` the
        mean logarithm of that; ``variance`` the likelihood in nats per value, or ``vlb`` the bound in bits.

        Raises:
            FibldmError: the network has not as many channels as the target, or twice as many for a variance.
        """
        mean, spread = self._parts(prediction, target.value.shape[1])
        terms = {"denoising": weighted_error(mean, target, self.norm)}
        if self.log_variance is not None:
            expected = _per_sample(self.log_variance(target.times()), target.value)
            factor = (-expected).exp() if target.factor is None else target.factor * (-expected).exp()
            terms["scaled"] = weighted_error(mean, target._replace(factor=factor), self.norm)
            terms["log_variance"] = _mean(expected.expand_as(target.weight), target._replace(factor=None))
        if spread is not None and self.bound is not None:
            error = (target.value - mean.detach()).square()
            terms["vlb"] = _mean(self.bound.bits(error, spread.sigmoid(), target.times()), target._replace(factor=None))
        elif spread is not None:
            terms["variance"] = gaussian_likelihood(mean.detach(), spread, target)
        return terms

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """What is trained on, a scalar."""
        weights = {"log_variance": 1.0, "variance": self.variance_weight, "vlb": self.variance_weight}
        return _weighted_sum(terms.get("scaled", terms["denoising"]), weights, terms)

    @torch.no_grad()
    def by_sample(self, prediction: Tensor, target: Weighted) -> Tensor:
        """What the network is trained on, of each sample by itself and without its importance; ``(B,)``."""
        terms = (
            self.terms(prediction[number : number + 1], target.sample(number)._replace(importance=None))
            for number in range(len(prediction))
        )
        return torch.stack(
            [self.objective({**part, "log_variance": part["denoising"].new_zeros(())}) for part in terms]
        )

    def forward(self, prediction: Tensor, target: Weighted) -> Tensor:
        """What validation compares epochs by: the error without the likelihood; a scalar.

        Raises:
            FibldmError: as `terms`.
        """
        mean, _ = self._parts(prediction, target.value.shape[1])
        return weighted_error(mean, target, self.norm)

    def _parts(self, prediction: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        expected = 2 * channels if self.variance_weight else channels
        if prediction.shape[1] != expected:
            raise FibldmError(
                f"a network for targets of {channels} channels must give {expected} with variance_weight "
                f"{self.variance_weight:g}; got {prediction.shape[1]}",
                "put configuration learned_variance (or learned_variance_vlb) after both stages, 2 and 3, or neither",
            )
        return prediction[:, :channels], prediction[:, channels:] if self.variance_weight else None


def _checked(variance: Variance) -> Variance:
    if variance not in get_args(Variance):
        raise unknown_choice("variance", variance, get_args(Variance))
    return variance


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def gaussian_likelihood(mean: Tensor, log_variance: Tensor, target: Weighted) -> Tensor:
    """Negative log likelihood of the target in nats per value but for ``log(2 pi) / 2``, each place as it weighs."""
    nats = (log_variance + (target.value - mean).square() * (-log_variance).exp()) / 2
    return _mean(nats, target)


class SegmentationLoss(nn.Module):
    """Dice loss plus cross entropy over the voxels that count, as `monai.losses.DiceCELoss` where all of them do.

    Dice is averaged over samples and labels, background included (Milletari et al. 2016, "V-Net", equation 3, without
    the squares; Isensee et al. 2021, "nnU-Net", add the cross entropy).

    Where labels of a sample were not annotated, its background may be any of them: their probabilities count together,
    as one class, in both terms (Shi et al. 2021, "Marginal loss and exclusion loss for partially supervised multi-organ
    segmentation", equations 3 and 4; a label-set loss of Fidon et al. 2021).
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice, self.dice_by_class = DiceLoss(), DiceLoss(reduction="none")

    def forward(self, prediction: Tensor, target: Weighted) -> Tensor:
        """A scalar, for logits ``(B, L, X, Y, Z)`` and channel numbers ``(B, 1, X, Y, Z)``, integers in 0..L-1."""
        if target.merged is not None:
            return self._marginal(prediction, target, target.merged)
        labels = one_hot(target.value, prediction.shape[1])
        dice: Tensor = self.dice(prediction.softmax(dim=1) * target.weight, labels * target.weight)
        error = F.cross_entropy(prediction, target.value[:, 0], reduction="none")[:, None]
        return dice + (error * target.weight).sum() / target.weight.sum().clamp(min=1e-6)

    def _marginal(self, prediction: Tensor, target: Weighted, merged: Tensor) -> Tensor:
        logs = marginal_log_probabilities(prediction, merged)
        told_apart = (~merged).to(logs.dtype)
        told_apart[:, 0] = 1  # what is merged, as one class
        labels = one_hot(target.value, prediction.shape[1])
        by_class = self.dice_by_class(logs.exp() * target.weight, labels * target.weight).flatten(1)
        dice: Tensor = (by_class * told_apart).sum() / told_apart.sum()
        error = F.nll_loss(logs, target.value[:, 0], reduction="none")[:, None]
        return dice + (error * target.weight).sum() / target.weight.sum().clamp(min=1e-6)


def marginal_log_probabilities(logits: Tensor, merged: Tensor) -> Tensor:
    """Logarithms of the probabilities ``(B, L, ...)``, the first one that of all classes merged with it.

    Args:
        logits: ``(B, L, ...)``.
        merged: ``(B, L)`` booleans, the first of each sample True.
    """
    logs = logits.log_softmax(dim=1)
    outside = ~_per_class(merged, logits)
    together = logs.masked_fill(outside, -math.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([together, logs[:, 1:]], dim=1)


def _per_class(values: Tensor, like: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (like.ndim - 2))
