"""Masks as conditions: what is known of each label at the latent's size, with a group of channels for *unknown*."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.autoencoder import check_divisible, shown_per_axis
from fibldm.models.conditions.condition import Case, Condition
from fibldm.models.conditions.mask_features import contour, signed_distance

Resize = Literal["fraction", "nearest"]
Feature = Literal["signed_distance", "contour"]

_SHOWN = 10  # labels in an error


@dataclass(frozen=True)
class MaskEncoding(Condition):
    """A label volume as the fraction of every latent cell that each label fills, and perhaps a feature of its shape.

    Fractions keep each label's volume exactly, so thin labels survive. Groups of channels come in the order of
    ``labels``; then comes *unknown*, where nothing is asked for; then, where there is a feature, its groups, again in
    the order of ``labels``. The null condition is "all unknown". What a network sees of this is up to the modules of
    `fibldm.models.conditions.mask_encoders`.

    Attributes:
        labels: the label values of the dataset, background first.
        compression: voxels per latent cell along each axis; one number is for three axes.
        detail: parts that a cell is cut into along each axis that is compressed, each with a fraction (a channel) of
            its own; 1 says how much of a label is in a cell, ``compression`` says where to the voxel.
        resize: "fraction" is the mean over a part; "nearest" asks the voxel in its middle, as resizing a label volume
            does, and loses what is thin.
        feature: "signed_distance" (see `mask_features.signed_distance`), "contour" (see `mask_features.contour`), or
            None.
        spacing: of the voxels in mm, for distances.
        reach: distance in mm at which signed distances end.

    Raises:
        FibldmError: ``detail`` does not divide ``compression``, or a choice is unknown.
    """

    labels: tuple[int, ...]
    compression: int | Sequence[int]
    detail: int = 1
    resize: Resize = "fraction"
    feature: Feature | None = None
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    reach: float = 16.0

    what = "a mask"
    kept_as = torch.float16  # the largest of all that is kept

    def __post_init__(self) -> None:
        if self.detail < 1 or any(factor % part for factor, part in zip(self.factors, self.pieces, strict=True)):
            shown = shown_per_axis(self.factors)
            raise FibldmError(f"mask detail must divide the compression {shown}; got {self.detail}")
        if self.resize not in get_args(Resize):
            raise unknown_choice("mask resize", self.resize, get_args(Resize))
        if self.feature is not None and self.feature not in get_args(Feature):
            raise unknown_choice("mask feature", self.feature, get_args(Feature))

    @property
    def factors(self) -> tuple[int, ...]:
        """Voxels per latent cell, one for each axis."""
        return (self.compression,) * 3 if isinstance(self.compression, int) else tuple(self.compression)

    @property
    def parts(self) -> tuple[str, ...]:
        """The labels."""
        return tuple(map(str, self.labels))

    @property
    def pieces(self) -> tuple[int, ...]:
        """Parts of a latent cell along each axis; an axis that is not compressed has one."""
        return tuple(1 if factor == 1 else self.detail for factor in self.factors)

    @property
    def known_channels(self) -> int:
        """Channels of the fractions of all labels and of unknown."""
        return (len(self.labels) + 1) * math.prod(self.pieces)

    @property
    def channels(self) -> int:
        """Number of channels of the encoded mask: parts of a cell, for each of ``L`` labels, unknown, and features."""
        return self.known_channels + (len(self.labels) * math.prod(self.pieces) if self.feature else 0)

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (self.channels, *cells)

    def encode(self, labels: Tensor) -> Tensor:
        """The encoded mask ``(B, channels, x, y, z)`` of integer labels ``(B, 1, X, Y, Z)``.

        Fractions and contours lie in ``[0, 1]``, signed distances in ``[-1, 1]``.

        Raises:
            FibldmError: the mask holds a label that the dataset does not have, or an axis is not divisible by the
                compression.
        """
        self.read(labels)
        check_divisible(labels.shape[2:], self.factors, "autoencoder compression")
        one_hot = torch.stack([labels[:, 0] == value for value in (*self.labels, UNKNOWN_LABEL)], dim=1)
        known = self._to_cells(one_hot.float(), self.resize)
        if self.feature is None:
            return known
        shapes = one_hot[:, :-1]
        of_shape = contour(shapes) if self.feature == "contour" else signed_distance(shapes, self.spacing, self.reach)
        return torch.cat([known, self._to_cells(of_shape, "fraction")], dim=1)

    def encode_case(self, case: Case) -> Tensor:
        return self.encode(case.labels[None])[0]

    def read(self, labels: Tensor) -> Tensor:
        """The same labels; those of another dataset are refused.

        Raises:
            FibldmError: lists the labels that came and the ones there are.
        """
        found = set(torch.unique(labels).tolist())
        unexpected = sorted(found - set(self.labels) - {UNKNOWN_LABEL})
        if unexpected:
            shown = ", ".join(map(str, unexpected[:_SHOWN])) + (", ..." if len(unexpected) > _SHOWN else "")
            raise FibldmError(
                f"a mask may hold the labels {list(self.labels)} or {UNKNOWN_LABEL} (unknown); got also [{shown}]",
                "map the labels of the mask to those of the training data; or is this an image?",
            )
        return labels

    def shares(self, encoded: Tensor) -> Tensor:
        """How much of each latent cell every label and, last, *unknown* fills: ``(B, L + 1, x, y, z)``, summing to 1.

        Args:
            encoded: mask ``(B, channels, x, y, z)``.
        """
        return self._known(encoded).mean(dim=2)

    def chances(self, dropout: float | Mapping[str, float]) -> Tensor:
        """As of any condition; but the background is no label of its own, and goes with the others."""
        chances = super().chances(dropout)
        chances[0] = 0
        return chances

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        """Move labels to unknown, as if nobody had drawn them: what they fill, and the background that may hide them.

        A mask may be the largest tensor of a batch; this takes no second one of its size.

        Args:
            encoded: mask ``(B, channels, x, y, z)``; is changed and given back.
            dropped: ``(B, L)`` booleans, one per label; the background, which comes first, goes with any of them.
        """
        away = dropped.clone()
        away[:, 0] = dropped.any(dim=1)
        known = self._known(encoded)
        away = away.view(*away.shape, *[1] * (known.ndim - 2))
        kept = known[:, :-1].mul_(~away)
        known[:, -1] = 1 - kept.sum(dim=1)
        if self.feature is not None:
            features = encoded[:, self.known_channels :].unflatten(1, (len(self.labels), -1))
            features.masked_fill_(away, -1.0 if self.feature == "signed_distance" else 0.0)
        return encoded

    def all_but(self, labels: Iterable[int]) -> Tensor:
        """What `drop` takes away to leave some labels only: ``(1, L)`` booleans.

        Raises:
            FibldmError: the dataset has no such label.
        """
        kept = {int(label) for label in labels}
        if not kept or not kept <= set(self.labels):
            raise FibldmError(
                f"labels must be some of {list(self.labels)}; got {sorted(kept)}", "change the list of labels"
            )
        return torch.tensor([[label not in kept | set(self.labels[:1]) for label in self.labels]])

    def _known(self, encoded: Tensor) -> Tensor:
        """Fractions by label and part: ``(B, L + 1, parts, x, y, z)``."""
        return encoded[:, : self.known_channels].unflatten(1, (len(self.labels) + 1, -1))

    def _to_cells(self, volume: Tensor, resize: Resize) -> Tensor:
        """``(B, N, X, Y, Z)`` as ``(B, N * parts, x, y, z)``."""
        steps = [factor // part for factor, part in zip(self.factors, self.pieces, strict=True)]
        axes = len(steps)
        if resize == "nearest":
            middles = tuple(slice(step // 2, None, step) for step in steps)
            cells = volume[:, :, *middles]
        else:
            cells = {2: F.avg_pool2d, 3: F.avg_pool3d}[axes](volume, steps)
        for axis in reversed(range(axes)):
            cells = cells.unflatten(2 + axis, (-1, self.pieces[axis]))
        order = (0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2))
        return cells.permute(order).flatten(1, 1 + axes)
