"""``fibldm edit-masks``: labels grown, moved, put in or taken away, within what training masks show."""

from pathlib import Path
from typing import Annotated, Any

import typer


def edit_masks(
    masks: Annotated[list[Path], typer.Option("--masks", help="Mask, or folder of masks; repeatable.")],
    data: Annotated[
        Path,
        typer.Option("--data", help="Work folder of fibldm prepare: its training masks say what may lie where."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    edit: Annotated[
        list[str],
        typer.Option(
            "--edit",
            metavar="EDIT",
            help="In order, repeatable: 'grow LABEL 3mm', 'shrink LABEL 3mm', 'volume LABEL 25ml', 'move LABEL "
            "R,A,Smm', 'copy LABEL R,A,Smm', 'remove LABEL', 'insert LABEL from=MASK in=LABEL', 'deform 1', "
            "'fibrosis 30%'.",
        ),
    ],
    count: Annotated[int, typer.Option(min=1, help="Edited masks of each; they differ where an edit draws.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of what is drawn.")] = 0,
    allow_extrapolation: Annotated[
        bool,
        typer.Option("--allow-extrapolation", help="Proceed although a label is larger or smaller than in training."),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> dict[str, Any]:
    """Change masks to synthesize from: labels grown, moved, put in or taken away, the whole deformed, fibrosis dialled.

    What surrounds a label closes the gap where it is taken away, and nothing may lie where training masks never have
    it. A JSON file beside each mask says what was done.
    """
    from fibldm.mask_editing import edit_masks as edit_all
    from fibldm.typed_settings import counted

    written = edit_all(
        masks,
        out,
        work=data,
        edits=edit,
        count=count,
        seed=seed,
        allow_extrapolation=allow_extrapolation,
        workers=workers,
    )
    print(f"{counted(len(written), 'edited mask')} in {out}")
    return {"outputs": [str(path) for path in written]}
