"""Agreement of labels with a mask: closed forms of boxes, MONAI, SciPy and SimpleITK on the same arrays."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import DiceMetric, compute_average_surface_distance, compute_hausdorff_distance
from numpy.typing import NDArray
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.segmentation_metrics import (
    Overlap,
    assd,
    dice,
    dice_by_label,
    hd95,
    measured_labels,
    named_values,
    overlaps,
)

SHAPE = (24, 18, 14)
SPACING = (0.7, 1.3, 2.5)
Labels = NDArray[np.uint8]


def box(start: tuple[int, int, int] = (4, 5, 3), size: tuple[int, int, int] = (8, 6, 5), label: int = 7) -> Labels:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = label
    return labels


def blobs(seed: int) -> Labels:
    """Two labels of irregular shape, one of them at the border of the volume."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    return np.digitize(field, np.quantile(field, [0.6, 0.85])).astype(np.uint8)


def surface_percentile(found: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> float:
    """An independent 95 % Hausdorff distance: a distance map to each surface, read at the other one."""
    surfaces = [region & ~ndimage.binary_erosion(region) for region in (found, wanted)]
    maps = [ndimage.distance_transform_edt(~surface, sampling=SPACING) for surface in surfaces]
    return float(max(np.percentile(maps[1][surfaces[0]], 95), np.percentile(maps[0][surfaces[1]], 95)))


@pytest.mark.parametrize(("axis", "shift"), [(0, 1), (1, 2), (2, 4), (0, 3)])
def test_a_moved_box_has_the_dice_and_distance_of_its_shift(axis: int, shift: int) -> None:
    """Of a side of w voxels, w - k overlap after k steps; a face of more than 5 % of the surface is k steps away."""
    start, size = [4, 5, 3], (8, 6, 5)
    start[axis] += shift
    found = overlaps(box((start[0], start[1], start[2])), box(), [7], SPACING)[7]
    assert found.dice == pytest.approx(1 - shift / size[axis])
    assert found.hd95 == pytest.approx(shift * SPACING[axis], rel=1e-6)
    assert (found.volume_error, found.volume_bias) == (0, 0)


def test_volume_error_is_relative_to_the_mask_and_keeps_its_sign() -> None:
    smaller = overlaps(box(size=(6, 6, 5)), box(), [7], SPACING)[7]
    assert (smaller.volume_bias, smaller.volume_error) == pytest.approx((-0.25, 0.25))
    larger = overlaps(box(size=(12, 6, 5)), box(), [7], SPACING)[7]
    assert (larger.volume_bias, larger.volume_error) == pytest.approx((0.5, 0.5))


def test_a_label_that_is_not_found_has_no_overlap_and_the_diagonal_as_distance() -> None:
    diagonal = float(np.sqrt((24 * 0.7) ** 2 + (18 * 1.3) ** 2 + (14 * 2.5) ** 2))
    assert overlaps(np.zeros(SHAPE, np.uint8), box(), [7], SPACING)[7] == pytest.approx(
        Overlap(0, diagonal, diagonal, 1, -1)
    )


@pytest.mark.parametrize("seed", range(4))
def test_dice_is_that_of_monai_and_simpleitk(seed: int) -> None:
    found, wanted = blobs(seed), blobs(seed + 10)
    hot = [torch.from_numpy(np.stack([labels == label for label in (1, 2)])[None]) for labels in (found, wanted)]
    monai = DiceMetric(include_background=True, reduction="none")(*hot)[0]
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(labels) for labels in (found, wanted)))
    measured = dice_by_label(found, wanted, [1, 2])
    assert list(measured.values()) == pytest.approx(monai.tolist(), abs=1e-6)
    assert list(measured.values()) == pytest.approx([overlap.GetDiceCoefficient(label) for label in (1, 2)])
    assert measured == {label: one.dice for label, one in overlaps(found, wanted, [1, 2], SPACING).items()}


