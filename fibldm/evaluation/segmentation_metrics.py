"""How well labels that were found agree with a mask: Dice, surface distances and volume.

Arrays are labels ``(X, Y, Z)`` on one grid. Voxels that the mask leaves unknown (255) are background on both sides.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.grid import long_axes

FEWEST_VOXELS = 10

Labels = NDArray[np.integer]
Region = NDArray[np.bool_]
Distances = NDArray[np.float64]


class Overlap(NamedTuple):
    """Agreement of one label that was found with the mask.

    Attributes:
        dice: in ``[0, 1]``; 0 where the label was not found.
        hd95: 95th percentile of the distance between the surfaces, mm, the larger of both directions; the diagonal of
            the volume where the label was not found.
        assd: average symmetric surface distance, mm; the diagonal of the volume where the label was not found.
        volume_error: ``|found - wanted| / wanted``.
        volume_bias: ``(found - wanted) / wanted``, at least -1.
    """

    dice: float
    hd95: float
    assd: float
    volume_error: float
    volume_bias: float


def measured_labels(mask: Labels, labels: Iterable[int]) -> list[int]:
    """Those of ``labels`` that have at least 10 voxels in the mask; a few voxels more or less are all of a smaller one.

    Background and unknown are never among them.
    """
    return [label for label in labels if label not in (0, UNKNOWN_LABEL) and (mask == label).sum() >= FEWEST_VOXELS]


def dice(found: Region, wanted: Region) -> float:
    """``2 |A and B| / (|A| + |B|)`` (Dice 1945), in ``[0, 1]``; 1 for two empty regions."""
    total = int(found.sum()) + int(wanted.sum())
    return float(2 * (found & wanted).sum() / total) if total else 1.0


def hd95(found: Region, wanted: Region, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance, mm: the larger of the 95th percentiles of both directed `surface_distances`.

    Huttenlocher et al. 1993, "Comparing images using the Hausdorff distance", section II.
    """
    return max(float(np.percentile(directed, 95)) for directed in surface_distances(found, wanted, spacing))


def assd(found: Region, wanted: Region, spacing: Sequence[float]) -> float:
    """Average symmetric surface distance, mm: the mean of the `surface_distances` of both directions together.

    Heimann et al. 2009, "Comparison and evaluation of methods for liver segmentation from CT datasets", section III.C.
    """
    return float(np.concatenate(surface_distances(found, wanted, spacing)).mean())


def surface_distances(found: Region, wanted: Region, spacing: Sequence[float]) -> tuple[Distances, Distances]:
    """How far each voxel of one surface is from the closest of the other, mm, in both directions.

    The surface of a region is its voxels that share a face with the outside, which begins at the border of the volume;
    of a slice, the outline of a region.

    Args:
        found: ``(X, Y, Z)``; if empty, the only distance is the diagonal of the volume.
        wanted: ``(X, Y, Z)``, not empty.
        spacing: mm along each axis.
    """
    if not found.any():
        diagonal = np.array([np.linalg.norm(np.multiply(found.shape, spacing))])
        return diagonal, diagonal
    axes = long_axes(found.shape)
    found, wanted, steps = found.squeeze(), wanted.squeeze(), np.asarray(spacing)[axes]
    around = ndimage.find_objects((found | wanted).astype(np.uint8))[0]
    surfaces = (region[around] & ~ndimage.binary_erosion(region[around]) for region in (found, wanted))
    one, other = (np.argwhere(surface) * steps for surface in surfaces)
    return cKDTree(other).query(one)[0], cKDTree(one).query(other)[0]


def dice_by_label(predicted: Labels, mask: Labels, labels: Iterable[int]) -> dict[int, float]:
    """Dice of each of ``labels`` that the mask holds, see `measured_labels`.

    Raises:
        FibldmError: the arrays differ in shape.
    """
    predicted = _known(predicted, mask)
    return {label: dice(predicted == label, mask == label) for label in measured_labels(mask, labels)}


def overlaps(predicted: Labels, mask: Labels, labels: Iterable[int], spacing: Sequence[float]) -> dict[int, Overlap]:
    """Agreement of each of ``labels`` that the mask holds, see `measured_labels`.

    Args:
        predicted: the labels found, ``(X, Y, Z)``.
        mask: the labels asked for, ``(X, Y, Z)``.
        labels: values to measure.
        spacing: mm along each axis.

    Raises:
        FibldmError: the arrays differ in shape.
    """
    predicted = _known(predicted, mask)
    return {label: _overlap(predicted == label, mask == label, spacing) for label in measured_labels(mask, labels)}


def named_values(measured: Mapping[int, Overlap], names: Mapping[int, str]) -> dict[str, float]:
    """``dice/<name>``, ``hd95/<name>``, ... of every label, and ``dice``, ``hd95``, ... as the mean over them."""
    values: dict[str, float] = {}
    for measure in Overlap._fields if measured else ():
        of_labels = {f"{measure}/{names[label]}": getattr(overlap, measure) for label, overlap in measured.items()}
        values |= {measure: float(np.mean(list(of_labels.values()))), **of_labels}
    return values


def _overlap(found: Region, wanted: Region, spacing: Sequence[float]) -> Overlap:
    bias = float(found.sum() / wanted.sum()) - 1
    furthest, average = (measure(found, wanted, spacing) for measure in (hd95, assd))
    return Overlap(dice(found, wanted), furthest, average, abs(bias), bias)


def _known(predicted: Labels, mask: Labels) -> Labels:
    if predicted.shape != mask.shape:
        raise FibldmError(
            f"labels and their mask must lie on one grid; their shapes are {predicted.shape} and {mask.shape}"
        )
    return np.where(mask == UNKNOWN_LABEL, 0, predicted)
