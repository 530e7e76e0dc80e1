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

    Fractions keep each label's volume exactly, so thin labels survive. Groups of channels come in the order of
    ``labels``; the last group is *unknown*, where nothing is asked for. The null condition is "all unknown".

    Attributes:
        labels: the label values of the dataset, background first.
        compression: voxels per latent cell along each axis.
        detail: parts that a cell is cut into along each axis, each with a fraction (a channel) of its own; 1 says how
            much of a label is in a cell, ``compression`` says where to the voxel.

    Raises:
        FibldmError: ``detail`` does not divide ``compression``.
    """

    labels: tuple[int, ...]
    compression: int
    detail: int = 1

    def __post_init__(self) -> None:
        if self.detail < 1 or self.compression % self.detail:
            raise FibldmError(f"mask detail must divide the compression {self.compression}; got {self.detail}")

    @property
    def channels(self) -> int:
        """Number of channels of the encoded mask: ``(L + 1) * detail^3``, for the labels and for unknown."""
        return (len(self.labels) + 1) * self.detail**3

    def encode(self, labels: Tensor) -> Tensor:
        """Fractions ``(B, channels, x, y, z)`` in ``[0, 1]``, of integer labels ``(B, 1, X, Y, Z)``.

        Raises:
            FibldmError: the mask holds a label that the dataset does not have, or an axis is not divisible by the
                compression.
        """
        self.check(labels)
        check_divisible(tuple(labels.shape[2:]), self.compression, "autoencoder compression")
        one_hot = torch.stack([labels[:, 0] == value for value in (*self.labels, UNKNOWN_LABEL)], dim=1)
        fine = F.avg_pool3d(one_hot.float(), self.compression // self.detail)
        cells = fine.unflatten(4, (-1, self.detail)).unflatten(3, (-1, self.detail)).unflatten(2, (-1, self.detail))
        return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

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
        """The condition that asks for nothing: all unknown, of the shape of ``like`` ``(B, channels, x, y, z)``."""
        nothing = torch.zeros_like(like)
        nothing[:, -(self.detail**3) :] = 1
        return nothing

    def shares(self, fractions: Tensor) -> Tensor:
        """How much of each latent cell every label and, last, *unknown* fills: ``(B, L + 1, x, y, z)``, summing to 1.

        Args:
            fractions: encoded mask ``(B, channels, x, y, z)``.
        """
        return fractions.unflatten(1, (len(self.labels) + 1, -1)).mean(dim=2)

    def drop_labels(self, fractions: Tensor, dropped: Tensor) -> Tensor:
        """Move labels to unknown, as if nobody had drawn them: what they fill, and the background that may hide them.

        Args:
            fractions: encoded mask ``(B, channels, x, y, z)``; not changed.
            dropped: ``(B, L)`` booleans, one per label; the background, which comes first, goes with any of them.
        """
        away = dropped.clone()
        away[:, 0] = dropped.any(dim=1)
        groups = fractions.unflatten(1, (len(self.labels) + 1, -1))
        kept = groups[:, :-1] * ~away[:, :, None, None, None, None]
        return torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1).flatten(1, 2)
