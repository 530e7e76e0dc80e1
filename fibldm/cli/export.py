"""``fibldm export``: a run as a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer


def export(
    run: Annotated[Path, typer.Option("--run", help="Run folder with all stages finished.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the bundle; its export.yaml has texts for the model card.")
    ],
    license: Annotated[str, typer.Option("--license", help="SPDX identifier of the weights' licence.")],
    license_file: Annotated[
        Path | None, typer.Option(help="Licence text, for identifiers that FibLDM does not know.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep weights in half precision.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the folder's name.")] = None,
    version: Annotated[str, typer.Option(help="Version of the bundle.")] = "0.1.0",
    unconditional: Annotated[
        bool,
        typer.Option(
            "--unconditional", help="Export an unconditional generator: stage 2 alone, if it was trained without masks."
        ),
    ] = False,
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="FILE=STRENGTH", help="Merge an adapter.safetensors into the network, by default at 1; repeatable."
        ),
    ] = [],
    settings: Annotated[
        list[str],
        typer.Option("--set", help="Default sampling of the bundle, such as steps=5; default: as measured."),
    ] = [],
) -> dict[str, Any]:
    """Write a run as a MONAI bundle: weights, configurations, model card; the default sampling is what was measured."""
    from fibldm.cli.synthesis_options import read_strengths
    from fibldm.delivery.export import ExportSettings
    from fibldm.delivery.export import export as write_bundle
    from fibldm.report.report import bundle_report
    from fibldm.runs.options import parse_overrides
    from fibldm.synthesis import SamplingSettings

    sampling = parse_overrides(settings)
    adapters = read_strengths(adapter)
    chosen = ExportSettings(license, license_file, half, name, version, unconditional, sampling, adapters)
    written = write_bundle(run, out, chosen, also=bundle_report(run))
    precision = "half" if half else "single"
    print(f"{out}: {written['bytes'] / 1e6:.1f} MB of weights in {precision} precision, {len(written['files'])} files")
    print(f"by default it draws by {SamplingSettings.from_dict(written['sampling']).described}")
    for note in written["notes"]:
        print(f"note: {note}")
    if _plain(written["data_licence"] or "") not in ("", _plain(license)):
        print(f"the dataset says it is under {written['data_licence']}; make sure that allows weights under {license}")
    return {"outputs": [str(out)], **written}


def _plain(licence: str) -> str:
    return "".join(letter for letter in licence.lower() if letter.isalnum())
