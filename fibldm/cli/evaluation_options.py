"""Options that the commands of ``fibldm evaluate`` share, stated once, and the commands that are made of them."""

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli.engine_options import Cluster, Workers
from fibldm.cli.train import Work
from fibldm.errors import FibldmError

Run = Annotated[
    Path | None, typer.Option("--run", help="Run folder, where metrics are written; or give --bundle and --out.")
]
Synthetic = Annotated[
    Path, typer.Option("--synthetic", help="Output folder of `fibldm synthesize`, of NIfTI or DICOM.")
]
Settings = Annotated[
    list[str], typer.Option("--set", help="Override of the segmenter's configuration, key::sub=value; repeatable.")
]
Bundle = Annotated[Path | None, typer.Option(help="Bundle to measure instead of a run; needs --out.")]
Out = Annotated[Path | None, typer.Option("--out", help="With --bundle: output folder of the metrics.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if available.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Measure volumes drawn with other weights, by their hash (in the sidecars, under source).",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="With --bundle: accept changes since export.")]
Perceptual = Annotated[
    Path | None, typer.Option("--perceptual", help="For LPIPS: local file with the weights of a 2-D ResNet.")
]
Lungs = Annotated[
    str | None,
    typer.Option(
        "--lungs",
        metavar="LABELS",
        help='Labels that are the lungs, such as "right lung,left lung,ground glass"; default: by their names.',
    ),
]


def every_option(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
    perceptual: Perceptual = None,
    lungs: Lungs = None,
    workers: Workers = None,
    cluster: Cluster = None,
) -> dict[str, Any]:
    """The options of all commands, in the order of their help; a command leaves some of them out."""
    raise NotImplementedError


def command(
    measure: Callable[..., dict[str, Any]], name: str, question: str, without: Collection[str]
) -> Callable[..., dict[str, Any]]:
    """A command for typer.

    Args:
        measure: gets the options by name.
        name: of the command.
        question: that it answers, for the help.
        without: the options that it does not have.
    """

    def asked(**options: Any) -> dict[str, Any]:
        return measure(**options)

    signature = inspect.signature(every_option)
    kept = [option for name, option in signature.parameters.items() if name not in without]
    asked.__name__, asked.__doc__ = name, question
    asked.__annotations__ = {option.name: option.annotation for option in kept}
    asked.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return asked


def place_of(run: Path | None, bundle: Path | None, out: Path | None) -> Path:
    """Where the figures go.

    Raises:
        FibldmError: not one of run and bundle is named, or a bundle without a folder.
    """
    if (run is None) == (bundle is None):
        given = "got both" if run else "got none of them"
        raise FibldmError(f"either a run (--run) or a bundle (--bundle) must be named; {given}", "give one of them")
    if (bundle is None) != (out is None):
        said = "figures of a bundle need a folder; got no --out" if bundle else "figures of a run lie in it; got --out"
        raise FibldmError(said, "give --out with --bundle, and only then")
    place = run or out
    assert place is not None
    return place


def names_in(text: str | None) -> list[str] | None:
    """The names of a list such as ``right lung,left lung``; None of None.

    Raises:
        FibldmError: a name is empty.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise FibldmError(f"--lungs needs names of labels, parted by commas; got {text!r}", "give at least one")
    return names
