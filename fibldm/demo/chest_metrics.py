"""The demo's figures: synthetic phantoms, as written, against the real phantoms of the same masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.demo import density
from fibldm.errors import FibldmError
from fibldm.report.report import Match
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Array, Volume, resample

_GRID_TOLERANCE = 1e-2


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


def _case(match: Match, other: Match) -> dict[str, Any]:
    labels = read_volume(str(match.mask)).canonical()
    if not np.isin(labels.array, density.LUNG).any():
        raise FibldmError(f"the figures of chest CT need the lung labels {density.LUNG}; {match.mask} has none")
    real, *synthetic = (_voxels_on(labels, path) for path in (match.real, *match.synthetic))
    first = synthetic[0]
    figures: dict[str, Any] = {
        "case": match.case,
        "lung_dice": density.lung_dice(first, labels.array),
        "lung_dice_real": density.lung_dice(real, labels.array),
        "lung_dice_shuffled": density.lung_dice(first, _on_grid(other.mask, labels)),
        "shuffled_with": other.case,
    }
    wanted, got = (density.fibrosis_contrast(volume, labels.array) for volume in (real, first))
    if wanted and got is not None:
        figures["fibrosis_contrast_ratio"] = got / wanted
    made, wanted_texture = density.texture(first, labels.array), density.texture(real, labels.array)
    figures |= {f"texture_ratio_{region}": made[region] / value for region, value in wanted_texture.items() if value}
    within = density.spread_within(real, labels.array)
    if len(synthetic) > 1 and within:
        figures["seed_ratio"] = density.spread_between(synthetic, labels.array) / within
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
