"""What may be wrong with the voxels, the labels and the grids of a case."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.volumes.grid import Array
from fibldm.volumes.label_values import are_whole, fractions_shown, remap_remedy, shown
from fibldm.volumes.scan import Remark, Scan

AIR = -1024
"""HU of air: what lies below is padding and becomes air."""

LEAST_AIR = 0.001
"""Share of the voxels of a CT that are air; padding, which lies below, is none."""

GRID_TOLERANCE = 1e-3
"""How far the affines of image and label may differ, in voxels."""

PERCENTILES = (0.5, 99.5)
"""Of an MR volume, what becomes -1 and 1."""

MANY_LABELS = 30
LIKELY_IMAGE = 0.8
"""A label volume of many values that correlates with its image by more is taken for an image."""

ANISOTROPY = 3.0
"""From this ratio of the largest to the smallest spacing on, a case is said to be anisotropic."""

EXTENT_MM = (2.5, 3000.0)
"""Least and greatest length of the longest side of a CT or MR volume: from a mouse's organ to a whole body. In metres
a whole body is shorter, and in micrometres a mouse's organ is longer."""

HEAD_MM = ((145, 205), (190, 265), (120, np.inf))
"""Extent along R, A, S of a whole head with its face; a brain alone is smaller, a trunk larger."""

LEAST_SUV, LARGEST_SUV = 0.1, 200.0
"""The highest SUV of a PET is more than the one, and hardly a voxel, not even of the bladder, more than the other."""

OUTSIDE_RANGE = 0.01
"""Of the voxels of ``other``, so many may lie outside of the declared range and be clipped."""

COUCH_MM = (150, 60)
"""A couch is at least this wide and at most this high in an axial slice."""


Found = Iterator[Remark]


def image_findings(
    array: Array,
    modality: str,
    spacing: NDArray[np.float64],
    name: str = "image",
    limits: tuple[float, float] | None = None,
) -> Found:
    """What is wrong with one channel.

    Args:
        array: voxels ``(X, Y, Z)`` along RAS+; CT in HU.
        modality: ``ct``, ``mr``, ``pt`` or ``other``.
        spacing: mm along R, A, S.
        name: of the channel.
        limits: the declared range of ``other``.
    """
    wrong = 0 if array.dtype.kind in "iu" else array.size - np.count_nonzero(np.isfinite(as_float32(array)))
    if wrong:
        yield "error", f"{name} must be finite; {wrong} of {array.size} voxels are NaN or infinite"
        return
    low, high = float(array.min()), float(array.max())
    if low == high:
        yield "error", f"{name} must not be constant; every voxel is {low:g}"
        return
    if modality == "ct":
        yield from _ct_findings(array, low, high, spacing)
    elif modality == "pt":
        yield from _pt_findings(low, high, float(np.percentile(array, PERCENTILES[1])), name)
    elif modality == "mr":
        yield from _mr_findings(array, spacing, name)
    elif limits is not None:
        yield from _range_findings(array, low, high, limits, name)


def label_findings(array: Array, names: Collection[int] = ()) -> Found:
    """What is wrong with the values of a label volume.

    Args:
        array: voxels ``(X, Y, Z)``.
        names: the values that have a name; empty where no name is known.
    """
    if not are_whole(array):
        yield (
            "error",
            f"labels must be whole numbers; the label volume has fractions or NaN, such as {fractions_shown(array)} "
            "(is it an image or a probability? bring it to labels, and save it as integers)",
        )
    elif array.min() < 0 or array.max() >= UNKNOWN_LABEL:
        values = np.unique(array).tolist()
        remedy = remap_remedy(values)
        yield (
            "error",
            f"labels must be within 0...{UNKNOWN_LABEL - 1} ({UNKNOWN_LABEL} is kept for unknown); "
            f"they run from {array.min():g} to {array.max():g}: {shown(values)}"
            + (f" (change them with {remedy})" if remedy else ""),
        )
    elif not array.any():
        yield "warning", "the label volume is all background"
    elif unnamed := sorted(set(np.unique(array).tolist()) - {0, *names}) if names else []:
        yield (
            "error",
            f"every label must have a name; {', '.join(f'{value:g}' for value in unnamed)} has none "
            "(name it with --labels, or change it with --remap)",
        )


