"""Does the audit name a generator that knows its training scans by heart? One is made so, and audited.

    python scripts/overfit.py --data WORK --run RUN --out OUT [--cases 10] [--epochs 600] [--count 1]

Of the work folder a few training cases are left, and all that is held out. Stage 2 is trained on them alone for many
epochs, on the autoencoder of RUN, without augmentation and without dropout; the weights of the last validation are
kept by how well they know these very cases. Volumes are drawn from their masks, and audited. Wanted are more than half
of the volumes named, and an area under the curve of membership of at least 0.9.

What is finished is kept, so that the same command goes on where it was stopped. OUT/overfit.json has the figures.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fibldm.cli.output import as_command
from fibldm.errors import FibldmError
from fibldm.evaluation.audit import audit, scans_of_folder, scans_of_work
from fibldm.files import hash_value, read_json, write_json, write_text
from fibldm.planning.timing import time_stage
from fibldm.planning.traced_step import Request
from fibldm.runs import StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.options import parse_overrides
from fibldm.synthesis import Synthesizer, synthesize_files
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.writer import volume_stem

NAMED, AUC = 0.5, 0.9
"""What an audit must pass: named more than that, told with at least that."""

BY_HEART = {
    "latents": {"views": 1, "latent_draw": "mean"},
    "diffusion": {
        "mask_dropout": 0.0,
        "label_dropout": 0.0,
        "watch_training": False,
        "preview_every": 0,
        "val_interval": 25,
        "checkpoint_every": 5,
        "ema_momentum": 0.01,
    },
}
_OWN_CASES = {"validate::dataset::data": "$@latents.items('training')"}  # which weights are best is asked of them


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and audit what is missing, then print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="work folder of fibldm prepare")
    parser.add_argument("--run", type=Path, required=True, help="run on it whose autoencoder is trained")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--cases", type=int, default=10, help="training cases that are left")
    parser.add_argument("--epochs", type=int, default=600, help="of stage 2")
    parser.add_argument("--count", type=int, default=1, help="volumes of each mask")
    parser.add_argument("--config", action="append", default=["mask_concat"], help="more, of stage 2; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="key=value of stage 2; may be repeated")
    chosen = parser.parse_args(arguments)
    with as_command():
        print(told(overfit(chosen)))


def overfit(chosen: argparse.Namespace) -> dict[str, Any]:
    """Figures of the audit of a generator that knows its training cases by heart.

    Raises:
        FibldmError: there are too few cases, or a step is refused.
    """
    work, run, synthetic = (chosen.out / name for name in ("work", "run", "synthetic"))
    few_cases(chosen.data, work, chosen.cases)
    _keep_autoencoder(chosen.run, run)
    _train(chosen, work, run)
    masks = [entry["label"] for entry in load_datalist(work, "training", masks=True)]
    synthesize_files(run, masks, synthetic, count=chosen.count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = audit(
        scans_of_work(work, "training"),
        scans_of_work(work, "validation", "test"),
        scans_of_folder(synthetic, "synthetic volumes"),
        chosen.out / "audit",
        synthesizer=Synthesizer.from_run(run, device=device),
    )
    figures = figures_of(result)
    write_json(chosen.out / "overfit.json", {"epochs": chosen.epochs, "cases": chosen.cases, **figures})
    return figures


def few_cases(data: Path, work: Path, count: int) -> None:
    """A work folder of the first few training cases of another, and of all that is held out there.

    Raises:
        FibldmError: there are fewer, or the folder has others.
    """
    content = read_json(data / "datalist.json")
    left = load_datalist(data, "training", masks=True)[:count]
    if len(left) < count or count < 2:
        raise FibldmError(f"--cases must be from 2 to the number of training cases; got {count} of {len(left)}")
    splits = {split: load_datalist(data, split) for split in SPLITS} | {"training": left}
    names = [entry["case"] for entry in left]
    made = {**content, **splits, "content": hash_value([content["content"], names])}
    file = work / "datalist.json"
    if file.exists() and read_json(file)["content"] != made["content"]:
        raise FibldmError(f"{work} has other training cases", "choose another --out folder, or the same --cases")
    work.mkdir(parents=True, exist_ok=True)
    for other in (one for one in data.glob("*.json") if one.name != "datalist.json"):
        shutil.copy(other, work)
    write_json(file, made)


def _keep_autoencoder(source: Path, run: Path) -> None:
    """Copy the autoencoder of a run into another one."""
    StageFolder(source, "autoencoder").require()
    target, partly = run / "autoencoder", run / ".autoencoder"
    if not target.exists():
        shutil.rmtree(partly, ignore_errors=True)
        shutil.copytree(source / "autoencoder", partly, ignore=shutil.ignore_patterns("epoch_*.pt", "last.pt"))
        partly.rename(target)


def _train(chosen: argparse.Namespace, work: Path, run: Path) -> None:
    """The latents of the plain cases, and stage 2 on them; how long that will take is said before."""
    grid, before = chosen.out / "grid.yaml", StageFolder(run, "autoencoder").parser()
    write_text(grid, yaml.safe_dump({name: list(before[name]) for name in ("spacing", "size")}))
    folders: dict[str, Any] = {"work": work, "run_dir": run}
    stage_configuration("latents", **folders, configs=[str(grid)], overrides=BY_HEART["latents"]).run()
    configs = (str(grid), *chosen.config)
    changes = {**BY_HEART["diffusion"], "epochs": chosen.epochs, **parse_overrides(chosen.set)}
    configuration = stage_configuration("diffusion", **folders, configs=configs, overrides={**changes, **_OWN_CASES})
    if StageFolder(run, "diffusion").done() is None:
        print(f"stage 2 of {chosen.epochs} epochs takes about {_minutes(work, configs, changes, run):.0f} minutes")
    configuration.run()


def _minutes(work: Path, configs: tuple[str, ...], changes: Mapping[str, Any], run: Path) -> float:
    """Of what is left of stage 2, by a few of its steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = time_stage("diffusion", Request(work, configs, changes, device)).seconds
    return max(0.0, asked - StageFolder(run, "diffusion").seconds()) / 60


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is wanted of an audit, and whether it is so.

    Raises:
        FibldmError: the audit was not possible, or could not ask the weights.
    """
    named, membership = result["copy_rate"], result["membership"]
    if named is None or isinstance(membership, str):
        raise FibldmError(f"the audit must be whole; {result['verdict']}; {membership}", "hold more patients out")
    right = [volume_stem(Path(one["train"])) == _mask_of(Path(one["synthetic"])) for one in result["copies"]]
    return {
        "named": named,
        "right": sum(right),
        "membership": membership,
        "held_out_named": result["held_out_named"],
        "threshold": result["threshold"],
        "ok": named["value"] > NAMED and membership["auc"] >= AUC,
    }


def _mask_of(volume: Path) -> str:
    return volume_stem(volume).rpartition("_")[0]


def told(figures: Mapping[str, Any]) -> str:
    """The figures in words."""
    named, told, false = (figures[name] for name in ("named", "membership", "held_out_named"))
    return "\n".join(
        [
            "named: {count} of {of} volumes [{low:.2f}, {high:.2f}]".format(**named)
            + f", {figures['right']} of them of the case of their mask; wanted more than {NAMED:.0%}",
            "membership: AUC {auc:.3f} [{low:.3f}, {high:.3f}], ".format(**told)
            + "{tpr_at_1_percent_fpr:.2f} told at 1 % false ones; ".format(**told)
            + f"wanted {AUC:g} or more",
            f"held out: {false['count']} of {false['of']} named, threshold {figures['threshold']:.3f}",
            "as wanted" if figures["ok"] else "NOT as wanted",
        ]
    )


if __name__ == "__main__":
    main()
