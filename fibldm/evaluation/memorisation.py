"""Copies of training scans among synthetic volumes.

Two chests correlate because both are chests, and two patients of one build because they fill the same place. What tells
patients apart is their detail: a volume minus its blur, minus the mean of the same of the training scans. The
similarity of two volumes is the Pearson correlation of what is left, the largest of all shifts by at most two voxels;
all volumes pass through the autoencoder first, so that none differs by being sharper or noisier than it can draw.

A synthetic volume is named as a copy where it lies less than half as far (1 - similarity) from a training scan as every
real test scan does. Being closer than all of them is no proof: of n test scans and one more, any may be the closest.
The half is that of Carlini et al. 2023, "Extracting training data from diffusion models", section 5.

Without the blur taken away, pose and build decide, and scans of two patients can be as similar as a blurred copy;
without shifts, a copy moved by a voxel is lost among other patients. A copy that is turned, mirrored or scaled is not
found.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, FeatureCache, Sample
from fibldm.evaluation.reconstruction import Reconstructor
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import FEWEST_PATIENTS, Estimate, by_patient, mean_estimate
from fibldm.files import hash_value
from fibldm.progress import track
from fibldm.volumes.pictures import Pair, channel_pairs, write_comparison

_LONGEST_AXIS = 64
_BLUR = 1.0
_SHIFT = 2
_SMALLEST_NORM = 1e-6
_PICTURED = 4

Floats = NDArray[np.float32]


class Nearest(NamedTuple):
    """A volume, the training scan most similar to it, and their similarity in ``[-1, 1]``."""

    case: Case
    training: Case
    similarity: float


@dataclass(frozen=True)
class TrainingDetails:
    """What volumes are compared with.

    Attributes:
        cases: the training scans.
        mean: of their details without the margin that shifts need, ``(D,)``.
        residuals: ``(N, D)``, each of mean 0 and norm 1.
    """

    cases: Sequence[Case]
    mean: Floats
    residuals: Floats

    @classmethod
    def of(cls, cases: Sequence[Case], details: Iterable[Floats]) -> "TrainingDetails":
        """Of training scans and their details, ``(x, y, z)`` or ``(C, x, y, z)`` each."""
        rows = np.stack([_shifted(one, (0, 0, 0)) for one in details])
        mean = rows.mean(axis=0)
        return cls(cases, mean, _standardise(rows, mean))

    def nearest(self, case: Case, detail: Floats) -> Nearest:
        """The training scan most similar to a volume of this detail; the first of equally similar ones."""
        steps = itertools.product(*(range(-margin, margin + 1) for margin in _margins(detail)))
        shifted = _standardise(np.stack([_shifted(detail, step) for step in steps]), self.mean)
        similarities = (self.residuals @ shifted.T).max(axis=1)
        best = int(similarities.argmax())
        return Nearest(case, self.cases[best], min(1.0, float(similarities[best])))  # rounding may pass 1


def measure_copies(
    evaluated: Evaluated, synthetic: Sequence[Case], *, pictures: Path, reconstruct: Reconstructor
) -> Section:
    """How close synthetic volumes are to training scans, beside how close real scans of other patients are.

    The closest pairs are drawn in ``copies.png`` of the folder ``pictures``.

    Returns:
        Figures ``nearest_training_similarity`` (real: of test scans) and the same ``/validation``;
        ``closer_than_any_real``, the share of volumes more similar to a training scan than any test scan is, and
        ``named``, the share named as copies (real: of the validation scans, None without any).

    Raises:
        FibldmError: no synthetic volume, fewer than two training scans, no test scan, or a file that cannot be read.
    """
    training, validation, test = (evaluated.real(split) for split in ("training", "validation", "test"))
    if not synthetic:
        raise FibldmError("the search for copies needs at least one synthetic volume; got none")
    if len(training) < 2 or not test:
        raise FibldmError(
            "the search for copies needs at least two training scans and one test scan; "
            f"got {len(training)} and {len(test)}",
            "prepare the data again with more patients",
        )
    made_with = hash_value([reconstruct.fingerprint, _LONGEST_AXIS, _BLUR])
    cache = FeatureCache(evaluated, "detail", made_with)

    def compute(sample: Sample) -> NDArray[np.float16]:
        return detail_of(reconstruct(sample.image)).astype(np.float16)

    def detail(case: Case) -> Floats:
        return cache.get(case, compute).astype(np.float32)

    known = TrainingDetails.of(training, map(detail, track(training, "training scans")))
    others = track([*test, *validation, *synthetic], "nearest training scans")
    found = [known.nearest(case, detail(case)) for case in others]
    of_test, of_validation = found[: len(test)], found[len(test) : -len(synthetic)]
    made = sorted(found[-len(synthetic) :], key=lambda nearest: (-nearest.similarity, nearest.case.name))
    closest = max(nearest.similarity for nearest in of_test)
    threshold = 1 - (1 - closest) / 2
    picture = Path(pictures) / "copies.png"
    write_comparison(picture, [pair for nearest in made[:_PICTURED] for pair in _pairs(evaluated, nearest)])
    return Section(
        figures=_figures(made, of_validation, of_test, closest, threshold),
        facts={
            "threshold": threshold,
            "closest_test_similarity": closest,
            "training_scans": len(training),
            "validation_scans": len(validation),
            "test_scans": len(test),
            "from_training_masks": sum(case.split == "training" for case in synthetic),
            "autoencoder": reconstruct.fingerprint,
            "picture": picture.name,
        },
        cases=[_entry(nearest, threshold) for nearest in made],
        notes=_notes(made, threshold, test),
    )


def detail_of(image: Floats) -> Floats:
    """What an image holds below the scale of a voxel's neighbourhood, on at most 64 voxels an axis.

    Args:
        image: ``(X, Y, Z)``, or ``(C, X, Y, Z)``, whose channels keep apart.
    """
    x, y, z = (min(length, _LONGEST_AXIS) for length in image.shape[-3:])
    channels = torch.from_numpy(image).reshape(-1, *image.shape[-3:])
    coarse = F.adaptive_avg_pool3d(channels, (x, y, z)).numpy()
    detail = coarse - ndimage.gaussian_filter(coarse, _BLUR, mode="nearest", axes=(1, 2, 3))
    return np.asarray(detail.reshape(*image.shape[:-3], x, y, z))


def _shifted(detail: Floats, step: tuple[int, ...]) -> Floats:
    """The voxels that lie ``step`` beyond those of the volume without its margin, ``(D,)``."""
    axes = zip(step, _margins(detail), detail.shape[-3:], strict=True)
    x, y, z = (slice(margin + offset, margin + offset + n - 2 * margin) for offset, margin, n in axes)
    return detail[..., x, y, z].ravel()


def _margins(detail: Floats) -> list[int]:
    """Voxels that a shift may take away on each side of each axis; a slice stays in its plane."""
    return [_SHIFT if length > 1 else 0 for length in detail.shape[-3:]]


def _standardise(rows: Floats, mean: Floats) -> Floats:
    """Residuals of mean 0 and norm 1, in place: there may be gigabytes of them; 0 where nothing is left."""
    rows -= mean
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST_NORM)
    return rows


def _figures(
    made: Sequence[Nearest],
    validation: Sequence[Nearest],
    test: Sequence[Nearest],
    closest: float,
    threshold: float,
) -> dict[str, Estimate]:
    real = _mean(test).value
    figures = {"nearest_training_similarity": _mean(made, real)}
    if validation:
        figures["nearest_training_similarity/validation"] = _mean(validation, real)
    for name, limit in (("closer_than_any_real", closest), ("named", threshold)):
        figures[name] = _share(made, limit, _share(validation, limit).value if validation else None)
    return figures


def _mean(found: Sequence[Nearest], real: float | None = None) -> Estimate:
    return _mean_of(found, [nearest.similarity for nearest in found], real)


def _share(found: Sequence[Nearest], limit: float, real: float | None = None) -> Estimate:
    return _mean_of(found, [float(nearest.similarity > limit) for nearest in found], real)


def _mean_of(found: Sequence[Nearest], values: list[float], real: float | None) -> Estimate:
    return mean_estimate(by_patient([nearest.case.subject for nearest in found], values), real_vs_real=real)


def _entry(nearest: Nearest, threshold: float) -> dict[str, object]:
    return {
        "case": nearest.case.name,
        "nearest": nearest.training.name,
        "similarity": nearest.similarity,
        "named": nearest.similarity > threshold,
        "from_training_mask": nearest.case.split == "training",
    }


def _notes(made: Sequence[Nearest], threshold: float, test: Sequence[Case]) -> list[str]:
    notes = []
    named = [f"{case.name} (of {training.name})" for case, training, similarity in made if similarity > threshold]
    if named:
        notes.append(f"Copies of training scans are {len(named)} of {len(made)} volumes: {', '.join(named)}.")
    if shared := sum(nearest.case.split == "training" for nearest in made):
        notes.append(f"{shared} of {len(made)} volumes follow a training patient's mask and so share its anatomy.")
    if (patients := len({case.subject for case in test})) < FEWEST_PATIENTS:
        notes.append(f"The threshold comes from {patients} test patients only; {FEWEST_PATIENTS} or more make it firm.")
    return notes


def _pairs(evaluated: Evaluated, nearest: Nearest) -> list[Pair]:
    real, made = evaluated.read(nearest.training), evaluated.read(nearest.case)
    title = f"{nearest.training.name} and {nearest.case.name}: similarity {nearest.similarity:.3f}"
    names, channels = ("training", "synthetic"), evaluated.channels
    return channel_pairs(title, real.image, made.image, spacing=real.spacing, names=names, channels=channels)
