"""``fibldm import-weights``: other people's weights as ones that FibLDM trains on."""

from pathlib import Path
from typing import Annotated, Any

import typer


def import_weights(
    source: Annotated[Path, typer.Argument(help="File of weights, or folder of a MONAI bundle.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    license: Annotated[str, typer.Option("--license", help="SPDX identifier of the weights' licence.")],
    license_file: Annotated[
        Path | None, typer.Option(help="Text of the licence, where FibLDM does not know it.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="autoencoder, vqvae, unet, controlnet, or auto: all that are there.")
    ] = "auto",
    network: Annotated[
        Path | None, typer.Option(help="JSON or YAML with what the networks were built with; beyond what shapes say.")
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="An argument of the network; may be repeated.")
    ] = [],
    fix: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=NUMBERS",
            help="Value of a further input for which it is imported: class=1, spacing=1.5,1.5,1.5, top_region=0,1,0,0, "
            "bottom_region=0,0,1,0.",
        ),
    ] = [],
    prediction: Annotated[
        str | None,
        typer.Option(
            help="What the UNet says: epsilon, sample, v, flow, or rflow, which MONAI's RFlowScheduler wants."
        ),
    ] = None,
    scale_factor: Annotated[
        float | None, typer.Option(help="By which latents were multiplied; by default as the checkpoint says.")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Run expressions of the bundle as code; take one changed since its export."),
    ] = False,
) -> dict[str, Any]:
    """Import weights of monai-generative, MONAI's model zoo or MAISI, and compare both networks' outputs."""
    from fibldm.cli.output import log_to_standard_error
    from fibldm.importing.import_weights import ImportSettings
    from fibldm.importing.import_weights import import_weights as run_import

    log_to_standard_error()
    settings = ImportSettings(
        licence=license,
        licence_file=license_file,
        kind=kind,
        network=network,
        arguments=_arguments(set_),
        fixed=_fixed(fix),
        prediction=prediction,
        scale_factor=scale_factor,
        trust=trust,
    )
    imported = run_import(source, out, settings)
    for folder, facts in imported.items():
        equal = facts["parity"]
        print(f"{folder}: {facts['kind']} of {facts['format']}, {facts['weights']} weights")
        print(f"  differs from {equal['against']} by {equal['largest_difference']:.1g}")
        print("\n".join(f"  {note}" for note in (*facts["notes"], facts["use"])))
    return {"outputs": list(imported), "networks": imported}


def _arguments(texts: list[str]) -> dict[str, Any]:
    import yaml

    from fibldm.errors import FibldmError

    pairs = [text.partition("=") for text in texts]
    try:
        values = {name: yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise FibldmError(f"--set needs KEY=VALUE with a value of YAML; {error}") from error
    if not all(name and sign for name, sign, _ in pairs):
        raise FibldmError(f"--set needs KEY=VALUE; got {', '.join(texts)}")
    return values


def _fixed(texts: list[str]) -> dict[str, list[float]]:
    from fibldm.cli.numbers import split_numbers
    from fibldm.errors import FibldmError

    pairs = [text.partition("=") for text in texts]
    try:
        return {name: [float(number) for number in split_numbers(numbers)] for name, _, numbers in pairs}
    except ValueError as error:
        raise FibldmError(f"--fix needs NAME=NUMBERS, such as class=1; got {', '.join(texts)}") from error
