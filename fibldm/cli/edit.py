"""``fibldm edit``: a region of a real scan drawn anew."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.cli.synthesis_options import read_named, with_boxes


def edit(
    scan: Annotated[Path, typer.Argument(help="Scan: NIfTI, NRRD, MetaImage, or the folder of a DICOM series.")],
    mask: Annotated[Path, typer.Option("--mask", help="Mask of what the edited scan shows, on the scan's voxels.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    run: shared.Run = None,
    bundle: shared.Bundle = None,
    trust: shared.Trust = False,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="LABELS|MASK|everywhere",
            help="What is drawn anew: labels of the mask (tumour,cyst), a mask file, or everywhere; default: where "
            "--before and --mask differ.",
        ),
    ] = None,
    before: Annotated[Path | None, typer.Option("--before", help="Mask of the scan as it is.")] = None,
    margin: Annotated[float, typer.Option(min=0, help="Grow the region by so many mm.")] = 0.0,
    strength: Annotated[
        float, typer.Option(help="1 draws the region from noise; below 1, a variation of what is there.")
    ] = 1.0,
    resampling: Annotated[int, typer.Option(min=0, help="How often the region is drawn again, to fit better.")] = 0,
    depth: Annotated[
        float, typer.Option(help="Voxels over which the scan's own grain fades from the region's border.")
    ] = 3.0,
    count: Annotated[int, typer.Option(min=1, help="Edits of the scan.")] = 1,
    seed: shared.Seed = None,
    steps: shared.Steps = None,
    sampler: shared.Sampler = None,
    guidance: shared.Guidance = None,
    residual_noise: shared.ResidualNoise = None,
    covariate: shared.Covariates = [],
    condition: shared.Conditions = [],
    box: Annotated[
        list[str],
        typer.Option(metavar="BOX", help="As of fibldm synthesize; places are those of the whole scan; repeatable."),
    ] = [],
    allow_extrapolation: shared.AllowExtrapolation = False,
    label_codes: shared.LabelCodes = None,
    mask_format: shared.MaskFormat = None,
    device: shared.Device = None,
) -> dict[str, Any]:
    """Draw a region of a real scan anew, following a mask: a lesion in, a lesion out, or a variation.

    Outside the region every voxel stays as it is. The edited scan has the format of the scan, is marked as synthetic in
    part, and is still a patient's: handle it as the scan itself.
    """
    options = dict(locals())
    from fibldm.cli.output import log_to_standard_error
    from fibldm.editing import EditSettings, edit_files
    from fibldm.synthesis.settings import OPTIONS
    from fibldm.typed_settings import counted

    log_to_standard_error()
    options |= {
        "covariates": read_named(covariate),
        "conditions": with_boxes(read_named(condition, "--condition"), box),
    }
    given = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    outputs = edit_files(
        scan,
        mask,
        out,
        run=run,
        bundle=bundle,
        region=region,
        before=before,
        margin=margin,
        edit=EditSettings(strength, resampling, depth),
        trust=trust,
        device=device,
        **given,
    )
    print(f"{counted(len(outputs), 'edited scan')} in {out}; outside the region as {scan.name}")
    return {"outputs": [str(path) for path in outputs]}
