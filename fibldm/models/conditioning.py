"""Masks as conditions: one-hot fractions at the latent's size, with a channel for *unknown*."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.autoencoder import check_divisible


@dataclass(frozen=True)
class MaskEncoding:
    """A label volume as the fraction of every latent cell that each label fills.

    Fractions keep each label's volume exactly, so thin labels survive. Channel ``i`` is ``labels[i]``; the last channel
    is *unknown*, where nothing is asked for. The null condition is "all unknown".

    Attributes:
        labels: the label values of the dataset, background first.
        compression: voxels per latent cell along each axis.
    """

    labels: tuple[int, ...]
    compression: int

    @property
    def channels(self) -> int:
        """Number of channels of the encoded mask: one per label and one for unknown."""
        return len(self.labels) + 1

    def encode(self, labels: Tensor) -> Tensor:
        """Fractions ``(B, L + 1, x, y, z)`` in ``[0, 1]`` that sum to 1, of integer labels ``(B, 1, X, Y, Z)``.

        Raises:
            FibldmError: the mask holds a label that the dataset does not have, or an axis is not divisible by the
                compression.
        """
        self.check(labels)
        check_divisible(tuple(labels.shape[2:]), self.compression, "autoencoder compression")
        one_hot = torch.stack([labels[:, 0] == value for value in (*self.labels, UNKNOWN_LABEL)], dim=1)
        return F.avg_pool3d(one_hot.float(), self.compression)

    def check(self, labels: Tensor) -> None:
        """Refuse a mask with a label that the dataset does not have.

        Raises:
            FibldmError: lists the labels that came and the ones there are.
        """
        found = set(torch.unique(labels).tolist())
        unexpected = sorted(found - set(self.labels) - {UNKNOWN_LABEL})
        if unexpected:
            raise FibldmError(
                f"a mask may hold the labels {list(self.labels)} or {UNKNOWN_LABEL} (unknown); got also {unexpected}",
                "map the labels of the mask to those of the training data",
            )

    def null(self, like: Tensor) -> Tensor:
        """The condition that asks for nothing: all unknown, of the shape of ``like`` ``(B, L + 1, x, y, z)``."""
        nothing = torch.zeros_like(like)
        nothing[:, -1] = 1
        return nothing

    def drop_labels(self, fractions: Tensor, dropped: Tensor) -> Tensor:
        """Move labels to unknown, as if nobody had drawn them: what they fill, and the background that may hide them.

        Args:
            fractions: encoded mask ``(B, L + 1, x, y, z)``; not changed.
            dropped: ``(B, L)`` booleans, one per label; the background, which comes first, goes with any of them.
        """
        away = dropped.clone()
        away[:, 0] = dropped.any(dim=1)
        kept = fractions[:, :-1] * ~away[:, :, None, None, None]
        return torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1)
