"""From names and overrides to a checked configuration, and the plain MONAI command that runs the same."""

import copy
import difflib
import importlib
import inspect
import json
import logging
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

import fibldm
from fibldm.errors import FibldmError, unknown_choice
from fibldm.runs.causes import unwrapped
from fibldm.runs.locator import parser_of
from fibldm.runs.options import in_order
from fibldm.runs.renamed import current
from fibldm.runs.stages import TABLE, files_of_stages
from fibldm.runs.values import check_values, require_minutes
from fibldm.runs.workflow import StageWorkflow
from fibldm.verbatim import as_argument, verbatim

_GRID = {"spacing", "size"}


# Where whoever adds a kind of condition chooses its name.
_BY_NAME = frozenset(
    "conditions routes::channels routes::norms routes::time routes::tokens stage::inputs "
    "train::prepare_batch::dropout".split()
)


class IncompatibleGrid(FibldmError):
    """The model grid does for stage 1, and not for stage 2."""


@dataclass(frozen=True)
class Configuration:
    """The files of a stage, in the order they are merged, and the overrides on top.

    Attributes:
        files: YAML files; later ones change earlier ones.
        overrides: ``key::sub`` to value.
    """

    files: tuple[Path, ...]
    overrides: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The same through MONAI alone."""
        return self.command_of(1)

    def command_of(self, devices: int) -> str:
        """The same through MONAI alone, by so many processes."""
        python = "python" if devices == 1 else f"torchrun --standalone --nproc-per-node {devices}"
        listed = "[" + ",".join(repr(str(shown(file))) for file in self.files) + "]"
        quoted = shlex.quote(listed) if re.search(r'[\\"$`!]', listed) else f'"{listed}"'
        arguments = " ".join(f"--{key} {shlex.quote(as_argument(value))}" for key, value in self.overrides.items())
        return f"{python} -m monai.bundle run --config_file {quoted} {arguments}".rstrip()

    def parser(self) -> ConfigParser:
        """Files and overrides as one; of a part nothing is made until it is asked for."""
        parser = parser_of(ConfigFiles.load_config_files([str(file) for file in self.files]))
        for key, value in self.overrides.items():
            parser[key] = value
        return parser

    def run(self, *, began: float | None = None) -> None:
        """Run the configuration in this process.

        Args:
            began: when that began, in seconds of `time.monotonic`, for ``minutes`` to count from; None is now.

        Raises:
            FibldmError: what a part of it refused, without MONAI's wrapping.
        """
        began = time.monotonic() if began is None else began
        parser = self.parser()
        timed = parser.get("minutes") is not None and "epochs" in parser  # latents have none
        overrides = {**self.overrides, "stage::began": began} if timed else self.overrides
        with _without_warnings_of_files():
            workflow = StageWorkflow(
                config_file=[str(file) for file in self.files],
                logging_file=False,
                workflow_type="train",
                **overrides,
            )
        with unwrapped():
            workflow.initialize()
            workflow.run()
            workflow.finalize()


def stage_configuration(
    stage: str, *, work: Path, run_dir: Path, configs: Sequence[str], overrides: Mapping[str, Any]
) -> Configuration:
    """The configuration of a training stage: common, the stage's files, and the user's own.

    Args:
        stage: one of the table of stages.
        work: folder of ``fibldm prepare``.
        run_dir: the run folder.
        configs: paths, or names of shipped configurations, of the data and of changes; they come last.
        overrides: ``key::sub`` to value, in any order.

    Raises:
        FibldmError: a file is missing or no YAML mapping, no data configuration is given, a key is unknown or
            replaces what was said before of a part of it, a number of something is none, or the overrides give epochs
            and something gives minutes.
    """
    if stage not in TABLE:
        raise unknown_choice("stage", stage, TABLE)
    base = [shipped(name) for name in ("common", *TABLE[stage].files)]
    given = [_find(name) for name in configs]
    known = {key for name in ("common", *files_of_stages()) for key in _read(shipped(name))}
    folders = {"work": verbatim(str(work)), "run_dir": verbatim(str(run_dir))}
    configuration = Configuration((*base, *given), in_order({**folders, **overrides}))
    _check(configuration, given, known)
    return configuration


def check_grid(autoencoder: Configuration, diffusion: Configuration | None = None) -> None:
    """Refuse a model grid that would be refused only after stage 1 was trained.

    Args:
        autoencoder: stage 1, on a prepared work folder.
        diffusion: stage 2; None takes the UNet as it ships.

    Raises:
        IncompatibleGrid: an axis is not divisible by the autoencoder's compression times what the UNet halves.
        FibldmError: the autoencoder is refused.
    """
    first = autoencoder.parser()
    ships = tuple(shipped(name) for name in ("common", *TABLE["diffusion"].files))
    second = (diffusion or Configuration(ships, {})).parser()
    channels = next((key for key in ("unet::channels", "unet::num_channels") if key in second), None)
    if channels is None:
        return  # another kind of network, which may divide otherwise
    with unwrapped():
        compression = first.get_parsed_content("network_def").compression
    size = tuple(first.get_parsed_content("size"))
    halvings = len(second.get_parsed_content(channels)) - 1
    steps = [step * 2**halvings if length > 1 else 1 for length, step in zip(size, compression, strict=True)]
    if any(length % step for length, step in zip(size, steps, strict=True)):
        fitting = tuple(-(-length // step) * step for length, step in zip(size, steps, strict=True))
        raise IncompatibleGrid(
            f"for stage 2, size {size} of the model grid must be divisible by {tuple(steps)}, "
            f"which is the autoencoder's compression times 2^{halvings} of the UNet",
            f"choose size {fitting}, or fewer unet_channels",
        )


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
    return _read(_find(name))


def _find(name: str) -> Path:
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


def _read(file: Path) -> dict[str, Any]:
    try:
        content = ConfigFiles.load_config_file(file)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise FibldmError(f"{file} must be YAML or JSON; {error}") from error
    if not isinstance(content, dict):
        raise FibldmError(f"{file} must hold a mapping of keys to values; it holds {type(content).__name__}")
    return content


def _check(configuration: Configuration, given: Sequence[Path], known: set[str]) -> None:
    contents = {file: _read(file) for file in given}
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


def _refuse_orphans(configuration: Configuration, given: Mapping[Path, Mapping[str, Any]]) -> None:
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
        names |= {key.lstrip("+").split("::")[0] for key in given.get(file) or _read(file)}


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
        stages = [stage for stage, row in TABLE.items() if name in _read(shipped(row.files[-1]))]
        options = [file.stem for file in sorted(configs_folder().glob("*.yaml")) if name in _own_keys(file)]
        if stages or options:
            owners = f"stage {' or '.join(stages)}" if stages else f"the configuration {' or '.join(options)}"
            remedy = "set it for that stage" if stages else f"add --config {options[0]} where that is wanted"
            return FibldmError(f"configuration key {key!r}{where} is not known here; it belongs to {owners}", remedy)
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return FibldmError(f"configuration key {key!r}{where} is not known", f"did you mean {nearest[0]!r}?")


def _own_keys(file: Path) -> set[str]:
    """Keys that an option brings; data and recipes only give values to those of others."""
    return set() if file.stem.startswith(("data_", "recipe_", "tiny", "demo")) else set(_read(file))


@contextmanager
def _without_warnings_of_files() -> Iterator[None]:
    """MONAI warns that there is no file for logging, and that files lie in several folders; both are meant so."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Logging file is set to False", "Not all config files are in"))

    logger = logging.getLogger("monai.bundle.workflows")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def shown(file: Path) -> Path:
    """A file as people are told of it: from where they are, if it lies below."""
    try:
        return file.resolve().relative_to(Path.cwd())
    except ValueError:
        return file
