"""``fibldm demo``: the whole of FibLDM on phantoms."""

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write everything to.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed of phantoms, training and samples.")] = 0,
    minutes: Annotated[
        float | None,
        typer.Option(help="Total time; default 13, or 5 with a GPU or AMX. More gives better volumes."),
    ] = None,
) -> dict[str, Any]:
    """Make chest CT phantoms with fibrosis, train all stages, synthesize from unseen masks, and write a report."""
    from fibldm.cli.output import log_to_standard_error
    from fibldm.demo.demo import DemoSettings, usual_minutes
    from fibldm.demo.demo import demo as run_demo

    log_to_standard_error()
    figures = run_demo(out, DemoSettings(seed=seed, minutes=usual_minutes() if minutes is None else minutes))
    return {"outputs": [str(out / "report.html"), str(out / "metrics.json")], "figures": figures}
