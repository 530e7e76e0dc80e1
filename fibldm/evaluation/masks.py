"""Are masks that were drawn from nothing like real ones, do they have what was asked for, and are some of them copies?

Real masks of test patients are compared with; beside every figure stands the same of masks of training patients, which
no generator of them can be expected to surpass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, wasserstein_distance

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.distances import polynomial_kernel, squared_mmd
from fibldm.evaluation.mask_shapes import CONTACT, PLACE, SHAPE, TOPOLOGY, centred, describe, pairwise_dice
from fibldm.evaluation.realism import Array, Arrays, compared_sets, standardised
from fibldm.evaluation.results import Section
from fibldm.evaluation.sets import seeded_places
from fibldm.evaluation.statistics import Estimate, Indices, by_patient, estimate, mean_estimate
from fibldm.files import read_json
from fibldm.progress import track
from fibldm.typed_settings import counted
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import resample
from fibldm.volumes.masks import as_labels, volumes_in
from fibldm.volumes.writer import sidecar, volume_stem

_LONGEST_AXIS = 64  # of what is looked up among training masks
_FEWEST_ASKED = 3
_COPY = 0.5  # of the distance of the closest test mask; Carlini et al. 2023, section 5, as in `memorisation`
_CHUNK = 64  # training masks that are compared at a time
_SHAPE_OF_LABEL = (*SHAPE, *PLACE)
_SHOWN = ("volume_ml", "sphericity", *TOPOLOGY, CONTACT)


class Measured(NamedTuple):
    """A mask on the model grid.

    Attributes:
        case: its file is the image.
        figures: see `describe`.
        small: moved to the middle, of at most 64 voxels an axis.
    """

    case: Case
    figures: dict[str, float]
    small: NDArray[np.uint8]


def measure_masks(evaluated: Evaluated, synthetic: Sequence[Case]) -> Section:
    """Compare masks, the images of ``synthetic``, with those of the work folder.

    * ``volume_ml/<label>``, ``sphericity/<label>``, ``components/...``, ``cavities/...``, ``handles/...``,
      ``contact_mm2/<label>+<label>``: means, beside those of test patients, see `describe`
    * ``absent/<label>``: share of masks without it
    * ``volume_distance_ml/<label>``: 1-Wasserstein distance of the volumes from those of test patients
    * ``kid/shapes``: `squared_mmd` with the polynomial kernel, of figures of shape, place and contact, `standardised`
    * ``asked_volume_r/<label>``, ``asked_volume_error/<label>``: correlation of asked and drawn volume, and the mean of
      their difference over the asked one; where sidecars say what was asked
    * ``nearest_training_dice``: mean Dice with the training mask that is most alike, moved to one middle;
      ``closer_than_any_real``, the share that is closer to one than any test mask is; ``named``, the share less than
      half as far from one as every test mask is

    Raises:
        FibldmError: there are fewer than two masks, test or training patients, or a file cannot be read.
    """
    names = evaluated.labels
    splits = {split: evaluated.real(split) for split in ("training", "test")}
    real = {split: _measured(evaluated, [_of_labels(case) for case in cases], split) for split, cases in splits.items()}
    made = _measured(evaluated, synthetic, "masks")
    if min(len(made), *(len(part) for part in real.values())) < 2:
        raise FibldmError(
            "masks are compared with at least two training and two test masks without unknown voxels; got "
            f"{len(made)} masks, {len(real['training'])} and {len(real['test'])}",
            "draw more masks, or prepare the data with more patients",
        )
    nearest, copies = _copies(made, real["training"], real["test"], names)
    asked = {one.case.name: _asked(one.case) for one in made}
    figures = {
        **_means(made, real["test"]),
        **_distances(made, real["training"], real["test"]),
        **_asked_and_got(made, asked),
        **copies,
    }
    facts = {
        "masks": len(made),
        "training_masks": len(real["training"]),
        "test_masks": len(real["test"]),
        "real": "means are of test masks; distances, and copies, of training masks from test masks",
    }
    cases = [
        {"case": one.case.name, "asked_ml": asked[one.case.name], **nearest[one.case.name], **one.figures}
        for one in made
    ]
    left_out = len(synthetic) + sum(map(len, splits.values())) - len(made) - sum(map(len, real.values()))
    return Section(figures, facts, cases, _notes(cases, left_out))


def masks_of(folder: Path) -> list[Case]:
    """The masks that ``fibldm synthesize-masks`` wrote to a folder, each of a patient of its own.

    Raises:
        FibldmError: there is none.
    """
    files = volumes_in(folder)
    if not files:
        raise FibldmError(f"{folder} must hold masks (.nii, .nii.gz); it holds none", "check the path")
    return [Case(volume_stem(file), volume_stem(file), None, file, file) for file in files]


def _of_labels(case: Case) -> Case:
    """A real case whose image is its mask."""
    return replace(case, image=cast(Path, case.label))  # `Evaluated.real` gives those with masks


def _measured(evaluated: Evaluated, cases: Sequence[Case], what: str) -> list[Measured]:
    """Of masks without unknown voxels."""
    measured = []
    for case in track(cases, f"masks: {what}"):
        labels, spacing = _read(evaluated, case.image)
        if (labels == UNKNOWN_LABEL).any():
            continue
        step = -(-max(evaluated.grid.size) // _LONGEST_AXIS)
        small = centred(labels, evaluated.grid.size)[::step, ::step, ::step]
        measured.append(Measured(case, describe(labels, spacing, evaluated.labels), small))
    return measured


def _read(evaluated: Evaluated, file: Path) -> tuple[NDArray[np.uint8], tuple[float, float, float]]:
    """Labels on the model grid; what lies beyond the field of view is background, as such a generator learns it."""
    volume = as_labels(read_volume(str(file))).canonical()
    if strange := sorted({*np.unique(volume.array).tolist()} - {*evaluated.labels, UNKNOWN_LABEL}):
        known = ", ".join(map(str, evaluated.labels))
        raise FibldmError(f"{file} must hold labels of the run ({known}); it holds {strange}", "check the folder")
    grid = evaluated.grid.training_grid(volume.grid)
    return resample(volume, grid, kind="label", fill=0).array, grid.spacing


def _means(made: Sequence[Measured], test: Sequence[Measured]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    for name in made[0].figures:
        figure, _, label = name.partition("/")
        seen = any(one.figures[name] for one in (*made, *test))
        if figure in _SHOWN and (seen or figure != CONTACT):
            figures[name] = _mean(made, test, partial(_figure, name))
        if figure == "volume_ml":
            figures[f"absent/{label}"] = _mean(made, test, partial(_is_zero, name))
    return figures


def _figure(name: str, mask: Measured) -> float:
    return mask.figures[name]


def _is_zero(name: str, mask: Measured) -> float:
    return float(not mask.figures[name])


def _mean(made: Sequence[Measured], real: Sequence[Measured], value: Callable[[Measured], float]) -> Estimate:
    """Of masks; beside it of real ones, by patient both."""
    drawn, scanned = (
        by_patient([one.case.subject for one in part], [value(one) for one in part]) for part in (made, real)
    )
    return mean_estimate(drawn, real_vs_real=mean_estimate(scanned).value)


def _distances(made: Sequence[Measured], training: Sequence[Measured], test: Sequence[Measured]) -> dict[str, Estimate]:
    """Of as many masks, training and test patients as there are of the fewest, each by a seeded choice."""
    parts = [_first_of_each(part) for part in (made, training, test)]
    n = min(map(len, parts))
    chosen = [[part[place] for place in seeded_places(len(part), n)] for part in parts]
    names = [name for name in made[0].figures if name.partition("/")[0] in (*_SHAPE_OF_LABEL, CONTACT)]
    shapes = Arrays(*(np.array([[one.figures[name] for name in names] for one in part]) for part in chosen))
    figures = {"kid/shapes": compared_sets(partial(squared_mmd, kernel=polynomial_kernel), standardised(shapes))}
    for column, name in enumerate(names):
        figure, _, label = name.partition("/")
        if figure == "volume_ml":
            volumes = Arrays(*(part[:, column] for part in shapes))
            figures[f"volume_distance_ml/{label}"] = compared_sets(wasserstein_distance, volumes)
    return figures


def _first_of_each(masks: Sequence[Measured]) -> list[Measured]:
    """One mask of every patient."""
    first: dict[str, Measured] = {}
    for one in masks:
        first.setdefault(one.case.subject, one)
    return list(first.values())


def _asked(case: Case) -> dict[str, float]:
    """The volumes that were asked of a mask, ml by name of the label, as its sidecar says; none without one."""
    file = sidecar(case.image)
    return dict(read_json(file).get("volumes_ml", {}).get("asked", {})) if file.exists() else {}


def _asked_and_got(made: Sequence[Measured], asked: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    figures = {}
    for label in dict.fromkeys(name for volumes in asked.values() for name in volumes):
        pairs = np.array(
            [
                (asked[one.case.name][label], one.figures[f"volume_ml/{label}"])
                for one in made
                if label in asked[one.case.name]
            ]
        )
        if len(pairs) >= _FEWEST_ASKED and np.ptp(pairs[:, 0]) > 0:
            figures[f"asked_volume_r/{label}"] = estimate(partial(_correlation, pairs), len(pairs))
        if len(some := pairs[pairs[:, 0] > 0]):
            errors = np.abs(some[:, 1] - some[:, 0]) / some[:, 0]
            figures[f"asked_volume_error/{label}"] = estimate(partial(_mean_at, errors), len(errors))
    return figures


def _correlation(pairs: Array, chosen: Indices) -> float:
    """Pearson's; 0 where one of both does not vary, so that it says nothing of the other."""
    asked, got = pairs[chosen].T
    return float(pearsonr(asked, got).statistic) if np.ptp(asked) > 0 and np.ptp(got) > 0 else 0.0


