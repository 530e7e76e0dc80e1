"""Experiment trackers that show the rows of ``metrics.csv``: MLflow and Weights & Biases, both local unless asked.

They get losses, rates, times, and the numbers of the configuration; no path, no name of a case or patient. Pictures
they get only if asked: a preview shows scans of validation patients.
A stage that goes on goes on in the same run of the tracker.
"""

import csv
import importlib
import os
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import yaml
from ignite.engine import Engine, Events

from fibldm.errors import FibldmError
from fibldm.files import write_text
from fibldm.volumes.pictures import preview_file

Mode = Literal["offline", "online", "disabled"]


class Tracker(ABC):
    """What trackers have in common: when they open, log and close, and what they are told.

    Args:
        run_dir: the run folder.
        stage: name of the stage.
        pictures: show the previews of the stage, too.
    """

    def __init__(self, run_dir: str | Path, stage: str, *, pictures: bool = False) -> None:
        self.run_dir, self.stage, self.pictures = Path(run_dir), stage, pictures
        self.folder = self.run_dir / stage

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self.open(settings(self.folder / "config.yaml")))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)
        engine.add_event_handler(Events.COMPLETED, lambda: self.close())

    @abstractmethod
    def open(self, settings: dict[str, Any]) -> None:
        """Begin a run of the tracker with the numbers of the configuration, or go on with the one that was begun."""

    @abstractmethod
    def log(self, values: dict[str, float], epoch: int) -> None:
        """Show the numbers of an epoch."""

    @abstractmethod
    def show(self, picture: Path, epoch: int) -> None:
        """Show the preview of an epoch."""

    @abstractmethod
    def close(self) -> None:
        """The stage is trained."""

    def _log(self, engine: Engine) -> None:
        with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            last = list(csv.DictReader(stream))[-1]
        values = {name: float(value) for name, value in last.items() if value and name != "epoch"}
        self.log(values, engine.state.epoch)
        picture = preview_file(self.folder, engine.state.epoch)
        if self.pictures and picture.exists():
            self.show(picture, engine.state.epoch)


class MLflow(Tracker):
    """MLflow, by default in a SQLite file in the run folder (``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``).

    Args:
        run_dir: the run folder.
        stage: name of the stage, and of the run in MLflow.
        experiment: name of the experiment in MLflow.
        tracking_uri: of a database or server; None: ``MLFLOW_TRACKING_URI``, or else the file in the run folder.
        pictures: keep the previews, too, among the artifacts.

    Raises:
        FibldmError: MLflow is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        *,
        experiment: str = "fibldm",
        tracking_uri: str | None = None,
        pictures: bool = False,
    ) -> None:
        super().__init__(run_dir, stage, pictures=pictures)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported
        self.mlflow = _package("mlflow")
        self.experiment = experiment
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")

    def open(self, settings: dict[str, Any]) -> None:
        local = f"sqlite:///{self.run_dir.resolve() / 'mlflow.db'}"
        self.client = self.mlflow.MlflowClient(tracking_uri=self.tracking_uri or local)
        file = self.folder / "mlflow_run.txt"
        if file.exists():
            self.run = file.read_text(encoding="utf-8").strip()
            self.client.update_run(self.run, status="RUNNING")
            return
        self.run = self.client.create_run(self._experiment(), run_name=self.stage).info.run_id
        params = [self.mlflow.entities.Param(name, str(value)) for name, value in settings.items()]
        self.client.log_batch(self.run, params=params)
        write_text(file, self.run + "\n")

    def log(self, values: dict[str, float], epoch: int) -> None:
        now = round(1000 * time.time())
        metrics = [self.mlflow.entities.Metric(name, value, now, epoch) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def show(self, picture: Path, epoch: int) -> None:
        self.client.log_artifact(self.run, str(picture), "previews")

    def close(self) -> None:
        self.client.set_terminated(self.run)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # by default MLflow puts what belongs to a SQLite store below the working directory
        files = None if self.tracking_uri else (self.run_dir.resolve() / "mlflow_files").as_uri()
        return str(self.client.create_experiment(self.experiment, artifact_location=files))


class WandB(Tracker):
    """Weights & Biases, by default offline, in ``RUN/wandb`` (``wandb sync`` sends it later).

    Args:
        run_dir: the run folder.
        stage: name of the stage, and of the run in W&B.
        project: name of the project in W&B.
        mode: None: ``WANDB_MODE``, or else "offline".
        pictures: show the previews, too.

    Raises:
        FibldmError: wandb is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        *,
        project: str = "fibldm",
        mode: Mode | None = None,
        pictures: bool = False,
    ) -> None:
        super().__init__(run_dir, stage, pictures=pictures)
        self.wandb = _package("wandb")
        self.project = project
        self.mode = mode or os.environ.get("WANDB_MODE", "offline")

    def open(self, settings: dict[str, Any]) -> None:
        file = self.folder / "wandb_run.txt"
        if not file.exists():
            write_text(file, uuid.uuid4().hex[:8] + "\n")
        self.run = self.wandb.init(
            project=self.project,
            group=self.run_dir.name,
            name=self.stage,
            id=file.read_text(encoding="utf-8").strip(),
            dir=str(self.run_dir),
            mode=self.mode,
            # offline, W&B warns of resuming; `wandb sync` joins runs of one id
            resume="allow" if self.mode == "online" else None,
            config=settings,
            # what is printed names paths and cases
            settings={"console": "off", "disable_git": True, "disable_code": True},
        )
        # W&B's own steps only grow, and a stage that goes on may do an epoch again
        self.run.define_metric("*", step_metric="epoch")

    def log(self, values: dict[str, float], epoch: int) -> None:
        self.run.log({"epoch": epoch, **values})

    def show(self, picture: Path, epoch: int) -> None:
        self.run.log({"epoch": epoch, "preview": self.wandb.Image(str(picture))})

    def close(self) -> None:
        self.run.finish()


def settings(file: Path) -> dict[str, Any]:
    """The numbers of a stage's ``config.yaml``: its entries that are a number, a boolean, or a list of those."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_number(part) for part in value)
    return isinstance(value, bool | int | float)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FibldmError(
            f"this configuration shows the training in {name}, which must be installed; {error}",
            f"pip install 'fibldm[{name}]', or leave --config {name} out",
        ) from error
