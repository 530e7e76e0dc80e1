"""The demo's figures: synthetic phantoms, as written, against the real phantoms of the same masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.evaluation import density
from fibldm.volumes.grid import Volume, read_volume, resample


@dataclass(frozen=True)
class Match:
    """One synthetic volume, its mask, and the real volume that the mask was drawn on; all files.

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
        FibldmError: fewer than two patients, or no mask with two seeds.
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
    real = read_volume(str(match.real)).canonical().array
    synthetic = [read_volume(str(path)).canonical().array for path in match.synthetic]
    first = synthetic[0]
    figures: dict[str, Any] = {
        "case": match.case,
        "lung_dice": density.lung_dice(first, labels.array),
        "lung_dice_real": density.lung_dice(real, labels.array),
        "lung_dice_shuffled": density.lung_dice(first, _on_grid(other.mask, labels)),
        "shuffled_with": other.case,
    }
    wanted, got = (density.fibrosis_contrast(volume, labels.array) for volume in (real, first))
    if wanted is not None and got is not None:
        figures["fibrosis_contrast_ratio"] = got / wanted
    textures = density.texture(first, labels.array), density.texture(real, labels.array)
    figures |= {f"texture_ratio_{region}": textures[0][region] / value for region, value in textures[1].items()}
    if len(synthetic) > 1:
        spread = density.spread_between(synthetic, labels.array)
        figures["seed_ratio"] = spread / density.spread_within(real, labels.array)
    return figures


def _other(matches: Sequence[Match], number: int) -> Match:
    """The next mask of another patient."""
    following = [*matches[number + 1 :], *matches[:number]]
    return next(match for match in following if match.subject != matches[number].subject)


def _on_grid(mask: Path, labels: Volume) -> np.ndarray[Any, Any]:
    """Another patient's labels where they would lie in this one's scanner; background outside their field of view."""
    return resample(read_volume(str(mask)).canonical(), labels.grid, kind="label", fill=0).array


def _mean(cases: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [case[key] for case in cases if key in case]
    if not values:
        raise FibldmError(f"the figure {key} needs at least one case that has it; none does", "make more phantoms")
    return float(np.mean(values))
