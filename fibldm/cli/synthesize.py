"""``fibldm synthesize``: synthetic volumes from masks."""

from pathlib import Path
from typing import Annotated, Any

import typer


def synthesize(
    run: Annotated[Path, typer.Option("--run", help="Run folder with a finished ControlNet stage.")],
    masks: Annotated[list[Path], typer.Option("--masks", help="NIfTI mask or folder of them; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="Volumes per mask.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, mask and number: same volume.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 10,
    sampler: Annotated[str, typer.Option(help="ddim, ancestral, heun or dpmpp_2m.")] = "dpmpp_2m",
    guidance: Annotated[float, typer.Option(help="1 is none; more follows the mask harder.")] = 1.0,
    allow_extrapolation: Annotated[
        bool, typer.Option("--allow-extrapolation", help="Go on where a mask lies outside the training data.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default cuda where there is one.")
    ] = None,
) -> dict[str, Any]:
    """Write a synthetic volume on every mask's own grid, marked as synthetic, with a sidecar."""
    from fibldm.synthesis import SamplingSettings, synthesize_files

    settings = SamplingSettings(sampler=sampler, steps=steps, guidance=guidance, seed=seed)
    if guidance > 5:
        print(f"guidance {guidance} is above 5: expect exaggerated anatomy")
    outputs = synthesize_files(
        run, masks, out, count=count, settings=settings, allow_extrapolation=allow_extrapolation, device=device
    )
    print(f"{len(outputs)} synthetic volumes in {out} ({settings.network_calls} network calls each)")
    return {"outputs": [str(path) for path in outputs], "network_calls": settings.network_calls}
