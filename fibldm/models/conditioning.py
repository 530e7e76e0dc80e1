"""Masks as conditions: one-hot fractions at the latent's size, with a channel for *unknown*."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.autoencoder import check_divisible, shown_per_axis


@dataclass(frozen=True)
class MaskEncoding:
    """A label volume as the fraction of every latent cell that each label fills.

    Fractions keep each label's volume exactly, so thin labels survive. Groups of channels come in the order of
    ``labels``; the last group is *unknown*, where nothing is asked for. The null condition is "all unknown".

    Attributes:
        labels: the label values of the dataset, background first.
        compression: voxels per latent cell along each axis; one number is for three axes.
        detail: parts that a cell is cut into along each axis that is compressed, each with a fraction (a channel) of
            its own; 1 says how much of a label is in a cell, ``compression`` says where to the voxel.

    Raises:
        FibldmError: ``detail`` does not divide ``compression``.
    """

    labels: tuple[int, ...]
    compression: int | Sequence[int]
    detail: int = 1

    def __post_init__(self) -> None:
        if self.detail < 1 or any(factor % part for factor, part in zip(self.factors, self._parts, strict=True)):
            shown = shown_per_axis(self.factors)
            raise FibldmError(f"mask detail must divide the compression {shown}; got {self.detail}")

    @property
    def factors(self) -> tuple[int, ...]:
        """Voxels per latent cell, one for each axis."""
        return (self.compression,) * 3 if isinstance(self.compression, int) else tuple(self.compression)

    @property
    def channels(self) -> int:
        """Number of channels of the encoded mask: parts of a cell, for each of ``L`` labels and for unknown."""
        return (len(self.labels) + 1) * math.prod(self._parts)

    def encode(self, labels: Tensor) -> Tensor:
        """Fractions ``(B, channels, x, y, z)`` in ``[0, 1]``, of integer labels ``(B, 1, X, Y, Z)``.

        Raises:
            FibldmError: the mask holds a label that the dataset does not have, or an axis is not divisible by the
                compression.
        """
        self.check(labels)
        check_divisible(labels.shape[2:], self.factors, "autoencoder compression")
        one_hot = torch.stack([labels[:, 0] == value for value in (*self.labels, UNKNOWN_LABEL)], dim=1)
        axes = len(self.factors)
        pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
        cells = pool(one_hot.float(), [factor // part for factor, part in zip(self.factors, self._parts, strict=True)])
        for axis in reversed(range(axes)):
            cells = cells.unflatten(2 + axis, (-1, self._parts[axis]))
        order = (0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2))
        return cells.permute(order).flatten(1, 1 + axes)

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
        nothing[:, -math.prod(self._parts) :] = 1
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
        kept = groups[:, :-1] * ~away.view(*away.shape, *[1] * (groups.ndim - 2))
        return torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1).flatten(1, 2)

    @property
    def _parts(self) -> tuple[int, ...]:
        return tuple(1 if factor == 1 else self.detail for factor in self.factors)
