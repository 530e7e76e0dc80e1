"""``fibldm evaluate``: how good a run's volumes are, in numbers with their uncertainty."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli.train import Run, Work

Synthetic = Annotated[Path, typer.Option("--synthetic", help="Folder of `fibldm synthesize`.")]
Settings = Annotated[
    list[str], typer.Option("--set", help="key::sub=value, changes of the segmenter's configuration (train_segmenter).")
]
Bundle = Annotated[
    Path | None, typer.Option(help="Measured in place of the run; --run is then a folder for the figures.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default cuda where there is one.")]

evaluate = typer.Typer(no_args_is_help=True, help="Measure a run; figures go to RUN/evaluation/metrics.json.")


@evaluate.command()
def faithfulness(
    data: Work, run: Run, synthetic: Synthetic, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """Do the volumes follow their masks? Dice, HD95 and volume of each label, beside real scans and shuffled masks."""
    return _measure(["faithfulness"], data, run, synthetic, bundle, settings, device)


@evaluate.command()
def realism(
    data: Work, run: Run, synthetic: Synthetic, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """Do they look like real ones? KID, MMD, Frechet distance, spectrum and diversity, beside real against real."""
    return _measure(["realism"], data, run, synthetic, bundle, settings, device)


@evaluate.command()
def reconstruction(
    data: Work, run: Run, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """What does the autoencoder lose? PSNR, SSIM, error, spectrum and segmentation on the test scans."""
    return _measure(["reconstruction"], data, run, None, bundle, settings, device)


@evaluate.command()
def copies(
    data: Work, run: Run, synthetic: Synthetic, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """Is a volume closer to a training scan than any real test scan is? Names those that are."""
    return _measure(["copies"], data, run, synthetic, bundle, settings, device)


@evaluate.command()
def utility(
    data: Work, run: Run, synthetic: Synthetic, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """Can a segmenter learn from them? Trained on volumes of the training masks alone, measured on real test scans."""
    return _measure(["utility"], data, run, synthetic, bundle, settings, device)


@evaluate.command("all")
def everything(
    data: Work, run: Run, synthetic: Synthetic, bundle: Bundle = None, settings: Settings = [], device: Device = None
) -> dict[str, Any]:
    """All of these but utility, which needs volumes of the training masks."""
    from fibldm.evaluation.measurements import OF_ANY_MASKS

    return _measure(list(OF_ANY_MASKS), data, run, synthetic, bundle, settings, device)


def _measure(
    names: list[str],
    work: Path,
    run: Path,
    synthetic: Path | None,
    bundle: Path | None,
    settings: list[str],
    device: str | None,
) -> dict[str, Any]:
    from fibldm.cli.output import log_to_standard_error
    from fibldm.evaluation.measurements import evaluate as measure
    from fibldm.training.configuration import parse_overrides

    log_to_standard_error()
    changes = parse_overrides(settings)
    sections = measure(
        names,
        run_dir=run,
        work=work,
        synthetic=synthetic,
        segmenter_settings=changes,
        device=device,
        bundle=bundle,
    )
    figures = {name: section.to_dict()["figures"] for name, section in sections.items()}
    print(f"recorded in {run / 'evaluation' / 'metrics.json'}")
    return {"outputs": [str(run / "evaluation" / "metrics.json")], "figures": figures}
