"""``fibldm evaluate``: how good a generator's volumes are, in numbers with their uncertainty."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli.train import Work

Run = Annotated[
    Path | None, typer.Option("--run", help="Run folder, where metrics are written; or give --bundle and --out.")
]
Synthetic = Annotated[Path, typer.Option("--synthetic", help="Output folder of `fibldm synthesize`.")]
Settings = Annotated[
    list[str], typer.Option("--set", help="Override of the segmenter's configuration, key::sub=value; repeatable.")
]
Bundle = Annotated[Path | None, typer.Option(help="Bundle to measure instead of a run; needs --out.")]
Out = Annotated[Path | None, typer.Option("--out", help="With --bundle: output folder of the metrics.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if available.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Measure volumes drawn with other weights, by their hash (in the sidecars, under source).",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="With --bundle: accept changes since export.")]
Perceptual = Annotated[
    Path | None, typer.Option("--perceptual", help="For LPIPS: local file with the weights of a 2-D ResNet.")
]

evaluate = typer.Typer(
    no_args_is_help=True, help="Measure a run or a bundle; figures go to evaluation/metrics.json in its folder."
)


@evaluate.command()
def faithfulness(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
) -> dict[str, Any]:
    """Do the volumes follow their masks? Dice, HD95 and volume of each label, beside real scans and shuffled masks."""
    return _measure(["faithfulness"], data, synthetic, (run, bundle, out), settings, device, trust, weights)


@evaluate.command()
def realism(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
    perceptual: Perceptual = None,
) -> dict[str, Any]:
    """Do they look like real scans? KID, MMD, Frechet, precision, recall, spectrum, diversity, LPIPS; beside real."""
    return _measure(["realism"], data, synthetic, (run, bundle, out), settings, device, trust, weights, perceptual)


@evaluate.command()
def reconstruction(
    data: Work,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    perceptual: Perceptual = None,
) -> dict[str, Any]:
    """What does the autoencoder lose? PSNR, (MS-)SSIM, LPIPS, error, spectrum, segmentation on the test scans."""
    return _measure(["reconstruction"], data, None, (run, bundle, out), settings, device, trust, None, perceptual)


@evaluate.command()
def audit(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
) -> dict[str, Any]:
    """Are volumes copies of training scans? What `fibldm audit` does, recorded with the other figures."""
    return _measure(["audit"], data, synthetic, (run, bundle, out), settings, device, trust, weights)


@evaluate.command()
def copies(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
) -> dict[str, Any]:
    """The baseline of the audit: is one closer to a training scan than any real test scan? Only as volumes lie."""
    return _measure(["copies"], data, synthetic, (run, bundle, out), settings, device, trust, weights)


@evaluate.command()
def utility(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
) -> dict[str, Any]:
    """Can a segmenter learn from them? Trained on volumes of the training masks alone, measured on real test scans."""
    return _measure(["utility"], data, synthetic, (run, bundle, out), settings, device, trust, weights)


@evaluate.command()
def gate(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
) -> dict[str, Any]:
    """How good is the check of `fibldm synthesize --check`? Real, synthetic and spoilt volumes outside its ranges."""
    return _measure(["gate"], data, synthetic, (run, bundle, out), settings, device, trust, weights)


@evaluate.command("all")
def everything(
    data: Work,
    synthetic: Synthetic,
    run: Run = None,
    bundle: Bundle = None,
    out: Out = None,
    settings: Settings = [],
    device: Device = None,
    trust: Trust = False,
    weights: Weights = None,
    perceptual: Perceptual = None,
) -> dict[str, Any]:
    """All of these but copies, gate, and utility, which needs volumes of the training masks."""
    from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS

    names = list(DEFAULT_MEASUREMENTS)
    return _measure(names, data, synthetic, (run, bundle, out), settings, device, trust, weights, perceptual)


def _measure(
    names: list[str],
    work: Path,
    synthetic: Path | None,
    folders: tuple[Path | None, Path | None, Path | None],
    settings: list[str],
    device: str | None,
    trust: bool,
    weights: str | None = None,
    perceptual: Path | None = None,
) -> dict[str, Any]:
    from fibldm.cli.output import log_to_standard_error
    from fibldm.evaluation.measurements import evaluate as measure
    from fibldm.runs.options import parse_overrides

    log_to_standard_error()
    place, changes = _place(*folders), parse_overrides(settings)
    sections = measure(
        names,
        run_dir=place,
        work=work,
        synthetic=synthetic,
        segmenter_settings=changes,
        device=device,
        bundle=folders[1],
        trust=trust,
        weights=weights,
        perceptual=perceptual,
    )
    figures = {name: section.to_dict()["figures"] for name, section in sections.items()}
    print(f"recorded in {place / 'evaluation' / 'metrics.json'}")
    return {"outputs": [str(place / "evaluation" / "metrics.json")], "figures": figures}


def _place(run: Path | None, bundle: Path | None, out: Path | None) -> Path:
    """Where the figures go."""
    from fibldm.errors import FibldmError

    if (run is None) == (bundle is None):
        given = "got both" if run else "got none of them"
        raise FibldmError(f"either a run (--run) or a bundle (--bundle) must be named; {given}", "give one of them")
    if (bundle is None) != (out is None):
        said = "figures of a bundle need a folder; got no --out" if bundle else "figures of a run lie in it; got --out"
        raise FibldmError(said, "give --out with --bundle, and only then")
    place = run or out
    assert place is not None
    return place
