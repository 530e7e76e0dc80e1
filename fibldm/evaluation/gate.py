"""How good is the quality gate? What it leaves out of real scans, of synthetic volumes, and of scans that were spoilt.

`fibldm synthesize --check` draws a volume again whose intensities lie outside of the ranges of training, see
`fibldm.volumes.gate`. Real test scans that lie outside are false alarms; spoilt ones that lie inside are missed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.evaluation.cases import Case, Evaluated, Sample, need_masks
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate, by_patient, mean_estimate
from fibldm.files import read_json
from fibldm.progress import track
from fibldm.volumes.gate import Gate, measure
from fibldm.volumes.writer import sidecar

_NO_FAULT = "none"
_BLURS = (0.5, 1.0)
_GRAINS = (0.05, 0.1)
_AIR_HU = 1024.0

Spoil = Callable[[Sample, Sample, np.random.Generator], Sample]
Voxels = Callable[[NDArray[Any], Sample, np.random.Generator], NDArray[Any]]


def measure_gate(evaluated: Evaluated, synthetic: Sequence[Case], gate: Gate) -> Section:
    """How many volumes lie outside of the ranges of training.

    Figures are ``outside``, the share of synthetic volumes, beside that of real test scans; and ``caught/<fault>``, the
    share of real test scans that lie outside once they have that fault, see `FAULTS`.

    Raises:
        FibldmError: there is no real test scan, or a volume has no mask.
    """
    need_masks(list(synthetic), "gate")
    real, faults = evaluated.real("test"), faults_of(evaluated)
    found: dict[str, list[list[str]]] = {name: [] for name in (_NO_FAULT, *faults)}
    for place, case in enumerate(track(real, "gate, real")):
        scan, other = (in_units(evaluated, one) for one in (case, real[(place + 1) % len(real)]))
        found[_NO_FAULT].append(_outside(evaluated, gate, scan))
        for name, spoil in faults.items():
            spoilt = spoil(scan, other, np.random.default_rng(place))
            found[name].append(_outside(evaluated, gate, spoilt))
    drawn = [_outside(evaluated, gate, evaluated.as_written(case)) for case in track(synthetic, "gate")]
    of_real = _share(real, found.pop(_NO_FAULT)).value
    figures = {"outside": _share(synthetic, drawn, of_real)}
    figures |= {f"caught/{name}": _share(real, each) for name, each in found.items()}
    cases = [
        {"case": case.name, "subject": case.subject, "outside": what}
        for case, what in zip(synthetic, drawn, strict=True)
    ]
    return Section(figures, {"patients_of_ranges": gate.patients, "why": _why(drawn)}, cases, _notes(synthetic, gate))


def in_units(evaluated: Evaluated, case: Case) -> Sample:
    """A real scan on the model grid, in the units that volumes are written in."""
    sample = evaluated.read(case)
    return sample._replace(image=evaluated.intensity.restore(sample.image))


def faults_of(evaluated: Evaluated) -> dict[str, Spoil]:
    """Faults that a volume may have, by name, each from a scan in its units, another one, and a generator."""
    low, high = (np.reshape(level, (-1, *[1] * 3)) for level in evaluated.intensity.output_range)
    hounsfield = evaluated.intensity.units == "HU"

    def changed(voxels: Voxels) -> Spoil:
        def spoil(scan: Sample, other: Sample, generator: np.random.Generator) -> Sample:
            channels = scan.image.reshape(-1, *scan.labels.shape)
            return scan._replace(image=voxels(channels, scan, generator).astype(np.float32).reshape(scan.image.shape))

        return spoil

    return {
        "constant": changed(lambda image, scan, _: np.zeros_like(image) + _of(image, scan.valid, np.median)),
        "inverted": changed(lambda image, scan, _: low + high - image),
        "wrong units": changed(lambda image, scan, _: image + _AIR_HU if hounsfield else 2 * image),
        "noise of its mean and deviation": changed(
            lambda image, scan, generator: (
                _of(image, scan.valid, np.mean)
                + _of(image, scan.valid, np.std) * generator.standard_normal(image.shape)
            )
        ),
        "noise of the mean and deviation of each label": changed(_noise_by_label),
        "flat labels": changed(lambda image, scan, _: _by_label(image, scan, np.median)),
        **{f"blurred, {step:g} voxels": changed(_blurred(step)) for step in _BLURS},
        **{f"grain added, {share:.0%} of the range": changed(_grained(share * (high - low))) for share in _GRAINS},
        "upside down": changed(lambda image, scan, _: image[..., ::-1]),
        "labels swapped": lambda scan, other, _: scan._replace(labels=_swapped(scan.labels)),
        "mask of another patient": lambda scan, other, _: scan._replace(
            labels=other.labels, valid=scan.valid & other.valid
        ),
    }


def _blurred(step: float) -> Voxels:
    """By a Gaussian of that deviation, in voxels, along every axis that has several."""
    return lambda image, scan, _: ndimage.gaussian_filter(image, [0, *(step * (part > 1) for part in image.shape[1:])])


def _grained(deviation: NDArray[Any]) -> Voxels:
    return lambda image, scan, generator: image + deviation * generator.standard_normal(image.shape)


def _of(image: NDArray[Any], where: NDArray[np.bool_], statistic: Callable[..., Any]) -> NDArray[Any]:
    """A statistic of each channel, ``(C, 1, 1, 1)``."""
    return np.array([statistic(channel[where]) for channel in image], dtype=np.float32).reshape(-1, 1, 1, 1)


def _by_label(image: NDArray[Any], scan: Sample, statistic: Callable[..., Any]) -> NDArray[Any]:
    made = image.copy()
    for label in np.unique(scan.labels):
        where = scan.labels == label
        made[:, where] = _of(image, where, statistic)[:, :, 0, 0]
    return made


def _noise_by_label(image: NDArray[Any], scan: Sample, generator: np.random.Generator) -> NDArray[Any]:
    means, deviations = (_by_label(image, scan, statistic) for statistic in (np.mean, np.std))
    return means + deviations * generator.standard_normal(image.shape)


def _swapped(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each label becomes the next one; background, too."""
    present = [int(label) for label in np.unique(labels) if label != UNKNOWN_LABEL]
    table = np.arange(256, dtype=np.uint8)
    table[present] = present[1:] + present[:1]
    return table[labels]


def _outside(evaluated: Evaluated, gate: Gate, sample: Sample) -> list[str]:
    image = sample.image.reshape(-1, *sample.labels.shape)
    return gate.outside(measure(evaluated.channels, image, sample.labels, sample.valid))


def _share(cases: Sequence[Case], outside: Sequence[Sequence[str]], real: float | None = None) -> Estimate:
    values = [float(bool(found)) for found in outside]
    return mean_estimate(by_patient([case.subject for case in cases], values), real_vs_real=real)


def _why(outside: Sequence[Sequence[str]]) -> Mapping[str, int]:
    """How many synthetic volumes lie outside in what."""
    what = Counter(finding.partition(" (training")[0].rpartition(" ")[0] for each in outside for finding in each)
    return dict(what.most_common())


def _notes(synthetic: Sequence[Case], gate: Gate) -> list[str]:
    notes = [f"The ranges are those of {gate.patients} training patients."]
    sidecars = [file for case in synthetic if (file := sidecar(case.written)).exists()]
    if checked := sum("check" in read_json(file) for file in sidecars):
        notes.append(f"{checked} of {len(synthetic)} volumes were drawn with --check, which left out those outside.")
    return notes
