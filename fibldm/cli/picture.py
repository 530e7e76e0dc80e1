"""``fibldm picture``: volumes with the outlines of their masks, in one PNG or HTML file."""

from pathlib import Path
from typing import Annotated, Any

import typer


def picture(
    source: Annotated[
        Path, typer.Argument(help="Folder of fibldm synthesize, a work folder, or images/ with labels/.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write, .html or .png.")],
    split: Annotated[
        str | None, typer.Option(help="Split of a work folder: training, validation or test; default: all.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW,HIGH", help="Display window: values shown black and white; default: the run's, or percentiles."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help='Names for the legend, for example "1=tumour"; default: those of a work folder.')
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Maximum number of volumes shown.")] = 24,
) -> dict[str, Any]:
    """Draw three planes of each volume with the outlines of its mask; one file that opens offline."""
    from fibldm.datasets.settings import parse_label_names
    from fibldm.report.gallery import volumes_of, write_gallery
    from fibldm.typed_settings import counted

    volumes, names = volumes_of(source, split)
    names |= parse_label_names(labels) if labels is not None else {}
    left_out = max(0, len(volumes) - most)
    write_gallery(out, volumes[:most], names=names, window=window, left_out=left_out)
    more = f"; {left_out} more are not shown (--most)" if left_out else ""
    print(f"{counted(min(most, len(volumes)), 'volume')} in {out}{more}")
    return {"outputs": [str(out)], "volumes": min(most, len(volumes)), "left_out": left_out}
