"""Is synthetic CT as dense as real CT, and in the right places? HU within labels, and what is counted in lungs.

As in `realism` a patient counts once, and volumes are compared with the scans of their masks and with those of other
patients. What a drawing of the finest patterns is worth is not said where voxels are too large to show them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.cases import Case, Evaluated, FeatureCache, Sample, need_masks
from fibldm.evaluation.ct_density import (
    MOMENTS,
    SHARES,
    STATISTICS,
    Values,
    depth_names,
    depth_profile,
    describe,
    height_names,
    height_profile,
    histogram_distance,
    histogram_edges,
    lung_labels,
    plain,
    shares_of,
    within_lungs,
)
from fibldm.evaluation.faithfulness import foreground
from fibldm.evaluation.results import Section
from fibldm.evaluation.sets import Sets, choose_sets
from fibldm.evaluation.statistics import TOO_FEW, Estimate, Indices, estimate
from fibldm.files import hash_value
from fibldm.progress import track

WHOLE_LUNGS = "whole lungs"
FINEST_PATTERNS: Mapping[str, float] = {"reticulation": 1.5, "honeycombing": 1.5}
"""The largest voxel, mm, at which a pattern is judged.

Guidelines read both in sections of at most 1.5 mm (Raghu et al. 2018, "Diagnosis of idiopathic pulmonary fibrosis",
ATS/ERS/JRS/ALAT). Septa and the walls of cysts are about 1 mm thick or less, and cysts from 3 mm wide (Hansell et al.
2008, "Fleischner Society: glossary of terms for thoracic imaging"), which are two voxels of 1.5 mm: in larger ones a
region of either has the density of its mixture, and no pattern.
"""

_WITHHELD = "withheld at {:.1f} mm voxels"
_VERSION = 1  # Count up whenever the same volume gives other values.
_DECIMALS = 2  # of HU: thresholds are whole HU, and must not fall to rounding


@dataclass(frozen=True)
class Regions:
    """Where densities are measured.

    Attributes:
        values: label values by the name of a region.
        lungs: label values of the lungs together; empty where there are none.
        within: label values that make no surface of the lungs, though they are none.
    """

    values: Mapping[str, tuple[int, ...]]
    lungs: tuple[int, ...] = ()
    within: tuple[int, ...] = ()

    @classmethod
    def of(cls, names: Mapping[int, str], lungs: Sequence[str] | None = None) -> "Regions":
        """Every label, and the lungs as a whole.

        Args:
            names: of the labels by value, background (0) left out.
            lungs: names of the labels that are the lungs; None goes by their names, see `lung_labels`.

        Raises:
            FibldmError: one of ``lungs`` is the name of no label.
        """
        by_name = {name: value for value, name in names.items()}
        for name in lungs or ():
            if name not in by_name:
                raise unknown_choice("label", name, by_name)
        found = lung_labels(names) if lungs is None else sorted({by_name[name] for name in lungs})
        values: dict[str, tuple[int, ...]] = {name: (value,) for value, name in names.items()}
        if len(found) > 1:
            values = {_unlike(by_name): tuple(found), **values}
        return cls(values, tuple(found), tuple(value for value in within_lungs(names) if value not in found))

    @property
    def of_lungs(self) -> list[str]:
        """Regions that hold nothing but lungs."""
        return [name for name, values in self.values.items() if {*values} <= {*self.lungs}]

    @property
    def names_of_lungs(self) -> list[str]:
        """The labels that count as lungs."""
        return [name for name in self.of_lungs if len(self.values[name]) == 1]


class Measured(NamedTuple):
    """What was measured of volumes, one row each.

    Attributes:
        statistics: ``(n, regions, len(STATISTICS))``.
        shares: histograms ``(n, regions, bins)``.
        depths: ``(n, ranges)``; no columns without lungs.
        heights: ``(n, parts)``; no columns without lungs.
        cut: ``(n,)``, whether lungs reach the first or last slice.
    """

    statistics: Values
    shares: Values
    depths: Values
    heights: Values
    cut: NDArray[np.bool_]


def measure_ct(evaluated: Evaluated, synthetic: Sequence[Case], *, lungs: Sequence[str] | None = None) -> Section:
    """Densities within each label, and within the lungs as a whole, beside those of real scans.

    * ``hu_distance/<region>``: `histogram_distance` in HU between the volumes and scans of other patients;
      ``real_vs_real`` is that of the scans of the same masks from these.
    * ``hu_mean/...``, ``hu_std/...``, ``hu_skewness/...``, ``hu_kurtosis/...``: see `describe`; ``real_vs_real`` is the
      same of the scans of the same masks, as of all that follows. ``of_real`` has beside it that of other patients.
    * ``haa/...``, ``laa950/...``, ``perc15/...`` of lungs: see `describe`.
    * ``subpleural_to_central/...``, ``apex_to_base/...``: mean HU, see `depth_profile` and `height_profile`.

    All are means over patients, of the model grid and within the window of the run. Of labels named after a pattern
    that these voxels do not show (`FINEST_PATTERNS`), only the mean is told.

    Args:
        evaluated: the run and its work folder.
        synthetic: the volumes, with masks; of each patient the first by name counts.
        lungs: see `Regions.of`.

    Raises:
        FibldmError: the run is not one of CT with one channel and labels, a volume has no mask, one of ``lungs`` is no
            label, there are fewer than two patients to compare, or no mask holds a label.
    """
    _check(evaluated)
    need_masks(list(synthetic), "ct")
    regions = Regions.of(foreground(evaluated), lungs)
    sets = choose_sets(evaluated.real(), synthetic, "ct")
    edges = histogram_edges(evaluated.intensity.low, evaluated.intensity.high)
    made, real, others = (_measured(evaluated, cases, regions, edges) for cases in sets[:3])
    means = {name: (of(made), of(real), of(others)) for name, of in _columns(regions).items()}
    figures = _distances(regions, (made, real, others), edges) | {
        name: figure for name, parts in means.items() if (figure := _mean(*parts[:2])) is not None
    }
    if not figures:
        raise FibldmError("ct needs masks with at least 10 voxels of a label on the model grid; none has as many")
    voxel = max(evaluated.grid.spacing)
    figures = {name: _withheld(figure, voxel) if _hidden(name, voxel) else figure for name, figure in figures.items()}
    means = {name: parts for name, parts in means.items() if not _hidden(name, voxel)}
    facts = {
        "units": {"hu": "HU", "haa": "share", "laa950": "share", "perc15": "HU"},
        "window": [evaluated.intensity.low, evaluated.intensity.high],
        "voxel_mm": list(evaluated.grid.spacing),
        "lungs": regions.names_of_lungs,
        "withheld": dict.fromkeys(_unseen(voxel), _WITHHELD.format(voxel)),
        "patients": len(sets.real),
        "compared_with": "scans of the same masks" if sets.paired else "scans of test patients",
        "of_real": {name: [_average(part) for part in means[name][1:]] for name in figures if name in means},
        "real": [case.name for case in sets.real],
        "reference": [case.name for case in sets.reference],
    }
    return Section(figures, facts, _rows(sets, means), [*sets.notes(synthetic), *_notes(regions, voxel, made)])


def _check(evaluated: Evaluated) -> None:
    if evaluated.intensity.units != "HU":
        raise FibldmError(
            "densities need a run of CT, in HU; the intensities of this one are in arbitrary units",
            "measure realism instead",
        )
    if len(evaluated.channels) > 1 or not foreground(evaluated):
        raise FibldmError(
            "densities need a run with one channel and with labels; this one has the channels "
            f"{', '.join(evaluated.channels)} and {len(foreground(evaluated))} labels"
        )


def _unlike(names: Collection[str]) -> str:
    return WHOLE_LUNGS if WHOLE_LUNGS not in names else f"{WHOLE_LUNGS} together"


def _measured(evaluated: Evaluated, cases: Sequence[Case], regions: Regions, edges: Values) -> Measured:
    definition = [_VERSION, list(regions.values.items()), regions.lungs, regions.within, edges.tolist()]
    cache = FeatureCache(evaluated, "ct", hash_value(definition))

    def measure(sample: Sample) -> Values:
        image: Values = evaluated.intensity.restore(sample.image).astype(np.float64).round(_DECIMALS)
        return np.concatenate([_of_regions(image, sample, regions, edges).ravel(), _of_lungs(image, sample, regions)])

    rows = np.stack([cache.get(case, measure) for case in track(cases, "ct")])
    each = len(STATISTICS) + len(edges) - 1
    by_region, profiles = np.split(rows, [len(regions.values) * each], axis=1)
    statistics, shares = np.split(by_region.reshape(len(cases), -1, each), [len(STATISTICS)], axis=2)
    depths, heights, cut = np.split(profiles, [len(depth_names()), len(depth_names()) + len(height_names())], axis=1)
    return Measured(statistics, shares, depths, heights, cut[:, 0] > 0)


def _of_regions(image: Values, sample: Sample, regions: Regions, edges: Values) -> Values:
    inside = [image[np.isin(sample.labels, values) & sample.valid] for values in regions.values.values()]
    return np.stack([np.concatenate([describe(part), shares_of(part, edges)]) for part in inside])


def _of_lungs(image: Values, sample: Sample, regions: Regions) -> Values:
    """Both profiles, and 1 where lungs reach the end of the volume along Z."""
    lungs = np.isin(sample.labels, regions.lungs) & sample.valid
    no_surface = np.isin(sample.labels, [*regions.lungs, *regions.within, UNKNOWN_LABEL])
    depths = depth_profile(image, lungs, sample.valid & ~no_surface, sample.spacing)
    seen = np.flatnonzero(sample.valid.any(axis=(0, 1)))
    cut = lungs[..., seen[[0, -1]]].any()
    return np.concatenate([depths, height_profile(image, lungs), [float(cut)]])


def _columns(regions: Regions) -> dict[str, Any]:
    """Where the value of each figure that is a mean lies in `Measured`, by the figure's name."""

    def statistic(region: int, name: str) -> Any:
        return lambda measured: measured.statistics[:, region, STATISTICS.index(name)]

    places = {name: place for place, name in enumerate(regions.values)}
    columns = {f"{name}/{region}": statistic(at, name) for name in MOMENTS for region, at in places.items()}
    columns |= {f"{name}/{region}": statistic(places[region], name) for name in SHARES for region in regions.of_lungs}
    if not regions.lungs:
        return columns
    for at, part in enumerate(depth_names()):
        columns[f"subpleural_to_central/{part}"] = lambda measured, at=at: measured.depths[:, at]
    for at, part in enumerate(height_names()):
        columns[f"apex_to_base/{part}"] = lambda measured, at=at: measured.heights[:, at]
    return columns