def undrawn_findings(array: Array, annotated: Collection[int], names: Mapping[int, str]) -> Found:
    """Whether a mask holds labels of which it is said that nobody drew them.

    Args:
        array: labels ``(X, Y, Z)``.
        annotated: labels that were annotated.
        names: of labels by value.
    """
    drawn = [int(value) for value in np.unique(array) if value and value not in annotated]
    if drawn:
        listed = ", ".join(names.get(value, str(value)) for value in drawn)
        yield "error", f"a mask must hold annotated labels only; annotated_labels leaves out {listed}, which it holds"


def likely_image_findings(label: Array, image: Array) -> Found:
    """Whether a label volume of many values is rather an image: they rise and fall with those of the image itself.

    Args:
        label: voxels ``(X, Y, Z)``.
        image: one channel on the same grid.
    """
    sampled = (slice(None, None, 2 if min(label.shape) >= 8 else 1),) * 3
    values, voxels = label[sampled].ravel().astype(np.float64), image[sampled].ravel().astype(np.float64)
    if len(np.unique(values)) < MANY_LABELS or not np.isfinite(voxels).all() or voxels.std() == 0:
        return
    correlation = np.corrcoef(values, voxels)[0, 1]
    if correlation > LIKELY_IMAGE:
        yield (
            "error",
            f"the label volume must hold labels; its {len(np.unique(values))} values follow the image "
            f"(correlation {correlation:.2f}), as those of an image would",
        )


def grid_findings(image: Scan, other: Scan, what: str = "label") -> Found:
    """Whether an image and a mask, or another channel, lie on one grid, compared on RAS+ axes."""
    size, came = image.array.shape[:3], other.array.shape[:3]
    if size != came:
        yield "error", f"image and {what} must have one size; image {size}, {what} {came} voxels (RAS+)"
        return
    off = np.abs(np.linalg.solve(image.affine, other.affine) - np.eye(4)).max()
    if off > GRID_TOLERANCE:
        yield (
            "error",
            f"image and {what} must have one affine; they differ by {off:.3g} voxels (at most {GRID_TOLERANCE:g})",
        )


def extent_findings(shape: Sequence[int], spacing: NDArray[np.float64], modality: str) -> Found:
    """Whether a grid is as large as something that is scanned; of other than CT and MR nothing is known.

    Args:
        shape: voxels along R, A, S.
        spacing: mm along R, A, S.
        modality: ``ct``, ``mr``, ``pt`` or ``other``.
    """
    extent = np.array(shape) * spacing
    low, high = EXTENT_MM
    if modality == "other" or low <= extent.max() <= high:
        return
    sizes, steps = (" x ".join(f"{length:.3g}" for length in lengths) for lengths in (extent, spacing))
    unit = "metres" if extent.max() < low else "micrometres"
    yield (
        "error",
        f"the longest side of a CT or MR volume must be {low:g} to {high:g} mm; the extent is {sizes} mm, with a "
        f"spacing of {steps} mm (is it in {unit}? write it in mm into the header, or give it with --spacing where the "
        "format holds none; microscopy and simulations are --modality other)",
    )


def spacing_findings(spacing: NDArray[np.float64]) -> Found:
    """Whether a grid is far from isotropic."""
    if spacing.max() / spacing.min() > ANISOTROPY:
        sizes = " x ".join(f"{length:.3g}" for length in spacing)
        yield "warning", f"spacing {sizes} mm is anisotropic: little detail along the coarse axis"


