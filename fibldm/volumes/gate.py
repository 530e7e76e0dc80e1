"""The quality gate: in which ranges intensities of training cases lie, label by label, outside which a volume is bad.

Ranges are two-sided tolerance bounds of a normal distribution (Howe 1969, "Two-sided tolerance limits for normal
populations: some improvements"): with a confidence of 95 %, they hold so much of all patients that of a hundred real
scans at most five lie outside in anything that is measured (Bonferroni). The fewer patients were seen, the wider: of 2
they are 19 times as wide as of infinitely many, of 5 2.6 times, of 10 1.7 times, of 50 1.2 times.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json, write_json

GATE = "gate.json"
"""Where a run has its ranges, in its folder ``latents``."""

WHOLE = "volume"
"""The region of all voxels in the field of view, whatever their label."""

NOTHING = "nothing of it can be compared with training"
MEASURES = ("median", "spread", "contrast", "sharpness")
FEWEST_PATIENTS = 2

_FALSE_ALARMS = 0.05
_CONFIDENCE = 0.95
_PERCENTILES = (5, 50, 95)
_FEWEST_VOXELS = 30
_RING = 2  # voxels
_LEAST_MARGIN = 0.01  # of the range on output
_LEAST_FACTOR = 1.25
_POSITIVE = ("spread", "sharpness")
_DIGITS = 5

Range = tuple[float, float]
Values = dict[str, dict[str, float]]
"""By region, which is `WHOLE` or the value of a label as text, and measure."""


def measure(
    names: Sequence[str], image: NDArray[np.float32], labels: NDArray[np.uint8], valid: NDArray[np.bool_]
) -> dict[str, Values]:
    """What is `measured` of each channel ``(X, Y, Z)`` of an image ``(C, X, Y, Z)``, by its name."""
    return {name: measured(channel, labels, valid) for name, channel in zip(names, image, strict=True)}


def measured(channel: NDArray[np.float32], labels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> Values:
    """The intensities of one channel of a volume on the model grid, of the whole and inside each label.

    ``median``; ``spread`` from the 5th to the 95th percentile; ``contrast``, the median less that of what lies within 2
    voxels around a label; ``sharpness``, the mean gradient in units per voxel, to the next voxel along each axis, so
    that grain and blur both change it. A label of fewer than 30 voxels is not measured. What is unknown counts for the
    whole only, what lies outside of the field of view for nothing.

    Args:
        channel: ``(X, Y, Z)``, finite, in units on disk.
        labels: ``(X, Y, Z)``.
        valid: ``(X, Y, Z)``, whether a voxel lies in the field of view.
    """
    slope = _slope(channel)
    inner = ndimage.binary_erosion(valid, border_value=1)  # padding beside a voxel makes no edge
    regions = {WHOLE: valid}
    regions |= {"0": valid & (labels == 0)}
    values = {name: _inside(channel, slope, where, inner) for name, where in regions.items()}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or label == UNKNOWN_LABEL:
            continue
        near = tuple(slice(max(part.start - _RING, 0), part.stop + _RING) for part in box)
        own = (labels[near] == label) & valid[near]
        values[str(label)] = _inside(channel[near], slope[near], own, inner[near])
        around = ndimage.binary_dilation(own, iterations=_RING) & ~own & valid[near]
        around &= (labels[near] != UNKNOWN_LABEL) & (labels[near] != label)
        if values[str(label)] and around.sum() >= _FEWEST_VOXELS:
            contrast = values[str(label)]["median"] - float(np.median(channel[near][around]))
            values[str(label)]["contrast"] = contrast
    return {name: part for name, part in values.items() if part}


@dataclass(frozen=True)
class Gate:
    """The ranges of training cases.

    Attributes:
        ranges: by channel, region and measure, see `measured`; in units on disk.
        patients: training patients that were measured.
        names: of the labels by value, background included.
    """

    ranges: Mapping[str, Mapping[str, Mapping[str, Range]]]
    patients: int
    names: Mapping[int, str]

    @classmethod
    def fit(
        cls,
        cases: Sequence[tuple[str, Mapping[str, Values]]],
        *,
        names: Mapping[int, str],
        width: Mapping[str, float],
    ) -> "Gate | None":
        """The ranges of some cases; None where they are of fewer than two patients, which tell no range.

        A patient counts once, however many cases are of it. What fewer than two patients have gets no range.

        Args:
            cases: patient, and what was `measured` of each channel by its name.
            names: of the labels by value.
            width: of the range on output, by channel: the least that a range spans is 2 % of it.
        """
        gathered: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
        for patient, channels in cases:
            for key, value in _flat(channels):
                gathered.setdefault(key, []).append((patient, value))
        told = {key: found for key, found in gathered.items() if len({who for who, _ in found}) >= FEWEST_PATIENTS}
        if not told:
            return None
        content = 1 - _FALSE_ALARMS / len(told)
        ranges: dict[str, dict[str, dict[str, Range]]] = {}
        for (channel, region, measure), found in told.items():
            bounds = _bounds(found, content, positive=measure in _POSITIVE, margin=_LEAST_MARGIN * width[channel])
            ranges.setdefault(channel, {}).setdefault(region, {})[measure] = bounds
        return cls(ranges, len({patient for patient, _ in cases}), dict(names))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], names: Mapping[Any, str]) -> "Gate":
        """Inverse of `to_dict`; ``names`` are those of the labels by value.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it has another form.
        """
        ranges = {
            channel: {region: {m: _as_range(pair) for m, pair in part.items()} for region, part in regions.items()}
            for channel, regions in value["ranges"].items()
        }
        return cls(ranges, int(value["patients"]), {int(label): str(name) for label, name in names.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as it lies in the run and in ``generator.json``."""
        ranges = {
            channel: {region: {m: list(pair) for m, pair in part.items()} for region, part in regions.items()}
            for channel, regions in self.ranges.items()
        }
        return {"patients": self.patients, "ranges": ranges}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ranges."""
        return hash_value(self.to_dict())

    def outside(self, values: Mapping[str, Values]) -> list[str]:
        """What lies outside, in words; what is not in the volume, or was in too few of training, is not compared.

        That nothing can be compared is a finding, too.

        Args:
            values: what was `measured` of each channel by its name.
        """
        compared = list(self._compared(values))
        if not compared:
            return [NOTHING]
        return [
            f"{self.named(channel, region)} {measure} {value:.4g} (training {low:.4g} to {high:.4g})"
            for (channel, region, measure), value, (low, high) in compared
            if not low <= value <= high
        ]

    def told(self, values: Mapping[str, Values]) -> dict[str, dict[str, list[float]]]:
        """What was compared, for the sidecar: value, lower and upper end, by region and measure."""
        told: dict[str, dict[str, list[float]]] = {}
        for (channel, region, measure), value, bounds in self._compared(values):
            told.setdefault(self.named(channel, region), {})[measure] = [_rounded(part) for part in (value, *bounds)]
        return told

    def named(self, channel: str, region: str) -> str:
        """A region in words, with its channel where there are several."""
        name = region if region == WHOLE else f"label {region} ({self.names.get(int(region), '?')})"
        return f"{channel}: {name}" if len(self.ranges) > 1 else name

    def _compared(self, values: Mapping[str, Values]) -> Iterator[tuple[tuple[str, str, str], float, Range]]:
        for (channel, region, measure), value in _flat(values):
            if bounds := self.ranges.get(channel, {}).get(region, {}).get(measure):
                yield (channel, region, measure), value, bounds


def read_gate(run_dir: Path, facts: Mapping[str, Any]) -> Gate | None:
    """The ranges of a run; None where its encode stage measured none, of other data, or only one patient.

    Args:
        run_dir: the run folder.
        facts: of its ``latents.json``.

    Raises:
        FibldmError: the file is damaged.
    """
    file = run_dir / "latents" / GATE
    if not file.exists():
        return None
    content = read_json(file)
    try:
        if content["of"] != _key(facts) or not content["ranges"]:
            return None
        return Gate.from_dict(content, facts["labels"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FibldmError(
            f"{file} must be as the encode stage wrote it; {type(error).__name__}: {error}",
            "remove it, and run `fibldm encode`, which measures it again",
        ) from error


def gate_of_bundle(facts: Mapping[str, Any]) -> Gate | None:
    """The ranges that ``generator.json`` of a bundle tells; None of bundles of before, and of runs without.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they have another form.
    """
    return Gate.from_dict(facts["gate"], facts["labels"]) if facts.get("gate") else None


def required(gate: Gate | None) -> Gate:
    """The ranges of a generator, for what needs them.

    Raises:
        FibldmError: there are none.
    """
    if gate is None:
        raise FibldmError(
            "a check needs the ranges of intensity of at least two training patients; this generator has none",
            "run `fibldm encode` again as before, which measures them of a finished run and changes nothing else, and "
            "export a bundle again",
        )
    return gate


def has_gate(run_dir: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a run's ranges were measured, and of its own data; also where there are none, as of one patient."""
    file = run_dir / "latents" / GATE
    return file.exists() and read_json(file).get("of") == _key(facts)


