"""What several test files need: phantoms as a work folder, a run trained with the smallest networks, the real data."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from fibldm.runs import STAGES
from fibldm.training.configuration import Configuration, stage_configuration
from fibldm.volumes.phantoms import write_phantoms
from fibldm.volumes.preparation import prepare

ROOT = Path(__file__).parents[1]
SUBJECTS = 5

TinyStage = Callable[..., Configuration]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small are slower on many threads, and sums of one thread come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """Commands add a handler to the logger of the package that keeps the standard error of its time; take it off."""
    logger = logging.getLogger("fibldm")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture(scope="session")
def phantom_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of chest phantoms, split by patient."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "source", subjects=SUBJECTS, seed=1, progress=iter)
    prepare(folder / "source", folder / "work", progress=False)
    return folder / "work"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data configuration with the smallest model grid that the networks allow for whole chests."""
    file = tmp_path_factory.mktemp("configs") / "data_tiny.yaml"
    file.write_text(yaml.safe_dump({"spacing": [10.0, 10.0, 10.0], "size": [32, 32, 32]}))
    return file


@pytest.fixture(scope="session")
def tiny_stage(phantom_work: Path, tiny_data: Path) -> TinyStage:
    """Makes the configuration of a stage with tiny networks: ``tiny_stage(stage, run, *configs, key=value)``."""

    def configuration(stage: str, run: Path, *more: str, **overrides: object) -> Configuration:
        settings = {"device": "cpu", "precision": "float32", **overrides}
        configs = [str(tiny_data), "tiny", *more]
        return stage_configuration(stage, work=phantom_work, run_dir=run, configs=configs, overrides=settings)

    return configuration


@pytest.fixture(scope="session")
def tiny_run(tiny_stage: TinyStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every stage trained for an epoch; read only, as all tests share it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in STAGES:
        tiny_stage(stage, run).run()
    return run


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, ``$FIBLDM_DATA``."""
    folder = Path(os.environ.get("FIBLDM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data; {folder} does not exist ($FIBLDM_DATA)")
    return folder
