"""The demo's figures: synthetic phantoms, as written, against the real phantoms of the same masks.

They need no network: does the lung's density follow the mask? All work on arrays ``(X, Y, Z)`` in RAS+ order: HU, and
the labels of the chest phantoms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Array, Volume, resample

LUNG = (1, 2)
AIRWAYS = (3,)
FIBROSIS = (4, 5, 6)

LUNG_BELOW_HU = -500

_GRID_TOLERANCE = 1e-2

Hounsfield = NDArray[Any]
Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Match:
    """Synthetic volumes of one mask, and the phantom that the mask was drawn on; all files.

    Attributes:
        case: name of the mask.
        subject: whose mask it is.
        mask: label file.
        real: image file on the mask's grid.
        synthetic: image files on the mask's grid; more than one are of other seeds.
    """

    case: str
    subject: str
    mask: Path
    real: Path
    synthetic: Sequence[Path]


def measure(matches: Sequence[Match]) -> dict[str, Any]:
    """Lung Dice, fibrosis contrast, texture and spread between seeds, over all masks and for each.

    Returns:
        ``lung_dice``, ``lung_dice_real``, ``lung_dice_shuffled`` (means), ``fibrosis_contrast_ratio`` (mean of the
        cases with fibrosis), ``texture_ratio`` (the smaller of the means over lung and over fibrosis), ``seed_ratio``
        (spread between seeds by the real texture), and ``cases`` with the figures of every mask.

    Raises:
        FibldmError: fewer than two patients, no mask with two seeds or with fibrosis, a mask without lung, or a volume
            that does not lie on its mask's grid.
    """
    if len({match.subject for match in matches}) < 2:
        raise FibldmError("shuffled masks need masks of at least two patients", "make more phantoms")
    cases = [_case(match, _other(matches, number)) for number, match in enumerate(matches)]
    return {
        "lung_dice": _mean(cases, "lung_dice"),
        "lung_dice_real": _mean(cases, "lung_dice_real"),
        "lung_dice_shuffled": _mean(cases, "lung_dice_shuffled"),
        "fibrosis_contrast_ratio": _mean(cases, "fibrosis_contrast_ratio"),
        "texture_ratio": min(_mean(cases, "texture_ratio_lung"), _mean(cases, "texture_ratio_fibrosis")),
        "seed_ratio": _mean(cases, "seed_ratio"),
        "cases": cases,
    }


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


def _case(match: Match, other: Match) -> dict[str, Any]:
    labels = read_volume(str(match.mask)).canonical()
    if not np.isin(labels.array, LUNG).any():
        raise FibldmError(f"the figures of chest CT need the lung labels {LUNG}; {match.mask} has none")
    real, *synthetic = (_voxels_on(labels, path) for path in (match.real, *match.synthetic))
    first = synthetic[0]
    figures: dict[str, Any] = {
        "case": match.case,
        "lung_dice": lung_dice(first, labels.array),
        "lung_dice_real": lung_dice(real, labels.array),
        "lung_dice_shuffled": lung_dice(first, _on_grid(other.mask, labels)),
        "shuffled_with": other.case,
    }
    wanted, got = (fibrosis_contrast(volume, labels.array) for volume in (real, first))
    if wanted and got is not None:
        figures["fibrosis_contrast_ratio"] = got / wanted
    made, wanted_texture = texture(first, labels.array), texture(real, labels.array)
    figures |= {f"texture_ratio_{region}": made[region] / value for region, value in wanted_texture.items() if value}
    within = spread_within(real, labels.array)
    if len(synthetic) > 1 and within:
        figures["seed_ratio"] = spread_between(synthetic, labels.array) / within
    return figures


def _other(matches: Sequence[Match], number: int) -> Match:
    """The next mask of another patient."""
    following = [*matches[number + 1 :], *matches[:number]]
    return next(match for match in following if match.subject != matches[number].subject)


def _voxels_on(labels: Volume, path: Path) -> Array:
    volume = read_volume(str(path)).canonical()
    off = np.abs(np.linalg.solve(labels.affine, volume.affine) - np.eye(4)).max()
    if volume.array.shape != labels.array.shape or off > _GRID_TOLERANCE:
        raise FibldmError(
            f"{path} must lie on its mask's grid; volume {volume.array.shape}, mask {labels.array.shape} voxels, "
            f"affines {off:.3g} voxels apart",
            "synthesize from this very mask",
        )
    return volume.array


def _on_grid(mask: Path, labels: Volume) -> Array:
    """Another patient's labels with their field of view centred on this one's; background outside of it."""
    other = read_volume(str(mask)).canonical()
    shift = np.eye(4)
    shift[:3, 3] = labels.grid.centre - other.grid.centre
    return resample(Volume(other.array, shift @ other.affine), labels.grid, kind="label", fill=0).array


def _mean(cases: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [case[key] for case in cases if key in case]
    if not values:
        raise FibldmError(f"the figure {key} needs at least one case that has it; none does", "make more phantoms")
    return float(np.mean(values))
