"""``fibldm train`` and ``fibldm encode``: thin doors to the stages' configurations."""

from pathlib import Path
from typing import Annotated, Any

import typer

Work = Annotated[Path, typer.Option("--data", help="Work folder of `fibldm prepare`.")]
Run = Annotated[Path, typer.Option("--run", help="Run folder; each stage has a folder in it.")]
Configs = Annotated[
    list[str], typer.Option("--config", help="Path, or name of a shipped configuration; may be repeated.")
]
Overrides = Annotated[list[str], typer.Option("--set", help="key::sub=value, on top of the configurations.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew; what was there is kept beside it.")]


def train(
    stage: Annotated[str, typer.Argument(help="autoencoder, diffusion or controlnet.")],
    data: Work,
    run: Run,
    config: Configs = [],
    overrides: Overrides = [],
    restart: Restart = False,
) -> dict[str, Any]:
    """Train one stage; an interrupted one goes on, a finished one is skipped."""
    return run_stage(stage, data, run, config, overrides, restart)


def run_stage(
    stage: str, data: Path, run: Path, config: list[str], overrides: list[str], restart: bool
) -> dict[str, Any]:
    """Print the equivalent MONAI command and run it here."""
    from fibldm.cli.output import log_to_standard_error
    from fibldm.training.configuration import parse_overrides, stage_configuration

    log_to_standard_error()
    settings = parse_overrides(overrides) | ({"restart": True} if restart else {})
    configuration = stage_configuration(stage, work=data, run_dir=run, configs=config, overrides=settings)
    print(f"The same by MONAI alone:\n  {configuration.command}")
    configuration.run()
    print(f"{stage} is done: {run / stage}")
    return {"outputs": [str(run / stage)]}
