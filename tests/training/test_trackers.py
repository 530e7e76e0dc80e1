"""MLflow and Weights & Biases as stubs: what they are told, that they stay local, and what a resume does."""

import csv
import gzip
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml
from conftest import TinyStage
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow

from fibldm.errors import FibldmError
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration
from fibldm.training.profiler import Profiler
from fibldm.training.trackers import MLflow, Tracker, WandB, settings

CONFIG = {
    "epochs": 2,
    "learning_rate": 1e-3,
    "wavelet": True,
    "patch": [32, 32, 16],
    "work": "/home/somebody/secret",
    "steps": "$len(@train)",
    "nothing": None,
    "empty": [],
    "names": ["a"],
    "network_def": {"channels": 4},
}
NUMBERS = {"epochs": 2, "learning_rate": 1e-3, "wavelet": True, "patch": [32, 32, 16]}
ROWS = ["epoch,iteration,loss,validation_loss,loss/kl,seconds", "1,4,0.5,,0.25,1.5", "2,8,0.375,0.75,,1.25"]
VALUES = [
    {"iteration": 4.0, "loss": 0.5, "loss/kl": 0.25, "seconds": 1.5},
    {"iteration": 8.0, "loss": 0.375, "validation_loss": 0.75, "seconds": 1.25},
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    stage = tmp_path / "RUN" / "autoencoder"
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "RUN"


def train(tracker: Tracker, epochs: int = 2, first: int = 1) -> None:
    """Train for some epochs; each writes its row as `Metrics` does."""
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.EPOCH_COMPLETED)
    def write(engine: Engine) -> None:
        lines = ROWS[: 1 + engine.state.epoch]
        (tracker.folder / "metrics.csv").write_text("\n".join(lines) + "\n")

    tracker.attach(engine)
    engine.state.epoch, engine.state.iteration, engine.state.epoch_length = first - 1, first - 1, 1
    engine.state.max_epochs = epochs
    engine.run([0])


# --- MLflow


class Client:
    """MLflow's client with all stores in one dictionary, by the address."""

    stores: dict[str, dict[str, Any]] = {}

    def __init__(self, tracking_uri: str) -> None:
        self.store = self.stores.setdefault(tracking_uri, {"experiments": {}, "runs": {}})

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.store["experiments"].get(name)
        return None if found is None else SimpleNamespace(**found)

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        assert name not in self.store["experiments"]
        self.store["experiments"][name] = {"experiment_id": "7", "artifact_location": artifact_location}
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run_id = f"run{len(self.store['runs'])}"
        self.store["runs"][run_id] = {
            **{"experiment": experiment_id, "name": run_name, "status": "RUNNING"},
            **{"params": {}, "metrics": []},
        }
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.store["runs"][run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        run = self.store["runs"][run_id]
        for param in params:
            assert run["params"].setdefault(param.key, param.value) == param.value  # as MLflow insists
        run["metrics"] += metrics

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str) -> None:
        self.store["runs"][run_id].setdefault("pictures", []).append((Path(local_path).name, artifact_path))

    def set_terminated(self, run_id: str) -> None:
        self.store["runs"][run_id]["status"] = "FINISHED"


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    mlflow: Any = ModuleType("mlflow")
    mlflow.MlflowClient = Client
    mlflow.entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(Client, "stores", {})
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return Client.stores


def test_mlflow_gets_every_row_in_a_file_in_the_run_folder(run_dir: Path, stores: dict[str, Any]) -> None:
    train(MLflow(run_dir, "autoencoder"))
    (store,) = stores.values()
    assert list(stores) == [f"sqlite:///{run_dir.resolve()}/mlflow.db"]
    assert store["experiments"]["fibldm"]["artifact_location"] == (run_dir.resolve() / "mlflow_files").as_uri()
    (run,) = store["runs"].values()
    assert (run["experiment"], run["name"], run["status"]) == ("7", "autoencoder", "FINISHED")
    expected = [(name, value, step) for step, row in enumerate(VALUES, 1) for name, value in row.items()]
    assert run["metrics"] == expected
    assert run["params"] == {name: str(value) for name, value in NUMBERS.items()}
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_stage_that_goes_on_goes_on_in_the_same_run_of_mlflow(run_dir: Path, stores: dict[str, Any]) -> None:
    train(MLflow(run_dir, "autoencoder"), epochs=1)
    (run_dir / "autoencoder" / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "epochs": 20}))
    tracker = MLflow(run_dir, "autoencoder")
    tracker.open({"epochs": 20})
    (run,) = next(iter(stores.values()))["runs"].values()
    assert run["status"] == "RUNNING"
    train(tracker, epochs=2, first=2)
    assert run["status"] == "FINISHED"
    assert sorted({step for _, _, step in run["metrics"]}) == [1, 2]


