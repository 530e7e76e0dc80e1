"""Whether every key that a configuration gives is one that its stage takes."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibldm.errors import FibldmError
from fibldm.runs.config_files import ConfigFiles, configs_folder, read, shipped
from fibldm.runs.options import in_order
from fibldm.runs.stages import TABLE
from fibldm.runs.values import check_values, require_minutes

if TYPE_CHECKING:
    from fibldm.runs.configuration import Configuration

_GRID = {"spacing", "size"}


# Where whoever adds a kind of condition chooses its name.
_BY_NAME = frozenset(
    "conditions routes::channels routes::norms routes::time routes::tokens stage::inputs "
    "train::prepare_batch::dropout".split()
)


def check_keys(configuration: "Configuration", given: Sequence[Path], known: set[str]) -> None:
    """Refuse keys and values that the stage does not take.

    Args:
        configuration: of a stage.
        given: those of its files that are the user's, which come last.
        known: keys that any stage has.

    Raises:
        FibldmError: a key is unknown or replaces what was said before of a part of it, there is no model grid, a number
            of something is none, or both minutes and epochs are given.
    """
    contents = {file: read(file) for file in given}
    _refuse_orphans(configuration, contents)
    _refuse_lost_parts(contents)
    config = ConfigFiles.load_config_files([str(file) for file in configuration.files])
    config |= {key: value for key, value in configuration.overrides.items() if key in _GRID}
    if not config.keys() >= _GRID:
        data = sorted(path.stem for path in configs_folder().glob("data_*.yaml"))
        raise FibldmError(
            "a data configuration must give spacing and size of the model grid; none was given",
            f"give --config with a file of your own or one of {', '.join(data)}",
        )
    allowed = known | _GRID | {name for text in _texts(config) for name in re.findall(r"@(\w+)", text)}
    for position, file in enumerate(given, start=len(configuration.files) - len(given)):
        before = ConfigFiles.load_config_files([str(earlier) for earlier in configuration.files[:position]])
        for key in contents[file]:
            if key.lstrip("+").split("::")[0] not in allowed:
                raise _unknown_key(key, f" in {file}", allowed)
        inside = {key: value for key, value in contents[file].items() if "::" in key}
        _override(before, {key: value for key, value in inside.items() if not key.startswith("+")}, f" in {file}")
        for key in inside:
            _require(before, key.lstrip("+"), f" in {file}")
    _override(config, configuration.overrides)
    check_values(config)
    require_minutes(config.get("minutes"))
    if config.get("minutes") is not None and "epochs" in configuration.overrides:
        raise both_given(config["minutes"], config["epochs"])


def _override(config: dict[str, Any], overrides: Mapping[str, Any], where: str = "") -> None:
    """Change what the files say; a key may be one that another override brings, such as an argument of a new class."""
    for key in in_order(overrides):
        _require(config, key, where)
        *path, name = key.split("::")
        place: Any = config
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(name) if isinstance(place, list) else name] = overrides[key]


def _require(config: dict[str, Any], key: str, where: str) -> None:
    *path, name = key.split("::")
    if not _exists(config, [*path, name]):
        raise _unknown_key(key, where, {*config, *_flat_keys(config), *_arguments_at(config, path)})


def both_given(minutes: Any, epochs: Any) -> FibldmError:
    """The error for two lengths of one training."""
    return FibldmError(
        f"a training lasts either so many minutes or so many epochs; got minutes {minutes} and epochs {epochs}",
        "give one of them; epochs of a configuration file give way to minutes by themselves",
    )


def _refuse_orphans(configuration: "Configuration", given: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse ``a::b`` where no file before has ``a``, which MONAI would break off at."""
    names: set[str] = set()
    for file in configuration.files:
        for key in given.get(file, ()):
            name, *inside = key.lstrip("+").split("::")
            if inside and name not in names:
                raise FibldmError(
                    f"{file} changes {key!r}, and this stage has no {name!r}",
                    "leave it out here; other stages may need it",
                )
        names |= {key.lstrip("+").split("::")[0] for key in given.get(file) or read(file)}


def _refuse_lost_parts(given: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse ``a`` behind ``a::b`` in one file, which would drop the latter."""
    for file, content in given.items():
        keys = list(content)
        for position, key in enumerate(keys):
            if lost := [part for part in keys[:position] if part.lstrip("+").startswith(f"{key}::")]:
                raise FibldmError(
                    f"{file} gives {key!r} behind {lost[0]!r}, which it would drop", f"give {key!r} first"
                )


def _exists(config: Any, path: Sequence[str]) -> bool:
    if "::".join(path[:-1]) in _BY_NAME:
        return True
    for depth, name in enumerate(path):
        if isinstance(config, list) and name.isdigit() and int(name) < len(config):
            config = config[int(name)]
        elif isinstance(config, dict) and name in config:
            config = config[name]
        else:
            return isinstance(config, dict) and depth == len(path) - 1 and name in _parameters(config)
    return True


def _arguments_at(config: Any, path: Sequence[str]) -> set[str]:
    """What the class at a place takes, as keys."""
    for part in path:
        config = config.get(part) if isinstance(config, dict) else None
    names = _parameters(config) if isinstance(config, dict) else set()
    return {"::".join([*path, name]) for name in names}


def _parameters(config: Mapping[str, Any]) -> set[str]:
    target = str(config.get("_target_", ""))
    module, _, _ = target.rpartition(".")
    if not module or module.startswith(("$", "@", "%")):
        return set()
    try:
        return set(inspect.signature(_located(target)).parameters)
    except (ImportError, AttributeError) as error:
        raise FibldmError(f"_target_ must name a class or function that can be imported; {error}") from error


def _located(target: str) -> Any:
    """A class or function of a module, or a class method such as ``fit``."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        outer, _, kind = module.rpartition(".")
        if not outer:
            raise
        return getattr(getattr(importlib.import_module(outer), kind), name)


def _flat_keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            name = f"{prefix}::{key}" if prefix else str(key)
            yield name
            yield from _flat_keys(value, name)


def _texts(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    parts = [*config, *config.values()] if isinstance(config, dict) else config if isinstance(config, list) else ()
    for part in parts:
        yield from _texts(part)


def _unknown_key(key: str, where: str, known: set[str]) -> FibldmError:
    name = key.lstrip("+").split("::")[0]
    if name not in known:
        stages = [stage for stage, row in TABLE.items() if name in read(shipped(row.files[-1]))]
        options = [file.stem for file in sorted(configs_folder().glob("*.yaml")) if name in _own_keys(file)]
        if stages or options:
            owners = f"stage {' or '.join(stages)}" if stages else f"the configuration {' or '.join(options)}"
            remedy = "set it for that stage" if stages else f"add --config {options[0]} where that is wanted"
            return FibldmError(f"configuration key {key!r}{where} is not known here; it belongs to {owners}", remedy)
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return FibldmError(f"configuration key {key!r}{where} is not known", f"did you mean {nearest[0]!r}?")


def _own_keys(file: Path) -> set[str]:
    """Keys that an option brings; data and recipes only give values to those of others."""
    return set() if file.stem.startswith(("data_", "recipe_", "tiny", "demo")) else set(read(file))
