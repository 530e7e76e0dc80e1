"""What are masks worth in which not all labels were annotated? Beside masks with all of them, and beside the naive way.

    python scripts/compare_partial.py --source hippocampus_mri --out OUT --config data_hippocampus_mri --minutes 60

Of the training and validation cases, one half loses the first label of --labels and the other half the second. Row
"full" has all masks, "partial" says what was annotated (`annotated_labels`), "naive" takes what is missing for
background. All three have the same scans and the same split, and test masks are whole. Each row is measured by the Dice
on real test scans of a segmenter that learned from its scans (real), by that of one that learned from its synthetic
volumes, made from its own training masks (utility), and by what the segmenter of "full" finds in volumes of the test
masks (volumes). --real-only trains no generator. What is finished is kept, so that it can be stopped and started again.
"""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.cli.output import as_command
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.faithfulness import mean_estimates, measure_overlaps
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.files import read_json, write_json, write_text
from fibldm.pipeline import train_steps
from fibldm.recipe import TrainingStep
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.options import parse_overrides
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.datalist import ANNOTATED, SPLITS, load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import write_nifti

ROWS = ("full", "partial", "naive")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, train and measure what is missing, then print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a dataset with masks of two labels or more")
    parser.add_argument("--out", type=Path, required=True, help="folder of work folders, runs, volumes and rows.json")
    parser.add_argument("--config", action="append", default=[], help="of all stages; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="key=value of all stages; may be repeated")
    parser.add_argument("--labels", nargs=2, metavar="NAME", help="that are withheld; the first two without it")
    parser.add_argument("--cases", type=int, help="only so many cases, for a quick look")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help=f"rows, of {', '.join(ROWS)}")
    parser.add_argument("--minutes", type=float, help="to train the generator of each row; all epochs without it")
    parser.add_argument("--real-only", action="store_true", help="train segmenters on real scans, and no generator")
    parser.add_argument("--segmenter-steps", type=int, default=800, help="of each segmenter")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    chosen = parser.parse_args(arguments)
    with as_command():
        print(table(compare(chosen)))


def compare(chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The rows by name, those that lay in ``OUT/rows.json`` already among them.

    Raises:
        FibldmError: a row or label is unknown, or a step is refused.
    """
    for name in chosen.only:
        if name not in ROWS:
            raise unknown_choice("row", name, ROWS)
    prepare_rows(chosen.source, chosen.out, labels=chosen.labels, cases=chosen.cases)
    file = chosen.out / "rows.json"
    rows: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}
    for name in chosen.only:
        row = rows.setdefault(name, {})
        for part, measure in (("real", _real), ("volumes", _volumes), ("utility", _utility)):
            if not any(key.startswith(part) for key in row) and not (chosen.real_only and part != "real"):
                row |= {f"{part} {key}": value for key, value in measure(name, chosen).items()}
                write_json(file, rows)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of figures as text."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, [*rows, ""]))
    lines = [" " * width + "".join(f"  {name}" for name in names)]
    for row, figures in rows.items():
        cells = {name: format(figures[name], ".3f") if name in figures else "-" for name in names}
        lines.append(f"{row:<{width}}" + "".join(f"  {cell:>{len(name)}}" for name, cell in cells.items()))
    return "\n".join(lines)


def prepare_rows(source: Path, out: Path, *, labels: Sequence[str] | None = None, cases: int | None = None) -> None:
    """Write ``OUT/ROW/work`` of every row, from one split of the dataset.

    Raises:
        FibldmError: the dataset has not these labels, or is refused.
    """
    prepare(source, out / "all")
    whole = read_datalist(out / "all")
    values = _withheld({name: int(value) for value, name in whole["labels"].items() if value != "0"}, labels)
    entries = {split: load_datalist(out / "all", split, masks=True) for split in SPLITS}
    kept = {split: _first(listed, len(listed), cases, entries) for split, listed in entries.items()}
    hidden = [entry["case"] for split in SPLITS[:2] for entry in kept[split]]
    lacks = {case: values[number % 2] for number, case in enumerate(hidden)}
    for row in ROWS:
        _write_table(out / row / "source", row, whole, kept, lacks)
        prepare(out / row / "source" / "cases.csv", out / row / "work", PrepareSettings(modality=whole["modality"]))


def _first(
    entries: list[dict[str, Any]], count: int, cases: int | None, all_entries: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The share of a split that a smaller dataset has, at least one case."""
    total = sum(map(len, all_entries.values()))
    return entries if cases is None else entries[: max(1, round(cases * count / total))]


def _withheld(values: dict[str, int], labels: Sequence[str] | None) -> list[int]:
    names = list(values)[:2] if labels is None else labels
    if len(names) < 2 or not set(names) <= values.keys():
        raise FibldmError(f"--labels must be two of {', '.join(values)}; got {', '.join(names) or 'none'}")
    return [values[name] for name in names]


def _write_table(
    folder: Path, row: str, whole: dict[str, Any], entries: dict[str, list[dict[str, Any]]], lacks: dict[str, int]
) -> None:
    """A table of the cases with the masks of a row."""
    values = [int(value) for value in whole["labels"] if value != "0"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "image", "label", "subject", "split", *([ANNOTATED] if row == "partial" else [])])
    for split, listed in entries.items():
        for entry in listed:
            case, label = entry["case"], Path(entry["label"])
            missing = None if row == "full" else lacks.get(case)
            if missing is not None:
                label = _without(label, missing, folder / "labels" / label.name)
            drawn = ";".join(str(value) for value in values if value != missing)
            said = [drawn] if row == "partial" else []
            writer.writerow([case, entry["image"], label.resolve(), entry["subject"], split, *said])
    write_text(folder / "cases.csv", text.getvalue())
    about = {"name": whole["name"], "labels": whole["labels"], "licence": whole["licence"]}
    write_json(folder / "dataset.json", about)


