"""``fibldm phantoms``: synthetic scans to try everything with."""

from pathlib import Path
from typing import Annotated, Any

import typer


def phantoms(
    out: Annotated[Path, typer.Option("--out", help="Folder to write, a dataset for fibldm prepare.")],
    subjects: Annotated[int, typer.Option(help="Number of patients; about one in six has two scans.")] = 50,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="X,Y,Z", help="Voxel size in mm; default: about 5 along each axis."),
    ] = None,
    findings: Annotated[
        bool,
        typer.Option(
            "--findings", help="Give each patient a written finding (side, extent, pattern): OUT/findings.csv."
        ),
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Also write OUT/cases.csv, a source for fibldm prepare: disease (healthy or fibrosis) and "
            "extent_percent of each phantom.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Write computer-generated chest CT phantoms with fibrosis, and their labels; no patient data."""
    from fibldm.phantoms.phantoms import write_phantoms
    from fibldm.phantoms.table import write_table
    from fibldm.typed_settings import counted
    from fibldm.workers import cores

    images = write_phantoms(out, subjects=subjects, seed=seed, spacing=spacing, findings=findings, workers=cores())
    print(f"{counted(len(images), 'phantom')} of {counted(subjects, 'patient')} in {out}")
    outputs = [out, *([write_table(out, images)] if table else [])]
    return {"outputs": [str(path) for path in outputs], "phantoms": len(images)}
