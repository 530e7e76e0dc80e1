"""Do synthetic volumes, as a set, look like real scans? Distances between sets, beside those of two sets of scans.

The patient is the unit: one volume of each. Synthetic volumes of some patients' masks are compared with the scans of
other patients, and so are the scans of the first: the same masks, the same reference, as many patients, none in both.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm.evaluation.cases import Case, Evaluated, FeatureCache, Sample, need_masks
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
from fibldm.evaluation.ms_ssim import channel_similarity, scale_weights, spread_pairs
from fibldm.evaluation.perceptual import PLANES, PlaneDistance, planes_of
from fibldm.evaluation.radiomics import Radiomics
from fibldm.evaluation.results import Section
from fibldm.evaluation.segmenter import Segmenter
from fibldm.evaluation.sets import Sets, choose, choose_sets
from fibldm.evaluation.spectrum import channel_spectra, frequency_edges, spectrum_distance
from fibldm.evaluation.statistics import TOO_FEW, Estimate, Indices, estimate
from fibldm.files import hash_value
from fibldm.progress import track

_PAIRS = 50
_SPECTRUM_VERSION = 1  # Count up whenever the same volume gives another spectrum.

Array = NDArray[np.float64]


class Arrays(NamedTuple):
    """What was computed of `Sets`, ``(n, d)`` each."""

    synthetic: Array
    real: Array
    reference: Array


def measure_realism(
    evaluated: Evaluated, synthetic: Sequence[Case], segmenter: Segmenter, *, planes: PlaneDistance | None = None
) -> Section:
    """Distances between the synthetic volumes and real scans.

    * ``kid/...``, ``mmd/...``, ``frechet/...``: `squared_mmd` with the polynomial and with the Gaussian kernel, and
      `frechet_distance`, of radiomic features and of the segmenter's, both `standardised`.
    * ``frechet/segmenter/<plane>``: the same of slabs of the volumes, see `frechet_by_plane`.
    * ``precision/...``, ``recall/...``: the share of synthetic volumes that lie among real ones, and of real ones that
      lie among the synthetic, of the same features, see `distances.precision`.
    * ``density/...``, ``coverage/...``: in how many neighbourhoods of real ones a synthetic volume lies, and the share
      of real ones with a synthetic volume near by, see `distances.density` and `distances.coverage`.
    * ``spectrum``: `spectrum_distance`, dB.
    * ``ms_ssim``: mean MS-SSIM between volumes of different patients; above that of real scans they are too alike.
      What is padded on both sides counts too, in synthetic and real volumes the same.
    * ``lpips``, ``lpips/<plane>``, where there is a network for it: `PlaneDistance` of each synthetic volume from the
      scan of its mask, beside that of this scan from another patient's, which has other anatomy.

    Of several channels, radiomic features and spectra stand one after the other, and MS-SSIM is their mean.

    Args:
        evaluated: the run and its work folder.
        synthetic: the volumes, with masks; of each patient the first by name counts.
        segmenter: the network whose features are used.
        planes: for LPIPS; None leaves it out.

    Raises:
        FibldmError: a volume has no mask, or there are fewer than two patients to compare.
    """
    need_masks(list(synthetic), "realism")
    sets = choose_sets(evaluated.real(), synthetic)
    radiomics = Radiomics.on_grid(evaluated.labels, evaluated.grid.spacing)
    described = _arrays(
        FeatureCache(evaluated, "segmenter-slabs", segmenter.fingerprint),
        partial(_described, segmenter),
        sets,
    )
    features = {
        "radiomics": _arrays(FeatureCache(evaluated, "radiomics", radiomics.fingerprint), radiomics, sets),
        "segmenter": Arrays(*(part[:, 0, 1:] for part in described)),
    }
    spectra = _spectra(evaluated, sets)
    likeness, pairs = _likeness(evaluated, sets)
    figures = {
        **_distances(features),
        **frechet_by_plane(described, evaluated.grid.size),
        "spectrum": compared_sets(spectrum_distance, spectra),
        "ms_ssim": likeness,
    }
    facts = {
        "extractors": {
            "radiomics": {"hash": radiomics.fingerprint, "features": features["radiomics"].real.shape[1]},
            "segmenter": {"hash": segmenter.fingerprint, "features": features["segmenter"].real.shape[1]},
        },
        "ms_ssim": {"scales": len(scale_weights(evaluated.grid.size)), "pairs": pairs},
        "scaling": "arcsinh of the difference from the mean of the scans in their standard deviations",
        "units": {"spectrum": "dB"},
        "patients": len(sets.real),
        "compared_with": "scans of the same masks" if sets.paired else "scans of test patients",
        "real": [case.name for case in sets.real],
        "reference": [case.name for case in sets.reference],
    }
    if planes is not None:
        figures |= _perceptual(evaluated, sets, planes)
        facts["lpips"] = planes.facts
    cases = [
        {"case": case.name, "subject": case.subject, "spectrum": spectrum_distance(own[None], spectra.reference)}
        for case, own in zip(sets.synthetic, spectra.synthetic, strict=True)
    ]
    return Section(figures, facts, cases, sets.notes(synthetic))


def standardised(features: Arrays) -> Arrays:
    """``arcsinh`` of features with mean 0 and standard deviation 1 over all real scans.

    As it is among the scans, logarithmic far from them: otherwise a feature that hardly differs among few scans decides
    alone, and where all are far off the Gaussian kernel sees no difference between bad and worse. A feature without
    spread among the scans is only centred. NaN, the features of a label that a volume lacks, becomes 0, the mean of the
    scans: synthetic and real volumes have the same masks, so what is lacking is lacking in both.
    """
    scans = np.ma.masked_invalid(np.concatenate([features.real, features.reference]))
    mean, std = scans.mean(axis=0).filled(0), scans.std(axis=0).filled(0)
    scale = np.where(std > 0, std, 1)
    return Arrays(*(np.nan_to_num(np.arcsinh((part - mean) / scale), nan=0.0) for part in features))


def frechet_by_plane(described: Arrays, shape: Sequence[int]) -> dict[str, Estimate]:
    """`frechet_distance` of axial, coronal and sagittal slabs, those of all patients of a set together.

    A patient has many slabs, which are alike, so that there is a figure of fewer patients than of whole volumes; its
    interval is over patients. Figures of other networks, or of other numbers of patients, are others.

    Args:
        described: `Segmenter.described` of each volume, ``(n, 1 + S, 1 + D)``.
        shape: of the volumes; a plane in which they are one voxel thin is left out.
    """
    across = described.real[0, :, 0]
    planes = {PLANES[axis]: Arrays(*(part[:, across == axis, 1:] for part in described)) for axis in planes_of(shape)}
    return {f"frechet/segmenter/{plane}": _frechet_of_slabs(arrays) for plane, arrays in planes.items()}


def _frechet_of_slabs(slabs: Arrays) -> Estimate:
    """Of slabs ``(n, s, d)``."""
    n, each, dimensions = slabs.real.shape
    if n * each <= dimensions:
        note = f"{TOO_FEW}: {n * each} slabs of {n} patients for {dimensions} features"
        return Estimate(None, None, None, n, None, note)
    scaled = standardised(Arrays(*(part.reshape(-1, dimensions) for part in slabs)))

    def distance(x: Array, y: Array) -> float:
        return frechet_distance(x.reshape(-1, dimensions), y.reshape(-1, dimensions))

    return compared_sets(distance, Arrays(*(part.reshape(n, each, dimensions) for part in scaled)))


def _distances(features: dict[str, Arrays]) -> dict[str, Estimate]:
    scaled = {name: standardised(arrays) for name, arrays in features.items()}
    measures: dict[str, Callable[[Arrays], Estimate]] = {
        "kid": partial(compared_sets, partial(squared_mmd, kernel=polynomial_kernel)),
        "mmd": _mmd,
        "frechet": _frechet,
        "precision": partial(compared_sets, precision),
        "recall": partial(compared_sets, lambda x, y: precision(y, x)),
        "density": partial(compared_sets, density),
        "coverage": partial(compared_sets, coverage),
    }
    return {f"{of}/{name}": measure(arrays) for of, measure in measures.items() for name, arrays in scaled.items()}


def _mmd(arrays: Arrays) -> Estimate:
    bandwidth = median_bandwidth(np.concatenate([arrays.real, arrays.reference]))
    return compared_sets(partial(squared_mmd, kernel=gaussian_kernel(bandwidth)), arrays)


def _frechet(arrays: Arrays) -> Estimate:
    n, dimensions = arrays.real.shape
    if n > dimensions:
        return compared_sets(frechet_distance, arrays)
    return Estimate(None, None, None, n, None, f"{TOO_FEW}: {n} patients for {dimensions} features")


def compared_sets(distance: Callable[[Array, Array], float], arrays: Arrays) -> Estimate:
    synthetic, real, reference = arrays
    return estimate(
        lambda chosen: distance(synthetic[chosen], reference[chosen]),
        len(synthetic),
        real_vs_real=distance(real, reference),
    )


def _arrays(cache: FeatureCache, compute: Callable[[Sample], NDArray[Any]], sets: Sets) -> Arrays:
    cases = [*sets.synthetic, *sets.real, *sets.reference]
    cache.fill(cases, compute)
    computed = np.stack([cache.get(case, compute) for case in track(cases, f"realism: {cache.name}")])
    return Arrays(*np.split(computed.astype(np.float64), 3))


def _spectra(evaluated: Evaluated, sets: Sets) -> Arrays:
    """Over the bins of the model grid: the cases' own spacings differ by up to 10 %."""
    edges = frequency_edges(evaluated.grid.size, evaluated.grid.spacing)
    cache = FeatureCache(evaluated, "spectrum", hash_value([_SPECTRUM_VERSION, edges.tolist()]))
    return _arrays(cache, partial(_spectrum, edges), sets)


