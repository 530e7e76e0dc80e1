"""Densities of CT against closed forms and scipy, and profiles of lungs of known geometry."""

import numpy as np
import pytest
from scipy import stats

from fibldm.evaluation.ct_density import (
    STATISTICS,
    depth_names,
    depth_profile,
    describe,
    height_names,
    height_profile,
    histogram_distance,
    histogram_edges,
    lung_labels,
    shares_of,
    within_lungs,
)

EDGES = histogram_edges(-1000.0, 400.0)


def described(values: np.ndarray) -> dict[str, float]:
    return dict(zip(STATISTICS, describe(values), strict=True))


def test_statistics_are_those_of_scipy_and_the_shares_those_of_a_normal_distribution() -> None:
    values = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000, loc=-800, scale=90)
    values = np.concatenate([values, np.full(20_000, -400.0)])
    found = described(values)
    assert found["hu_mean"] == pytest.approx(values.mean()) and found["hu_std"] == pytest.approx(values.std())
    assert found["hu_skewness"] == pytest.approx(stats.skew(values)) and found["hu_skewness"] > 1
    assert found["hu_kurtosis"] == pytest.approx(stats.kurtosis(values))
    lung = 10 / 11
    expected = lung * (stats.norm.cdf(-250, -800, 90) - stats.norm.cdf(-600, -800, 90)) + 1 / 11
    assert found["haa"] == pytest.approx(expected, abs=1e-4)
    assert found["laa950"] == pytest.approx(lung * stats.norm.cdf(-950, -800, 90), abs=1e-4)
    assert found["perc15"] == pytest.approx(stats.norm.ppf(0.15 / lung, -800, 90), abs=0.05)


def test_thresholds_are_those_of_the_literature() -> None:
    """High attenuation from -600 to -250 HU, both counted; low attenuation below -950, which is not."""
    values = np.array([-1000.0, -951, -950, -601, -600, -250, -249, 0, 0, 0])
    found = described(values)
    assert (found["haa"], found["laa950"]) == (0.2, 0.2)


def test_few_voxels_tell_nothing_and_equal_ones_have_no_shape() -> None:
    assert np.isnan(describe(np.zeros(9))).all() and np.isnan(shares_of(np.zeros(9), EDGES)).all()
    found = described(np.full(10, -700.0, dtype=np.float32))
    assert found["hu_mean"] == -700 and found["hu_std"] == 0
    assert np.isnan(found["hu_skewness"]) and np.isnan(found["hu_kurtosis"])


def test_the_distance_of_histograms_is_the_shift_and_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    one, other = np.round(rng.normal(-800, 50, 4000)), np.round(rng.gamma(2, 100, 4000) - 900)
    histograms = [shares_of(values, EDGES) for values in (one, one + 37, other)]
    assert histogram_distance(histograms[0], histograms[1], EDGES) == pytest.approx(37)
    expected = stats.wasserstein_distance(one, np.clip(other, -1000, 399))
    assert histogram_distance(histograms[0], histograms[2], EDGES) == pytest.approx(expected, abs=0.5)
    assert histogram_distance(histograms[0], histograms[0], EDGES) == 0


def test_every_patient_counts_once_however_large_the_label() -> None:
    small, large = shares_of(np.full(10, -900.5), EDGES), shares_of(np.full(5000, -700.5), EDGES)
    middle = shares_of(np.full(10, -800.5), EDGES)
    assert histogram_distance(np.stack([small, large]), middle, EDGES) == pytest.approx(100)


def test_what_lies_beyond_the_window_is_in_its_last_bins() -> None:
    shares = shares_of(np.array([-3000.0] * 4 + [3000.0] * 6), EDGES)
    assert (shares[0], shares[-1], shares.sum()) == (0.4, 0.6, 1)
    assert len(histogram_edges(-1000.0, 400.5)) == 1402 and np.diff(histogram_edges(-1000.0, 400.5)).max() <= 1


def test_depth_is_measured_in_mm_from_the_surface_and_the_end_of_the_volume_is_none() -> None:
    """Layers of 2 x 2 x 2.5 mm along X, the chest wall on one side; a hole within makes no surface."""
    lungs = np.zeros((24, 6, 5), dtype=bool)
    lungs[4:] = True
    lungs[12, 2, 2] = False
    outside = np.zeros_like(lungs)
    outside[:4] = True
    depth = (np.arange(24) - 4 + 0.5) * 2.0
    image = np.broadcast_to(depth[:, None, None], lungs.shape).astype(float)
    profile = depth_profile(image, lungs, outside, (2.0, 2.0, 2.5))
    bounds = [(0, 5), (5, 10), (10, 20), (20, 30), (30, np.inf)]
    holes = np.count_nonzero  # of each layer, one voxel less in that of the hole
    for (low, high), value in zip(bounds, profile, strict=True):
        inside = (depth >= low) & (depth < high) & (depth > 0)
        weights = [holes(lungs[x]) for x in np.flatnonzero(inside)]
        assert value == pytest.approx(np.average(depth[inside], weights=weights))
    assert depth_names() == ["0-5 mm", "5-10 mm", "10-20 mm", "20-30 mm", "over 30 mm"]
    assert np.isnan(depth_profile(image, lungs, np.zeros_like(outside), (2.0, 2.0, 2.5))).all()


def test_height_runs_from_apex_to_base() -> None:
    lungs = np.zeros((5, 4, 20), dtype=bool)
    lungs[1:4, 1:3, 3:18] = True  # 15 slices
    image = np.broadcast_to(np.arange(20.0), lungs.shape)
    assert height_profile(image, lungs) == pytest.approx([16, 13, 10, 7, 4])
    assert height_names() == ["0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"]
    lungs[..., 7:] = False
    assert np.isnan(height_profile(image, lungs)).all()


@pytest.mark.parametrize(
    ("names", "lungs", "within"),
    [
        (["right lung", "left lung", "airways", "ground glass", "reticulation", "honeycombing"], [1, 2, 4, 5, 6], [3]),
        (["lung_upper_lobe_left", "lung_vessels", "Lung-Nodule", "trachea", "heart"], [1], [2, 3]),
        (["Lungs", "Ground-Glass Opacity", "bronchi"], [1, 2], [3]),
        (["liver", "fibrosis", "tumour"], [], []),
        (["lunge", "plunger"], [], []),
    ],
)
def test_lungs_are_known_by_their_names(names: list[str], lungs: list[int], within: list[int]) -> None:
    legend = dict(enumerate(names, start=1))
    assert (lung_labels(legend), within_lungs(legend)) == (lungs, within)
