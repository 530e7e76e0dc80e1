"""The comparison of partial with whole masks: what each row is given, its table, and that its smallest form runs."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from builders import script as module

from fibldm import UNKNOWN_LABEL
from fibldm.files import read_json
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.volumes.datalist import SPLITS, annotated_of, load_datalist
from fibldm.volumes.formats.nifti import read_volume


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("compare_partial", monkeypatch)


def test_an_unknown_row_lists_the_rows(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(["--source", str(tmp_path), "--out", str(tmp_path), "--only", "half"])
    assert left.value.code == 2
    assert "row must be one of full, partial, naive" in capsys.readouterr().err


def test_the_table_has_a_dash_where_nothing_was_measured(script: ModuleType) -> None:
    head, full, naive = script.table(
        {"full": {"real dice": 0.9, "volumes dice": 0.8}, "naive": {"real dice": 0.5}}
    ).splitlines()
    assert head.split() == ["real", "dice", "volumes", "dice"]
    assert (full.split(), naive.split()) == (["full", "0.900", "0.800"], ["naive", "0.500", "-"])


@pytest.mark.slow
def test_rows_have_one_split_and_lose_half_of_two_labels_each_and_all_is_measured(
    script: ModuleType, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So few steps teach nothing: what is shown is what each row learns from, and that it is measured and kept."""
    source, out = tmp_path / "phantoms", tmp_path / "out"
    write_phantoms(source, subjects=6, seed=3)
    given = [
        "--source",
        str(source),
        "--out",
        str(out),
        "--config",
        str(tiny_data),
        "--labels",
        "left lung",
        "right lung",
    ]
    given += ["--real-only", "--segmenter-steps", "2", "--set=device=cpu", "--set=precision=float32"]
    given += ["--set=segmenter_channels=[4, 8, 8]", "--set=warmup_steps=1"]
    script.main(given)
    names = {name: int(value) for value, name in read_json(out / "full/work/datalist.json")["labels"].items()}
    left, right = names["left lung"], names["right lung"]
    found = {
        row: {entry["case"]: (split, entry) for split in SPLITS for entry in load_datalist(out / row / "work", split)}
        for row in script.ROWS
    }
    lost = []
    for case, (split, entry) in found["full"].items():
        whole, partial, naive = (read_volume(str(found[row][case][1]["label"])).array for row in script.ROWS)
        assert {found[row][case][0] for row in script.ROWS} == {split} and annotated_of(entry) is None
        gone = [value for value in (left, right) if not (naive == value).any()]
        lost += gone
        assert len(gone) == (split != "test")
        assert np.array_equal(naive, np.where(np.isin(whole, gone), 0, whole))
        assert np.array_equal(partial, np.where(naive == 0, UNKNOWN_LABEL, naive) if gone else whole)
    assert abs(lost.count(left) - lost.count(right)) <= 1
    rows = read_json(out / "rows.json")
    assert set(rows) == set(script.ROWS) and all("real dice" in row for row in rows.values())
    capsys.readouterr()
    script.main(given)
    assert read_json(out / "rows.json") == rows
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == list(script.ROWS)
