"""How should a network see the mask? Every way and every encoding on the demo's phantoms, for as many epochs each.

    fibldm demo --out demo
    python scripts/compare_conditions.py --demo demo --out compared [--epochs N] [--only NAME ...] [--guidance G ...]

Each row trains stages 2 and 3 anew on the demo's latents, synthesizes from the masks of its test patients, and is
measured as the demo is. A ControlNet has the epochs shared between its base network and itself. What is finished is
kept, so that it can be stopped and started again; rows that lie in OUT already are printed with the others.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.cli.output import as_command
from fibldm.demo.chest_metrics import measure
from fibldm.demo.demo import synthesize_test_masks
from fibldm.errors import unknown_choice
from fibldm.evaluation.measurements import evaluate
from fibldm.files import read_json, write_json
from fibldm.runs.configuration import stage_configuration
from fibldm.synthesis import SamplingSettings

CONTROLNET = ("diffusion", "controlnet")
CONFIGURATIONS: Mapping[str, tuple[Sequence[str], Sequence[str], Mapping[str, Any]]] = {
    "controlnet": (CONTROLNET, (), {}),
    "concat": (("diffusion",), ("mask_concat",), {}),
    "spade": (("diffusion",), ("mask_spade",), {}),
    "concat + controlnet": (CONTROLNET, ("mask_concat",), {}),
    "concat, detail 1": (("diffusion",), ("mask_concat",), {"mask_detail": 1}),
    "concat, nearest": (("diffusion",), ("mask_concat",), {"mask_detail": 1, "mask_resize": "nearest"}),
    "concat, label value": (("diffusion",), ("mask_concat", "mask_label_value"), {}),
    "concat, distance": (("diffusion",), ("mask_concat", "mask_distance"), {}),
    "concat, contour": (("diffusion",), ("mask_concat", "mask_contour"), {}),
    "concat, rescaler": (("diffusion",), ("mask_concat", "mask_rescaler"), {}),
    "concat, convolutions": (("diffusion",), ("mask_concat", "mask_convolutions"), {}),
}
FIGURES = {  # of the demo, then of the sections of fibldm evaluate
    "lung Dice": ("", "lung_dice"),
    "contrast": ("", "fibrosis_contrast_ratio"),
    "texture": ("", "texture_ratio"),
    "Dice": ("faithfulness", "dice"),
    "KID": ("realism", "kid/radiomics"),
    "spectrum dB": ("realism", "spectrum"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and print what is missing, then the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished fibldm demo")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of rows.json")
    parser.add_argument("--epochs", type=int, default=120, help="of stages 2 and 3 together")
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS), help="rows to train, by name")
    parser.add_argument("--guidance", type=float, nargs="*", default=[2.0], help="each gets a row of its own")
    chosen = parser.parse_args(arguments)
    with as_command():
        compare(chosen.demo, chosen.out, chosen.only, epochs=chosen.epochs, guidance=chosen.guidance)


def compare(demo: Path, out: Path, names: Sequence[str], *, epochs: int, guidance: Sequence[float]) -> None:
    """Add a row of figures to ``OUT/rows.json`` for every name and guidance, and print all.

    Raises:
        FibldmError: a name is unknown, or the demo is not finished.
    """
    for name in names:
        if name not in CONFIGURATIONS:
            raise unknown_choice("row", name, CONFIGURATIONS)
    rows_file = out / "rows.json"
    rows: dict[str, Any] = read_json(rows_file) if rows_file.exists() else {}
    for name in names:
        run = _train(name, demo, out, epochs)
        for scale in guidance:
            key = f"{name}, guidance {scale:g}"
            if key not in rows:
                rows[key] = _measure(run, demo, out / "synthetic" / key.replace(", ", "_").replace(" ", "_"), scale)
                write_json(rows_file, rows)
    print(table(rows))


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Rows of figures as text."""
    width = max(map(len, rows), default=0)
    head = " " * width + "".join(f"{name:>13}" for name in FIGURES)
    lines = [
        f"{name:<{width}}" + "".join(f"{'-' if row[key] is None else format(row[key], '.3f'):>13}" for key in FIGURES)
        for name, row in rows.items()
    ]
    return "\n".join([head, *lines])


def _train(name: str, demo: Path, out: Path, epochs: int) -> Path:
    """The stages of a row, on the demo's latents."""
    stages, configs, overrides = CONFIGURATIONS[name]
    run = out / "runs" / name.replace(", ", "_").replace(" ", "_")
    for part in ("autoencoder", "latents", "evaluation/segmenter"):
        if not (run / part).exists():
            shutil.copytree(demo / "runs" / "demo" / part, run / part)
    share = {"diffusion": epochs} if len(stages) == 1 else {"diffusion": epochs * 3 // 8, "controlnet": epochs * 5 // 8}
    for stage in stages:
        changes = {**overrides, "epochs": share[stage], "mask_dropout": 0.1, "label_dropout": 0.02}
        used = ("data_chest_phantom", "demo", *configs)
        stage_configuration(stage, work=demo / "work", run_dir=run, configs=used, overrides=changes).run()
    return run


def _measure(run: Path, demo: Path, synthetic: Path, guidance: float) -> dict[str, float | None]:
    """About ten network calls for each volume, with guidance and without."""
    sampling = SamplingSettings(steps=10 if guidance == 1 else 5, guidance=guidance)
    figures = measure(synthesize_test_masks(run, demo / "phantoms", demo / "work", synthetic, sampling))
    sections = evaluate(
        ("faithfulness", "realism"),
        run_dir=run,
        work=demo / "work",
        synthetic=synthetic,
        segmenter_settings={"steps": 160, "batch_size": 2},
    )
    return {
        key: figures[name] if not section else sections[section].figures[name].value
        for key, (section, name) in FIGURES.items()
    }


if __name__ == "__main__":
    main()
