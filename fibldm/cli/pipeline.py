"""``fibldm pipeline``: from a dataset to a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer


def pipeline(
    source: Annotated[Path, typer.Argument(help="Dataset, as for `fibldm prepare`.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for everything: work, run, synthetic, bundle, report.html.")
    ],
    license: Annotated[str, typer.Option("--license", help="SPDX identifier of the weights' licence.")],
    license_file: Annotated[
        Path | None, typer.Option(help="Licence text, for identifiers that FibLDM does not know.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Path or name of a shipped recipe; default: recipe_default.")
    ] = None,
    config: Annotated[
        list[str], typer.Option("--config", help="Configuration for all stages, such as the model grid; repeatable.")
    ] = [],
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", help="Override of the recipe, step::key=value, such as diffusion::epochs=60; repeatable."
        ),
    ] = [],
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Time limit for all training stages together; default: all epochs."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep the bundle's weights in half precision.")] = False,
) -> dict[str, Any]:
    """Prepare, train all stages, synthesize, measure, export, report and verify; finished steps are kept."""
    from fibldm.cli.output import log_to_standard_error
    from fibldm.delivery.export import ExportSettings
    from fibldm.pipeline import pipeline as run_pipeline
    from fibldm.recipe import Recipe
    from fibldm.runs.options import parse_overrides
    from fibldm.workers import cores

    log_to_standard_error()
    limit = {} if minutes is None else {"minutes": minutes}
    chosen = Recipe.read(recipe, configs=config, overrides=parse_overrides(overrides) | limit)
    settings = ExportSettings(license, license_file, half=half, name=out.resolve().name)
    return run_pipeline(source, out, chosen, settings, workers=cores())
