"""``fibldm slices``: axial slices of a work folder, for networks in two dimensions."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def slices(
    work: Annotated[Path, typer.Argument(help="Work folder of fibldm prepare, with volumes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, a dataset for fibldm prepare.")],
    every: Annotated[float, typer.Option(help="Slice distance in mm.")] = 10.0,
) -> dict[str, Any]:
    """Cut the volumes of a work folder into axial slices; all slices of a patient stay in one split."""
    from fibldm.datasets.slices import write_slices
    from fibldm.typed_settings import counted
    from fibldm.verbatim import as_word
    from fibldm.volumes.datalist import read_datalist
    from fibldm.volumes.intensity import load_intensity

    count = write_slices(work, out, every=every)
    intensity = load_intensity(work / "intensity.json")
    ends = [f"{intensity.low:g}", f"{intensity.high:g}"]
    window = {"window": ["--window", *ends], "suv": ["--window", *ends], "range": ["--range", *ends]}.get(
        intensity.kind, []
    )
    modality = read_datalist(work)["modality"]
    following = f"fibldm prepare {as_word(out)} --out {as_word(f'{out}_work')} " + shlex.join(
        ["--modality", modality, *window]
    )
    print(f"{counted(count, 'slice')} in {out}; go on with\n  {following}")
    return {"outputs": [str(out)], "slices": count, "next": following}
