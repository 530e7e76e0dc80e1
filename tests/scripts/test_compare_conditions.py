"""The comparison of ways and encodings of masks: its rows exist, and its table says what was measured."""

from pathlib import Path
from types import ModuleType

import pytest
from builders import script as script_of

from fibldm.files import write_json
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import stage_configuration


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_of("compare_conditions", monkeypatch)


def test_every_row_is_a_configuration_that_can_be_trained(script: ModuleType, tmp_path: Path) -> None:
    for stages, configs, overrides in script.CONFIGURATIONS.values():
        for stage in stages:
            given = {**overrides, "mask_dropout": 0.1, "label_dropout": 0.02}
            used = ("data_chest_phantom", "demo", *configs)
            made = stage_configuration(stage, work=tmp_path, run_dir=tmp_path, configs=used, overrides=given)
            assert [shipped(name) for name in configs] == [*made.files[len(made.files) - len(configs) :]]


def test_rows_that_were_measured_are_printed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dict.fromkeys(script.FIGURES, 0.5) | {"KID": None}
    write_json(tmp_path / "rows.json", {"concat, guidance 2": values, "controlnet, guidance 2": values})
    script.compare(tmp_path, tmp_path, [], epochs=1, guidance=[])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == " ".join(script.FIGURES).split()
    assert rows[0] == "concat, guidance 2    " + "".join(f"{cell:>13}" for cell in ["0.500"] * 4 + ["-", "0.500"])


def test_an_unknown_row_lists_the_rows(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(["--demo", str(tmp_path), "--out", str(tmp_path), "--only", "cross"])
    assert left.value.code == 2
    assert "row must be one of controlnet, concat, spade" in capsys.readouterr().err