def test_two_stages_are_two_runs_of_one_experiment(run_dir: Path, stores: dict[str, Any]) -> None:
    (run_dir / "diffusion").mkdir()
    (run_dir / "diffusion" / "config.yaml").write_text("{}")
    train(MLflow(run_dir, "autoencoder"))
    train(MLflow(run_dir, "diffusion"))
    (store,) = stores.values()
    assert [run["name"] for run in store["runs"].values()] == ["autoencoder", "diffusion"]


@pytest.mark.parametrize("by_environment", [True, False])
def test_mlflow_may_be_a_server(
    run_dir: Path, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    if by_environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    train(MLflow(run_dir, "autoencoder", tracking_uri=None if by_environment else "http://server", experiment="lungs"))
    assert list(stores) == ["http://server"]
    assert stores["http://server"]["experiments"]["lungs"]["artifact_location"] is None


# --- Weights & Biases


class Run:
    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.defined, self.finished = given, [], {}, False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    begun: list[Run] = []

    def init(**given: Any) -> Run:
        begun.append(Run(**given))
        return begun[-1]

    wandb: Any = ModuleType("wandb")
    wandb.init = init
    wandb.Image = lambda path: f"picture {Path(path).name}"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return begun


def test_wandb_gets_every_row_and_stays_offline(run_dir: Path, runs: list[Run]) -> None:
    train(WandB(run_dir, "autoencoder"))
    (run,) = runs
    assert (run.given["mode"], run.given["resume"]) == ("offline", None)
    assert (run.given["dir"], run.given["name"], run.given["group"]) == (str(run_dir), "autoencoder", "RUN")
    assert run.given["config"] == NUMBERS
    assert run.given["settings"] == {"console": "off", "disable_git": True, "disable_code": True}
    assert run.defined == {"*": "epoch"}
    assert run.logged == [{"epoch": epoch, **row} for epoch, row in enumerate(VALUES, 1)]
    assert run.finished


def test_a_stage_that_goes_on_goes_on_in_the_same_run_of_wandb(run_dir: Path, runs: list[Run]) -> None:
    train(WandB(run_dir, "autoencoder", mode="online"), epochs=1)
    train(WandB(run_dir, "autoencoder", mode="online"), first=2)
    assert runs[0].given["id"] == runs[1].given["id"]
    assert len(runs[0].given["id"]) == 8
    assert [run.given["resume"] for run in runs] == ["allow", "allow"]
    assert [run.logged[0]["epoch"] for run in runs] == [1, 2]


def test_the_mode_of_wandb_may_come_from_the_environment(
    run_dir: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(WandB(run_dir, "autoencoder"))
    train(WandB(run_dir, "autoencoder", mode="online"))
    assert [run.given["mode"] for run in runs] == ["disabled", "online"]


# --- both


@pytest.mark.parametrize("asked", [False, True])
def test_pictures_are_shown_only_if_asked(run_dir: Path, stores: dict[str, Any], runs: list[Run], asked: bool) -> None:
    """A preview shows scans of validation patients; the first epoch has none."""
    (run_dir / "autoencoder" / "previews").mkdir()
    (run_dir / "autoencoder" / "previews" / "epoch_0002.png").touch()
    train(WandB(run_dir, "autoencoder", pictures=asked))
    train(MLflow(run_dir, "autoencoder", pictures=asked))
    (store,) = stores.values()
    (run,) = store["runs"].values()
    shown = [row for row in runs[0].logged if "preview" in row]
    assert shown == ([{"epoch": 2, "preview": "picture epoch_0002.png"}] if asked else [])
    assert run.get("pictures", []) == ([("epoch_0002.png", "previews")] if asked else [])


def test_trackers_are_told_numbers_and_no_path(run_dir: Path) -> None:
    assert settings(run_dir / "autoencoder" / "config.yaml") == NUMBERS


@pytest.mark.parametrize(("kind", "name"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_a_tracker_that_is_not_installed_names_the_extra(
    kind: Any, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FibldmError, match=f"shows the training in {name}, which must be installed") as raised:
        kind(run_dir, "autoencoder")
    assert raised.value.remedy == f"pip install 'fibldm[{name}]', or leave --config {name} out"


def test_both_may_be_asked_for_at_once() -> None:
    parser = ConfigParser(
        ConfigParser.load_config_files([str(shipped(name)) for name in ("common", "mlflow", "wandb")])
        | {"run_dir": "RUN", "stage": {"name": "diffusion"}}
    )
    assert parser["trackers"] == ["@mlflow", "@wandb"]
    for name in ("mlflow", "wandb"):
        item = parser.get_parsed_content(name, instantiate=False).get_config()
        assert (item["run_dir"], item["stage"]) == ("RUN", "diffusion")
        module, _, kind = item["_target_"].rpartition(".")
        assert hasattr(importlib.import_module(module), kind)


def test_a_stage_trains_with_both_and_a_profile(
    tiny_stage: TinyStage, tmp_path: Path, stores: dict[str, Any], runs: list[Run]
) -> None:
    settings = {"train::dataset::progress": False, "batch_size": 1, "epochs": 2, "profile": 1}
    configuration = tiny_stage("segmenter", tmp_path, **settings)
    files = (*configuration.files, shipped("mlflow"), shipped("wandb"))
    Configuration(files, configuration.overrides).run()
    losses = [float(line.split(",")[2]) for line in (tmp_path / "segmenter/metrics.csv").read_text().splitlines()[1:]]
    (store,) = stores.values()
    (run,) = store["runs"].values()
    assert [value for name, value, _ in run["metrics"] if name == "loss"] == losses
    assert [row["loss"] for row in runs[0].logged] == losses
    assert run["params"]["batch_size"] == "1"
    profile = tmp_path / "segmenter" / "profile"
    assert "aten::convolution" in (profile / "operators.txt").read_text()
    events = json.loads(gzip.decompress((profile / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event["name"].startswith("aten::") for event in events)


@pytest.mark.parametrize("wrong", [True, -1, "5"])
def test_a_profile_is_of_a_number_of_iterations(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="profile must be a number of iterations, 0 for none"):
        Profiler(tmp_path, wrong)


def test_a_training_too_short_for_a_profile_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda engine, batch: None)
    Profiler(tmp_path, 5).attach(engine)
    engine.run([0, 1])
    assert "it takes more than 3 iterations; there were fewer" in caplog.text
    assert list(tmp_path.iterdir()) == []


class Listener:
    """In place of MONAI's handler of MLflow: hears what that would log."""

    heard: ClassVar[list[float]] = []

    def __init__(self, *, output_transform: Callable[[Any], Any] | None = None, **_: Any) -> None:
        self.output_transform = output_transform

    def attach(self, engine: Engine) -> None:
        if self.output_transform is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._hear)

    def _hear(self, engine: Engine) -> None:
        assert self.output_transform is not None
        self.heard.append(self.output_transform(engine.state.output).item())


def test_the_tracking_of_monai_hears_every_loss_and_is_no_change_of_a_stage(
    tiny_stage: TinyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MONAI's own settings; a stage that was begun with it goes on without."""
    monkeypatch.setattr("monai.handlers.mlflow_handler.MLFlowHandler", Listener)
    monkeypatch.setattr(Listener, "__module__", "monai.handlers.mlflow_handler")  # MONAI finds its own classes only
    monkeypatch.setattr(Listener, "heard", [])
    configuration = tiny_stage("autoencoder", tmp_path / "run")
    workflow = ConfigWorkflow(
        config_file=[str(file) for file in configuration.files],
        workflow_type="train",
        tracking="mlflow",
        **configuration.overrides,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    (row,) = csv.DictReader((tmp_path / "run" / "autoencoder" / "metrics.csv").read_text().splitlines())
    assert len(Listener.heard) == int(row["iteration"])
    assert sum(Listener.heard) / len(Listener.heard) == pytest.approx(float(row["loss"]), rel=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    tiny_stage("autoencoder", tmp_path / "run", epochs=2).run()
    assert "going on after epoch 1 of 2" in (tmp_path / "run" / "autoencoder" / "log.txt").read_text()
