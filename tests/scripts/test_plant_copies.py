"""Planted copies: how they are told apart, the table, and that the smallest form runs with its baseline."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from builders import script as script_of

from fibldm.files import read_json, write_json


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_of("plant_copies", monkeypatch)


def test_the_area_is_that_of_scikit_learn(script: ModuleType) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    copies, others = np.round(np.random.default_rng(0).normal([[1.0], [0.0]], 1, (2, 40)), 1)
    expected = metrics.roc_auc_score(np.repeat([1, 0], 40), [*copies, *others])
    assert script.area(list(copies), list(others)) == pytest.approx(expected)


def test_the_table_has_the_baseline_where_it_was_measured(script: ModuleType) -> None:
    row = {"auc": 1.0, "named": 0.5, "right": 1.0}
    result = {"kinds": {"turned": row}, "held_out_named": {"count": 0, "of": 6}}
    assert script.table(result).splitlines() == [
        "| copies | AUC | named | right patient |",
        "|---|---|---|---|",
        "| turned | 1.000 | 0.50 | 1.00 |",
        "| held-out scans |  | 0 of 6 |  |",
    ]
    beside = script.table({**result, "kinds": {"turned": {**row, "baseline_auc": 0.5, "baseline_named": 0.0}}})
    assert beside.splitlines()[2] == "| turned | 1.000 | 0.50 | 1.00 | 0.500 | 0.00 |"


@pytest.mark.slow
def test_the_smallest_form_plants_looks_up_and_has_the_baseline_beside(
    script: ModuleType, mostly_held_out: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "latents").mkdir(parents=True)
    for part in tiny_run.iterdir():
        if part.name not in ("latents", "evaluation"):
            (run / part.name).symlink_to(part)
    for part in (tiny_run / "latents").iterdir():
        if part.name != "latents.json":
            (run / "latents" / part.name).symlink_to(part)
    data = read_json(mostly_held_out / "datalist.json")["content"]
    write_json(run / "latents" / "latents.json", read_json(tiny_run / "latents" / "latents.json") | {"data": data})
    folders = ["--data", str(mostly_held_out), "--out", str(tmp_path / "out"), "--run", str(run)]
    script.main([*folders, "--count", "1", "--only", "as it is", "mirrored"])
    assert "| as it is | 1.000 | 1.00 | 1.00 | 1.000 | " in capsys.readouterr().out
    kinds = read_json(tmp_path / "out" / "planted.json")["kinds"]
    assert kinds["mirrored"]["right"] == 1.0 and kinds["mirrored"]["baseline_auc"] < 1.0
