"""``fibldm synthesize``: synthetic volumes from masks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared
from fibldm.cli.engine_options import Cluster, Workers
from fibldm.cli.synthesis_options import read_named, read_strengths, with_boxes

_ELSE = shared.FROM_BUNDLE


def synthesize(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    run: shared.Run = None,
    bundle: shared.Bundle = None,
    trust: shared.Trust = False,
    masks: Annotated[
        list[Path],
        typer.Option("--masks", help="Mask (NIfTI, NRRD, MetaImage, DICOM-SEG) or folder of masks; repeatable."),
    ] = [],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Work folder whose masks of --split are used, in addition to --masks."),
    ] = None,
    split: Annotated[str, typer.Option(help="With --data: the split, training, validation or test.")] = "test",
    count: shared.Count = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of sampling.")] = 1,
    seed: shared.Seed = None,
    steps: shared.Steps = None,
    sampler: shared.Sampler = None,
    eta: Annotated[float | None, typer.Option(help="Sampler ddim only: 0 = deterministic, 1 = ancestral.")] = None,
    guidance: shared.Guidance = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(help=f"0 to 1: how much of the contrast added by guidance is removed, often 0.7; {_ELSE} 0."),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW,HIGH",
            help=f"Apply guidance between these times only (0 = data, 1 = noise); {_ELSE} 0,1.",
        ),
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Time shift; above 1 puts more steps at high noise; default: as in training.")
    ] = None,
    dynamic_threshold: Annotated[
        float | None, typer.Option(help="Runs in pixel space only: share of voxels kept unclamped, often 0.995.")
    ] = None,
    residual_noise: shared.ResidualNoise = None,
    tiles: Annotated[
        bool | None,
        typer.Option(
            "--tiles/--no-tiles",
            help="Draw a mask larger than the training grid in overlapping tiles of its size, as one volume; "
            f"{_ELSE} whole.",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint: best, or an epoch kept by keep_every, such as epoch_0010.")
    ] = "best",
    strength: Annotated[float, typer.Option(min=0, help="ControlNet strength: 1 = as trained, 0 = off.")] = 1.0,
    with_controlnet: Annotated[
        list[str],
        typer.Option(
            metavar="RUN=STRENGTH", help="Add the ControlNet of another run with the same base network; repeatable."
        ),
    ] = [],
    covariate: shared.Covariates = [],
    condition: shared.Conditions = [],
    box: Annotated[
        list[str],
        typer.Option(
            metavar="BOX",
            help='Box of a generator trained with --config boxes, such as "tumour 40x30x20mm at 10,-20,35" (centre, '
            'RAS+ mm; also "at 50%,40%,60%", or "voxels"); repeatable. "none" asks for no boxes.',
        ),
    ] = [],
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="SCAN",
            help="Image of the patient (file, or folder of DICOM) that all volumes follow, of a generator trained "
            "with one: the same as --condition image=SCAN. Without masks, volumes come on its grid.",
        ),
    ] = None,
    conditions_table: Annotated[
        Path | None,
        typer.Option(
            help="CSV or JSON with a row for every mask: column mask, then covariates and other conditions by name, "
            "empty = unknown. Goes before --covariate and --condition."
        ),
    ] = None,
    own_conditions: Annotated[
        bool,
        typer.Option(
            "--own-conditions",
            help="With --data: ask of each mask what the data say of its case, where nothing else is asked.",
        ),
    ] = False,
    adapter: shared.Adapters = [],
    text: Annotated[
        str | None,
        typer.Option(help="What is written of the patient, of a network trained with texts: --condition text=..."),
    ] = None,
    unconditional: Annotated[
        bool,
        typer.Option("--unconditional", help="Draw without masks from a generator trained with masks."),
    ] = False,
    allow_extrapolation: shared.AllowExtrapolation = False,
    check: shared.Check = None,
    reject_copies: shared.RejectCopies = None,
    output_format: Annotated[
        str, typer.Option("--format", help="Output format: nifti, or dicom (a series and its mask).")
    ] = "nifti",
    template: shared.Template = None,
    label_codes: shared.LabelCodes = None,
    patient_position: shared.PatientPosition = None,
    mask_format: shared.MaskFormat = None,
    bids: Annotated[
        str | None,
        typer.Option(metavar="SUFFIX", help="NIfTI only: also write OUT/bids; T1w, T2w, FLAIR, ..., or ct."),
    ] = None,
    skull_stripped: Annotated[
        bool | None,
        typer.Option(
            "--skull-stripped/--no-skull-stripped", help="With --bids, MR only: whether the volumes are skull-stripped."
        ),
    ] = None,
    device: shared.Device = None,
    workers: Workers = None,
    cluster: Cluster = None,
) -> dict[str, Any]:
    """Write a synthetic volume on the grid of every mask, marked as synthetic, with a sidecar.

    A generator trained without masks takes none: it draws --count volumes on the model grid. A bundle uses the sampling
    settings that it was measured with, unless options change them.
    """
    options = dict(locals())
    from fibldm.cli.output import log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.files import read_json
    from fibldm.synthesis import SamplingSettings, synthesize_files
    from fibldm.synthesis.settings import OPTIONS
    from fibldm.typed_settings import counted
    from fibldm.volumes.bids_writer import check_bids, write_bids
    from fibldm.volumes.writer import sidecar

    log_to_standard_error()
    options |= {"format": output_format, "covariates": read_named(covariate)}
    further = [*condition, *([] if text is None else [f"text={text}"]), *([] if image is None else [f"image={image}"])]
    options |= {"conditions": with_boxes(read_named(further, "--condition"), box)}
    options["own_conditions"] = data if own_conditions else None
    options["adapters"] = read_strengths(adapter)
    given = {name: options[name] for name in OPTIONS if options[name] is not None}
    if guidance is not None and guidance > 5:
        print(f"guidance {guidance} is above 5: expect exaggerated anatomy")
    if own_conditions and data is None:
        raise FibldmError("--own-conditions are those of cases of a work folder; none was given", "give --data")
    if bids is not None and output_format != "nifti":
        raise FibldmError(f"--format {output_format} takes no --bids", "change or leave out one of them")
    if not masks and data is None and (bids is not None or output_format == "dicom"):
        raise _needs_masks("--bids" if bids is not None else "--format dicom")
    if bids is not None:
        check_bids(bids, modality=_facts(run, bundle, trust)["modality"], skull_stripped=skull_stripped)
    outputs = synthesize_files(
        run,
        [*masks, *_masks_of(data, split)],
        out,
        **given,
        bundle=bundle,
        unconditional=unconditional,
        trust=trust,
        checkpoint=checkpoint,
        strength=strength,
        others=read_strengths(with_controlnet, "--with-controlnet", "RUN"),
        device=device,
        workers=workers,
        cluster=cluster,
    )
    if bids is not None:
        names = {int(value): name for value, name in _facts(run, bundle, trust)["labels"].items() if int(value)}
        write_bids(out / "bids", outputs, suffix=bids, names=names, skull_stripped=skull_stripped)
    facts = read_json(sidecar(outputs[0]))
    calls = facts["network_calls"]
    said = "" if facts.get("follows_mask", True) else ", drawn without masks on the model grid"
    drawn = f"{SamplingSettings.from_dict(facts['sampling']).described}; {counted(calls, 'network call')} each"
    print(f"{counted(len(outputs), 'synthetic volume')} in {out}{said} ({drawn})")
    return {"outputs": [str(path) for path in outputs], "network_calls": calls}


def _needs_masks(option: str) -> Exception:
    from fibldm.errors import FibldmError

    return FibldmError(f"{option} writes the masks beside the volumes; none were given", "give --masks")


def _facts(run: Path | None, bundle: Path | None, trust: bool) -> Mapping[str, Any]:
    from fibldm.runs import load_facts
    from fibldm.synthesis.bundle import open_bundle

    if run is not None or bundle is None:
        return load_facts(run or "")
    with open_bundle(bundle, trust=trust) as opened:
        return opened.facts


def _masks_of(work: Path | None, split: str) -> list[str]:
    from fibldm.errors import unknown_choice
    from fibldm.volumes.datalist import SPLITS, load_datalist

    if work is None:
        return []
    if split not in SPLITS:
        raise unknown_choice("--split", split, SPLITS)
    return [str(entry["label"]) for entry in load_datalist(work, split, masks=True)]
