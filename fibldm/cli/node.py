"""``fibldm node``: masks that arrive by DICOM become synthetic series, which leave by it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.cli.synthesis_options import read_named, read_strengths


def node(
    bundle: Annotated[Path, typer.Option("--bundle", help="Folder or zip of fibldm export.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the node: what came, jobs and results.")],
    caller: Annotated[
        list[str], typer.Option("--caller", metavar="AET@HOST", help="Who may call: title and host; repeatable.")
    ],
    send: Annotated[
        list[str], typer.Option("--send", metavar="AET@HOST:PORT", help="Who gets all results; repeatable.")
    ] = [],
    aet: Annotated[str, typer.Option("--aet", help="Title of this application entity.")] = "FIBLDM",
    host: Annotated[str, typer.Option("--host", help="Address to listen on; other machines need another one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 11112,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM): all is by TLS, with the next two.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Authorities (PEM) whose certificates others must show.")] = None,
    keep: Annotated[float, typer.Option(help="Hours after which results are deleted, sent or not.")] = 24.0,
    wait: Annotated[
        float, typer.Option(help="Minutes for which a structure set waits for its series, and images are kept.")
    ] = 30.0,
    max_associations: Annotated[int, typer.Option(help="Associations at a time.")] = 10,
    max_pdu: Annotated[int, typer.Option(help="Bytes of a protocol data unit.")] = 131072,
    max_object: Annotated[float, typer.Option(help="MiB of an object.")] = 512.0,
    max_association: Annotated[float, typer.Option(help="MiB that come in one association.")] = 4096.0,
    max_per_minute: Annotated[int, typer.Option(help="Objects that a caller may send in a minute.")] = 3000,
    max_tries: Annotated[
        int, typer.Option(min=1, help="A mask that was in hand when the node was killed so often is refused.")
    ] = 3,
    idle: Annotated[float, typer.Option(help="Seconds after which a silent connection is closed.")] = 60.0,
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
    device: shared.Device = None,
) -> dict[str, Any]:
    """Make synthetic series of every mask that arrives by DICOM, and send them on, until asked to end.

    C-STORE of segmentations and RT structure sets comes in, synthetic CT or MR series and their masks go out.
    SIGTERM ends it after the item in hand. For research: it is no medical device.
    """
    options = dict(locals())
    import signal

    from fibldm.cli.output import emit_line, log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.serving import Ending, Service, serving_output
    from fibldm.serving.store import State
    from fibldm.synthesis.settings import OPTIONS

    try:
        from fibldm.serving.dicom.limits import MIB, Limits
        from fibldm.serving.dicom.node import Node, tls_contexts
        from fibldm.serving.dicom.peers import Caller, Peer, addresses_of, titled
    except ModuleNotFoundError as error:
        if error.name != "pynetdicom":
            raise
        raise FibldmError(
            "a DICOM node needs pynetdicom, which is not installed", "pip install 'fibldm[node]'"
        ) from None

    log_to_standard_error()
    title, callers = titled(aet, "--aet"), [Caller.of(text) for text in caller]
    peers, address = [Peer.of(text) for text in send], addresses_of(host)[0]
    files = [file for file in (tls_cert, tls_key, tls_ca) if file is not None]
    if len(files) not in (0, 3):
        raise FibldmError(f"TLS needs --tls-cert, --tls-key and --tls-ca; got {len(files)} of them", "give all")
    tls = tls_contexts(*files) if files else None
    if not keep > 0:
        raise FibldmError(f"`keep` must be above 0; got {keep:g}", "24 is a day")
    limits = Limits(
        associations=max_associations,
        pdu=max_pdu,
        object_bytes=int(max_object * MIB),
        association_bytes=int(max_association * MIB),
        objects_per_minute=max_per_minute,
        idle=idle,
        wait=60 * wait,
    )
    options |= {"format": "dicom", "covariates": read_named(covariate)}
    options |= {"conditions": read_named(condition, "--condition"), "adapters": read_strengths(adapter)}
    given = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    with Ending() as ending:
        output = serving_output(bundle, out, device=device, **given)
        if output.dicom is not None:
            output.dicom.codes.find(output.synthesizer.names.values())  # refused now, not with every mask
        with Service(output, out, most=count, keep=3600 * keep, tries=max_tries) as service:
            door = Node(service, title, callers, peers, limits=limits, tls=tls)
            listening = door.open(address, port)
            print(f"{title} listens on {address}:{listening}{' by TLS' if tls else ''}", flush=True)
            emit_line({"ok": True, "title": title, "host": address, "port": listening})
            door.run(ending)
            jobs = {str(state): len(service.store.jobs(state)) for state in State}
    if ending.asked == signal.SIGINT:
        raise typer.Exit(130)
    print(", ".join(f"{number} {state}" for state, number in jobs.items() if number) or "nothing came")
    return {"jobs": jobs}
