"""The table of stages: a new stage is a row in it and a configuration file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.planning import traced_step
from fibldm.planning.plan import plan
from fibldm.planning.traced_step import Request
from fibldm.recipe import Recipe
from fibldm.runs import STAGES, StageFolder
from fibldm.runs.config_files import configs_folder
from fibldm.runs.stages import TABLE, StageKind, begun, kind_of, trained
from fibldm.synthesis.loading import generating_stage
from fibldm.training.shares import TotalBudget, shares_of

ROW = StageKind(
    "refined",
    ("common_training", "train_diffusion", "train_refined"),
    "fibldm train refined",
    in_pipeline="on request",
    on_latents=True,
    share=0.25,
    generates=True,
)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageKind]:
    """A stage that is in the table and in a folder of configurations, and nowhere else."""
    configs = tmp_path / "configs"
    shutil.copytree(configs_folder(), configs)
    (configs / "train_refined.yaml").write_text("stage::name: refined\nstrength_of_refinement: 0.5\n")
    monkeypatch.setattr("fibldm.runs.config_files.configs_folder", lambda: configs)
    monkeypatch.setitem(TABLE, ROW.name, ROW)
    traced_step._shipped_keys.cache_clear()
    yield ROW
    traced_step._shipped_keys.cache_clear()


def begun_with(tiny_run: Path, folder: Path, *stages: str) -> Path:
    folder.mkdir()
    for stage in stages:
        (folder / stage).symlink_to(tiny_run / stage)
    return folder


def test_fibldm_train_trains_a_stage_of_the_table(
    made_up: StageKind,
    phantom_work: Path,
    tiny_data: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = begun_with(tiny_run, tmp_path / "run", "autoencoder", "latents")
    places = ["--data", str(phantom_work), "--run", str(folder), "--config", str(tiny_data), "--config", "tiny"]
    chosen = ["--set", "device=cpu", "--set", "precision=float32", "--set", "strength_of_refinement=0.75"]
    assert run(["train", "refined", *places, *chosen, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"]
    assert StageFolder(folder, "refined").parser()["strength_of_refinement"] == 0.75
    assert [kind.name for kind in begun(folder)] == ["autoencoder", "latents", "refined"]
    with pytest.raises(FibldmError, match="run `fibldm train refined`"):
        StageFolder(tiny_run, "refined").require()


def test_the_plan_has_a_stage_of_the_table(
    made_up: StageKind, phantom_work: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands on latents, as its row says; the other stages are left out here to be quick."""
    monkeypatch.setattr("fibldm.planning.plan.is_trained", lambda stage, _: stage == "refined")
    monkeypatch.setattr("fibldm.planning.plan.largest_batch", lambda *_: 1)
    monkeypatch.setattr("fibldm.planning.plan.device_memory", lambda _: 1e5)  # too little to try a step
    overrides = {"precision": "float32", "strength_of_refinement": 0.75}
    made = plan(Request(phantom_work, (str(tiny_data), "tiny"), overrides, "cpu"), memory=1e12)
    assert list(made["stages"]) == ["refined"]
    assert made["stages"]["refined"]["fits"] and "largest_patch" not in made["stages"]["refined"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"controlnet": {}}, ["autoencoder", "latents", "diffusion", "controlnet"]),
        ({"controlnet": {}, "refined::epochs": 3}, ["autoencoder", "latents", "diffusion", "controlnet", "refined"]),
        ({"refined": {}}, ["autoencoder", "latents", "diffusion", "refined"]),
        ({"refined": None}, ["autoencoder", "latents", "diffusion"]),
    ],
)
def test_a_recipe_has_a_stage_of_the_table_where_it_is_named(
    made_up: StageKind, overrides: dict[str, object], expected: list[str]
) -> None:
    steps = Recipe.read(None, configs=["data_lung_ct"], overrides=overrides).stages()
    assert [step.name for step in steps] == expected
    assert all(step.configuration(Path("work"), Path("run")) for step in steps)


def test_minutes_are_shared_with_a_stage_of_the_table(made_up: StageKind, tmp_path: Path) -> None:
    assert trained() == ("autoencoder", "diffusion", "controlnet", "distillation", "refined")
    shares = shares_of([*STAGES[:3], "refined"])
    assert shares == {"autoencoder": 0.35, "diffusion": 0.65, "refined": 0.25}
    usual = {"autoencoder": 0.3, "diffusion": 0.5, "controlnet": 0.2}
    assert shares_of(STAGES) == {**usual, "distillation": 0.3, "refined": 0.25}
    assert TotalBudget(tmp_path, 10.0, shares).minutes_of("refined") == 10.0
    assert TotalBudget(tmp_path, 10.0, shares).minutes_of("diffusion") == pytest.approx(10 * 0.65 / 0.9, abs=1e-4)


def test_volumes_are_drawn_with_the_last_stage_that_was_begun(
    made_up: StageKind, tiny_run: Path, tmp_path: Path
) -> None:
    """Stage 2 of the run knows no mask, nor does the made-up stage bring it one."""
    run_dir = begun_with(tiny_run, tmp_path / "run", *STAGES[:4])
    assert generating_stage(run_dir, unconditional=True).name == "diffusion"
    (run_dir / "refined").symlink_to(tiny_run / "diffusion")
    assert generating_stage(run_dir, unconditional=True).name == "refined"
    assert generating_stage(run_dir).name == "controlnet"
    (run_dir / "controlnet").unlink()
    with pytest.raises(FibldmError, match="stage 'controlnet' .* never started.*run `fibldm train controlnet`"):
        generating_stage(run_dir)


def test_every_row_can_be_followed() -> None:
    for row in TABLE.values():
        assert all((configs_folder() / f"{file}.yaml").is_file() for file in row.files)
        earlier = list(TABLE)[: list(TABLE).index(row.name)]
        assert row.base is None or row.base in earlier
        assert {*row.share_of_others} <= {*earlier}
        assert row.in_pipeline == "never" or not row.is_trained or row.share or row.share_of_others


def test_one_of_several_stages_has_the_row_of_its_kind() -> None:
    assert kind_of("segmenter/0123") is TABLE["segmenter"]
    with pytest.raises(FibldmError, match="stage must be one of autoencoder, .*; got 'refined'"):
        kind_of("refined")