AS_HERE = {"include_background": True, "spacing": list(SPACING)}


def one_hot(*volumes: Labels) -> list[torch.Tensor]:
    return [torch.from_numpy(np.stack([labels == label for label in (1, 2)])[None]) for labels in volumes]


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("seed", range(4))
def test_distance_is_that_of_monai_and_of_distance_maps(seed: int) -> None:
    found, wanted = blobs(seed), blobs(seed + 10)
    monai = compute_hausdorff_distance(*one_hot(found, wanted), percentile=95, **AS_HERE)[0]
    for label in (1, 2):
        expected = surface_percentile(found == label, wanted == label)
        assert expected > max(SPACING)
        assert float(monai[label - 1]) == pytest.approx(expected, rel=1e-5)
        for pair in ((found == label, wanted == label), (wanted == label, found == label)):
            assert hd95(*pair, SPACING) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("seed", range(4))
def test_the_mean_surface_distance_is_that_of_monai(seed: int) -> None:
    found, wanted = blobs(seed), blobs(seed + 10)
    monai = compute_average_surface_distance(*one_hot(found, wanted), symmetric=True, **AS_HERE)[0]
    for label in (1, 2):
        for pair in ((found == label, wanted == label), (wanted == label, found == label)):
            assert assd(*pair, SPACING) == pytest.approx(float(monai[label - 1]), rel=1e-5)


def test_unknown_voxels_are_background_on_both_sides() -> None:
    mask = box()
    mask[:, :8] = UNKNOWN_LABEL
    half = overlaps(box(), mask, [7, UNKNOWN_LABEL], SPACING)
    assert half == {7: Overlap(1, 0, 0, 0, 0)}
    beside = box() + box((14, 5, 3), (8, 3, 5))  # the second box lies where the mask is unknown
    assert overlaps(beside, mask, [7], SPACING) == half


def test_labels_of_fewer_than_ten_voxels_are_not_measured() -> None:
    mask = box() + box((14, 1, 1), (3, 3, 1), label=2) + box((14, 10, 1), (5, 2, 1), label=3)
    assert measured_labels(mask, [0, 2, 3, 7, 9]) == [3, 7]
    assert set(overlaps(mask, mask, [0, 2, 3, 7, 9], SPACING)) == {3, 7}


def test_values_are_named_by_label_with_their_mean() -> None:
    values = named_values({4: Overlap(0.5, 2, 1, 0.1, -0.1), 2: Overlap(0.9, 4, 2, 0.3, 0.3)}, {2: "lung", 4: "tumour"})
    assert values == pytest.approx(
        {"dice": 0.7, "hd95": 3, "assd": 1.5, "volume_error": 0.2, "volume_bias": 0.1}
        | {"dice/lung": 0.9, "hd95/lung": 4, "assd/lung": 2, "volume_error/lung": 0.3, "volume_bias/lung": 0.3}
        | {
            "dice/tumour": 0.5,
            "hd95/tumour": 2,
            "assd/tumour": 1,
            "volume_error/tumour": 0.1,
            "volume_bias/tumour": -0.1,
        }
    )
    assert named_values({}, {2: "lung"}) == {}


def test_two_empty_regions_agree() -> None:
    nothing = np.zeros(SHAPE, dtype=bool)
    assert dice(nothing, nothing) == 1


def test_arrays_of_two_grids_are_refused_and_inputs_stay_as_they_are() -> None:
    with pytest.raises(FibldmError, match=r"must lie on one grid; their shapes are \(2, 3, 4\) and \(24, 18, 14\)"):
        overlaps(np.zeros((2, 3, 4), np.uint8), box(), [7], SPACING)
    found, mask = box(), box()
    mask[:5] = UNKNOWN_LABEL
    before = found.copy(), mask.copy()
    overlaps(found, mask, [7], SPACING)
    np.testing.assert_array_equal((found, mask), before)
