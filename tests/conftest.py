"""What several test files need: phantoms as a work folder, a run trained with the smallest networks, the real data.

What takes long to make is made once for all processes that test side by side, and is only read.
"""

import fcntl
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from builders import STAGES, data_file, tiny_configuration
from monai.bundle import config_parser
from processes import server

from fibldm.datasets.preparation import prepare
from fibldm.files import read_json, write_json
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.runs.configuration import Configuration
from fibldm.volumes.datalist import SPLITS

ROOT = Path(__file__).parents[1]
SUBJECTS = 5

TinyStage = Callable[..., Configuration]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow or many tests begin first, so that at the end no process waits for another."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    many = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -many[item.path]))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small are slower on many threads, and sums of one thread come out the same every time."""
    torch.set_num_threads(1)


class YamlInC(yaml.CSafeLoader, config_parser.CheckKeyDuplicatesYamlLoader):
    """MONAI's, by the parser in C: every stage reads all of its files."""


@pytest.fixture(scope="session", autouse=True)
def yaml_in_c() -> Iterator[None]:
    """Configurations are read in a tenth of the time; processes of their own read them as MONAI does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_parser, "CheckKeyDuplicatesYamlLoader", YamlInC)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Processes that share work begin with their imports done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fibldm.workers.get_context", server)
        yield


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that --devices starts do as well."""
    from torch.distributed.launcher import api

    server()
    monkeypatch.setattr(api, "LaunchConfig", partial(api.LaunchConfig, start_method="forkserver"))


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """Commands add a handler to the logger of the package that keeps the standard error of its time; take it off."""
    logger = logging.getLogger("fibldm")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture(scope="session")
def slice_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet for colour slices, as torchvision stores it: with a classifier."""
    from monai.networks.nets.resnet import ResNetFeatures

    torch.manual_seed(0)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=2, in_channels=3)
    file = tmp_path_factory.mktemp("weights") / "slices.pth"
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}, file)
    return file


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Calls ``make`` with a new folder, in the first process that asks for the name; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = base / name, base / f"{name}.made"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def phantom_work(made_once: MadeOnce) -> Path:
    """A work folder of chest phantoms, split by patient."""

    def make(folder: Path) -> None:
        write_phantoms(folder / "source", subjects=SUBJECTS, seed=1, progress=iter)
        prepare(folder / "source", folder / "work", progress=False)

    return made_once("phantoms", make) / "work"


@pytest.fixture(scope="session")
def mostly_held_out(made_once: MadeOnce) -> Path:
    """A work folder of chest phantoms: two in training, and as many held out as an audit needs at least."""

    def make(folder: Path) -> None:
        write_phantoms(folder / "source", subjects=6, seed=2, progress=iter)
        prepare(folder / "source", folder / "work", progress=False)
        file = folder / "work" / "datalist.json"
        content = read_json(file)
        cases = [entry for split in SPLITS for entry in content[split]]
        write_json(file, content | {"training": cases[:2], "validation": cases[2:3], "test": cases[3:]})

    return made_once("mostly_held_out", make) / "work"


@pytest.fixture(scope="session")
def tiny_data(made_once: MadeOnce) -> Path:
    """A data configuration with the smallest model grid that the networks allow for whole chests."""
    return made_once("configs", lambda folder: data_file(folder, 10.0, 32, 32, 32)) / "data.yaml"


@pytest.fixture(scope="session")
def tiny_stage(phantom_work: Path, tiny_data: Path) -> TinyStage:
    """Makes the configuration of a stage with tiny networks: ``tiny_stage(stage, run, *configs, key=value)``."""

    def configuration(stage: str, run: Path, *more: str, **overrides: object) -> Configuration:
        return tiny_configuration(stage, phantom_work, run, tiny_data, "tiny", *more, **overrides)

    return configuration


@pytest.fixture(scope="session")
def tiny_run(tiny_stage: TinyStage, made_once: MadeOnce) -> Path:
    """A run folder with every usual stage trained for an epoch; read only, as all tests share it."""

    def make(folder: Path) -> None:
        for stage in STAGES:
            tiny_stage(stage, folder / "tiny").run()

    return made_once("runs", make) / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, made_once: MadeOnce) -> Path:
    """The tiny run, which ends with a ControlNet, as a bundle; read only."""
    from fibldm.delivery.export import ExportSettings, export

    made = made_once("bundles", lambda folder: export(tiny_run, folder / "tiny", ExportSettings("CC0-1.0")))
    return made / "tiny"


@pytest.fixture(scope="session")
def mask_file(phantom_work: Path) -> Path:
    """One of the phantoms' masks."""
    return sorted((phantom_work / "labels").iterdir())[0]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, ``$FIBLDM_DATA``."""
    folder = Path(os.environ.get("FIBLDM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data; {folder} does not exist ($FIBLDM_DATA)")
    return folder
