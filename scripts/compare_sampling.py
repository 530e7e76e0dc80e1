"""How should a trained model be sampled, and how long trained? Volumes of the test masks, measured for every choice.

    python scripts/compare_sampling.py --run RUN --data WORK --out OUT --steps 5 10 30 50 1000
    python scripts/compare_sampling.py --run RUN --data WORK --out OUT --checkpoint epoch_0010 epoch_0020 epoch_0030

Every combination of what is given is a row: faithfulness, realism and copies as ``fibldm evaluate`` has them, with
their intervals, beside those of real scans. Rows are kept in OUT/rows.json, so that it can be stopped and started
again; where one choice alone varies, OUT/curve_<choice>.png draws them.
"""

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from fibldm.cli.output import as_command
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.measurements import MEASUREMENTS, Measurements
from fibldm.evaluation.statistics import Estimate
from fibldm.files import atomic_path, read_json, write_json
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.writer import sidecar

CHOICES: Mapping[str, tuple[type, Any, str]] = {
    "checkpoint": (str, "best", "best, or of an epoch that keep_every kept"),
    "sampler": (str, "dpmpp_2m", "ddim, ancestral, heun or dpmpp_2m"),
    "eta": (float, None, "of the sampler ddim, 0 to 1"),
    "steps": (int, 10, "of the sampler"),
    "guidance": (float, 1.0, "1 is none"),
    "residual_noise": (float, 1.0, "of the grain that the decoder leaves out"),
}
FIGURES = {  # of the sections of fibldm evaluate
    "Dice": ("faithfulness", "dice"),
    "KID": ("realism", "kid/radiomics"),
    "spectrum dB": ("realism", "spectrum"),
    "closer than real": ("copies", "closer_than_any_real"),
    "named copies": ("copies", "named"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Synthesize and measure what is missing, then print the table of these rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder, trained to the end")
    parser.add_argument("--data", type=Path, required=True, help="work folder it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the volumes and of rows.json")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose masks are taken")
    parser.add_argument("--batch-size", type=int, default=8, help="volumes that are sampled together")
    for name, (kind, default, meaning) in CHOICES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+", default=[default], help=meaning)
    chosen = parser.parse_args(arguments)
    with as_command():
        wanted = {name: getattr(chosen, name) for name in CHOICES}
        compare(chosen.run, chosen.data, chosen.out, wanted, split=chosen.split, batch_size=chosen.batch_size)


def compare(
    run: Path, work: Path, out: Path, wanted: Mapping[str, Sequence[Any]], *, split: str, batch_size: int
) -> dict[str, Any]:
    """Add a row to ``OUT/rows.json`` for every combination, print them, and return them by their names.

    Raises:
        FibldmError: the run, the work folder or a choice is refused.
    """
    rows_file = out / "rows.json"
    rows: dict[str, Any] = read_json(rows_file) if rows_file.exists() else {}
    choices = [dict(zip(wanted, values, strict=True)) for values in itertools.product(*wanted.values())]
    for choice in choices:
        _sampling(choice)  # what is refused is so before the first hour
    for choice in choices:
        if _name(choice) not in rows:
            rows[_name(choice)] = _row(run, work, out / _name(choice).replace(", ", "_"), choice, split, batch_size)
            write_json(rows_file, rows)
    chosen = {_name(choice): rows[_name(choice)] for choice in choices}
    print(table(chosen))
    varied = [name for name, values in wanted.items() if len(values) > 1]
    if len(varied) == 1:
        _draw(out / f"curve_{varied[0]}.png", varied[0], wanted[varied[0]], list(chosen.values()))
    return chosen


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of figures as text, each with its interval; the last is that of real scans."""
    cells = [[name, str(row["network_calls"]), f"{row['seconds']:.2f}"] for name, row in rows.items()]
    for line, row in zip(cells, rows.values(), strict=True):
        line += [_shown(Estimate(**row["figures"][name])) for name in FIGURES]
    last = [Estimate(**list(rows.values())[-1]["figures"][name]).real_vs_real for name in FIGURES]
    cells += [["real", "", "", *("" if value is None else f"{value:.3f}" for value in last)]]
    cells = [["", "calls", "s/volume", *FIGURES], *cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _shown(figure: Estimate) -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:.3f}" + ("" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]")


def _name(choice: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}_{value}" if name != "checkpoint" else str(value)
        for name, value in choice.items()
        if name in ("checkpoint", "steps") or value != CHOICES[name][1]
    )


def _sampling(choice: Mapping[str, Any]) -> SamplingSettings:
    return SamplingSettings(**{name: value for name, value in choice.items() if name != "checkpoint"})


def _row(run: Path, work: Path, folder: Path, choice: Mapping[str, Any], split: str, batch_size: int) -> dict[str, Any]:
    masks = [entry["label"] for entry in load_datalist(work, split, masks=True)]
    began = time.perf_counter()
    files = synthesize_files(
        *(run, masks, folder),
        count=1,
        settings=_sampling(choice),
        batch_size=batch_size,
        checkpoint=choice["checkpoint"],
    )
    seconds = (time.perf_counter() - began) / len(files)
    measurements = Measurements(Evaluated.open(run, work), folder, None, None)
    names = dict.fromkeys(section for section, _ in FIGURES.values())
    sections = {section: MEASUREMENTS[section](measurements) for section in names}
    figures = {name: sections[section].figures[figure].to_dict() for name, (section, figure) in FIGURES.items()}
    calls = read_json(sidecar(files[0]))["network_calls"]
    return {"choice": dict(choice), "network_calls": calls, "seconds": seconds, "figures": figures}


def _draw(file: Path, varied: str, values: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Every figure over what varies, with its interval; a dashed line is that of real scans."""
    places, labels = range(len(values)), [str(value).removeprefix("epoch_").lstrip("0") or "0" for value in values]
    drawing, axes = pyplot.subplots(1, len(FIGURES), figsize=(3.2 * len(FIGURES), 3), layout="constrained")
    for axis, name in zip(axes, FIGURES, strict=True):
        figures = [Estimate(**row["figures"][name]) for row in rows]
        middle = [float("nan") if figure.value is None else figure.value for figure in figures]
        low = [figure.low if figure.low is not None else value for figure, value in zip(figures, middle, strict=True)]
        high = [
            figure.high if figure.high is not None else value for figure, value in zip(figures, middle, strict=True)
        ]
        axis.plot(places, middle, marker="o")
        axis.fill_between(places, low, high, alpha=0.2)
        if figures[-1].real_vs_real is not None:
            axis.axhline(figures[-1].real_vs_real, linestyle="--", color="grey")
        axis.set_xticks(places, labels)
        axis.set_title(name)
        axis.set_xlabel("epoch" if varied == "checkpoint" else varied.replace("_", " "))
    with atomic_path(file) as temporary:
        drawing.savefig(temporary, format="png", dpi=110)
    pyplot.close(drawing)


if __name__ == "__main__":
    main()
