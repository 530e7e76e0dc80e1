"""Intervals against their closed form and their coverage; the patient is the unit."""

import math

import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.evaluation.results import Section, record
from fibldm.evaluation.statistics import TOO_FEW, by_patient, estimate, mean_estimate
from fibldm.files import read_json


@pytest.mark.parametrize("n", [20, 41])
def test_the_interval_of_a_mean_is_that_of_the_normal_distribution(n: int) -> None:
    values = np.random.default_rng(3).normal(5, 2, n)
    made = mean_estimate({str(number): [value] for number, value in enumerate(values)})
    half_width = 1.96 * values.std(ddof=1) / math.sqrt(n)
    assert made.value == pytest.approx(values.mean())
    assert made.low is not None and made.high is not None
    assert (made.high - made.low) / 2 == pytest.approx(half_width, rel=0.15)
    assert made.low < values.mean() < made.high
    assert made.n == n


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = drawn.normal(0, 1, 24)
        made = estimate(lambda chosen, values=values: float(values[chosen].mean()), 24)  # type: ignore[misc]
        assert made.low is not None and made.high is not None
        covered += made.low <= 0 <= made.high
    assert 86 <= covered <= 100


def test_a_patient_with_many_volumes_counts_once() -> None:
    values = {"a": [0.0], "b": [10.0] * 50}
    made = mean_estimate(values)
    assert (made.value, made.n) == (5.0, 2)
    assert by_patient(["a", "b", "a"], [1, 2, 3]) == {"a": [1, 3], "b": [2]}


def test_a_subsample_never_holds_a_patient_twice() -> None:
    seen: list[int] = []

    def statistic(chosen: np.ndarray) -> float:
        assert len(set(chosen.tolist())) == len(chosen)
        seen.append(len(chosen))
        return 0.0

    estimate(statistic, 11)
    assert seen[0] == 11
    assert set(seen[1:]) == {5}


def test_few_patients_get_a_value_and_no_interval() -> None:
    made = mean_estimate({"a": [1.0], "b": [3.0]}, real_vs_real=2.5)
    assert made.to_dict() == {"value": 2.0, "low": None, "high": None, "n": 2, "real_vs_real": 2.5, "note": TOO_FEW}
    assert "note" not in mean_estimate({str(number): [1.0] for number in range(8)}).to_dict()


def test_the_same_values_give_the_same_interval() -> None:
    values = {str(number): [float(number**2)] for number in range(12)}
    assert mean_estimate(values) == mean_estimate(values)


def test_no_patient_or_one_without_a_value_is_refused() -> None:
    with pytest.raises(FibldmError, match="at least one patient; got none"):
        mean_estimate({})
    with pytest.raises(FibldmError, match="at least one value; b came without"):
        mean_estimate({"a": [1.0], "b": []})


def test_sections_are_recorded_side_by_side(tmp_path) -> None:  # type: ignore[no-untyped-def]
    one = Section({"psnr": mean_estimate({"a": [30.0]})}, facts={"unit": "dB"}, cases=[{"case": "a"}], notes=["few"])
    record(tmp_path, "reconstruction", one)
    file = record(tmp_path, "copies", Section({}))
    record(tmp_path, "reconstruction", one)
    content = read_json(file)
    assert sorted(content) == ["copies", "fibldm", "reconstruction"]
    assert content["reconstruction"]["figures"]["psnr"]["value"] == 30.0
    assert content["reconstruction"]["unit"] == "dB"
    assert content["reconstruction"]["notes"] == ["few"]


def test_shuffled_masks_stand_beside_the_right_ones() -> None:
    figures = {"dice": mean_estimate({"a": [0.9]}, real_vs_real=0.95), "dice/shuffled": mean_estimate({"a": [0.2]})}
    (row,) = Section(figures).rows()
    assert (row.name, row.value, row.real, row.shuffled) == ("dice", "0.9", "0.95", "0.2")
    assert Section(figures, notes=["so it is"]).text("faithfulness").splitlines()[-1] == "  note: so it is"
