"""The comparison of none, low rank and full further training: its rows, its table, and that its smallest form runs."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fibldm.files import read_json
from fibldm.runs import StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.datalist import load_datalist

SMALL = {
    "device": "cpu",
    "precision": "float32",
    "warmup_steps": 5,
    "val_interval": 1,
    "mask_dropout": 0.1,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import compare_adapters

    return compare_adapters


def test_an_unknown_row_lists_the_rows(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(["--base", str(tmp_path), "--out", str(tmp_path), "--only", "half"])
    assert left.value.code == 2
    assert "row must be one of none, low rank, full" in capsys.readouterr().err


def test_the_table_has_a_dash_where_nothing_was_measured(script: ModuleType) -> None:
    rows = {"none": {"distance": 90.0, "megabytes": 0.0, "minutes": 0.0, "realism/kid": None}}
    head, row = script.table(rows).splitlines()
    assert head.split() == ["distance", "megabytes", "minutes", "realism/kid"]
    assert row.split() == ["none", "90.000", "0.000", "0.000", "-"]


@pytest.mark.slow
def test_the_smallest_comparison_measures_every_row_on_a_shifted_site(
    script: ModuleType,
    phantom_work: Path,
    tiny_data: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So few steps teach nothing: what is shown is that all is drawn, measured and told, and that 0 is the base."""
    base, configs = tmp_path / "base", [str(tiny_data), "tiny"]
    for stage in ("autoencoder", "latents"):
        shutil.copytree(tiny_run / stage, base / stage)
    own = {**SMALL, "learning_rate": 0.01, "epochs": 2}
    used = [*configs, "mask_concat"]
    stage_configuration("diffusion", work=phantom_work, run_dir=base, configs=used, overrides=own).run()
    given = ["--base", str(base), "--out", str(tmp_path / "out"), "--subjects", "6", "--cases", "3", "--steps", "4"]
    given += [f"--config={name}" for name in configs] + [
        f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()
    ]
    given += ["--diffusion", "mask_concat", "--epochs", "2", "--rate", "0.01"]
    script.main([*given, "--set=lora_rank=1", "--set=lora_alpha=1"])
    rows = read_json(tmp_path / "out" / "rows.json")
    none, low, full = (rows[name] for name in ("none", "low rank", "full"))
    assert len({row["distance"] for row in (none, low, full)}) == 3
    assert 0 < low["megabytes"] < 0.15 * full["megabytes"] and none["megabytes"] == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["none", "low", "full"]

    work = tmp_path / "out" / "site" / "work"
    masks = [str(entry["label"]) for entry in load_datalist(work, "test", masks=True)]
    adapter = StageFolder(tmp_path / "out" / "runs" / "low_rank", "diffusion").checkpoints / "adapter.safetensors"

    options: dict[str, Any] = {"settings": SamplingSettings(steps=4), "allow_extrapolation": True, "device": "cpu"}
    synthesize_files(base, masks, tmp_path / "off", adapters={adapter: 0.0}, **options)
    assert script.distance(work, tmp_path / "off") == none["distance"]