def _mean_at(values: Array, chosen: Indices) -> float:
    return float(values[chosen].mean())


def _copies(
    made: Sequence[Measured], training: Sequence[Measured], test: Sequence[Measured], names: Mapping[int, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Estimate]]:
    """The training mask that is most like each mask, and how often that is closer than real masks of others are."""
    values = [value for value in names if value]
    known = [np.stack([one.small for one in training[start : start + _CHUNK]]) for start in _chunks(training)]

    def nearest(masks: Sequence[Measured]) -> tuple[NDArray[np.intp], Array]:
        own = np.stack([one.small for one in masks])
        dice = np.concatenate([pairwise_dice(own, part, values) for part in known], axis=1)
        return dice.argmax(axis=1), dice.max(axis=1)

    places, dice = nearest(made)
    _, of_test = nearest(test)
    closest = float(of_test.max())
    threshold = 1 - _COPY * (1 - closest)
    subjects = [one.case.subject for one in made]
    real = mean_estimate(by_patient([one.case.subject for one in test], of_test.tolist())).value
    figures = {
        "nearest_training_dice": mean_estimate(by_patient(subjects, dice.tolist()), real_vs_real=real),
        "closer_than_any_real": mean_estimate(by_patient(subjects, (dice > closest).astype(float).tolist())),
        "named": mean_estimate(by_patient(subjects, (dice > threshold).astype(float).tolist())),
    }
    told = {
        one.case.name: {
            "nearest_training": training[place].case.name,
            "nearest_training_dice": float(like),
            "named": bool(like > threshold),
        }
        for one, place, like in zip(made, places, dice, strict=True)
    }
    return told, figures


def _chunks(masks: Sequence[Measured]) -> range:
    return range(0, len(masks), _CHUNK)


def _notes(cases: Sequence[Mapping[str, Any]], left_out: int) -> list[str]:
    notes = [f"{counted(left_out, 'mask')} with unknown voxels left out."] if left_out else []
    if asked := sum(bool(case["asked_ml"]) for case in cases):
        notes.append(f"Volumes were asked of {asked} of {len(cases)} masks, so that theirs are no draws of training.")
    if named := [f"{case['case']} (of {case['nearest_training']})" for case in cases if case["named"]]:
        notes.append(f"Copies of training masks are {len(named)} of {len(cases)} masks: {', '.join(named)}.")
    return notes
