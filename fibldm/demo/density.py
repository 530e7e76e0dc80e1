"""Figures of chest CT that need no network: does the lung's density follow the mask?

All work on arrays ``(X, Y, Z)`` in RAS+ order: HU, and the labels of the chest phantoms.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError

LUNG = (1, 2)
AIRWAYS = (3,)
FIBROSIS = (4, 5, 6)

LUNG_BELOW_HU = -500

Hounsfield = NDArray[Any]
Labels = NDArray[np.integer]


def body_hull(volume: Hounsfield) -> NDArray[np.bool_]:
    """The body with all that it encloses: the largest part that is no air, filled axial slice by axial slice.

    Slices are filled one by one since the airways leave the field of view at the top.
    """
    parts, count = ndimage.label(volume > LUNG_BELOW_HU)
    if not count:
        return np.zeros(volume.shape, dtype=bool)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return np.stack([ndimage.binary_fill_holes(body[..., z]) for z in range(volume.shape[2])], axis=2)


def lung_dice(volume: Hounsfield, labels: Labels) -> float:
    """Dice of air-dense voxels and the lung labels; airways and fibrosis are left out.

    Air-dense is what lies below -500 HU inside the body hull.
    """
    counted = ~np.isin(labels, AIRWAYS + FIBROSIS)
    found = (volume < LUNG_BELOW_HU) & body_hull(volume) & counted
    wanted = np.isin(labels, LUNG)
    return float(2 * (found & wanted).sum() / max(1, found.sum() + wanted.sum()))


def fibrosis_contrast(volume: Hounsfield, labels: Labels) -> float | None:
    """Mean HU of the fibrosis labels minus mean HU of healthy lung; None without fibrosis or without healthy lung."""
    fibrosis, lung = np.isin(labels, FIBROSIS), np.isin(labels, LUNG)
    if not fibrosis.any() or not lung.any():
        return None
    return float(volume[fibrosis].mean() - volume[lung].mean())


def texture(volume: Hounsfield, labels: Labels) -> dict[str, float]:
    """Standard deviation, in HU, within healthy lung and, where there is any, within fibrosis."""
    regions = {"lung": np.isin(labels, LUNG), "fibrosis": np.isin(labels, FIBROSIS)}
    return {name: float(volume[region].std()) for name, region in regions.items() if region.sum() > 1}


def spread_between(volumes: Sequence[Hounsfield], labels: Labels) -> float:
    """How much volumes of one mask differ: the standard deviation between them, in HU, averaged over lung and fibrosis.

    Args:
        volumes: at least two, of other seeds.
        labels: their mask.

    Raises:
        FibldmError: fewer than two volumes.
    """
    if len(volumes) < 2:
        raise FibldmError(f"a spread between volumes needs at least two of them; got {len(volumes)}")
    region = np.isin(labels, LUNG + FIBROSIS)
    values = np.stack([volume[region] for volume in volumes]).astype(np.float64)
    return float(np.sqrt(values.var(axis=0, ddof=1).mean()))


def spread_within(volume: Hounsfield, labels: Labels) -> float:
    """Standard deviation, in HU, around the mean of each label, over lung and fibrosis: the texture of one volume."""
    region = np.isin(labels, LUNG + FIBROSIS)
    within, values = labels[region], volume[region].astype(np.float64)
    means = {int(label): values[within == label].mean() for label in np.unique(within)}
    expected = np.vectorize(means.get, otypes=[np.float64])(within)
    return float(np.sqrt(np.square(values - expected).mean()))