def as_float32(array: Array) -> NDArray[np.float32]:
    """The same numbers in float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def label_counts(array: NDArray[np.uint8]) -> Mapping[int, int]:
    """Voxels of every label that occurs; neither background nor unknown is one."""
    counts = np.bincount(array.ravel(), minlength=UNKNOWN_LABEL + 1)[:UNKNOWN_LABEL]
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def _ct_findings(array: Array, low: float, high: float, spacing: NDArray[np.float64]) -> Found:
    air = np.count_nonzero((array >= AIR) & (array < -500)) / array.size
    if low < -4096 or high > np.iinfo(np.int16).max or air < LEAST_AIR:
        hint = "rescale to HU, or for a dataset of MR give --modality mr"
        yield (
            "error",
            "a CT must have air (-1024 to -500 HU) and lie within [-4096, 32767] HU; it runs from "
            f"{low:g} to {high:g}; {hint}",
        )
        return
    padded = np.count_nonzero(array < AIR) / array.size
    if padded > 0.005:
        yield "warning", f"{100 * padded:.0f} % of the voxels lie below {AIR} HU (padding, from {low:g}) and become air"
    body = (array > -500).any()
    if not body:
        yield "error", f"a CT must show more than air; its highest value is {high:g} HU"
    elif _couch(array, spacing):
        yield "warning", "a couch is likely in the field of view; synthetic volumes will show one too"


def _pt_findings(low: float, high: float, upper: float, name: str) -> Found:
    """PET must be in SUV: activity per ml is thousands of times as large."""
    if upper > LARGEST_SUV or high < LEAST_SUV:
        yield (
            "error",
            f"{name} must be in SUV by body weight; it runs from {low:g} to {high:g}, its percentile "
            f"{PERCENTILES[1]:g} is {upper:g} (is it in Bq/ml? divide by the injected activity, decayed to the scan, "
            "per g of body weight, or give the DICOM series)",
        )
    elif low < -LEAST_SUV:
        yield "warning", f"{name} has SUV below 0, down to {low:g}; what lies below the window is clipped"


def _mr_findings(array: Array, spacing: NDArray[np.float64], name: str) -> Found:
    low, high = np.percentile(array, PERCENTILES)
    if low >= high:
        yield (
            "error",
            f"percentiles {PERCENTILES[0]:g} and {PERCENTILES[1]:g} of {name} must differ; both are {low:g} "
            "(nearly all of it is background: crop it)",
        )
    elif _whole_head(array, float(low), float(high), spacing):
        yield (
            "warning",
            f"{name} shows a whole head: its face is likely recognisable, and synthetic ones may be; deface it first",
        )


def _range_findings(array: Array, low: float, high: float, limits: tuple[float, float], name: str) -> Found:
    outside = np.count_nonzero((array < limits[0]) | (array > limits[1]))
    if not outside:
        return
    came = f"{outside} of {array.size} voxels of {name} lie outside, from {low:g} to {high:g}"
    if outside > OUTSIDE_RANGE * array.size:
        yield "error", f"voxels must lie within --range {limits[0]:g} {limits[1]:g}; {came} (give a wider range)"
    else:
        yield "warning", f"voxels outside of --range {limits[0]:g} {limits[1]:g} are clipped; {came}"


def _couch(array: Array, spacing: NDArray[np.float64]) -> bool:
    """Something wide and flat behind the body that does not touch it, in the middle axial slice."""
    parts, count = ndimage.label(array[:, :, array.shape[2] // 2] > -500)
    if count < 2:
        return False
    sizes = np.bincount(parts.ravel())[1:]
    boxes = ndimage.find_objects(parts)
    body = boxes[int(sizes.argmax())]
    return any(
        (box[0].stop - box[0].start) * spacing[0] >= COUCH_MM[0]
        and (box[1].stop - box[1].start) * spacing[1] <= COUCH_MM[1]
        and box[1].start + box[1].stop < body[1].start + body[1].stop
        for box in boxes
        if box is not body
    )


def _whole_head(array: Array, low: float, high: float, spacing: NDArray[np.float64]) -> bool:
    inside = ndimage.binary_opening(array > low + 0.1 * (high - low))
    if not inside.any():
        return False
    parts, _ = ndimage.label(inside)
    largest = ndimage.find_objects(parts)[int(np.bincount(parts.ravel())[1:].argmax())]
    extent = [(part.stop - part.start) * step for part, step in zip(largest, spacing, strict=True)]
    return all(least <= length <= most for length, (least, most) in zip(extent, HEAD_MM, strict=True))
