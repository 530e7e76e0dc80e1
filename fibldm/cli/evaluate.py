"""``fibldm evaluate``: how good a generator's volumes are, in numbers with their uncertainty."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from fibldm.cli.evaluation_options import command, names_in, place_of

evaluate = typer.Typer(
    no_args_is_help=True, help="Measure a run or a bundle; figures go to evaluation/metrics.json in its folder."
)

EVERYTHING = "all"
_ENGINE = ("workers", "cluster")
# In the order of the help text: what each asks, and the options that it has no use for.
COMMANDS = {
    "faithfulness": (
        "Do the volumes follow their masks? Dice, HD95 and volume of each label, beside real scans and shuffled masks.",
        ("perceptual", "lungs"),
    ),
    "realism": (
        "Do they look like real scans? KID, MMD, Frechet, precision, recall, density, coverage, spectrum, diversity, "
        "LPIPS; beside real.",
        ("lungs",),
    ),
    "reconstruction": (
        "What does the autoencoder lose? PSNR, (MS-)SSIM, LPIPS, error, spectrum, segmentation on the test scans.",
        ("synthetic", "weights", "lungs", *_ENGINE),
    ),
    "audit": (
        "Are volumes copies of training scans? What `fibldm audit` does, recorded with the other figures.",
        ("perceptual", "lungs"),
    ),
    "copies": (
        "The baseline of the audit: is one closer to a training scan than any real test scan? Only as volumes lie.",
        ("perceptual", "lungs", *_ENGINE),
    ),
    "utility": (
        "Can a segmenter learn from them? Trained on volumes of the training masks alone, measured on real test scans.",
        ("perceptual", "lungs"),
    ),
    "gate": (
        "How good is the check of `fibldm synthesize --check`? Real, synthetic and spoilt volumes outside its ranges.",
        ("perceptual", "lungs", *_ENGINE),
    ),
    "ct": (
        "Are they as dense as real CT? HU of each label; HAA, LAA-950, 15th percentile, profile of lungs; beside real.",
        ("settings", "device", "perceptual", *_ENGINE),
    ),
    "spread": (
        "How much do volumes of one mask differ? A map of their standard deviation, and its size in each label.",
        ("settings", "device", "perceptual", "lungs", *_ENGINE),
    ),
    "masks": (
        "Are drawn masks like real ones? Volume, shape, topology, contacts, copies; asked and got volume; beside real.",
        ("settings", "device", "perceptual", "lungs"),
    ),
    EVERYTHING: (
        "All of these but copies, gate, ct, spread, masks, and utility, which needs volumes of the training masks.",
        ("lungs",),
    ),
}


def _measure(
    name: str,
    *,
    data: Path,
    run: Path | None,
    bundle: Path | None,
    out: Path | None,
    settings: Sequence[str] = (),
    lungs: str | None = None,
    **asked: Any,
) -> dict[str, Any]:
    from fibldm.cli.output import log_to_standard_error
    from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS
    from fibldm.evaluation.measurements import evaluate as measure
    from fibldm.runs.options import parse_overrides

    log_to_standard_error()
    place, changes = place_of(run, bundle, out), parse_overrides(list(settings))
    sections = measure(
        DEFAULT_MEASUREMENTS if name == EVERYTHING else [name],
        run_dir=place,
        work=data,
        segmenter_settings=changes,
        bundle=bundle,
        lungs=names_in(lungs),
        **asked,
    )
    figures = {measured: section.to_dict()["figures"] for measured, section in sections.items()}
    print(f"recorded in {place / 'evaluation' / 'metrics.json'}")
    return {"outputs": [str(place / "evaluation" / "metrics.json")], "figures": figures}


def _register(name: str, question: str, without: Sequence[str]) -> None:
    measure: Callable[..., dict[str, Any]] = partial(_measure, name)
    evaluate.command(name)(command(measure, name, question, without))


for _name, (_question, _without) in COMMANDS.items():
    _register(_name, _question, _without)
