"""Where configuration files lie, and what stands in them, in today's names."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

import fibldm
from fibldm.errors import FibldmError, unknown_choice
from fibldm.runs.renamed import current


def configs_folder() -> Path:
    """Where the shipped configurations lie: in the installed package, or beside it in a checkout."""
    package = Path(fibldm.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped(name: str) -> Path:
    """The shipped configuration of a name.

    Raises:
        FibldmError: there is none; lists them.
    """
    file = configs_folder() / f"{name}.yaml"
    if not file.is_file():
        raise unknown_choice("configuration", name, sorted(path.stem for path in configs_folder().glob("*.yaml")))
    return file


def read_configuration(name: str) -> dict[str, Any]:
    """The content of a configuration file of the user's, or of a shipped one by its name.

    Raises:
        FibldmError: there is none, or it is no YAML mapping.
    """
    return read(find(name))


def find(name: str) -> Path:
    """A configuration file of the user's, or a shipped one by its name.

    Raises:
        FibldmError: there is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        if not path.is_file():
            raise FibldmError(f"configuration {name} must exist", "check the path")
        return path
    return shipped(name)


class ConfigFiles(ConfigParser):
    """MONAI's parser, which reads a file once as long as it stays the same: its YAML reader takes most of the time."""

    @classmethod
    def load_config_file(cls, filepath: Any, **kwargs: Any) -> dict[str, Any]:
        stat = Path(filepath).stat()
        return copy.deepcopy(_loaded(str(filepath), stat.st_mtime_ns, stat.st_size))


@cache
def _loaded(file: str, _mtime: int, _size: int) -> dict[str, Any]:
    content: dict[str, Any] = current(ConfigParser.load_config_file(file))
    return content


def read(file: Path) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        FibldmError: it is no YAML or JSON mapping.
    """
    try:
        content = ConfigFiles.load_config_file(file)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise FibldmError(f"{file} must be YAML or JSON; {error}") from error
    if not isinstance(content, dict):
        raise FibldmError(f"{file} must hold a mapping of keys to values; it holds {type(content).__name__}")
    return content


def shown(file: Path) -> Path:
    """A file as people are told of it: from where they are, if it lies below."""
    try:
        return file.resolve().relative_to(Path.cwd())
    except ValueError:
        return file
