"""Distances between sets, features, spectra and MS-SSIM against closed forms and the libraries' own: E8."""

import re
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from scipy import ndimage
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fibldm.errors import FibldmError
from fibldm.evaluation import radiomics
from fibldm.evaluation.cases import Sample
from fibldm.evaluation.distances import (
    coverage,
    density,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    polynomial_kernel,
    precision,
    squared_mmd,
)
from fibldm.evaluation.ms_ssim import ms_ssim, scale_weights, spread_pairs
from fibldm.evaluation.radiomics import Radiomics
from fibldm.evaluation.spectrum import frequency_edges, radial_spectrum, spectrum_distance

SHAPE, SPACING = (20, 26, 14), (1.5, 1.0, 2.5)
LABELS = {0: "background", 2: "left", 5: "right"}


class Features(nn.Module):
    """The "images" are the features already."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def with_moments(rng, mean, std, n: int = 30) -> np.ndarray:
    """Draws whose sample mean and covariance are exactly ``mean`` and ``diag(std^2)``."""
    draws = rng.normal(size=(n, len(mean)))
    draws -= draws.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(draws.T))).T
    return draws @ whiten * np.array(std) + np.array(mean)


# Distances


def test_mmd_is_the_double_sum_of_gretton(rng):
    x, y, kernel = rng.normal(size=(5, 3)), rng.normal(1, 2, size=(7, 3)), gaussian_kernel(1.3)

    def k(a, b):
        return np.exp(-np.square(a - b).sum() / (2 * 1.3**2))

    expected = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (5 * 4)
    expected += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (5 * 7)
    assert squared_mmd(x, y, kernel) == pytest.approx(expected, abs=1e-12)
    assert squared_mmd(y, x, kernel) == pytest.approx(expected, abs=1e-12)


def test_mmd_of_two_gaussians_is_their_closed_form(rng):
    """``2 (s^2 / (s^2 + 2))^(d/2) (1 - exp(-|m|^2 / (2 (s^2 + 2))))`` of N(0, I) and N(m, I)."""
    shift, bandwidth = np.array([0.8, -0.5]), 1.1
    spread = bandwidth**2 + 2
    expected = 2 * bandwidth**2 / spread * (1 - np.exp(-np.square(shift).sum() / (2 * spread)))
    x, y = with_moments(rng, [0, 0], [1, 1], n=2000), with_moments(rng, shift, [1, 1], n=2000)
    assert squared_mmd(x, y, gaussian_kernel(bandwidth)) == pytest.approx(expected, rel=0.05)


def test_mmd_is_unbiased(rng):
    """Many small sets of one distribution: around 0, on both sides of it."""
    kernel = gaussian_kernel(1.0)
    values = [squared_mmd(*rng.normal(size=(2, 4, 2)), kernel) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_kid_agrees_with_torchmetrics(rng):
    x, y = rng.normal(size=(12, 4)), rng.normal(0.4, 1.5, size=(12, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it keeps all features in memory
        kid = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=12)
    kid.update(torch.from_numpy(x), real=True)
    kid.update(torch.from_numpy(y), real=False)
    assert squared_mmd(x, y, polynomial_kernel) == pytest.approx(float(kid.compute()[0]), rel=1e-6)


def test_frechet_distance_agrees_with_torchmetrics(rng):
    x, y = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4)), rng.normal(0.4, 1.5, size=(31, 4))
    fid = FrechetInceptionDistance(feature=Features())
    fid.set_dtype(torch.float64)
    fid.update(torch.from_numpy(x), real=True)
    fid.update(torch.from_numpy(y), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(fid.compute()), rel=1e-6)


def test_frechet_distance_of_two_gaussians_is_their_closed_form(rng):
    """``|m - n|^2 + sum (s - t)^2`` where both covariances are diagonal."""
    x, y = with_moments(rng, [0, 1, -2], [1, 2, 0.5]), with_moments(rng, [0.5, 1, -1], [2, 2, 0.1], n=17)
    assert frechet_distance(x, y) == pytest.approx(0.25 + 1 + 1 + 0.16, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_moved_set_is_the_move_though_members_are_few(rng):
    x = rng.normal(size=(3, 10))
    assert frechet_distance(x, x + 0.5) == pytest.approx(10 * 0.25)


def test_precision_is_the_share_within_reach_of_a_real_member():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])  # each reaches as far as its next neighbour, 1
    assert precision(np.array([[-1.0], [-1.5], [3.9], [10.0]]), real, neighbours=1) == 0.5
    reach = np.array([[0.0], [10.0]])  # fewer members than neighbours: each reaches to the other
    assert precision(np.array([[-9.0], [5.0], [21.0]]), reach, neighbours=3) == pytest.approx(2 / 3)


def test_precision_falls_off_the_data_and_recall_with_what_is_left_out(rng):
    real, narrow = rng.normal(size=(80, 3)), rng.normal(scale=0.2, size=(80, 3))
    assert precision(real, real) == 1
    assert precision(narrow, real) > 0.95 and precision(real, narrow) < 0.2
    assert precision(real + 50, real) == precision(real, real + 50) == 0


def counted(x, y, k) -> tuple[float, float]:
    """Density and coverage as Naeem et al. write them, sum by sum."""
    inside = np.zeros((len(x), len(y)))
    for i, centre in enumerate(y):
        radius = sorted(np.linalg.norm(other - centre) for j, other in enumerate(y) if j != i)[k - 1]
        for j, member in enumerate(x):
            inside[j, i] = np.linalg.norm(member - centre) <= radius
    return float(sum(inside[j, i] for j in range(len(x)) for i in range(len(y))) / (k * len(x))), float(
        sum(any(inside[:, i]) for i in range(len(y))) / len(y)
    )


@pytest.mark.parametrize(("n", "m", "k"), [(9, 9, 5), (14, 7, 3), (6, 20, 1)])
def test_density_and_coverage_are_the_sums_of_naeem(rng, n, m, k):
    x, y = rng.normal(0.3, 0.7, size=(n, 3)), rng.normal(size=(m, 3))
    assert (density(x, y, neighbours=k), coverage(x, y, neighbours=k)) == pytest.approx(counted(x, y, k))


def test_density_is_1_and_coverage_that_of_the_lemma_for_one_distribution(rng):
    """Lemma 2 of Naeem et al.; 10 and 12 members, 5 neighbours."""
    draws = [(rng.normal(size=(12, 4)), rng.normal(size=(10, 4))) for _ in range(600)]
    n, m, k = 12, 10, 5
    expected = 1 - np.prod([(m - i) / (n + m - i) for i in range(1, k + 1)])
    assert np.mean([coverage(x, y) for x, y in draws]) == pytest.approx(expected, abs=0.01)
    assert np.mean([density(x, y) for x, y in draws]) == pytest.approx(1, abs=0.03)


def test_an_outlier_among_scans_makes_precision_but_not_density(rng):
    """Volumes far away lie in the sphere of one scan that is farther still, and cover it alone."""
    scans = np.concatenate([rng.normal(size=(39, 2)), [[60.0, 0.0]]])
    volumes = rng.normal(size=(40, 2)) * 0.1 + [30, 0]
    assert precision(volumes, scans, neighbours=5) == 1
    assert density(volumes, scans) == pytest.approx(1 / 5) and coverage(volumes, scans) == 1 / 40


def test_bandwidth_is_the_median_distance():
    assert median_bandwidth(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])) == pytest.approx(np.hypot(3, 3))


@pytest.mark.parametrize(
    "distance", [lambda x, y: squared_mmd(x, y, polynomial_kernel), frechet_distance, precision, density, coverage]
)
def test_distances_refuse_what_is_no_pair_of_sets(distance):
    with pytest.raises(FibldmError, match=r"at least two members of each; got 5 and 1; give more patients"):
        distance(np.ones((5, 3)), np.ones((1, 3)))
    with pytest.raises(FibldmError, match=re.escape("same features, as (n, d) and (m, d); got (5, 3) and (5, 2)")):
        distance(np.ones((5, 3)), np.ones((5, 2)))


def test_bandwidth_refuses_copies():
    with pytest.raises(FibldmError, match="must be above 0; that of these 4 is 0; look for copies"):
        median_bandwidth(np.ones((4, 2)))


# Spectrum


def test_spectrum_of_white_noise_is_flat_at_its_variance_per_volume(rng):
    noise = [radial_spectrum(rng.normal(3, 2, size=SHAPE), SPACING) for _ in range(60)]
    power = np.mean(10 ** np.array(noise), axis=0)
    assert power == pytest.approx(np.full(len(power), 4 * np.prod(SPACING)), rel=0.1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_spectrum_of_a_wave_peaks_at_its_frequency_in_cycles_per_mm(axis):
    """The same frequency in mm along axes of different voxel sizes falls into the same bin."""
    edges = frequency_edges(SHAPE, SPACING)
    k = 1
    wanted = (edges[k] + edges[k + 1]) / 2
    position = np.arange(SHAPE[axis]) * SPACING[axis]
    wave = np.sin(2 * np.pi * wanted * position).reshape([-1 if a == axis else 1 for a in range(3)])
    assert np.argmax(radial_spectrum(np.broadcast_to(wave, SHAPE), SPACING)) == k


def test_spectrum_ends_below_the_coarsest_axis_and_has_no_empty_bin():
    edges = frequency_edges(SHAPE, SPACING)
    assert edges[-1] <= 1 / (2 * max(SPACING)) < edges[-1] + (edges[1] - edges[0])
    for shape, spacing in [((9, 30, 12), (1, 1, 1)), ((64, 64, 6), (1, 1, 6)), ((5, 5, 5), (2, 2, 2))]:
        assert np.isfinite(radial_spectrum(np.ones(shape), spacing)).all()


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_spectra_of_spacings_within_the_tolerance_of_a_grid_share_its_bins(rng, factor):
    edges = frequency_edges(SHAPE, SPACING)
    own = tuple(step * factor for step in SPACING)
    noise = [radial_spectrum(rng.normal(size=SHAPE), own, edges=edges) for _ in range(60)]
    assert np.mean(10 ** np.array(noise), axis=0) == pytest.approx(np.full(len(edges) - 1, np.prod(own)), rel=0.12)


def test_spectrum_of_a_constant_is_the_smallest_power():
    assert (radial_spectrum(np.full(SHAPE, 0.7), SPACING) == -12).all()


def test_spectrum_distance_is_the_gain_in_decibels_and_grows_with_blur(rng):
    volumes = [ndimage.gaussian_filter(rng.normal(size=SHAPE), 0.7) for _ in range(4)]
    spectra = np.array([radial_spectrum(volume, SPACING) for volume in volumes])
    twice = np.array([radial_spectrum(2 * volume, SPACING) for volume in volumes])
    assert spectrum_distance(spectra, twice) == pytest.approx(20 * np.log10(2))
    assert spectrum_distance(spectra, spectra[::-1]) == pytest.approx(0, abs=1e-12)
    blurred = [
        spectrum_distance(
            spectra,
            np.array([radial_spectrum(ndimage.gaussian_filter(v, width, mode="wrap"), SPACING) for v in volumes]),
        )
        for width in (0.4, 0.8, 1.6)
    ]
    assert 0 < blurred[0] < blurred[1] < blurred[2]


def test_spectrum_refuses_thin_volumes_and_foreign_bins():
    with pytest.raises(
        FibldmError, match=re.escape("at least five voxels of its coarsest axis; got size (20, 20, 4) at (1, 1, 4)")
    ):
        radial_spectrum(np.ones((20, 20, 4)), (1, 1, 4))
    with pytest.raises(FibldmError, match="leaves 1 of 1 empty; give edges made for this volume"):
        radial_spectrum(np.ones((8, 8, 8)), (1, 1, 1), edges=np.array([5.0, 6.0]))
    with pytest.raises(FibldmError, match=re.escape("same bins, as (n, K) and (m, K); got (2, 3), (2, 4)")):
        spectrum_distance(np.ones((2, 3)), np.ones((2, 4)))


# Radiomics


def sample(image: np.ndarray, labels: np.ndarray | None = None, spacing=SPACING) -> Sample:
    image = image.astype(np.float32)
    labels = np.zeros(image.shape, dtype=np.uint8) if labels is None else labels
    return Sample(image, labels, np.ones(image.shape, dtype=bool), spacing)


def named(features: Radiomics, of: Sample) -> dict[str, float]:
    return dict(zip(features.names, features(of), strict=True))


def test_radiomics_of_a_ramp_are_its_slope_and_no_texture():
    """0.02 per mm along x, 0.01 along y: the slope is per mm whatever the voxels are."""
    x, y, _ = np.meshgrid(*(np.arange(n) * step for n, step in zip(SHAPE, SPACING, strict=True)), indexing="ij")
    labels = np.zeros(SHAPE, dtype=np.uint8)
    inner = np.s_[8:12, 10:16, 4:10]
    labels[inner] = 2
    image = 0.02 * x + 0.01 * y - 0.5
    values = named(Radiomics(LABELS, (1.0, 2.0)), sample(image, labels))
    assert values["left/gradient_mean"] == pytest.approx(np.hypot(0.02, 0.01), rel=1e-4)
    assert values["left/gradient_std"] == pytest.approx(0, abs=1e-5)
    assert values["left/texture_1mm"] == pytest.approx(0, abs=1e-5)
    assert values["left/mean"] == pytest.approx(image[inner].mean(), rel=1e-5)
    assert values["left/std"] == pytest.approx(image[inner].std(), rel=1e-5)
    assert values["left/p90"] == pytest.approx(np.percentile(image[inner], 90), rel=1e-5)
    assert values["whole/mean"] == pytest.approx(image.mean(), abs=1e-6)
    assert np.isnan([value for name, value in values.items() if name.startswith("right/")]).all()


def test_laplacian_of_a_parabola_is_its_curvature_on_any_voxels():
    """``z^2 + 2 y^2`` has Laplacian 6 per mm^2, blurred or not."""
    _, y, z = np.meshgrid(*(np.arange(n) * step for n, step in zip(SHAPE, SPACING, strict=True)), indexing="ij")
    for scale in (0.3, 1.0):
        laplacian = radiomics.blurred_laplacian((z**2 + 2 * y**2).astype(np.float32), SPACING, scale)
        assert laplacian[8:12, 10:16, 5:9] == pytest.approx(np.full((4, 6, 4), 6.0), rel=1e-3)


def test_radiomics_count_neither_padding_nor_unknown_voxels(rng):
    image, labels = rng.normal(size=SHAPE), np.full(SHAPE, 2, dtype=np.uint8)
    plain = named(Radiomics(LABELS, (1.0,)), sample(image[:10], labels[:10]))
    padded = sample(image, labels)
    padded.valid[10:] = False
    assert named(Radiomics(LABELS, (1.0,)), padded)["left/std"] == pytest.approx(plain["left/std"])
    assert named(Radiomics(LABELS, (1.0,)), padded)["whole/p10"] == pytest.approx(plain["whole/p10"])
    labels[10:] = 255
    assert named(Radiomics(LABELS, (1.0,)), sample(image, labels))["left/mean"] == pytest.approx(plain["left/mean"])


def test_radiomics_have_a_name_each_and_a_fingerprint_of_their_definition():
    features = Radiomics.on_grid(LABELS, (1.0, 0.5, 3.0))
    assert features.scales == (0.5, 1.0)
    assert len(set(features.names)) == len(features.names) == 3 * 9
    assert features.names[0] == "left/mean" and features.names[-1] == "whole/texture_1mm"
    others = [Radiomics({**LABELS, 7: "x"}, (0.5, 1.0)), Radiomics(LABELS, (0.5, 2.0))]
    assert len({other.fingerprint for other in [features, *others]}) == 3
    assert Radiomics(dict(LABELS), (0.5, 1.0)).fingerprint == features.fingerprint


def test_radiomics_refuse_a_line():
    with pytest.raises(FibldmError, match=re.escape("at least two voxels along two axes; got (20, 1, 1)")):
        Radiomics(LABELS, (1.0,))(sample(np.ones((20, 1, 1))))


# MS-SSIM


def test_ms_ssim_agrees_with_monai_at_the_first_weights_of_wang(rng):
    official = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    assert scale_weights((112, 120, 130)) == pytest.approx(official, abs=1e-4)
    a = ndimage.gaussian_filter(rng.normal(size=(30, 28, 33)), 1.5).astype(np.float32) * 3
    b = a + rng.normal(0, 0.05, size=a.shape).astype(np.float32)
    weights = np.array(official[:3]) / sum(official[:3])
    metric = MultiScaleSSIMMetric(3, data_range=2.0, kernel_size=7, weights=weights.tolist())
    expected = metric(torch.from_numpy(b)[None, None], torch.from_numpy(a)[None, None])
    assert 0.3 < ms_ssim(a, b) < 0.999
    assert ms_ssim(a, b) == pytest.approx(float(expected), abs=1e-5)


def test_ms_ssim_is_one_for_equals_and_falls_with_noise(rng):
    a = ndimage.gaussian_filter(rng.normal(size=(24, 20, 18)), 1).astype(np.float32)
    noise = rng.normal(size=a.shape).astype(np.float32)
    values = [ms_ssim(a, a + width * noise) for width in (0.0, 0.05, 0.1, 0.3)]
    assert values[0] == pytest.approx(1)
    assert values == sorted(values, reverse=True) and values[-1] < 0.8


@pytest.mark.parametrize(("shortest", "scales"), [(7, 1), (13, 1), (14, 2), (28, 3), (63, 4), (111, 4), (112, 5)])
def test_scales_of_ms_ssim_follow_from_the_size(rng, shortest, scales):
    weights = scale_weights((200, shortest, 150))
    assert len(weights) == scales and sum(weights) == pytest.approx(1)
    if shortest < 20:
        a, b = rng.normal(size=(2, shortest, shortest, shortest)).astype(np.float32)
        assert np.isfinite(ms_ssim(a, b))


def test_ms_ssim_refuses_small_and_unequal_volumes():
    with pytest.raises(FibldmError, match=re.escape("at least 7 voxels along every axis; got (6, 30, 30)")):
        ms_ssim(np.ones((6, 30, 30)), np.ones((6, 30, 30)))
    with pytest.raises(FibldmError, match=re.escape("two volumes of one size; got (8, 8, 8) and (8, 8, 9)")):
        ms_ssim(np.ones((8, 8, 8)), np.ones((8, 8, 9)))
    with pytest.raises(FibldmError, match="pairs need at least two volumes; got 1"):
        spread_pairs(1, 50)


def test_pairs_are_distinct_and_spread_over_all_members():
    assert spread_pairs(2, 50) == [(0, 1)]
    assert len(spread_pairs(8, 50)) == 28
    for n in (3, 9, 20, 50):
        pairs = spread_pairs(n, 50)
        counts = np.bincount(np.array(pairs).ravel(), minlength=n)
        assert len(set(pairs)) == len(pairs) <= 50 and all(i < j for i, j in pairs)
        assert counts.min() == counts.max()
