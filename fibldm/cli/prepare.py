"""``fibldm prepare``: check a dataset, split it by patient, write the work folder."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli.engine_options import Cluster

_LISTS = ("datalist.json", "intensity.json", "report.json")


def prepare(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a dataset, or a CSV or TSV table of its cases; several become one, labels matched by name."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Work folder to write.")],
    layout: Annotated[
        str, typer.Option(help="Layout: auto, decathlon, nnunet, bids, folders, csv, dicom, organs or pack.")
    ] = "auto",
    modality: Annotated[
        str | None, typer.Option(help="Modality: ct, mr, pt (PET, in SUV) or other; default: what the dataset states.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW,HIGH", help="HU of CT (default: -1000,1000) or SUV of PET (default: 0,20) mapped to -1 and 1."
        ),
    ] = None,
    intensity_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW,HIGH", help="Modality other: values mapped to -1 and 1, such as 0,255."),
    ] = None,
    labels: Annotated[str | None, typer.Option(help='Label names, for example "1=right lung,2=left lung".')] = None,
    remap: Annotated[str | None, typer.Option(help='Label values to change, for example "2=1,4=1".')] = None,
    channels: Annotated[
        str | None, typer.Option(help='Names of the image channels, for example "T1w,FLAIR"; with BIDS, those to read.')
    ] = None,
    merge_masks: Annotated[
        str | None, typer.Option(help="Binary masks to merge, most important first: airways,lung_left,lung_right.")
    ] = None,
    bids_mask: Annotated[str | None, typer.Option(help="Pattern of the mask files of a BIDS dataset.")] = None,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="X,Y,Z", help="Voxel spacing in mm, for formats that state none (PNG, HDF5, .mat)."),
    ] = None,
    resample_masks: Annotated[
        bool, typer.Option("--resample-masks", help="Resample masks on another grid to their image's grid.")
    ] = False,
    resample_tilt: Annotated[
        bool,
        typer.Option(
            "--resample-tilt",
            help="Bring DICOM series under a tilted gantry, or of uneven slice spacing, to a regular grid.",
        ),
    ] = False,
    derive: Annotated[str | None, typer.Option(help="lung: derive lung masks from HU for CT without masks.")] = None,
    bias_field: Annotated[bool, typer.Option("--bias-field", help="MR only: correct the bias field (N4).")] = False,
    missing_is_unknown: Annotated[
        bool,
        typer.Option(
            "--missing-is-unknown",
            help="A label that a case does not have counts as not annotated there (unknown), not as absent, unless the "
            "data say what was annotated (annotated_labels).",
        ),
    ] = False,
    keep_columns: Annotated[
        str | None, typer.Option(help="Columns to keep although they may identify the patient.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|beside", help="Free text to carry along: a column, or .txt files beside the images."
        ),
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="Facts of the scans to carry along as covariates: spacing (spacing_x_mm, ...), body_part, and those "
            "carried anyway, which some file must then state: kernel, slice_thickness_mm, contrast, "
            "tube_voltage_kv, respiration, field_strength_t, repetition_time_ms, echo_time_ms."
        ),
    ] = None,
    boxes: Annotated[
        bool,
        typer.Option("--boxes", help="Also write boxes.csv: the boxes around the connected parts of every label."),
    ] = False,
    hide_names: Annotated[
        bool, typer.Option("--hide-names", help="Name cases by hashes instead of file names (always for DICOM).")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad/--strict", help="Skip cases with errors, or fail (default).")
    ] = False,
    subject_pattern: Annotated[
        str | None, typer.Option(help="Regular expression matched on the image path; its first group is the patient.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into training, validation and test.")] = 0,
    second_modality: Annotated[
        str | None,
        typer.Option(
            help="Modality of the column second_image of the table, an image as a condition: ct, mr, pt or other."
        ),
    ] = None,
    second_window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Second images: values mapped to -1 and 1; CT in HU (default: -1000,1000), PET in SUV "
            "(default: 0,20), other in their units.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes; default: one per CPU core.")] = None,
    cluster: Cluster = None,
    keep_salt: Annotated[
        bool, typer.Option("--keep-salt", help="Store the salt of the pseudonyms in the work folder.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace a work folder that was prepared with other settings.")
    ] = False,
) -> dict[str, Any]:
    """Check every volume and mask of a dataset, split it by patient (70/10/20), and write the work folder."""
    from fibldm.datasets.findings import table
    from fibldm.datasets.fitting_grid import fitting_grid
    from fibldm.datasets.preparation import prepare as prepare_dataset
    from fibldm.datasets.settings import PrepareSettings, parse_label_names, parse_remap
    from fibldm.datasets.work_folder import BOXES
    from fibldm.workers import cores

    settings = PrepareSettings(
        layout=layout,
        modality=modality,
        window=window,
        range=intensity_range,
        labels=parse_label_names(labels) if labels is not None else {},
        remap=parse_remap(remap) if remap is not None else {},
        channels=_names(channels),
        merge_masks=_names(merge_masks),
        bids_mask=bids_mask,
        spacing=spacing,
        resample_masks=resample_masks,
        resample_tilt=resample_tilt,
        derive=derive,
        bias_field=bias_field,
        keep_columns=_names(keep_columns),
        facts=_names(facts),
        text=text,
        hide_names=hide_names,
        skip_bad=skip_bad,
        subject_pattern=subject_pattern,
        seed=seed,
        missing_is_unknown=missing_is_unknown,
        second_modality=second_modality,
        second_window=second_window,
    )
    workers = cores() if workers is None and cluster is None else workers
    report = prepare_dataset(
        source, out, settings, restart=restart, workers=workers, cluster=cluster, keep_salt=keep_salt
    )
    for line in (*table(report.findings), *(f"note: {note}" for note in report.notes)):
        print(line, file=sys.stderr)
    print(_summary(report))
    if boxes:
        from fibldm.datasets.boxes import write_boxes

        print(f"boxes: {write_boxes(report.work)} in {report.work / BOXES}")
    grid = fitting_grid(report.work)
    print(
        "a model grid that cuts nothing off, for your data configuration (a coarser one is faster; `fibldm plan` says "
        f"what fits):\n  spacing: {list(grid.spacing)}\n  size: {list(grid.size)}"
    )
    return {
        "outputs": [str(report.work / name) for name in (*_LISTS, *([BOXES] if boxes else []))],
        "counts": dict(report.counts),
        "grid": {"spacing": list(grid.spacing), "size": list(grid.size)},
        "unchanged": report.unchanged,
        "left_out": list(report.left_out),
        "findings": [asdict(finding) for finding in report.findings],
        "notes": list(report.notes),
    }


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _summary(report: Any) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in report.counts.items())
    left_out = f"; left out: {', '.join(report.left_out)}" if report.left_out else ""
    if report.unchanged:
        return f"{report.work} is prepared already from this source with these settings ({counts}{left_out})"
    return f"{report.work} is prepared: {counts}{left_out}"