def write_gate(run_dir: Path, facts: Mapping[str, Any], gate: Gate | None) -> None:
    """Inverse of `read_gate`."""
    content = {"patients": 0, "ranges": {}} if gate is None else gate.to_dict()
    write_json(run_dir / "latents" / GATE, {"of": _key(facts), **content})


def tolerance_factor(patients: int, content: float, confidence: float = _CONFIDENCE) -> float:
    """How many standard deviations a two-sided normal tolerance range reaches from the mean, equation 2 of Howe 1969.

    Args:
        patients: that mean and deviation are of; at least 2.
        content: share of the population that lies in the range.
        confidence: how certain that is.
    """
    freedom = patients - 1
    lowest = special.chdtri(freedom, confidence)  # chi square that is exceeded so often
    return float(special.ndtri((1 + content) / 2) * math.sqrt(freedom * (1 + 1 / patients) / lowest))


def _key(facts: Mapping[str, Any]) -> str:
    """Of all that the ranges of a run depend on; kept apart from its latents, so that runs of before may get theirs."""
    cases = sorted({(item["case"], item["subject"]) for item in facts["items"]["training"]})
    return hash_value([cases, *(facts[name] for name in ("data", "grid", "intensity", "labels"))])


def _bounds(found: Sequence[tuple[str, float]], content: float, *, positive: bool, margin: float) -> Range:
    """The tolerance bounds of values of patients; of what cannot be negative, those of its logarithm."""
    values = np.array([value for _, value in found])
    who = [patient for patient, _ in found]
    weights = np.array([1 / who.count(patient) for patient in who])
    patients = len(set(who))
    logarithmic = positive and bool((values > 0).all())
    scaled = np.log(values) if logarithmic else values
    mean = float((weights * scaled).sum() / patients)
    deviation = math.sqrt(float((weights * (scaled - mean) ** 2).sum()) / (patients - 1))
    half = max(tolerance_factor(patients, content) * deviation, math.log(_LEAST_FACTOR) if logarithmic else margin)
    low, high = mean - half, mean + half
    if logarithmic:
        low, high = math.exp(max(low, -700.0)), math.exp(min(high, 700.0))
    elif positive:
        low = max(low, 0.0)
    return _rounded(low), _rounded(high)


