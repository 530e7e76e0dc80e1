"""MONAI's workflows run a stage, whose whole configuration is recorded: its own, ours, and one within another."""

from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
import yaml
from conftest import TinyStage
from monai.bundle import ConfigParser, ConfigWorkflow

from fibldm.runs import StageFolder
from fibldm.runs.workflow import StageWorkflow, running_parser

OURS = "fibldm.runs.workflow.StageWorkflow"


class Asking:
    """A stage that keeps the configuration it is run by."""

    found: dict[str, ConfigParser] = {}

    def __init__(self, name: str, within: str | None = None) -> None:
        self.name, self.within = name, within

    def run(self) -> None:
        if self.within is not None:
            workflow = ConfigWorkflow(self.within, logging_file=False, workflow_type=None)
            workflow.initialize()
            workflow.run()
        self.found[self.name] = running_parser(self)


def written(folder: Path, name: str, **arguments: str) -> str:
    stage = {"_target_": f"{__name__}.Asking", "name": name, **arguments}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"stage": stage, "which": name, "run": ["$@stage.run()"], "training": "@run"}))
    return str(file)


@pytest.fixture
def no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.runs.workflow._evaluating_parser", lambda: pytest.fail("it looked at the call stack"))


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_run_workflow_trains_the_same_and_never_asks_the_call_stack(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path, no_stack: None
) -> None:
    """With MONAI's other name of what runs."""
    made = tiny_stage("autoencoder", tmp_path)
    files: dict[str, Any] = {"config_file": [str(file) for file in made.files], "run_id": "training"}
    monai.bundle.run_workflow(OURS, **files, logging_file=False, **made.overrides)
    ours, theirs = (StageFolder(run, "autoencoder") for run in (tiny_run, tmp_path))
    assert (ours.path / "inputs.json").read_bytes() == (theirs.path / "inputs.json").read_bytes()
    before, after = (stage.weights("last")["objects"]["network"] for stage in (ours, theirs))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:parsing config_file")
@pytest.mark.parametrize("given", [{}, {"workflow_name": OURS}], ids=["monai", "ours"])
@pytest.mark.parametrize("run_id", ["run", "training"])
def test_a_stage_knows_the_configuration_with_overrides_that_monai_runs(
    tmp_path: Path, given: dict[str, str], run_id: str
) -> None:
    file = written(tmp_path, "plain")
    monai.bundle.run(run_id, config_file=file, meta_file=[], logging_file=False, which="changed", **given)
    assert Asking.found.pop("plain")["which"] == "changed"


def test_our_workflow_never_asks_the_call_stack(tmp_path: Path, no_stack: None) -> None:
    workflow = StageWorkflow(written(tmp_path, "ours"), logging_file=False, workflow_type=None)
    workflow.initialize()
    workflow.run()
    assert Asking.found.pop("ours") is workflow.parser


def test_a_stage_within_another_has_its_own_configuration(tmp_path: Path) -> None:
    """The inner one is run by MONAI's workflow, while ours runs the outer one."""
    outer = written(tmp_path, "outer", within=written(tmp_path, "inner"))
    workflow = StageWorkflow(outer, logging_file=False, workflow_type=None)
    workflow.initialize()
    workflow.run()
    assert Asking.found.pop("inner")["which"] == "inner"
    assert Asking.found.pop("outer")["which"] == "outer"


def test_only_a_configuration_has_a_parser() -> None:
    with pytest.raises(RuntimeError, match="from an expression of a MONAI configuration"):
        running_parser(Asking("nobody"))