def _mean(made: Values, real: Values) -> Estimate | None:
    """The mean over patients that have a value; None where there are none."""
    having = made[~np.isnan(made)]
    if not having.size:
        return None
    return estimate(lambda chosen: float(having[chosen].mean()), len(having), real_vs_real=_average(real))


def _average(values: Values) -> float | None:
    having = values[~np.isnan(values)]
    return float(having.mean()) if having.size else None


def _distances(regions: Regions, measured: tuple[Measured, Measured, Measured], edges: Values) -> dict[str, Estimate]:
    """Of as many patients on either side as have the region; nothing stands beside it where fewer scans of masks do."""
    figures = {}
    for at, region in enumerate(regions.values):
        parts = [part.shares[:, at] for part in measured]
        having = [part[~np.isnan(part).any(axis=1)] for part in parts]
        made, real, others = having
        if n := min(len(made), len(others)):
            figures[f"hu_distance/{region}"] = _distance(made[:n], real[:n], others[:n], edges)
        elif len(made):
            note = f"{TOO_FEW}: no other patient has this label"
            figures[f"hu_distance/{region}"] = Estimate(None, None, None, len(made), None, note)
    return figures


def _distance(made: Values, real: Values, others: Values, edges: Values) -> Estimate:
    def moved(chosen: Indices) -> float:
        return histogram_distance(made[chosen], others[chosen], edges)

    beside = histogram_distance(real, others, edges) if len(real) == len(made) else None
    return estimate(moved, len(made), real_vs_real=beside)


