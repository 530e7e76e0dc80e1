"""``fibldm watch``: masks that arrive in a folder become synthetic volumes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.cli.synthesis_options import read_named, read_strengths


def watch(
    bundle: Annotated[Path, typer.Option("--bundle", help="Folder or zip of fibldm export.")],
    inbox: Annotated[Path, typer.Option("--inbox", help="Folder where masks arrive.")],
    outbox: Annotated[Path, typer.Option("--outbox", help="Folder of the results, not in the inbox.")],
    once: Annotated[bool, typer.Option("--once", help="End when nothing is left that stands still.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 10.0,
    output_format: Annotated[
        str, typer.Option("--format", help="Output format: dicom (a series and its mask), or nifti.")
    ] = "dicom",
    template: shared.Template = None,
    label_codes: shared.LabelCodes = None,
    patient_position: shared.PatientPosition = None,
    mask_format: shared.MaskFormat = None,
    count: shared.Count = 1,
    seed: shared.Seed = None,
    steps: shared.Steps = None,
    sampler: shared.Sampler = None,
    guidance: shared.Guidance = None,
    residual_noise: shared.ResidualNoise = None,
    covariate: shared.Covariates = [],
    condition: shared.Conditions = [],
    adapter: shared.Adapters = [],
    allow_extrapolation: shared.AllowExtrapolation = False,
    check: shared.Check = None,
    reject_copies: shared.RejectCopies = None,
    device: shared.Device = None,
) -> dict[str, Any]:
    """Make synthetic volumes of every mask that arrives in a folder, until asked to end.

    An item is a mask, or a folder with masks of one patient; covariates.json and conditions.json in it say what is
    known and asked beside. Under --json every item is a line. SIGTERM ends it after the item in hand.
    """
    options = dict(locals())
    import signal

    from fibldm.cli.output import emit_line, log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.serving import Ending, Watcher, serving_output
    from fibldm.synthesis.settings import OPTIONS
    from fibldm.typed_settings import counted

    log_to_standard_error()
    if not inbox.is_dir():
        raise FibldmError(f"`inbox` must be a folder; {inbox} is none", "make it, or check the path")
    if outbox.resolve().is_relative_to(inbox.resolve()):
        raise FibldmError(f"`outbox` must not lie in the inbox; {outbox} does", "choose another folder")
    if not interval > 0:
        raise FibldmError(f"`interval` must be above 0; got {interval:g}", "10 is usual")
    options |= {"format": output_format, "covariates": read_named(covariate)}
    options |= {"conditions": read_named(condition, "--condition"), "adapters": read_strengths(adapter)}
    given = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    done = refused = 0
    with Ending() as ending:
        watcher = Watcher(inbox, outbox, serving_output(bundle, outbox, device=device, **given))
        try:
            for report in watcher.reports(interval, ending, once=once):
                emit_line(report)
                done, refused = done + report["ok"], refused + (not report["ok"])
        except OSError as error:  # its text would name the item
            raise RuntimeError(f"{error.strerror}; start again: what was in hand is finished") from None
    if ending.asked == signal.SIGINT:
        raise typer.Exit(130)
    print(f"{counted(done, 'item')} made, {refused} refused")
    return {"items": done, "refused": refused}