def _slope(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """The length of the gradient to the next voxel along each axis; of the last one, from the one before."""
    squares = np.zeros(channel.shape, dtype=np.float32)
    for axis, length in enumerate(channel.shape):
        if length > 1:
            steps = np.diff(channel.astype(np.float32, copy=False), axis=axis)
            squares += np.concatenate([steps, np.take(steps, [-1], axis=axis)], axis=axis) ** 2
    return np.sqrt(squares)


def _inside(
    channel: NDArray[np.float32], slope: NDArray[np.float32], where: NDArray[np.bool_], inner: NDArray[np.bool_]
) -> dict[str, float]:
    inside = channel[where]
    if len(inside) < _FEWEST_VOXELS:
        return {}
    low, median, high = (float(value) for value in np.percentile(inside, _PERCENTILES))
    values = {"median": median, "spread": high - low}
    steep = slope[where & inner]
    return values | ({"sharpness": float(steep.mean(dtype=np.float64))} if len(steep) >= _FEWEST_VOXELS else {})


def _flat(channels: Mapping[str, Values]) -> Iterator[tuple[tuple[str, str, str], float]]:
    for channel, regions in channels.items():
        for region, part in regions.items():
            for measure, value in part.items():
                yield (channel, region, measure), value


def _as_range(pair: Any) -> Range:
    low, high = (float(part) for part in pair)
    if not low <= high:
        raise ValueError(f"a range must be increasing; got {low} and {high}")
    return low, high


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