def _unseen(voxel: float) -> list[str]:
    """The patterns that voxels of this size, mm, do not show."""
    return [pattern for pattern, largest in FINEST_PATTERNS.items() if voxel > largest]


def _hidden(name: str, voxel: float) -> bool:
    """Whether a figure tells more of a pattern than its mean, at voxels that do not show it."""
    kind, _, region = name.partition("/")
    return kind != "hu_mean" and any(pattern in plain(region) for pattern in _unseen(voxel))


def _withheld(figure: Estimate, voxel: float) -> Estimate:
    return Estimate(None, None, None, figure.n, None, _WITHHELD.format(voxel))


def _rows(sets: Sets, means: Mapping[str, tuple[Values, Values, Values]]) -> list[dict[str, Any]]:
    """The values of each volume."""
    rows = []
    for at, case in enumerate(sets.synthetic):
        values = {name: float(made[at]) for name, (made, *_) in means.items() if not np.isnan(made[at])}
        rows.append({"case": case.name, "subject": case.subject, **values})
    return rows


def _notes(regions: Regions, voxel: float, made: Measured) -> list[str]:
    notes = [f"Measured at voxels of {voxel:.1f} mm, where noise averages out: compare with real, not with literature."]
    if not regions.lungs:
        return [*notes, "No label is named as lungs, so nothing of lungs was measured; --lungs names them."]
    notes.append(f"Lungs are {', '.join(regions.names_of_lungs)}.")
    if unseen := _unseen(voxel):
        finest = min(FINEST_PATTERNS[pattern] for pattern in unseen)
        notes.append(
            f"{' and '.join(unseen)}: withheld at {voxel:.1f} mm voxels; whether they are drawn rightly can be seen at "
            f"{finest:g} mm or less only."
        )
    if made.cut.any():
        notes.append(f"In {made.cut.sum()} volumes lungs reach the end of the volume, which counts as apex or base.")
    return notes
