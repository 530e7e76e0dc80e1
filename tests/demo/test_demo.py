"""The demo, with networks too small to learn: every step runs, every promised file is there."""

import json
import re
from dataclasses import replace

import pytest

from fibldm.demo.demo import DemoSettings, _training_minutes, demo
from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import evaluate

TINY = DemoSettings(subjects=10, configs=("demo", "tiny"), segmenter={"steps": 2, "segmenter_channels": [4, 8, 8]})


def figures_of(section):
    assert section["figures"]
    return section["figures"].values()


def measured_once():
    """`evaluate`, which the second time gives what it gave the first time: it is no step that is skipped."""
    sections = {}

    def measured(names, **given):
        if not sections:
            sections.update(evaluate(names, **given))
        assert list(sections) == list(names)
        return sections

    return measured


@pytest.mark.slow
def test_demo_writes_what_it_promises_and_keeps_it_when_run_again(tmp_path, capsys, monkeypatch, tiny_data):
    """One command from nothing to a report; finished steps are skipped."""
    monkeypatch.setattr("fibldm.demo.demo.evaluate", measured_once())
    settings = replace(TINY, configs=(*TINY.configs, str(tiny_data)))
    figures = demo(tmp_path, settings)
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    names = "run masks outputs lung_dice lung_dice_real lung_dice_shuffled fibrosis_contrast_ratio texture_ratio"
    assert set(names.split()) | {"seed_ratio", "network_calls", "seconds"} <= set(figures)
    assert figures["network_calls"] <= 10
    assert figures["lung_dice_real"] > 0.97
    report = (tmp_path / "report.html").read_text()
    assert (
        "Figures of phantoms" in report and "scan that the mask was drawn on" in report and "PATIENT DATA" not in report
    )
    for folder in ("phantoms", "work", "runs/demo", "synthetic"):
        assert (tmp_path / folder).is_dir()
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "runs/demo/evaluation/metrics.json").read_text())
    assert "audit" in printed and "scans of at least 4 patients must be held out" in measured["audit"]["verdict"]
    for name in ("faithfulness", "realism", "reconstruction"):
        assert name in printed
        assert all(
            set(figure) >= {"value", "low", "high", "n", "real_vs_real"} for figure in figures_of(measured[name])
        )
    assert "fibldm train controlnet" in printed
    assert "fibldm evaluate all" in printed
    files = [*tmp_path.glob("synthetic/*.nii.gz"), *tmp_path.glob("runs/demo/*/checkpoints/*.pt")]
    before = {file: file.stat().st_mtime_ns for file in files}
    again = demo(tmp_path, settings)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert again | {"seconds": 0} == figures | {"seconds": 0}


def test_demo_refuses_a_folder_of_other_phantoms(tmp_path):
    """Nothing is mixed; the error says what to do."""
    (tmp_path / "phantoms").mkdir(parents=True)
    (tmp_path / "phantoms" / "dataset.json").write_text('{"name": "mine"}')
    with pytest.raises(FibldmError, match="phantoms"):
        demo(tmp_path, TINY, say=lambda line: None)


def test_minutes_that_leave_no_time_to_train_are_refused_and_what_would_do_is_said(tmp_path):
    """The second time, phantoms are there already, and take no time that anything could be told from."""
    with pytest.raises(FibldmError, match="needs at least .* minutes here, .* got 1") as refused:
        _training_minutes(tmp_path, DemoSettings(minutes=1.0), 24.0)
    least = float(re.search("at least (.*) minutes", refused.value.message)[1])
    with pytest.raises(FibldmError, match=f"needs at least {least:g} minutes"):
        _training_minutes(tmp_path, DemoSettings(minutes=least - 0.2), 1.0)
    training = _training_minutes(tmp_path, DemoSettings(minutes=least), 1.0)
    assert training == pytest.approx(2.0, abs=0.1)  # five times what the phantoms took
    assert _training_minutes(tmp_path, DemoSettings(minutes=least), 1.0) == training
