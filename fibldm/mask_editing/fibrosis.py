"""The extent of fibrosis in a chest mask as a dial.

It spreads as usual interstitial pneumonia does: subpleural, basal and posterior first, in patches; where it is oldest,
ground glass turns into reticulation and reticulation into honeycombing. A patient's own fibrosis goes last and is where
more begins, and of one mask and seed, a larger extent holds every smaller one.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.labels import Done
from fibldm.mask_editing.regions import Labels, Region, first, millilitres
from fibldm.phantoms.fibrosis import SmoothNoise
from fibldm.volumes.grid import Grid, Volume

MOST = 0.6
"""Of the lungs; end-stage fibrosis."""

_WORDS = {
    "lungs": ("lung",),
    "ground-glass": ("ground glass", "ground-glass", "ggo"),
    "reticulation": ("reticul",),
    "honeycombing": ("honeycomb",),
}
_RIND_MM = 13.0  # in which subpleural disease fades
_PATCH_MM, _FINE_MM = 36.0, 13.0

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SetFibrosis:
    """Fibrosis brought to a fraction of the lungs, airways left out.

    Attributes:
        extent: 0 to `MOST`.
        labels: names or numbers of the labels that are ``lungs``, ``ground-glass``, ``reticulation`` and
            ``honeycombing``; those not given are found by their names. Each but the lungs may be absent.

    Raises:
        FibldmError: the extent is none.
    """

    extent: float
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.extent <= MOST:
            raise FibldmError(f"the extent of fibrosis must be 0 % to {MOST:.0%} of the lungs; got {self.extent:.4g}")

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        values = self.values(anatomy)
        kinds = [values[kind] for kind in ("honeycombing", "reticulation", "ground-glass")]
        fibrotic = [value for kind in kinds for value in kind]
        lungs = np.isin(mask.array, [*values["lungs"], *fibrotic])
        if not np.isin(mask.array, values["lungs"]).any():
            raise FibldmError(
                f"a mask needs lungs for fibrosis; it has no {anatomy.listed(frozenset(values['lungs']))}"
            )
        own = np.isin(mask.array, fibrotic)
        place = _Place.of(lungs, mask.grid, rng)
        wanted = round(self.extent * int(lungs.sum()))
        diseased = first(-(place.score + 100 * own).astype(np.float64), lungs, wanted)
        labels = _healed(mask, own, values["lungs"])
        left, counts = diseased.copy(), self._shares(wanted, kinds, mask.array, diseased)
        for kind, count in zip(kinds, counts, strict=True):
            if not kind:
                continue
            was = np.isin(mask.array, kind)
            chosen = first(-(place.age + 100 * was).astype(np.float64), left, count)
            labels[chosen] = np.where(was[chosen], mask.array[chosen], kind[0])
            left &= ~chosen
        return labels, {
            "extent": [round(float(part.sum() / lungs.sum()), 4) for part in (own, diseased)],
            "lungs_ml": round(millilitres(int(lungs.sum()), mask.grid), 2),
            "voxels": {anatomy.listed([value]): int((labels == value).sum()) for value in fibrotic},
        }

    def values(self, anatomy: Anatomy) -> dict[str, list[int]]:
        """Label values of the ``lungs`` and of each kind of fibrosis; of a kind that no label is, none.

        Raises:
            FibldmError: there are no lungs or no fibrosis among the labels, or a label is named that there is not.
        """
        if strange := sorted(set(self.labels) - set(_WORDS)):
            raise FibldmError(f"fibrosis takes {', '.join(f'{key}=' for key in _WORDS)}; got {strange[0]}=")
        found = {
            kind: [
                value
                for value, name in anatomy.names.items()
                if value and any(part in name.casefold() for part in parts)
            ]
            for kind, parts in _WORDS.items()
        }
        found |= {kind: [anatomy.label(text) for text in texts] for kind, texts in self.labels.items()}
        found["lungs"] = [
            value for value in found["lungs"] if all(value not in found[k] for k in _WORDS if k != "lungs")
        ]
        if not found["lungs"] or not any(found[kind] for kind in _WORDS if kind != "lungs"):
            raise FibldmError(
                "fibrosis needs labels of lungs and of ground glass, reticulation or honeycombing; "
                f"there are {anatomy.listed(frozenset(anatomy.names))}",
                "name them: lungs=LABEL,LABEL ground-glass=LABEL reticulation=LABEL honeycombing=LABEL",
            )
        return found

    def _shares(self, wanted: int, kinds: list[list[int]], before: Labels, diseased: Region) -> list[int]:
        """Voxels of honeycombing, reticulation and ground glass: the more extent, the more of the older."""
        severity = self.extent / MOST
        shares = [0.05 + 0.3 * severity, 0.3 + 0.1 * severity, 1.0]
        left, counts = wanted, list[int]()
        for share, kind in zip(shares, kinds, strict=True):
            there = int((np.isin(before, kind) & diseased).sum())
            last = not any(kinds[len(counts) + 1 :])
            count = 0 if not kind else left if last else min(left, max(round(share * wanted), there))
            counts.append(count)
            left -= count
        return counts


@dataclass(frozen=True)
class _Place:
    """How early each voxel of the lungs is taken, and how old the disease is there; the larger, the earlier."""

    score: Floats
    age: Floats

    @classmethod
    def of(cls, lungs: Region, grid: Grid, rng: np.random.Generator) -> "_Place":
        fields = [SmoothNoise.draw(step, rng) for step in (_PATCH_MM, _FINE_MM, 22.0)]
        points = grid.affine[:3, :3] @ np.argwhere(lungs).T
        low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
        _, y, z = (points - low) / np.maximum(high - low, 1e-6)
        rind = np.exp(-_pleural_depth(lungs, grid)[lungs] / _RIND_MM)
        basal = 1 / (1 + np.exp((z - 0.3) / 0.12))
        coarse, fine, kinds = (noise(points) for noise in fields)
        score, age = np.zeros(lungs.shape, np.float32), np.zeros(lungs.shape, np.float32)
        score[lungs] = 1.7 * rind + basal - y + 0.45 * coarse + 0.27 * fine
        age[lungs] = 1.3 * rind + 0.8 * basal + 0.4 * kinds
        return cls(score, age)


def _pleural_depth(lungs: Region, grid: Grid) -> Floats:
    """mm to the costal or diaphragmatic pleura: to what lies outside of the lungs, but not between them."""
    filled = ndimage.binary_fill_holes(lungs)
    middle = np.argwhere(lungs)[:, 0].mean()
    right = np.arange(lungs.shape[0])[:, None, None] > middle
    left_seen = np.maximum.accumulate(lungs & ~right, axis=0)
    right_seen = np.maximum.accumulate((lungs & right)[::-1], axis=0)[::-1]
    between = left_seen & right_seen & ~lungs
    depth: Floats = ndimage.distance_transform_edt(filled | between, sampling=grid.spacing).astype(np.float32)
    return depth


def _healed(mask: Volume, own: Region, lungs: list[int]) -> Labels:
    """The labels with the nearest lung in place of fibrosis."""
    labels = mask.array.copy()
    if own.any():
        indices = ndimage.distance_transform_edt(
            ~np.isin(mask.array, lungs), sampling=mask.grid.spacing, return_distances=False, return_indices=True
        )
        labels[own] = mask.array[tuple(indices)][own]
    return labels
