"""Where should training look, and how should it weigh times? Ways of both on the latents of a run, for as many epochs.

    fibldm demo --out demo
    python scripts/compare_training_times.py --data demo/work --run demo/runs/demo --out compared [--epochs N]
        [--seeds N ...] [--only NAME ...] [--config FILE ...] [--set KEY=VALUE ...]

Each row trains stage 2 without a condition. Validation losses are means over the same times and noise for all rows;
they can be compared between rows of one target. The spread is the standard deviation of latents that are drawn in ten
ancestral steps, as a share of that of validation latents: 1 is right. Several seeds give mean and range. What is
finished is kept; the table also goes to OUT/rows.json.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fibldm.cli.output import as_command
from fibldm.errors import unknown_choice
from fibldm.files import read_json, write_json
from fibldm.models.denoiser import Denoiser
from fibldm.models.samplers import draw_noise, sampler
from fibldm.models.timesteps import sampling_times
from fibldm.runs import StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.options import parse_overrides
from fibldm.training.latents import Latents, LoadLatent

PROCESS = {"_target_": "fibldm.models.process.VariancePreserving", "schedule": "scaled_linear"}
EPSILON: Mapping[str, Any] = {"process": PROCESS, "target": "epsilon"}
LOGIT_NORMAL = {"_target_": "fibldm.models.timesteps.LogitNormalTimes"}
ROWS: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "flow, uniform": ((), {}),
    "flow, logit-normal": ((), {"times::times": LOGIT_NORMAL}),
    "flow, loss-aware": (("loss_aware_times",), {}),
    "flow, learned log-variance": (("loss_log_variance",), {}),
    "epsilon, uniform": ((), EPSILON),
    "epsilon, free variance": (("learned_variance",), EPSILON),
    "epsilon, L_vlb": (("learned_variance_vlb",), EPSILON),
    "epsilon, L_vlb, loss-aware": (("learned_variance_vlb", "loss_aware_times"), EPSILON),
}
STEPS, DRAWN = 10, 32  # of ancestral sampling; latents


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and print what is missing, then the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="work folder of fibldm prepare")
    parser.add_argument("--run", type=Path, required=True, help="run folder with autoencoder and latents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of rows.json")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="each trains every row once")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="rows to train, by name")
    parser.add_argument("--config", nargs="*", default=["data_chest_phantom", "demo"], help="data and other options")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the configuration, for all rows")
    chosen = parser.parse_args(arguments)
    with as_command():
        compare(
            chosen.data, chosen.run, chosen.out, chosen.only,
            seeds=chosen.seeds, configs=chosen.config, changes={**parse_overrides(chosen.set), "epochs": chosen.epochs},
        )  # fmt: skip


def compare(
    work: Path,
    run: Path,
    out: Path,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    configs: Sequence[str],
    changes: Mapping[str, Any],
) -> None:
    """Add the figures of every name and seed to ``OUT/rows.json``, and print all.

    Raises:
        FibldmError: a name is unknown, or stages 1 and encoding are not finished.
    """
    for name in names:
        if name not in ROWS:
            raise unknown_choice("row", name, ROWS)
    file = out / "rows.json"
    rows: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}
    for seed in seeds:
        for name in names:
            if str(seed) not in rows.setdefault(name, {}):
                trained = _train(name, work, run, out, configs, {**changes, "seed": seed})
                rows[name][str(seed)] = _measure(trained)
                write_json(file, rows)
    print(table(rows))


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Rows of figures as text: the mean over seeds, and the range where there are several."""
    width = max(map(len, rows), default=0)
    names = list(dict.fromkeys(name for seeds in rows.values() for row in seeds.values() for name in row))
    lines = [" " * width + "".join(f"{name:>22}" for name in names)]
    for name, seeds in rows.items():
        cells = [_cell([row[key] for row in seeds.values() if key in row]) for key in names]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.4f}" + (f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else "")


def _train(
    name: str, work: Path, run: Path, out: Path, configs: Sequence[str], changes: Mapping[str, Any]
) -> StageFolder:
    options, overrides = ROWS[name]
    folder = out / "runs" / f"{name.replace(', ', '_').replace(' ', '_')}_{changes['seed']}"
    for stage in ("autoencoder", "latents"):
        StageFolder(run, stage).require()
        if not (folder / stage).exists():
            shutil.copytree(run / stage, folder / stage)
    given = {**overrides, **changes}
    used = (*configs, *options)
    stage_configuration("diffusion", work=work, run_dir=folder, configs=used, overrides=given).run()
    return StageFolder(folder, "diffusion")


@torch.no_grad()
def _measure(stage: StageFolder) -> dict[str, float]:
    """Losses of the last epoch, as all rows have had as many; what is drawn is of the best weights, as always."""
    header, *rows = (line.split(",") for line in (stage.path / "metrics.csv").read_text().splitlines())
    last = {key: float(value) for key, value in zip(header, rows[-1], strict=True) if value}
    figures = {key.replace("validation_loss", "loss"): last[key] for key in last if key.startswith("validation_loss")}
    process, network = stage.component("process"), stage.trained(device="cpu")
    latents = Latents.open(str(stage.run_dir))
    real = torch.stack([LoadLatent(latents, {})(item)["mean"] for item in latents.items("validation")])
    generators = [torch.Generator().manual_seed(seed) for seed in range(DRAWN)]
    times = sampling_times(STEPS, spacing=process.sampling_spacing)
    denoise = Denoiser(network, process, stage.component("target"))
    start = draw_noise(real.shape[1:], generators)
    drawn = sampler("ancestral")(denoise, start, times, process=process, generators=generators)
    seconds = [float(row[header.index("seconds")]) for row in rows]
    return {**figures, "spread": float(drawn.std() / real.std()), "s per epoch": sorted(seconds)[len(seconds) // 2]}


if __name__ == "__main__":
    main()
