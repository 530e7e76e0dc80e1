"""What the stages minimise."""

from typing import Literal, NamedTuple

import torch
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.errors import unknown_choice
from fibldm.models.autoencoder import Posterior, Reconstruction

Norm = Literal["l1", "l2", "huber"]


class Weighted(NamedTuple):
    """A target ``(B, C, ...)`` and the weight ``(B, 1, ...)`` of its places; padding weighs 0."""

    value: Tensor
    weight: Tensor


def weighted_error(prediction: Tensor, target: Weighted, norm: Norm) -> Tensor:
    """The mean error over places, each weighing as its weight says; a scalar."""
    if norm == "l1":
        error = (prediction - target.value).abs()
    elif norm == "l2":
        error = (prediction - target.value).square()
    elif norm == "huber":
        error = F.huber_loss(prediction, target.value, reduction="none")
    else:
        raise unknown_choice("norm", norm, ("l1", "l2", "huber"))
    weight = target.weight.expand_as(error)
    return (error * weight).sum() / weight.sum().clamp(min=1e-6)


def kl_divergence(posterior: Posterior) -> Tensor:
    """KL divergence from the standard normal per latent value, averaged (Kingma & Welling 2014, appendix B)."""
    mean, std = posterior
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.clamp(min=1e-12).log()).mean()


class AutoencoderLoss(nn.Module):
    """Reconstruction error, KL divergence, and the amplitude of the spectrum.

    Args:
        norm: of the reconstruction error.
        kl_weight: of the KL divergence; small, as in Rombach et al. 2022, appendix G.
        spectral_weight: of the L1 distance between the amplitudes of the Fourier transforms, which keeps texture that
            a plain L1 loss blurs away; 0 leaves it out.
    """

    def __init__(self, norm: Norm = "l1", *, kl_weight: float = 1e-6, spectral_weight: float = 0.0) -> None:
        super().__init__()
        self.norm: Norm = norm
        self.kl_weight, self.spectral_weight = kl_weight, spectral_weight

    def forward(self, prediction: Reconstruction, target: Weighted) -> Tensor:
        """A scalar, for a reconstruction of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``."""
        loss = weighted_error(prediction.volume, target, self.norm)
        loss = loss + self.kl_weight * kl_divergence(prediction.posterior)
        if self.spectral_weight:
            loss = loss + self.spectral_weight * spectral_distance(prediction.volume, target)
        return loss


def spectral_distance(volume: Tensor, target: Weighted) -> Tensor:
    """L1 distance of Fourier amplitudes over the three axes, where the weight is not 0."""
    inside = (target.weight > 0).to(volume.dtype)
    axes = tuple(range(2, volume.ndim))
    amplitudes = [
        torch.fft.rfftn(part.float() * inside, dim=axes, norm="ortho").abs() for part in (volume, target.value)
    ]
    return F.l1_loss(*amplitudes)


class DenoisingLoss(nn.Module):
    """The error of the network's output against the training target.

    Args:
        norm: "l2" is that of the papers; "l1" and "huber" care less about outliers.
    """

    def __init__(self, norm: Norm = "l2") -> None:
        super().__init__()
        self.norm: Norm = norm

    def forward(self, prediction: Tensor, target: Weighted) -> Tensor:
        """A scalar, for outputs ``(B, C, x, y, z)``."""
        return weighted_error(prediction, target, self.norm)


class SegmentationLoss(nn.Module):
    """Dice loss plus cross entropy over the voxels that count, as `monai.losses.DiceCELoss` where all of them do.

    Dice is averaged over samples and labels, background included (Milletari et al. 2016, "V-Net", equation 3, without
    the squares; Isensee et al. 2021, "nnU-Net", add the cross entropy).
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss()

    def forward(self, prediction: Tensor, target: Weighted) -> Tensor:
        """A scalar, for logits ``(B, L, X, Y, Z)`` and channel numbers ``(B, 1, X, Y, Z)``, integers in 0..L-1."""
        labels = one_hot(target.value, prediction.shape[1])
        dice: Tensor = self.dice(prediction.softmax(dim=1) * target.weight, labels * target.weight)
        error = F.cross_entropy(prediction, target.value[:, 0], reduction="none")[:, None]
        return dice + (error * target.weight).sum() / target.weight.sum().clamp(min=1e-6)
