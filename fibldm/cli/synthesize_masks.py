"""``fibldm synthesize-masks``: masks from nothing."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.errors import FibldmError, shown

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_VOLUME = re.compile(rf"\s*({_NUMBER})\s*(?:\.\.\s*({_NUMBER})\s*)?(?:ml)?\s*")


def synthesize_masks(
    run: Annotated[Path, typer.Option("--run", help="Run folder of a generator of masks, all stages finished.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="Number of masks.")] = 1,
    volume: Annotated[
        list[str],
        typer.Option(
            metavar="LABEL=ML",
            help="Volume of a label: tumour=35ml, or tumour=20..60ml, of which every mask gets one; repeatable. Those "
            "not given are unknown.",
        ),
    ] = [],
    covariate: shared.Covariates = [],
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of sampling.")] = 4,
    seed: shared.Seed = None,
    steps: shared.Steps = None,
    sampler: shared.Sampler = None,
    guidance: Annotated[
        float | None, typer.Option(help="1 = none; higher values follow what is asked more closely; default: 1.")
    ] = None,
    allow_extrapolation: shared.AllowExtrapolation = False,
    device: shared.Device = None,
) -> dict[str, Any]:
    """Draw masks from a generator that was trained on masks, marked as synthetic, each with a sidecar.

    `fibldm synthesize --masks OUT` then draws a volume on each of them.
    """
    from fibldm.cli.output import log_to_standard_error
    from fibldm.synthesis.label_maps import synthesize_masks as draw
    from fibldm.typed_settings import counted

    log_to_standard_error()
    sampling: dict[str, Any] = {"seed": seed, "steps": steps, "sampler": sampler, "guidance": guidance}
    outputs = draw(
        run,
        out,
        count=count,
        volumes=read_volumes(volume),
        covariates=shared.read_named(covariate),
        allow_extrapolation=allow_extrapolation,
        batch_size=batch_size,
        device=device,
        **{name: value for name, value in sampling.items() if value is not None},
    )
    print(f"{counted(len(outputs), 'mask')} in {out}; volumes on them: fibldm synthesize --masks {out}")
    return {"outputs": [str(path) for path in outputs]}


def read_volumes(texts: list[str]) -> dict[str, tuple[float, float]]:
    """Both ends of the volumes of labels of ``LABEL=20..60ml``, ml.

    Raises:
        FibldmError: one is no volume, or a label comes twice.
    """
    volumes: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        found = _VOLUME.fullmatch(value)
        if not name.strip() or found is None:
            raise FibldmError(
                f"--volume needs LABEL=ML or LABEL=LOW..HIGH; got {shown(text)}",
                "such as tumour=35ml or tumour=20..60ml",
            )
        if name.strip() in volumes:
            raise FibldmError(f"--volume must name each label once; {name.strip()} came twice", "give it one volume")
        low = float(found[1])
        volumes[name.strip()] = (low, float(found[2]) if found[2] else low)
    return volumes
