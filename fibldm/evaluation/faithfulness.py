"""Do synthetic volumes show what their masks ask for? What a segmenter of real scans finds in them, against these.

The segmenter errs on real scans too: its agreement with the masks of real test scans is the ceiling of every figure,
and its agreement with the mask of another patient the floor.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, FeatureCache, Sample, need_masks
from fibldm.evaluation.results import SHUFFLED, Section
from fibldm.evaluation.segmentation_metrics import FEWEST_VOXELS, named_values, overlaps
from fibldm.evaluation.segmenter import Segmenter
from fibldm.evaluation.statistics import Estimate, by_patient, mean_estimate
from fibldm.progress import track


class Measured(NamedTuple):
    """The values of one volume, by the name of the figure that they are averaged to."""

    case: Case
    values: Mapping[str, float]


def measure_faithfulness(evaluated: Evaluated, synthetic: Sequence[Case], segmenter: Segmenter) -> Section:
    """Agreement of the labels found in synthetic volumes with the masks they were made from.

    Figures are ``dice``, ``hd95`` and ``assd`` (mm), ``volume_error`` (absolute) and ``volume_bias`` (signed, both
    relative to the mask): ``<measure>/<label>`` for each label, ``<measure>`` for their mean in each volume, see
    `Overlap`. ``real_vs_real`` is the ceiling: the same of real test scans, of those patients only whose masks were
    used where there are such. ``<figure>/shuffled`` is the floor, against the mask of the next patient; it has no
    ceiling.

    A Dice above its ceiling is no success: what is easier to segment than a real scan is simpler than one.

    Raises:
        FibldmError: a volume has no mask, or no mask holds a label of at least 10 voxels.
    """
    need_masks(list(synthetic), "faithfulness")
    names = foreground(evaluated)
    patients, test = {case.subject for case in synthetic}, evaluated.real("test")
    real = [case for case in test if case.subject in patients] or test
    measured = measure_overlaps(evaluated, [(case, case) for case in synthetic], segmenter)
    if not any(row.values for row in measured):
        raise FibldmError(
            f"faithfulness needs masks with at least {FEWEST_VOXELS} voxels of a label on the model grid; "
            f"none of {len(synthetic)} has as many of {', '.join(names.values())}",
            "check that these are the masks of the volumes",
        )
    ceiling = mean_estimates(measure_overlaps(evaluated, [(case, case) for case in real], segmenter))
    shuffled = mean_estimates(measure_overlaps(evaluated, _with_other_masks(synthetic), segmenter))
    figures = mean_estimates(measured, {name: figure.value for name, figure in ceiling.items()})
    floor = {f"{name}{SHUFFLED}": figure for name, figure in shuffled.items()}
    return Section(
        figures | floor,
        _facts(segmenter, measured, real, names),
        described(measured),
        _notes(figures, synthetic, names),
    )


def foreground(evaluated: Evaluated) -> dict[int, str]:
    """Names of the labels by value, without background."""
    return {value: name for value, name in evaluated.labels.items() if value}


def segmentation(evaluated: Evaluated, case: Case, segmenter: Segmenter) -> NDArray[np.uint8]:
    """Labels found in a case on the model grid, ``(X, Y, Z)``; computed once."""
    return _segmentations(evaluated, segmenter).get(case, partial(_segmented, segmenter))


def _segmentations(evaluated: Evaluated, segmenter: Segmenter) -> FeatureCache:
    return FeatureCache(evaluated, "segmentation", segmenter.fingerprint)


def _segmented(segmenter: Segmenter, sample: Sample) -> NDArray[np.uint8]:
    return segmenter.segment(sample.image)


def mean_estimates(
    measured: Sequence[Measured], real_vs_real: Mapping[str, float | None] | None = None
) -> dict[str, Estimate]:
    """The mean over patients of everything that was measured, each over the volumes that have it."""
    names = dict.fromkeys(name for row in measured for name in row.values)
    ceiling = real_vs_real or {}
    return {name: mean_estimate(values_of(measured, name), real_vs_real=ceiling.get(name)) for name in names}


def values_of(measured: Sequence[Measured], name: str) -> dict[str, list[float]]:
    """The values of one figure by patient, of the volumes that have it."""
    having = [row for row in measured if name in row.values]
    return by_patient([row.case.subject for row in having], [row.values[name] for row in having])


def described(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The values of each volume for a section's ``cases``."""
    return [{"case": row.case.name, "subject": row.case.subject, **row.values} for row in measured]


def measure_overlaps(evaluated: Evaluated, pairs: Sequence[tuple[Case, Case]], segmenter: Segmenter) -> list[Measured]:
    """What is found in the first of each pair against the mask of the second."""
    names, measured = foreground(evaluated), []
    _segmentations(evaluated, segmenter).fill([case for case, _ in pairs], partial(_segmented, segmenter))
    for case, other in track(pairs, "segment"):
        mask = evaluated.read(other)
        seen, wanted = mask.against(segmentation(evaluated, case, segmenter))
        found = overlaps(seen, wanted, names, mask.spacing)
        measured.append(Measured(case, named_values(found, names)))
    return measured


def _with_other_masks(synthetic: Sequence[Case]) -> list[tuple[Case, Case]]:
    """Each volume with the first of the next patient; none where there is one patient only."""
    first: dict[str, Case] = {}
    for case in synthetic:
        first.setdefault(case.subject, case)
    patients = list(first)
    following = dict(zip(patients, patients[1:] + patients[:1], strict=True))
    return [(case, first[following[case.subject]]) for case in synthetic] if len(patients) > 1 else []


def _facts(
    segmenter: Segmenter, measured: Sequence[Measured], real: Sequence[Case], names: Mapping[int, str]
) -> dict[str, Any]:
    without = {name: sum(f"dice/{name}" not in row.values for row in measured) for name in names.values()}
    patients = {case.subject for case in real}
    return {
        "segmenter": segmenter.fingerprint,
        "units": {"hd95": "mm", "assd": "mm"},
        "fewest_voxels": FEWEST_VOXELS,
        "volumes_not_measured": {name: count for name, count in without.items() if count},
        "ceiling": {"patients": len(patients), "same_patients": patients <= {row.case.subject for row in measured}},
    }


def _notes(figures: Mapping[str, Estimate], synthetic: Sequence[Case], names: Mapping[int, str]) -> list[str]:
    notes = []
    easy = {name: figures[f"dice/{name}"] for name in names.values() if _above_ceiling(figures.get(f"dice/{name}"))}
    if easy:
        listed = ", ".join(f"{name} ({figure.note})" if figure.note else name for name, figure in easy.items())
        notes.append(
            f"Dice above that of real scans for {listed}: what is easier to segment than a real scan may be simpler."
        )
    patients = {case.subject: case.split for case in synthetic}
    training = sum(split == "training" for split in patients.values())
    if training:
        notes.append(
            f"The segmenter was trained on scans of {training} of the {len(patients)} patients whose masks were used, "
            "which may flatter these figures."
        )
    if len(patients) == 1:
        notes.append("All masks are of one patient, so there is no other mask to shuffle with.")
    return notes


def _above_ceiling(figure: Estimate | None) -> bool:
    """Whether the whole interval lies above, or the figure itself where there are too few patients for an interval."""
    if figure is None or figure.value is None or figure.real_vs_real is None:
        return False
    return (figure.value if figure.low is None else figure.low) > figure.real_vs_real