def _without(label: Path, value: int, file: Path) -> Path:
    if not file.exists():
        volume = read_volume(str(label))
        write_nifti(file, np.where(volume.array == value, 0, volume.array).astype(np.uint8), volume.affine)
    return file


def _evaluated(name: str, chosen: argparse.Namespace) -> Evaluated:
    """A row's work folder and model grid, whether or not there is a generator of it yet."""
    folder = chosen.out / name
    overrides = {**parse_overrides(chosen.set)}
    configuration = stage_configuration(
        "segmenter", work=folder / "work", run_dir=folder / "run", configs=chosen.config, overrides=overrides
    )
    parser = configuration.parser()
    content = read_datalist(folder / "work")
    return Evaluated(
        folder / "run",
        folder / "work",
        parser.get_parsed_content("grid"),
        parser.get_parsed_content("intensity"),
        {int(value): str(label) for value, label in content["labels"].items()},
        tuple(content["channels"]),
    )


def _segmenter(evaluated: Evaluated, chosen: argparse.Namespace, cases: Sequence[Case] | None = None) -> Segmenter:
    settings = {"steps": chosen.segmenter_steps, **parse_overrides(chosen.set)}
    return trained_segmenter(evaluated, cases=cases, overrides=settings)


def _dice(evaluated: Evaluated, pairs: Sequence[tuple[Case, Case]], segmenter: Segmenter) -> dict[str, float]:
    figures = mean_estimates(measure_overlaps(evaluated, pairs, segmenter))
    return {
        name: float(part.value) for name, part in figures.items() if name.startswith("dice") and part.value is not None
    }


def _real(name: str, chosen: argparse.Namespace) -> dict[str, float]:
    evaluated = _evaluated(name, chosen)
    test = [(case, case) for case in evaluated.real("test")]
    return _dice(evaluated, test, _segmenter(evaluated, chosen))


def _volumes(name: str, chosen: argparse.Namespace) -> dict[str, float]:
    judge = _evaluated("full", chosen)
    made = judge.synthetic(_synthesized(name, "test", chosen))
    return _dice(judge, [(case, case) for case in made], _segmenter(judge, chosen))


def _utility(name: str, chosen: argparse.Namespace) -> dict[str, float]:
    evaluated = _evaluated(name, chosen)
    made = evaluated.synthetic(_synthesized(name, "training", chosen))
    test = [(case, case) for case in evaluated.real("test")]
    return _dice(evaluated, test, _segmenter(evaluated, chosen, made))


def _synthesized(name: str, split: str, chosen: argparse.Namespace) -> Path:
    """Volumes of the masks of a split as the row has them, by its generator, which is trained where it is missing."""
    folder = chosen.out / name
    own = parse_overrides(chosen.set)
    steps = [
        TrainingStep("autoencoder", chosen.config, own),
        TrainingStep("latents", chosen.config, own),
        TrainingStep("diffusion", [*chosen.config, "mask_concat"], own),
    ]
    train_steps(steps, folder / "work", folder / "run", minutes=chosen.minutes)
    out = folder / f"synthetic_{split}"
    masks = [str(entry["label"]) for entry in load_datalist(folder / "work", split, masks=True)]
    settings = SamplingSettings(steps=chosen.steps)
    synthesize_files(run_dir=folder / "run", masks=masks, out=out, settings=settings, allow_extrapolation=True)
    return out


if __name__ == "__main__":
    main()
