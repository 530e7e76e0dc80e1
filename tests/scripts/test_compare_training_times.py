"""The comparison of training times: its rows can be trained, and its table says what was measured."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fibldm.files import read_json, write_json
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import stage_configuration

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_training_times

    return compare_training_times


def test_every_row_is_a_configuration_that_can_be_trained(script: ModuleType, tmp_path: Path) -> None:
    for configs, overrides in script.ROWS.values():
        used = ("data_chest_phantom", "demo", *configs)
        made = stage_configuration("diffusion", work=tmp_path, run_dir=tmp_path, configs=used, overrides=overrides)
        assert [shipped(name) for name in configs] == [*made.files[len(made.files) - len(configs) :]]


def test_rows_that_were_measured_are_printed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"flow, uniform": {"0": {"loss": 0.5}, "1": {"loss": 0.7}}, "epsilon, L_vlb": {"0": {"spread": 1.0}}}
    write_json(tmp_path / "rows.json", rows)
    script.compare(tmp_path, tmp_path, tmp_path, [], seeds=[], configs=[], changes={})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["loss", "spread"]
    assert lines[0].split() == ["flow,", "uniform", "0.6000", "(0.5000-0.7000)", "-"]
    assert lines[1].split() == ["epsilon,", "L_vlb", "-", "1.0000"]


def test_an_unknown_row_lists_the_rows(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(["--data", ".", "--run", ".", "--out", str(tmp_path), "--only", "cosine"])
    assert left.value.code == 2
    assert "row must be one of flow, uniform, flow, logit-normal" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_trained_and_measured(
    script: ModuleType, tiny_run: Path, tiny_data: Path, phantom_work: Path, tmp_path: Path
) -> None:
    """Both kinds of a learned variance among them, which ancestral sampling uses."""
    for stage in ("autoencoder", "latents"):
        shutil.copytree(tiny_run / stage, tmp_path / "run" / stage)
    names = ["flow, learned log-variance", "epsilon, free variance", "epsilon, L_vlb, loss-aware"]
    given = {"device": "cpu", "precision": "float32", "times::times::bins": 2, "times::times::history": 2}
    for name in names:
        changes = {key: value for key, value in given.items() if "loss-aware" in name or "::" not in key}
        settings = {"seeds": [0], "configs": [str(tiny_data), "tiny"], "changes": {**changes, "epochs": 2}}
        script.compare(phantom_work, tmp_path / "run", tmp_path / "out", [name], **settings)
    rows = read_json(tmp_path / "out" / "rows.json")
    assert list(rows) == names
    assert all(row["0"]["loss"] > 0 and row["0"]["spread"] > 0 for row in rows.values())
