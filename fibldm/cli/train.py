"""``fibldm train`` and ``fibldm encode``: thin doors to the stages' configurations."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fibldm.runs.stages import trained

if TYPE_CHECKING:
    from fibldm.runs.configuration import Configuration

_TOGETHER, _STAGES = "multi_gpu", trained()

Work = Annotated[Path, typer.Option("--data", help="Work folder of `fibldm prepare`.")]
Run = Annotated[Path, typer.Option("--run", help="Run folder, with a subfolder for each stage.")]
Configs = Annotated[list[str], typer.Option("--config", help="Path or name of a shipped configuration; repeatable.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override of the configuration, key::sub=value; repeatable.")
]
Devices = Annotated[
    int, typer.Option("--devices", help="Number of processes, one per GPU; without GPUs they share the CPU cores.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Only print the merged configuration, and where each part comes from.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Start over; the old folder is kept as NAME.replaced-1.")]


def train(
    stage: Annotated[str, typer.Argument(help=f"Stage: {', '.join(_STAGES[:-1])} or {_STAGES[-1]}.")],
    data: Work,
    run: Run,
    config: Configs = [],
    overrides: Overrides = [],
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Time limit of the stage; trains as many epochs as fit.")
    ] = None,
    devices: Devices = 1,
    restart: Restart = False,
    print_config: PrintConfig = False,
) -> dict[str, Any]:
    """Train one stage. An interrupted stage resumes, a finished one is skipped."""
    return run_stage(
        stage, data, run, config, overrides, restart, minutes=minutes, devices=devices, print_config=print_config
    )


def run_stage(
    stage: str,
    data: Path,
    run: Path,
    config: list[str],
    overrides: list[str],
    restart: bool,
    *,
    minutes: float | None = None,
    devices: int = 1,
    print_config: bool = False,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the equivalent MONAI command and run it here; of several ranks only the first says what happens."""
    began = time.monotonic()
    from fibldm.cli.output import log_to_standard_error
    from fibldm.runs import StageFolder
    from fibldm.runs.configuration import stage_configuration
    from fibldm.runs.options import parse_overrides

    first = os.environ.get("RANK", "0") == "0"
    if first:
        log_to_standard_error()
    own = ({"restart": True} if restart else {}) | ({} if minutes is None else {"minutes": minutes})
    own |= more or {}
    settings = parse_overrides(overrides) | own
    config = [*config, _TOGETHER] if devices > 1 and _TOGETHER not in config else config
    configuration = stage_configuration(stage, work=data, run_dir=run, configs=config, overrides=settings)
    if print_config:
        return _print_config(configuration, {"work": "--data", "run_dir": "--run", **{key: f"--{key}" for key in own}})
    from fibldm.training.launch import check_devices, run_together

    check_devices(devices, settings.get("device"))
    if first:
        print(f"The same by MONAI alone:\n  {configuration.command_of(devices)}")
        if stage == "autoencoder":
            _warn_of_grid(configuration)
    if devices > 1:
        run_together(_train_rank, (configuration, began, sys.stdout is sys.stderr), devices)
    else:
        configuration.run(began=began)
    done = StageFolder(run, stage).done() is not None
    if first:
        print(f"{stage} is done: {run / stage}" if done else f"{stage} is not done: run the same command again")
    return {"outputs": [str(run / stage)], "done": done}


def _print_config(configuration: "Configuration", options: dict[str, str]) -> dict[str, Any]:
    from fibldm.runs.origins import with_origins

    text = with_origins(configuration, options)
    if os.environ.get("RANK", "0") == "0":
        print(text, end="")
    return {"outputs": [], "configuration": text}


def _train_rank(configuration: "Configuration", began: float, quiet: bool) -> None:
    """One of several processes; ``quiet`` keeps standard output for what --json shows."""
    from fibldm.cli.output import log_to_standard_error

    if quiet:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # also for those who hold the stream already
    if os.environ["RANK"] == "0":
        log_to_standard_error()
    configuration.run(began=began)


def _warn_of_grid(configuration: "Configuration") -> None:
    from fibldm.runs.configuration import IncompatibleGrid, check_grid

    try:
        check_grid(configuration)
    except IncompatibleGrid as error:
        print(f"warning: {error}")
