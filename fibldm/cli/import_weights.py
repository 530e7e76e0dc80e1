"""``fibldm import-weights``: other people's weights as ones that FibLDM trains on."""

from pathlib import Path
from typing import Annotated, Any

import typer


def import_weights(
    source: Annotated[Path, typer.Argument(help="File of weights, or folder of a MONAI bundle.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    license: Annotated[str, typer.Option("--license", help="SPDX identifier of the weights' licence.")],
    license_file: Annotated[
        Path | None, typer.Option(help="Licence text, for identifiers that FibLDM does not know.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Network to import: autoencoder, vqvae, unet, controlnet, or auto (all found).")
    ] = "auto",
    network: Annotated[
        Path | None, typer.Option(help="JSON or YAML with network arguments that weight shapes do not reveal.")
    ] = None,
    arguments: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Network argument as key=value; repeatable.")
    ] = [],
    fixed: Annotated[
        list[str],
        typer.Option(
            "--fix",
            metavar="NAME=NUMBERS",
            help="Fix an additional input to a value: class=1, spacing=1.5,1.5,1.5, top_region=0,1,0,0, "
            "bottom_region=0,0,1,0.",
        ),
    ] = [],
    prediction: Annotated[
        str | None,
        typer.Option(
            help="Prediction target of the UNet: epsilon, sample, v, flow, or rflow (MONAI's RFlowScheduler)."
        ),
    ] = None,
    scale_factor: Annotated[
        float | None, typer.Option(help="Scale factor of the latents; default: from the checkpoint.")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Trust the bundle: run its expressions as code, accept changes since export."),
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
        arguments=_arguments(arguments),
        fixed=_fixed(fixed),
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
