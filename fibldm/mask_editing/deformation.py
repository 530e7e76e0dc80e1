"""A whole mask bent, by no more than the patients of the training set differ from each other."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.labels import Done
from fibldm.mask_editing.regions import Labels
from fibldm.volumes.grid import Volume

_LATTICE = 5
"""Points along each axis at which the bending is drawn; splines lie between."""
_FARTHEST = 2.0
"""Standard deviations; what is drawn further out is brought back."""
_LEAST_JACOBIAN = 0.2
"""To how much of its volume tissue may shrink; at 0 it folds."""


@dataclass(frozen=True)
class Deform:
    """Each axis scaled and the whole bent, by normal draws with the standard deviations of the training masks.

    What comes from outside of the mask's field of view is *unknown*.

    Attributes:
        amount: factor on these standard deviations, above 0 up to 2.

    Raises:
        FibldmError: the amount is none.
    """

    amount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.amount <= 2:
            raise FibldmError(f"a mask is deformed by more than 0 up to 2 standard deviations; got {self.amount:g}")

    def __call__(self, mask: Volume, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Labels, Done]:
        if anatomy.variation is None:
            raise FibldmError("deforming needs at least two training masks, to know how patients differ")
        draws = np.clip(rng.standard_normal(3), -_FARTHEST, _FARTHEST)
        scale = np.exp(self.amount * draws * anatomy.variation.scale)
        most = self.amount * np.array(anatomy.variation.shift)
        bend = _smooth_field(mask.array.shape, rng) * (most / mask.grid.spacing)[:, None, None, None]
        middle = _middle(mask.array)
        bend = _without_folds(bend, scale)
        places = np.indices(mask.array.shape, dtype=np.float32) - middle[:, None, None, None]
        places = places / scale[:, None, None, None] + middle[:, None, None, None] + bend
        labels: Labels = ndimage.map_coordinates(
            mask.array, places, order=0, mode="grid-constant", cval=UNKNOWN_LABEL, output=np.uint8
        )
        if not set(np.unique(mask.array)) <= set(np.unique(labels)):
            raise FibldmError("a label would be lost by deforming", "deform less, or take another --seed")
        farthest = np.abs(bend).max(axis=(1, 2, 3)) * mask.grid.spacing
        return labels, {"scale": np.round(scale, 4).tolist(), "bent_by_mm": np.round(farthest, 3).tolist()}


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Displacements along each axis, ``(3, X, Y, Z)``, at most about 2 and of unit variance where they are drawn."""
    lattice = np.clip(rng.standard_normal((3, *(_LATTICE,) * 3)), -_FARTHEST, _FARTHEST)
    points = np.meshgrid(*(np.linspace(0, _LATTICE - 1, length) for length in shape), indexing="ij")
    field: NDArray[np.float32] = np.stack(
        [ndimage.map_coordinates(part, points, order=3, mode="nearest", output=np.float32) for part in lattice]
    )
    return field


def _without_folds(bend: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    """The field, made smaller until what it does to any voxel's volume is above the least."""
    while _least_jacobian(bend, scale) < _LEAST_JACOBIAN:
        bend = bend * 0.8
    return bend


def _least_jacobian(bend: NDArray[Any], scale: NDArray[Any]) -> float:
    gradients = np.empty((*bend.shape[1:], 3, 3), dtype=np.float32)
    for row in range(3):
        for column in range(3):
            flat = bend.shape[1 + column] < 2
            gradients[..., row, column] = 0 if flat else np.gradient(bend[row], axis=column)
        gradients[..., row, row] += 1 / scale[row]
    return float(np.linalg.det(gradients).min() * scale.prod())


def _middle(labels: Labels) -> NDArray[np.float64]:
    """Of all that is labelled, in voxels; of the volume where nothing is."""
    places = np.argwhere((labels > 0) & (labels != UNKNOWN_LABEL))
    middle: NDArray[np.float64] = places.mean(0) if len(places) else (np.array(labels.shape) - 1) / 2
    return middle
