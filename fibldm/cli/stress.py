"""``fibldm stress``: where a segmenter breaks, on volumes of which one thing changes at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fibldm.cli import synthesis_options as shared


def stress(
    segmenter: Annotated[
        str,
        typer.Option(
            "--segmenter",
            metavar="COMMAND",
            help="Command that segments a folder of images, with {images} and {masks} for the folders.",
        ),
    ],
    data: Annotated[Path, typer.Option("--data", help="Work folder whose masks are used, and its scans beside.")],
    sweep: Annotated[
        list[str],
        typer.Option(
            "--sweep",
            metavar="SWEEP",
            help="What changes and its values, repeatable: 'noise: 10 20 40', 'blur: 2mm 4mm', 'contrast LABEL: -40 "
            "20', or an edit of fibldm edit-masks, such as 'volume LABEL: 1ml 5ml 20ml' or 'fibrosis: 10% 40%'.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    run: shared.Run = None,
    bundle: shared.Bundle = None,
    trust: shared.Trust = False,
    split: Annotated[str, typer.Option(help="Split of the work folder: training, validation or test.")] = "test",
    cases: Annotated[int | None, typer.Option(min=1, help="Cases at most; default: all.")] = None,
    label: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            help="Label to measure, and its value in the segmenter's masks; repeatable. Default: all, by the values "
            "of the work folder.",
        ),
    ] = [],
    suffix: Annotated[str, typer.Option(help="Of image names; nnU-Net needs _0000.")] = "",
    drop: Annotated[float, typer.Option(help="Drop of mean Dice from which a value can be a weakness.")] = 0.1,
    real: Annotated[bool, typer.Option("--real/--no-real", help="Lay real scans of the split beside.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of edits, volumes and changes.")] = 0,
    steps: shared.Steps = None,
    guidance: shared.Guidance = None,
    allow_extrapolation: shared.AllowExtrapolation = False,
    device: shared.Device = None,
) -> dict[str, Any]:
    """Run a segmenter on synthetic volumes whose lesions, contrast or noise sweep a grid, and say where it breaks.

    Of each mask, a volume is made as it is and one for every value, the same but for one thing. OUT/stress.html has
    tables, curves and the worst cases; all volumes, masks and what was found stay in OUT.
    """
    from fibldm.cli.output import log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.stress import StressSettings
    from fibldm.stress import stress as run_stress
    from fibldm.stress.page import table_of, write_page
    from fibldm.stress.segmenter import Segmenter
    from fibldm.synthesis import SamplingSettings, synthesize_files

    log_to_standard_error()
    if (run is None) == (bundle is None):
        raise FibldmError("a stress test needs a generator: --run or --bundle, one of both", "give one of them")
    named = shared.read_named(label, "--label")
    if not all(value.isdigit() for value in named.values()):
        raise FibldmError(f"--label needs NAME=VALUE with a whole number; got {', '.join(label)}")
    settings = StressSettings(
        sweeps=sweep,
        split=split,
        cases=cases,
        labels={name: int(value) for name, value in named.items()},
        drop=drop,
        seed=seed,
        allow_extrapolation=allow_extrapolation,
        real=real,
    )
    asked: dict[str, Any] = {
        name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None
    }

    def generator(masks: Sequence[Path], folder: Path) -> list[Path]:
        return synthesize_files(
            run,
            masks,
            folder,
            settings=None if bundle else SamplingSettings(),
            bundle=bundle,
            trust=trust,
            device=device,
            allow_extrapolation=True,
            seed=seed,
            **asked,
        )

    trial = run_stress(out, data, Segmenter(segmenter, suffix), generator, settings)
    for one in trial.sweeps:
        for value in trial.names:
            table = table_of(trial, one, value)
            if any(row[1] for row in table.rows[1:]):
                print(f"\n{table.caption}")
                for row in (table.heads, *table.rows):
                    print("  ".join(f"{cell:>18}" if place else f"{cell:12}" for place, cell in enumerate(row)))
    print()
    for weak in trial.weaknesses:
        print(f"weak at {weak.sweep} {weak.step}: Dice of {trial.names[weak.label]} {weak.dice:.2f} of {weak.base:.2f}")
    if not trial.weaknesses:
        print("no value lowers Dice by more than chance does")
    if trial.left_out:
        print(f"{len(trial.left_out)} masks could not take a value; see {out / 'stress.html'}")
    write_page(out / "stress.html", trial, f"stress test of {segmenter}")
    return {
        "report": out / "stress.html",
        "weaknesses": [f"{weak.sweep}: {weak.step}" for weak in trial.weaknesses],
    }
