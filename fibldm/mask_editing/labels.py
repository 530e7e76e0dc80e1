"""Edits of one label of a mask. Each takes a mask in canonical order and gives one, with what was done."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fibldm.errors import FibldmError
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.regions import (
    Labels,
    Region,
    distance_inside,
    distance_outside,
    first,
    millilitres,
    nearest_other,
    shifted,
    steps_of,
    voxels_of,
)
from fibldm.volumes.grid import Volume

Done = dict[str, Any]


class Edit(Protocol):
    """One edit of a mask."""

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        """The labels after it, and what it did.

        Args:
            mask: uint8 in canonical order; it is not changed.
            anatomy: of the training set.
            rng: of this edit of this mask.

        Raises:
            FibldmError: it cannot be done on this mask.
        """


@dataclass(frozen=True)
class Grow:
    """A label grown (shrunk, where ``mm`` is below 0) by a distance, into the labels that it may lie in.

    Attributes:
        label: name or number.
        mm: distance between voxel centres.
        over: the labels it may grow into; None is what training masks say.
    """

    label: str
    mm: float
    over: tuple[str, ...] | None = None

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        value, region = present(mask, anatomy, self.label)
        if self.mm < 0:
            return given_up(mask, anatomy, value, region & (distance_inside(region, mask.grid) <= -self.mm))
        within = distance_outside(region, mask.grid) <= self.mm
        return _won(mask, anatomy, value, within & ~region, self.over)


@dataclass(frozen=True)
class ToVolume:
    """A label grown or shrunk to a volume, layer by layer.

    Attributes:
        label: name or number.
        ml: the volume that it is to have.
        over: as of `Grow`.
    """

    label: str
    ml: float
    over: tuple[str, ...] | None = None

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        value, region = present(mask, anatomy, self.label)
        wanted, there = voxels_of(self.ml, mask.grid), int(region.sum())
        if wanted < 1:
            raise FibldmError(
                f"a volume must be at least one voxel, {millilitres(1, mask.grid):.2g} ml; got {self.ml:g} ml",
                "remove takes a label away",
            )
        if wanted <= there:
            outer = first(distance_inside(region, mask.grid), region, there - wanted)
            return given_up(mask, anatomy, value, outer)
        room = np.isin(mask.array, list(hosts_of(anatomy, value, self.over)))
        if (free := int(room.sum())) < wanted - there:
            raise FibldmError(
                f"{anatomy.names[value]!r} cannot have {self.ml:g} ml: with all that it may lie in "
                f"({anatomy.listed(hosts_of(anatomy, value, self.over))}) it has "
                f"{millilitres(there + free, mask.grid):.3g} ml",
                "ask for less, or say where it may lie: over=LABEL,LABEL",
            )
        layer = first(distance_outside(region, mask.grid), room, wanted - there)
        return _won(mask, anatomy, value, layer, self.over)


@dataclass(frozen=True)
class Remove:
    """A label taken away; what surrounds it closes the gap."""

    label: str

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        value, region = present(mask, anatomy, self.label)
        labels = mask.array.copy()
        labels[region] = nearest_other(mask, region)
        return labels, done(mask, labels, anatomy, value)


@dataclass(frozen=True)
class Move:
    """A label, all of it, moved or copied to another place where it may lie.

    Attributes:
        label: name or number.
        by: mm towards R, A, S; the nearest whole voxels are taken.
        keep: whether it also stays where it was: a copy.
        over: as of `Grow`.
    """

    label: str
    by: tuple[float, float, float]
    keep: bool = False
    over: tuple[str, ...] | None = None

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        value, region = present(mask, anatomy, self.label)
        steps, got = steps_of(self.by, mask.grid)
        if not any(steps):
            raise FibldmError(
                f"{anatomy.names[value]!r} must move by at least one voxel; {_shown(self.by)} mm is none",
                "move it further",
            )
        moved, lost = shifted(region, steps)
        if lost:
            raise FibldmError(
                f"{anatomy.names[value]!r} would leave the volume with {lost} of {int(region.sum())} voxels",
                "move it less",
            )
        labels = mask.array.copy()
        if not self.keep:
            labels[region] = nearest_other(mask, region)
        put(labels, moved, value, anatomy, self.over)
        return labels, done(mask, labels, anatomy, value) | {"moved_by_mm": got}


def present(mask: Volume, anatomy: Anatomy, label: str) -> tuple[int, Region]:
    """Value and voxels of a label that the mask must have.

    Raises:
        FibldmError: there is no such label, or the mask has none of it.
    """
    value = anatomy.label(label)
    region: Region = mask.array == value
    if not region.any():
        raise FibldmError(f"a mask must have a label to edit it; this one has no {anatomy.names[value]!r}")
    return value, region


def hosts_of(anatomy: Anatomy, value: int, over: tuple[str, ...] | None) -> frozenset[int]:
    """The labels that one may take the place of; `over` names them in place of what training masks say."""
    if over is None:
        return anatomy.host_values(value)
    names = {anatomy.names.get(0, "background"), "background", "0"}
    return frozenset(0 if name in names else anatomy.label(name) for name in over)


def put(labels: Labels, region: Region, value: int, anatomy: Anatomy, over: tuple[str, ...] | None) -> None:
    """Write a label to a region, in place.

    Raises:
        FibldmError: another label lies there that it must not take the place of.
    """
    hosts = hosts_of(anatomy, value, over)
    below = np.bincount(labels[region], minlength=256)
    if wrong := [other for other in np.flatnonzero(below).tolist() if other not in hosts and other != value]:
        found = ", ".join(f"{int(below[other])} of {anatomy.listed([other])}" for other in wrong)
        raise FibldmError(
            f"{anatomy.names[value]!r} may lie in {anatomy.listed(hosts)}; there it would take the place of {found} "
            "(voxels)",
            "choose another place, or say what it may lie in: over=LABEL,LABEL",
        )
    labels[region] = value


def given_up(mask: Volume, anatomy: Anatomy, value: int, region: Region) -> tuple[Labels, Done]:
    """The mask without some voxels of a label, in whose place lies what is nearest.

    Raises:
        FibldmError: none would be left.
    """
    labels = mask.array.copy()
    whole = mask.array == value
    if region.sum() == whole.sum():
        raise FibldmError(f"nothing of {anatomy.names[value]!r} would be left", "shrink it less, or remove it")
    around = nearest_other(mask, whole)
    labels[region] = around[region[whole]]
    return labels, done(mask, labels, anatomy, value)


def done(before: Volume, after: Labels, anatomy: Anatomy, value: int) -> Done:
    """Label, volume before and after, and how many voxels each other label lost to it or won from it."""
    was, now = before.array == value, after == value
    won = np.bincount(before.array[now & ~was], minlength=256)
    lost = np.bincount(after[was & ~now], minlength=256)
    return {
        "label": anatomy.names[value],
        "ml": [round(millilitres(int(part.sum()), before.grid), 4) for part in (was, now)],
        "voxels_won_from": {anatomy.listed([other]): int(won[other]) for other in np.flatnonzero(won).tolist()},
        "voxels_given_to": {anatomy.listed([other]): int(lost[other]) for other in np.flatnonzero(lost).tolist()},
    }


def _won(
    mask: Volume, anatomy: Anatomy, value: int, wanted: Region, over: tuple[str, ...] | None
) -> tuple[Labels, Done]:
    """The mask with a label grown; what it may not lie in stays, and is counted."""
    hosts = hosts_of(anatomy, value, over)
    free = wanted & np.isin(mask.array, list(hosts))
    if wanted.any() and not free.any():
        raise FibldmError(
            f"{anatomy.names[value]!r} has no room: it may lie in {anatomy.listed(hosts)}, and none is next to it",
            "say what it may grow into: over=LABEL,LABEL",
        )
    labels = mask.array.copy()
    labels[free] = value
    return labels, done(mask, labels, anatomy, value) | {"voxels_held_back": int((wanted & ~free).sum())}


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
