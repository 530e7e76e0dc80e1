"""What the scripts that audit are tried on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fibldm.datasets.preparation import prepare
from fibldm.files import read_json, write_json
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.volumes.datalist import SPLITS


@pytest.fixture(scope="session")
def mostly_held_out(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A work folder of chest phantoms: two in training, and as many held out as an audit needs at least."""

    def make(folder: Path) -> None:
        write_phantoms(folder / "source", subjects=6, seed=2, progress=iter)
        prepare(folder / "source", folder / "work", progress=False)
        file = folder / "work" / "datalist.json"
        content = read_json(file)
        cases = [entry for split in SPLITS for entry in content[split]]
        write_json(file, content | {"training": cases[:2], "validation": cases[2:3], "test": cases[3:]})

    return made_once("mostly_held_out", make) / "work"