def _spectrum(edges: NDArray[Any], sample: Sample) -> NDArray[Any]:
    return channel_spectra(sample.image, sample.spacing, edges=edges)


def _described(segmenter: Segmenter, sample: Sample) -> NDArray[Any]:
    return segmenter.described(sample.image)


def _likeness(evaluated: Evaluated, sets: Sets) -> tuple[Estimate, int]:
    """MS-SSIM among at most 50 patients in about 50 pairs, the same on both sides, and the number of pairs."""
    n = min(len(sets.real), _PAIRS)
    pairs = spread_pairs(n, _PAIRS)
    values, of_real = (_pair_values(evaluated, choose(cases, n), pairs) for cases in (sets.synthetic, sets.real))
    members = np.array(pairs)

    def mean_among(chosen: Indices) -> float:
        return float(values[np.isin(members, chosen).all(axis=1)].mean())

    return estimate(mean_among, n, real_vs_real=float(of_real.mean())), len(pairs)


def _pair_values(evaluated: Evaluated, cases: Sequence[Case], pairs: Sequence[tuple[int, int]]) -> Array:
    """Volumes are read for every pair: a hundred large ones would not fit into memory together."""
    bar = track(pairs, "realism: MS-SSIM")
    return np.array(
        [channel_similarity(evaluated.read(cases[i]).image, evaluated.read(cases[j]).image) for i, j in bar]
    )


def _perceptual(evaluated: Evaluated, sets: Sets, planes: PlaneDistance) -> dict[str, Estimate]:
    cache = FeatureCache(evaluated, "lpips", planes.fingerprint)

    def distance(real: Sample, other: Sample) -> Array:
        return planes(real._replace(valid=real.valid & other.valid), other.image)

    def distances(cases: Sequence[Case], what: str) -> Array:
        pairs = track(list(zip(sets.real, cases, strict=True)), f"realism: LPIPS of {what}")
        return np.stack([cache.get_pair(one, two, distance) for one, two in pairs])

    made, others = distances(sets.synthetic, "volumes"), distances(sets.reference, "scans")

    def compared(plane: int) -> Estimate:
        real = float(others[:, plane].mean())
        return estimate(lambda chosen: float(made[chosen, plane].mean()), len(made), real_vs_real=real)

    return {name: compared(plane) for plane, name in enumerate(planes.names(evaluated.grid.size))}
