"""``fibldm fetch``: a file from the network, whose hash is known."""

from pathlib import Path
from typing import Annotated, Any

import typer


def fetch(
    url: Annotated[str, typer.Argument(help="URL of the file.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    sha256: Annotated[str, typer.Option(help="Expected SHA-256 of the file.")],
) -> dict[str, Any]:
    """Download a file, such as weights; kept only if its hash matches. No other command downloads anything."""
    from fibldm.delivery.fetch import fetch as download

    came = download(url, out, sha256)
    print(f"{out} {'is downloaded' if came else 'was there already'} and has the hash")
    return {"outputs": [str(out)], "downloaded": came}
