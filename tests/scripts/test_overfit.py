"""A generator that knows its scans by heart: its work folder, its figures, and that its smallest form runs."""

from pathlib import Path
from types import ModuleType

import pytest
from builders import script as script_of

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.datalist import load_datalist


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_of("overfit", monkeypatch)


def test_of_training_a_few_cases_are_left_and_all_that_is_held_out(
    script: ModuleType, phantom_work: Path, tmp_path: Path
) -> None:
    script.few_cases(phantom_work, tmp_path / "work", 2)
    before, after = (
        {
            split: [entry["case"] for entry in load_datalist(folder, split)]
            for split in ("training", "validation", "test")
        }
        for folder in (phantom_work, tmp_path / "work")
    )
    assert after == {**before, "training": before["training"][:2]}
    with pytest.raises(FibldmError, match="has other training cases"):
        script.few_cases(phantom_work, tmp_path / "work", 3)
    with pytest.raises(FibldmError, match="--cases must be from 2 to the number of training cases; got 99"):
        script.few_cases(phantom_work, tmp_path / "other", 99)


def test_the_figures_say_whether_the_audit_names_what_it_must(script: ModuleType) -> None:
    result = {
        "copy_rate": {"value": 0.6, "low": 0.2, "high": 0.9, "count": 3, "of": 5},
        "membership": {"auc": 0.95, "low": 0.9, "high": 1.0, "tpr_at_1_percent_fpr": 0.5},
        "copies": [{"train": "a.1.nii.gz", "synthetic": "a.1_000.nii.gz"}] * 2
        + [{"train": "b.nii.gz", "synthetic": "a.1_000.nii.gz"}],
        "held_out_named": {"count": 0, "of": 7},
        "threshold": 0.9,
        "verdict": "",
    }
    figures = script.figures_of(result)
    assert figures["ok"] and figures["right"] == 2
    assert "3 of 5 volumes" in script.told(figures) and "as wanted" in script.told(figures)
    missed = script.figures_of({**result, "membership": {**result["membership"], "auc": 0.89}})
    assert not missed["ok"] and "NOT as wanted" in script.told(missed)
    with pytest.raises(FibldmError, match="the audit must be whole"):
        script.figures_of({**result, "membership": "membership not measured"})


@pytest.mark.slow
def test_the_smallest_form_trains_draws_and_audits_and_goes_on(
    script: ModuleType,
    mostly_held_out: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So few steps teach nothing: what is shown is that all is made and told, and kept."""
    folders = ["--data", str(mostly_held_out), "--run", str(tiny_run), "--out", str(tmp_path)]
    small = ["--cases", "2", "--epochs", "2", "--config", "tiny", "--set", "val_interval=1"]
    script.main([*folders, *small])
    said = capsys.readouterr().out
    assert "stage 2 of 2 epochs takes about" in said and "of 2 volumes" in said and "membership: AUC" in said
    assert read_json(tmp_path / "overfit.json")["named"]["of"] == 2
    made = (tmp_path / "run" / "diffusion" / "done.json").stat().st_mtime_ns
    script.main([*folders, *small])
    assert "takes about" not in capsys.readouterr().out
    assert (tmp_path / "run" / "diffusion" / "done.json").stat().st_mtime_ns == made
