"""``fibldm prepare``: check a dataset, split it by patient, write the work folder."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    source: Annotated[Path, typer.Argument(help="Folder of a dataset, or a CSV manifest.")],
    out: Annotated[Path, typer.Option("--out", help="Work folder to write.")],
    layout: Annotated[str, typer.Option(help="auto, decathlon, folders or csv.")] = "auto",
    modality: Annotated[str | None, typer.Option(help="ct or mr; by default what dataset.json says.")] = None,
    window: Annotated[
        tuple[float, float] | None, typer.Option(help="CT only: HU that become -1 and 1 (default -1000 1000).")
    ] = None,
    labels: Annotated[str | None, typer.Option(help='Names, for example "1=right lung,2=left lung".')] = None,
    subject_pattern: Annotated[
        str | None, typer.Option(help="Regular expression on the image path; its first group is the patient.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into training, validation and test.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Write a work folder anew that was made otherwise.")
    ] = False,
) -> dict[str, Any]:
    """Check every volume and mask of a dataset, split it by patient (70/10/20), and write the work folder."""
    from fibldm.volumes.preparation import prepare as prepare_dataset
    from fibldm.volumes.prepare_settings import PrepareSettings, parse_label_names

    settings = PrepareSettings(
        layout=layout,
        modality=modality,
        window=window,
        labels=parse_label_names(labels) if labels is not None else {},
        subject_pattern=subject_pattern,
        seed=seed,
    )
    report = prepare_dataset(source, out, settings, restart=restart)
    warnings = [f"{finding.case}: {finding.message}" for finding in report.findings]
    for line in (*(f"warning: {warning}" for warning in warnings), *(f"note: {note}" for note in report.notes)):
        print(line, file=sys.stderr)
    print(_summary(report))
    return {
        "outputs": [str(report.work / name) for name in ("datalist.json", "intensity.json", "report.json")],
        "counts": dict(report.counts),
        "unchanged": report.unchanged,
        "warnings": warnings,
        "notes": list(report.notes),
    }


def _summary(report: Any) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in report.counts.items())
    if report.unchanged:
        return f"{report.work} is prepared already from this source with these settings ({counts}); nothing to do"
    return f"{report.work} is prepared: {counts}"
