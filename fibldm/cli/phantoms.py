"""``fibldm phantoms``: synthetic scans to try everything with."""

from pathlib import Path
from typing import Annotated, Any

import typer


def phantoms(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; fibldm prepare makes a work folder of it.")],
    subjects: Annotated[int, typer.Option(help="Patients; about one in six has two scans.")] = 50,
    seed: Annotated[int, typer.Option(help="Same seed, same phantoms.")] = 0,
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
) -> dict[str, Any]:
    """Write procedural chest CT with fibrosis and its labels: no network, no patient."""
    from fibldm.phantoms.phantoms import write_phantoms
    from fibldm.workers import cores

    images = write_phantoms(out, subjects=subjects, seed=seed, spacing=spacing, findings=findings, workers=cores())
    print(f"{len(images)} phantoms of {subjects} patients in {out}")
    return {"outputs": [str(out)], "phantoms": len(images)}
