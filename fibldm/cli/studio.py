"""``fibldm studio``: a generator behind a page and an API."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.cli.synthesis_options import read_strengths


def studio(
    bundle: Annotated[Path, typer.Option("--bundle", help="Folder or zip of fibldm export.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of jobs, results and the token.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 8080,
    name: Annotated[
        list[str], typer.Option(help="Another name that requests may call this machine by; repeatable.")
    ] = [],
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, readable for you alone; default: a fresh one in --out.")
    ] = None,
    masks: Annotated[
        list[Path], typer.Option("--masks", help="Masks that the page offers: files and folders; repeatable.")
    ] = [],
    largest: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 256,
    waiting: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 32,
    most: Annotated[int, typer.Option(min=1, help="Volumes that a job may ask for.")] = 16,
    keep: Annotated[
        float | None, typer.Option(min=0, help="Days that jobs and results are kept; default: until they are deleted.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Minutes for which an RT structure set waits for its series, and images are kept."),
    ] = 30.0,
    max_tries: Annotated[
        int, typer.Option(min=1, help="A mask that was in hand when the studio was killed so often is refused.")
    ] = 3,
    adapter: shared.Adapters = [],
    device: shared.Device = None,
) -> dict[str, Any]:
    """Offer a generator on a page, and to programs by HTTP, until asked to end.

    It prints a link that signs a browser in once, and where the token for programs lies. SIGTERM ends it after the job
    in hand; jobs that wait go on when it is started again.
    """
    import signal

    from fibldm.cli.output import emit_line, log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.serving import Ending, Service, State, serving_output
    from fibldm.typed_settings import counted
    from fibldm.volumes.masks import find_masks

    try:
        from fibldm.serving.studio import (
            Access,
            Limits,
            kept_token,
            listening,
            new_token,
            serving,
            structure_sets,
            studio_app,
        )
    except ModuleNotFoundError as error:
        raise FibldmError(f"studio needs the package {error.name}", 'pip install "fibldm[studio]"') from error
    log_to_standard_error()
    token = None if token_file is None else kept_token(token_file)
    examples = find_masks(masks) if masks else []
    with listening(host, port) as place, Ending() as ending:
        output = serving_output(bundle, out, device=device, adapters=read_strengths(adapter))
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        limits = Limits(upload=largest * 2**20, waiting=waiting)
        days = None if keep is None else keep * 86400
        with Service(output, out, most=most, keep=days, tries=max_tries) as service:
            access = Access(token or new_token(out), host, place.getsockname()[1], name)
            if not access.loopback:
                print("warning: others reach this address, and what is sent is not encrypted: put it behind TLS")
            with (
                structure_sets(service, wait=60 * wait) as dicom,
                serving(studio_app(service, bundle, access, limits, examples, dicom), place),
            ):
                print(f"open {access.start_link}", flush=True)
                print(f"the token for programs lies in {token_file or out / 'token'}; Ctrl+C ends the studio")
                emit_line({"ok": True, "address": access.address, "start": access.start_link})
                service.run(ending)
            jobs = {state: len(service.store.jobs(state)) for state in State}
    if ending.asked == signal.SIGINT:
        raise typer.Exit(130)
    print(f"{counted(jobs[State.DONE], 'job')} made, {jobs[State.REFUSED]} refused, {jobs[State.WAITING]} waiting")
    return {"jobs": {str(state): number for state, number in jobs.items()}}
