"""The comparison of samplings: a row for every combination, kept, printed with real scans and drawn."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders import script as script_of
from PIL import Image

from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.files import read_json


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_of("compare_sampling", monkeypatch)


@pytest.fixture
def measured(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were measured; two volumes are too few to be measured in earnest."""
    folders: list[Path] = []

    def section(measurements: Any) -> Section:
        folders.append(measurements.synthetic_folder)
        wanted = ("dice", "kid/radiomics", "spectrum", "closer_than_any_real", "named")
        return Section(dict.fromkeys(wanted, Estimate(0.5, 0.25, 0.75, 8, real_vs_real=0.125)))

    monkeypatch.setattr(script, "MEASUREMENTS", dict.fromkeys(("faithfulness", "realism", "copies"), section))
    return folders


def test_every_combination_is_a_row_that_is_kept(
    script: ModuleType,
    measured: list[Path],
    tiny_run: Path,
    phantom_work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--run", tiny_run, "--data", phantom_work, "--out", tmp_path, "--steps", 1, 2, "--guidance", 1, 2]
    script.main([str(part) for part in given])
    names = ["best, steps_1", "best, steps_1, guidance_2.0", "best, steps_2", "best, steps_2, guidance_2.0"]
    rows = read_json(tmp_path / "rows.json")
    assert list(rows) == names and [row["network_calls"] for row in rows.values()] == [1, 2, 2, 4]
    assert len(measured) == 12 and all((tmp_path / name.replace(", ", "_")).is_dir() for name in names)
    printed = capsys.readouterr().out.splitlines()[-6:]
    assert printed[0].split()[:2] == ["calls", "s/volume"] and printed[1].startswith("best, steps_1")
    assert "0.500 [0.250, 0.750]" in printed[1] and printed[-1].split() == ["real", *["0.125"] * 5]
    assert not list(tmp_path.glob("*.png"))
    script.main([str(part) for part in given])
    assert len(measured) == 12


def test_one_choice_that_varies_is_drawn(
    script: ModuleType, measured: list[Path], tiny_run: Path, phantom_work: Path, tmp_path: Path
) -> None:
    given = ["--run", tiny_run, "--data", phantom_work, "--out", tmp_path, "--steps", 1, "--residual-noise", 0, 1]
    script.main([str(part) for part in given])
    with Image.open(tmp_path / "curve_residual_noise.png") as picture:
        assert picture.width > 3 * picture.height


def test_an_unknown_checkpoint_is_refused(
    script: ModuleType, tiny_run: Path, phantom_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--run", tiny_run, "--data", phantom_work, "--out", tmp_path, "--checkpoint", "epoch_0007"]
    with pytest.raises(SystemExit) as left:
        script.main([str(part) for part in given])
    assert left.value.code == 2
    assert "checkpoint must be one of best; got 'epoch_0007'" in capsys.readouterr().err
