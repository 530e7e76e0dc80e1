"""The quality gate: ranges of intensity of training cases, and what falls outside of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.volumes.gate import (
    FEWEST_PATIENTS,
    GATE,
    NOTHING,
    Gate,
    has_gate,
    measure,
    measured,
    read_gate,
    tolerance_factor,
)
from fibldm.volumes.gate import write_gate as write

NAMES = {0: "background", 1: "organ", 2: "lesion"}
WIDTH = {"image": 2000.0}
SHAPE = (20, 18, 16)
ALL = np.ones(SHAPE, dtype=bool)


def labels() -> np.ndarray:
    made = np.zeros(SHAPE, dtype=np.uint8)
    made[3:15, 3:15, 3:13] = 1
    made[6:11, 6:11, 5:10] = 2
    return made


def patient(seed: int, *, shift: float = 0.0) -> np.ndarray:
    """Air of about -900, an organ of 0 and a lesion of 300, with grain that is smooth over half a voxel."""
    generator = np.random.default_rng(seed)
    levels = np.array([-900.0, 0.0, 300.0]) + generator.normal(0, 15, 3) + shift
    smooth = ndimage.gaussian_filter(generator.normal(0, 60 * generator.lognormal(0, 0.1), SHAPE), 0.5)
    return (ndimage.gaussian_filter(levels[labels()], 0.7) + smooth).astype(np.float32)


def values(image: np.ndarray, mask: np.ndarray | None = None, valid: np.ndarray = ALL) -> dict[str, Any]:
    return measure(["image"], image[None], labels() if mask is None else mask, valid)


def fitted(patients: int, *, first: int = 0) -> Gate:
    cases = [(str(seed), values(patient(seed))) for seed in range(first, first + patients)]
    gate = Gate.fit(cases, names=NAMES, width=WIDTH)
    assert gate is not None and gate.patients == patients
    return gate


@pytest.mark.parametrize(("patients", "factor"), [(2, 37.674), (5, 5.079), (10, 3.379), (50, 2.379), (200, 2.143)])
def test_tolerance_factors_are_those_of_the_tables(patients: int, factor: float) -> None:
    """Of 95 % of a population with a confidence of 95 %; the equation is right to 2 % for two values, else better."""
    assert tolerance_factor(patients, 0.95) == pytest.approx(factor, rel=0.02 if patients == 2 else 0.005)


def test_what_is_measured_of_a_label() -> None:
    image, mask = np.full(SHAPE, 3.0, dtype=np.float32), np.zeros(SHAPE, dtype=np.uint8)
    mask[5:10, 5:10, 5:10] = 7
    image[mask == 7] = 10
    found = measured(image, mask, ALL)
    assert found.keys() == {"volume", "0", "7"}
    assert (found["7"]["median"], found["7"]["spread"], found["7"]["contrast"]) == (10, 0, 7)
    # of 125 voxels, 48 lie before a step of 7 along one axis, 12 along two, one along three
    assert found["7"]["sharpness"] == pytest.approx(7 * (48 + 12 * 2**0.5 + 3**0.5) / 125)
    assert (found["0"]["median"], found["volume"]["median"]) == (3, 3) and "contrast" not in found["0"]
    mask[0, 0, :16] = 9
    assert "9" not in measured(image, mask, ALL), "16 voxels tell nothing"


def test_what_is_unknown_counts_for_no_label_and_what_is_padding_for_nothing() -> None:
    image, mask = patient(0), labels()
    mask[:, :, :8] = 255
    known = values(image, mask)["image"]
    changed = image.copy()
    changed[:, :, :5] = 9000  # far enough not to be around what is known
    other = values(changed, mask)["image"]
    assert known.keys() == {"volume", "0", "1", "2"} and other["volume"] != known["volume"]
    assert all(other[label] == known[label] for label in ("0", "1", "2"))
    inside = ALL.copy()
    inside[:, :, :8] = False
    padded = values(image, mask, inside)
    changed[:, :, :8] = -9000
    assert values(changed, mask, inside) == padded and padded != values(image, mask)


def test_channels_are_measured_each_by_itself() -> None:
    pair = np.stack([patient(0), 10 * patient(1)])
    cases = [(str(n), measure(["a", "b"], pair + n, labels(), ALL)) for n in range(4)]
    gate = Gate.fit(cases, names=NAMES, width={"a": 2000.0, "b": 20000.0})
    assert gate is not None and gate.outside(cases[0][1]) == []
    swapped = gate.outside(measure(["a", "b"], pair[::-1], labels(), ALL))
    assert any(text.startswith("a: label 2 (lesion) median") for text in swapped)


FAULTS = {
    "constant": lambda image: np.zeros_like(image) + np.median(image),
    "noise of its mean and deviation": lambda image: np.random.default_rng(0).normal(image.mean(), image.std(), SHAPE),
    "inverted": lambda image: -image,
    "empty": lambda image: np.zeros_like(image) - 1000,
    "wrong units": lambda image: image + 1024,
    "scaled": lambda image: image * 2,
    "blurred": lambda image: ndimage.gaussian_filter(image, 2),
    "grainy": lambda image: image + np.random.default_rng(0).normal(0, 200, SHAPE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_lies_outside(fault: str) -> None:
    broken = values(FAULTS[fault](patient(100)).astype(np.float32))
    assert fitted(20).outside(broken), fault


def test_swapped_labels_and_values_that_are_not_finite_lie_outside() -> None:
    gate, swapped = fitted(20), np.array([0, 2, 1], dtype=np.uint8)[labels()]
    assert any("label 2 (lesion) median" in text for text in gate.outside(values(patient(100), swapped)))
    image = patient(100)
    image[10, 10, 8] = np.nan
    with np.errstate(invalid="ignore"):
        assert gate.outside(values(image))


def test_at_most_one_of_twenty_other_patients_lies_outside() -> None:
    """In anything that is measured, and with a confidence of 95 %: also where few were seen."""
    for patients in (3, 8, 40):
        gates = [fitted(patients, first=1000 * (number + 1)) for number in range(10)]
        outside = [np.mean([bool(gate.outside(values(patient(seed)))) for seed in range(40)]) for gate in gates]
        assert np.median(outside) <= 0.05


def test_the_fewer_patients_the_wider_and_a_constant_volume_never_fits() -> None:
    spans = [np.ptp(fitted(patients).ranges["image"]["1"]["median"]) for patients in (2, 4, 40)]
    assert spans[0] > spans[1] > spans[2]
    flat = fitted(2).outside(values(np.zeros(SHAPE, np.float32)))
    assert {"volume spread 0", "label 1 (organ) spread 0"} < {text.partition(" (training")[0] for text in flat}


def test_a_patient_counts_once_and_one_alone_tells_nothing() -> None:
    twice = [("a", values(patient(0))), ("a", values(patient(1)))]
    assert FEWEST_PATIENTS == 2 and Gate.fit(twice, names=NAMES, width=WIDTH) is None
    assert Gate.fit([], names=NAMES, width=WIDTH) is None
    more = [*twice, ("b", values(patient(2)))]
    gate = Gate.fit(more, names=NAMES, width=WIDTH)
    assert gate is not None and gate.patients == 2
    assert gate.ranges == Gate.fit(more + twice, names=NAMES, width=WIDTH).ranges  # type: ignore[union-attr]


def test_what_does_not_vary_in_training_may_vary_by_a_hundredth_of_the_range() -> None:
    """Air that a window cuts off is the same in all."""
    flat = {"image": {"0": {"median": -1000.0, "spread": 0.0, "sharpness": 5.0}}}
    gate = Gate.fit([("a", flat), ("b", flat)], names=NAMES, width=WIDTH)
    assert gate is not None
    assert gate.ranges["image"]["0"] == {"median": (-1020, -980), "spread": (0, 20), "sharpness": (4, 6.25)}


def test_findings_and_what_a_sidecar_tells_are_in_words() -> None:
    gate = Gate({"image": {"volume": {"median": (1.0, 2.0)}, "1": {"spread": (3.0, 4.0)}}}, 5, NAMES)
    found = {"image": {"volume": {"median": 1.5}, "1": {"spread": 7.0, "median": 3.0}, "2": {"median": 0.0}}}
    assert gate.outside(found) == ["label 1 (organ) spread 7 (training 3 to 4)"]
    assert gate.told(found) == {"volume": {"median": [1.5, 1, 2]}, "label 1 (organ)": {"spread": [7, 3, 4]}}
    assert gate.outside({"image": {"2": {"median": 0.0}}}) == gate.outside({"CT": found["image"]}) == [NOTHING]
    assert Gate.from_dict(gate.to_dict(), {"0": "background", "1": "organ", "2": "lesion"}) == gate
    with pytest.raises(ValueError, match="increasing"):
        Gate.from_dict({"patients": 2, "ranges": {"image": {"volume": {"median": [2, 1]}}}}, NAMES)


def test_a_run_has_the_ranges_of_its_own_data_only(tmp_path: Path) -> None:
    facts = {"items": {"training": [{"case": "a", "subject": "s", "file": "f"}]}, "intensity": {}, "grid": {}}
    facts |= {"data": "1", "labels": {"0": "background", "1": "organ", "2": "lesion"}}
    assert read_gate(tmp_path, facts) is None and not has_gate(tmp_path, facts)
    gate = Gate({"image": {"volume": {"median": (1.0, 2.0)}}}, 5, NAMES)
    write(tmp_path, facts, gate)
    assert read_gate(tmp_path, facts) == gate and has_gate(tmp_path, facts)
    assert read_gate(tmp_path, facts | {"licence": "CC0"}) == gate
    assert read_gate(tmp_path, facts | {"data": "2"}) is None and not has_gate(tmp_path, facts | {"data": "2"})
    write_json(tmp_path / "latents" / GATE, read_json(tmp_path / "latents" / GATE) | {"ranges": {"image": 3}})
    with pytest.raises(FibldmError, match="gate.json must be as the encode stage wrote it"):
        read_gate(tmp_path, facts)
    write(tmp_path, facts, None)
    assert read_gate(tmp_path, facts) is None and has_gate(tmp_path, facts), "of one patient it was tried"
