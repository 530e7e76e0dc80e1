"""Options of the commands whose work is done item by item: by processes of this machine, or by a cluster."""

from typing import Annotated

import typer

Workers = Annotated[
    int | None, typer.Option("--workers", help="Number of processes, each with its share of the CPU cores; default: 1.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Instead of processes: scheduler of Dask (tcp://HOST:8786, or its scheduler file); its workers must see "
        "the same folders.",
    ),
]
