"""Options that ``fibldm synthesize``, ``edit`` and ``watch`` share, and what is read out of their texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fibldm.errors import FibldmError, shown

FROM_BUNDLE = "default: that of the bundle, else"

Run = Annotated[Path | None, typer.Option("--run", help="Run folder with all stages finished.")]
Bundle = Annotated[Path | None, typer.Option("--bundle", help="Instead of --run: folder or zip of fibldm export.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="With --bundle: accept changes since export, and instantiate any class it names."),
]
Seed = Annotated[
    int | None,
    typer.Option(help=f"Random seed; same seed, mask and number give the same volume; {FROM_BUNDLE} 0."),
]
Steps = Annotated[int | None, typer.Option(help=f"Number of sampler steps; {FROM_BUNDLE} 10.")]
Sampler = Annotated[str | None, typer.Option(help=f"One of ddim, ancestral, heun or dpmpp_2m; {FROM_BUNDLE} dpmpp_2m.")]
Guidance = Annotated[
    float | None, typer.Option(help=f"1 = none; higher values follow the mask more closely; {FROM_BUNDLE} 1.")
]
ResidualNoise = Annotated[
    float | None,
    typer.Option(
        help=f"Residual noise (the grain the decoder leaves out): 1 = as measured, 0 = none; {FROM_BUNDLE} 1."
    ),
]
Covariates = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VALUE",
        help="Covariate of all patients, such as age=63; repeatable. Those not given are unknown. A bundle's card "
        "lists them.",
    ),
]
Conditions = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VALUE",
        help="Another condition that the network was trained with, of all masks; repeatable. A bundle's card lists "
        "them.",
    ),
]
AllowExtrapolation = Annotated[
    bool,
    typer.Option("--allow-extrapolation", help="Proceed although masks or conditions lie outside the training range."),
]
LabelCodes = Annotated[
    Path | None, typer.Option(help="DICOM only: CSV of coded meanings for labels that the shipped table lacks.")
]
Count = Annotated[int, typer.Option(min=1, help="Volumes per mask.")]
Adapters = Annotated[
    list[str],
    typer.Option(
        metavar="FILE=STRENGTH",
        help="Put an adapter.safetensors on the network: 1 = as trained (the default), 0 = off; repeatable.",
    ),
]
Check = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Measure every volume against the intensity ranges of the training data, draw it again up to so many "
        "times where it lies outside, else leave it out (exit code 2); default: no check.",
    ),
]
RejectCopies = Annotated[
    Path | None,
    typer.Option(
        metavar="AUDIT",
        help="Output folder of `fibldm audit` on the same data: draw again what it would name a copy of a training "
        "scan, up to as many times as --check says (default: 10), else leave it out (exit code 2).",
    ),
]
Template = Annotated[
    Path | None,
    typer.Option(help="DICOM only: folder of a series whose technical tags are copied (never patient tags)."),
]
PatientPosition = Annotated[
    str | None,
    typer.Option(help="DICOM only: Patient Position (HFS, FFS, ...); default: the template's, or empty."),
]
MaskFormat = Annotated[
    str | None,
    typer.Option(
        metavar="seg|rtstruct|both",
        help="DICOM only: the mask as a segmentation (the default), as an RT structure set, or as both.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if available.")]


def read_strengths(texts: list[str], option: str = "--adapter", what: str = "FILE") -> dict[str | Path, float]:
    """Strengths by path of ``PATH=STRENGTH``, as an option takes them; 1 of a path alone, which may hold a ``=``.

    Raises:
        FibldmError: a strength is no number, or a path comes twice.
    """
    strengths: dict[str | Path, float] = {}
    for text in texts:
        path, sign, strength = ("", "", "") if Path(text).exists() else text.rpartition("=")
        try:
            path, number = (path, float(strength)) if sign else (text, 1.0)
        except ValueError as error:
            raise FibldmError(
                f"{option} needs {what} or {what}=STRENGTH; got {text!r}", "check path and number"
            ) from error
        if path in strengths:
            raise FibldmError(f"{option} must name each {what} once; {path} came twice", "give it one strength")
        strengths[path] = number
    return strengths


def with_boxes(conditions: Mapping[str, str], boxes: list[str]) -> dict[str, str]:
    """What is asked of further conditions, with the boxes of ``--box``.

    Raises:
        FibldmError: boxes are asked for twice.
    """
    if boxes and "boxes" in conditions:
        raise FibldmError("boxes must be asked for once; got --box and --condition boxes", "leave out one of them")
    return {**conditions, **({"boxes": ";".join(boxes)} if boxes else {})}


def read_named(texts: list[str], option: str = "--covariate") -> dict[str, str]:
    """Values by name of ``NAME=VALUE``, as an option takes them.

    Raises:
        FibldmError: one has another form, or a name comes twice.
    """
    pairs = [text.partition("=") for text in texts]
    if not all(name and sign and value for name, sign, value in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise FibldmError(f"{option} needs NAME=VALUE, each name once; got {', '.join(map(shown, texts))}")
    return {name: value for name, _, value in pairs}
