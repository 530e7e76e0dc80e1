"""``fibldm audit``: are synthetic volumes copies of training scans?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli.engine_options import Cluster, Workers


def audit(
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Folder of synthetic volumes.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder: audit.json, closest.png and training.npz.")],
    train: Annotated[
        Path | None, typer.Option("--train", help="Folder of the scans that the generator learned from.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option("--holdout", help="Folder of scans of other patients, from the same scanners.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Instead of both: work folder; validation and test patients are held out."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder: do its weights tell which scans it learned from?")
    ] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="The same of a bundle.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: cuda if available.")
    ] = None,
    workers: Workers = None,
    cluster: Cluster = None,
) -> dict[str, Any]:
    """Look for copies of training scans, also turned, mirrored, moved, scaled, blurred, noisy or with other contrast.

    Ends with 1 where copies were found, or without enough scans held out.
    """
    import torch

    from fibldm.errors import FibldmError
    from fibldm.evaluation.audit import audit as run_audit
    from fibldm.evaluation.audit import scans_of_folder, scans_of_work
    from fibldm.evaluation.audit.audit import NO_EVIDENCE
    from fibldm.synthesis import Synthesizer
    from fibldm.volumes.datalist import read_datalist
    from fibldm.workers import engine_of

    if (data is None) == (train is None) or (data is not None and holdout is not None):
        raise FibldmError("an audit needs training scans: give `data`, or `train` with `holdout`")
    known, channels = None, 1
    if data is not None:
        content = read_datalist(data)
        known, channels = content["content"], len(content["channels"])
        training, held_out = scans_of_work(data, "training"), scans_of_work(data, "validation", "test")
    else:
        assert train is not None
        training = scans_of_folder(train, "training scans")
        held_out = [] if holdout is None else scans_of_folder(holdout, "scans that were held out")
    if run is not None and bundle is not None:
        raise FibldmError("weights come from a run or from a bundle; both were given", "leave out `run` or `bundle`")
    engine = engine_of(workers, cluster)
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = None if run is None else Synthesizer.from_run(run, device=on)
    generator = generator if bundle is None else Synthesizer.from_bundle(bundle, device=on)
    volumes = scans_of_folder(synthetic, "synthetic volumes", channels)
    result = run_audit(training, held_out, volumes, out, synthesizer=generator, data=known, engine=engine)
    print(result["verdict"])
    for copy in result.get("copies", []):
        print("  {synthetic} of {train}, similarity {score:.3f}, transform: {transform}".format(**copy))
    if "threshold" in result:
        named, of = (result["held_out_named"][key] for key in ("count", "of"))
        print(f"threshold {result['threshold']:.3f}; of {of} scans that were held out to try it out it names {named}")
    told = result["membership"]
    if not isinstance(told, str):
        told = "the weights tell training scans from others with AUC {auc:.2f} [{low:.2f}, {high:.2f}]".format(**told)
    print(f"{told}\n{out / 'audit.json'}")
    return {"ok": result["verdict"] == NO_EVIDENCE, "outputs": [str(out / "audit.json")], "verdict": result["verdict"]}
