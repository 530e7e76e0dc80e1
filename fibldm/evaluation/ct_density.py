"""Densities of CT within labels: histograms, their moments, the shares that densitometry of the lung counts, profiles.

All arrays are ``(X, Y, Z)`` in RAS+ order, in HU.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from fibldm.evaluation.segmentation_metrics import FEWEST_VOXELS

MOMENTS = ("hu_mean", "hu_std", "hu_skewness", "hu_kurtosis")
SHARES = ("haa", "laa950", "perc15")
STATISTICS = (*MOMENTS, *SHARES)

HIGH_ATTENUATION = (-600.0, -250.0)
LOW_ATTENUATION = -950.0
PERCENTILE = 15

DEPTHS_MM = (0.0, 5.0, 10.0, 20.0, 30.0, np.inf)
HEIGHTS = 5

_FLAT = 1e-3  # HU; rounding decides the moments of less
_NO_LUNG = ("airway", "bronch", "trachea", "vessel", "arter", "vein", "nodule", "tumo", "cancer", "lesion", "effusion")
_WITHIN_LUNGS = (
    "ground glass",
    "ggo",
    "reticulation",
    "honeycombing",
    "consolidation",
    "emphysema",
    "fibrosis",
    "crazy paving",
    "mosaic attenuation",
)

Hounsfield = NDArray[np.floating]
Region = NDArray[np.bool_]
Values = NDArray[np.float64]


def describe(values: Hounsfield) -> Values:
    """`STATISTICS` of the HU of a region; all NaN of fewer than 10 voxels.

    * ``hu_mean``: of lungs, the mean lung density.
    * ``hu_std``: standard deviation, ``ddof=0``; ``hu_skewness``, ``hu_kurtosis``: as `scipy.stats.skew` and
      `scipy.stats.kurtosis` have them by default: not corrected for small samples, and 0 for a normal distribution. NaN
      where all values are alike.
    * ``haa``: high attenuation areas, the share from -600 to -250 HU (Lederer et al. 2009, "Cigarette smoking is
      associated with subclinical parenchymal lung disease: the MESA-lung study"; Podolanczuk et al. 2016, "High
      attenuation areas on chest computed tomography in community-dwelling adults: the MESA study").
    * ``laa950``: low attenuation areas, the share below -950 HU (Gevenois et al. 1996, "Comparison of computed density
      and microscopic morphometry in pulmonary emphysema").
    * ``perc15``: the 15th percentile, HU; of the lungs Perc15 or PD15, there often in g/l, which is 1000 more (Parr et
      al. 2008, "Detection of emphysema progression in alpha 1-antitrypsin deficiency using CT densitometry").
    """
    if values.size < FEWEST_VOXELS:
        return np.full(len(STATISTICS), np.nan)
    inside = values.astype(np.float64)
    flat = inside.std() < _FLAT
    low, high = HIGH_ATTENUATION
    return np.array(
        [
            inside.mean(),
            inside.std(),
            np.nan if flat else stats.skew(inside),
            np.nan if flat else stats.kurtosis(inside),
            ((inside >= low) & (inside <= high)).mean(),
            (inside < LOW_ATTENUATION).mean(),
            np.percentile(inside, PERCENTILE),
        ]
    )


def histogram_edges(low: float, high: float) -> Values:
    """Ends of the bins of a histogram, at most 1 HU wide each, from one end of a window to the other."""
    return np.linspace(low, high, int(np.ceil(high - low)) + 1)


def shares_of(values: Hounsfield, edges: Values) -> Values:
    """The share of the values in each bin, those beyond the ends in the last ones; NaN of fewer than 10 voxels."""
    if values.size < FEWEST_VOXELS:
        return np.full(len(edges) - 1, np.nan)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return counts / values.size


def histogram_distance(one: Values, other: Values, edges: Values) -> float:
    """By how many HU one distribution has to be moved to be the other: the Wasserstein distance of order 1.

    It is the area between the cumulative histograms (Ramdas et al. 2017, "On Wasserstein two-sample testing and related
    families of nonparametric tests", section 3.1), and so the shift where one is the other shifted.

    Args:
        one: shares by bin, one set ``(n, bins)`` of patients, each of whom counts once, or a single one ``(bins,)``.
        other: the same.
        edges: of the bins.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    weights = (np.atleast_2d(part).mean(axis=0) for part in (one, other))
    return float(stats.wasserstein_distance(centres, centres, *weights))


def depth_profile(image: Hounsfield, lungs: Region, outside: Region, spacing: Sequence[float]) -> Values:
    """Mean HU of the lungs from under the pleura to the centre: by distance to their surface, between `DEPTHS_MM`.

    The distance is that of a voxel's centre to the nearest voxel outside, less half of the finest spacing, as surfaces
    lie between voxels.

    Args:
        image: in HU.
        lungs: what is averaged.
        outside: what is no lung; neither what lies within the lungs, such as airways, nor the end of the volume is, so
            that neither makes a surface.
        spacing: mm along each axis.

    Returns:
        One value for each range; NaN of fewer than 10 voxels, or where nothing lies outside.
    """
    if not outside.any():
        return np.full(len(DEPTHS_MM) - 1, np.nan)
    distance = ndimage.distance_transform_edt(~outside, sampling=spacing)[lungs] - min(spacing) / 2
    return _means(image[lungs], np.digitize(distance, DEPTHS_MM[1:-1]), len(DEPTHS_MM) - 1)


def height_profile(image: Hounsfield, lungs: Region) -> Values:
    """Mean HU of the lungs from apex to base: in fifths of the height between their highest and lowest slice.

    Returns:
        ``(5,)``; NaN of fewer than 10 voxels, all of them of lungs in fewer than five slices.
    """
    levels = np.flatnonzero(lungs.any(axis=(0, 1)))
    if len(levels) < HEIGHTS:
        return np.full(HEIGHTS, np.nan)
    below_top = levels[-1] - np.nonzero(lungs)[2]
    return _means(image[lungs], below_top * HEIGHTS // (levels[-1] - levels[0] + 1), HEIGHTS)


def depth_names() -> list[str]:
    """The ranges of `depth_profile`, such as ``0-5 mm``."""
    inner = [f"{low:g}-{high:g} mm" for low, high in zip(DEPTHS_MM[:-2], DEPTHS_MM[1:-1], strict=True)]
    return [*inner, f"over {DEPTHS_MM[-2]:g} mm"]


def height_names() -> list[str]:
    """The parts of `height_profile`, from the apex on, such as ``0-20 %``."""
    return [f"{100 * part // HEIGHTS}-{100 * (part + 1) // HEIGHTS} %" for part in range(HEIGHTS)]


def lung_labels(names: Mapping[int, str]) -> list[int]:
    """The labels that are the lungs by their names: those of lungs, and where there are any, patterns of their disease.

    Airways, vessels and tumours are none, whatever else their names say.
    """
    lungs = [value for value, name in names.items() if _is_lung(name)]
    within = [value for value, name in names.items() if any(word in plain(name) for word in _WITHIN_LUNGS)]
    return sorted({*lungs, *within}) if lungs else []


def within_lungs(names: Mapping[int, str]) -> list[int]:
    """Labels that make no surface of the lungs, though they are none: airways, and vessels or tumours of the lungs."""
    return [
        value
        for value, name in names.items()
        if not _is_lung(name) and ("airway" in plain(name) or "bronch" in plain(name) or _says_lung(name))
    ]


def plain(name: str) -> str:
    """A name in lower case, its words parted by single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _is_lung(name: str) -> bool:
    return _says_lung(name) and not any(word in plain(name) for word in _NO_LUNG)


def _says_lung(name: str) -> bool:
    return bool({"lung", "lungs"} & set(plain(name).split()))


def _means(values: Hounsfield, part: NDArray[np.integer], parts: int) -> Values:
    counts = np.bincount(part, minlength=parts)
    sums = np.bincount(part, weights=values, minlength=parts)
    return np.where(counts >= FEWEST_VOXELS, sums / np.maximum(counts, 1), np.nan)
