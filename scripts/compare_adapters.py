"""What few scans of a new site are worth: none of them, an adapter of low rank, or all weights trained further.

    python scripts/compare_adapters.py --base BASE --out OUT [--data WORK] --config DATA --diffusion mask_concat

WORK is a prepared dataset of the site. Without --data, phantoms of a site of its own are made in OUT/site, with another
calibration and a softer kernel than those of `fibldm demo`. Stage 2 of the base, a run or a bundle, must see masks
itself (mask_concat, mask_spade); --config and --diffusion say what it was trained with. Each row trains stage 2 on
--cases patients, draws from the masks of the site's test patients, and is compared with their own scans. What is
finished is kept; the table is printed, and lies in OUT/rows.json.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from fibldm.cli.output import as_command
from fibldm.datasets.preparation import prepare
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.measurements import evaluate
from fibldm.files import read_json, write_json
from fibldm.models.adapters import ADAPTER
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.runs import StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.options import parse_overrides
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.synthesis.bundle import GENERATOR
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import sidecar, write_nifti

ROWS = ("none", "low rank", "full")
_COLUMNS = ("distance", "megabytes", "minutes")
_GAIN, _OFFSET, _SOFT = 0.8, 120.0, 0.7  # of the site's scanner: HU and voxels


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and measure what is missing, then print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a finished run, or the folder of a bundle")
    parser.add_argument("--data", type=Path, help="work folder of the site; phantoms of another scanner without it")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs, volumes and rows.json")
    parser.add_argument("--config", action="append", default=[], help="of all stages of the base; may be repeated")
    parser.add_argument("--diffusion", action="append", default=[], help="of its stage 2 alone, as mask_concat is")
    parser.add_argument("--set", action="append", default=[], help="key=value of stage 2; may be repeated")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help=f"rows, of {', '.join(ROWS)}")
    parser.add_argument("--cases", type=int, default=10, help="training patients of the site")
    parser.add_argument("--subjects", type=int, default=20, help="phantoms of the site, without --data")
    parser.add_argument("--epochs", type=int, default=100, help="of each training")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of both trainings")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--measure", nargs="*", default=[], help="measurements of fibldm evaluate beside the distance")
    chosen = parser.parse_args(arguments)
    with as_command():
        print(table(compare(chosen)))


def compare(chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows by name, those that lay in ``OUT/rows.json`` already among them.

    Raises:
        FibldmError: a row is unknown, or a step is refused.
    """
    for name in chosen.only:
        if name not in ROWS:
            raise unknown_choice("row", name, ROWS)
    work = chosen.data or shifted_site(chosen.out / "site", chosen.subjects)
    file = chosen.out / "rows.json"
    rows: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}
    for name in (name for name in chosen.only if name not in rows):
        made, synthetic = _trained(name, work, chosen), chosen.out / "synthetic" / name.replace(" ", "_")
        _draw(name, made, work, synthetic, chosen)
        rows[name] = {"distance": distance(work, synthetic), **_cost(name, made), **_figures(work, synthetic, chosen)}
        write_json(file, rows)
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of figures as text."""
    names = list(dict.fromkeys([*_COLUMNS, *(name for row in rows.values() for name in row)]))
    width = max(map(len, [*rows, ""]))
    head = " " * width + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in names)

    def cell(value: float | None, name: str) -> str:
        return f"{'-' if value is None else format(value, '.3f'):>{max(12, len(name) + 2)}}"

    return "\n".join([head, *(f"{row:<{width}}" + "".join(cell(rows[row].get(n), n) for n in names) for row in rows)])


def shifted_site(folder: Path, subjects: int, *, seed: int = 100) -> Path:
    """The work folder of phantoms of another scanner: HU are off in gain and offset, and its kernel is softer."""
    if not (folder / "work").exists():
        for image in write_phantoms(folder / "phantoms", subjects=subjects, seed=seed):
            volume = read_volume(str(image))
            soft = gaussian_filter(volume.array.astype(np.float32), _SOFT)
            other = np.rint(_GAIN * soft + _OFFSET).clip(-1024, 3071).astype(np.int16)
            write_nifti(folder / "scans" / "images" / image.name, other, volume.affine, "SYNTHETIC phantom")
        shutil.copytree(folder / "phantoms" / "labels", folder / "scans" / "labels", dirs_exist_ok=True)
        shutil.copy(folder / "phantoms" / "dataset.json", folder / "scans" / "dataset.json")
        prepare(folder / "scans", folder / "work")
    return folder / "work"


def distance(work: Path, synthetic: Path) -> float:
    """Mean over test cases and labels of how far the mean intensity is from that of the patient's own scan."""
    found = []
    for entry in load_datalist(work, "test", masks=True):
        labels, scan = (read_volume(str(entry[key])).array for key in ("label", "image"))
        made = read_volume(str(synthetic / f"{_stem(entry['label'])}_000.nii.gz")).array
        found += [abs(made[labels == one].mean() - scan[labels == one].mean()) for one in np.unique(labels) if one]
    return float(np.mean(found))


def _trained(name: str, work: Path, chosen: argparse.Namespace) -> Path:
    """The run of a row; of none, that which all begin with: the base's autoencoder, and latents of its scale."""
    common = chosen.out / "runs" / "common"
    base = str(chosen.base)

    def train(stage: str, run: Path, *configs: str, **own: Any) -> None:
        used = [*chosen.config, *configs]
        stage_configuration(stage, work=work, run_dir=run, configs=used, overrides=own).run()

    train("autoencoder", common, "autoencoder_as_given", init_from=base)
    train("latents", common, latent_space=base)
    if name == "none":
        return common
    run = chosen.out / "runs" / name.replace(" ", "_")
    for part in ("autoencoder", "latents"):
        if not (run / part).exists():
            shutil.copytree(common / part, run / part)
    patients = {entry["subject"] for entry in load_datalist(work, "training", masks=True)}
    own = {"init_from": base, "init_strict": False, "epochs": chosen.epochs, "learning_rate": chosen.rate}
    own |= {"subset": _share(chosen.cases, patients), **parse_overrides(chosen.set)}
    train("diffusion", run, *chosen.diffusion, *(["adapter"] if name == "low rank" else []), **own)
    return run


def _share(cases: int, patients: set[str]) -> float:
    if cases > len(patients):
        raise FibldmError(f"the site must have {cases} training patients; it has {len(patients)}", "give --cases")
    return cases / len(patients)


def _draw(name: str, made: Path, work: Path, out: Path, chosen: argparse.Namespace) -> None:
    is_bundle = (chosen.base / GENERATOR).is_file()
    base: dict[str, Any] = {"run_dir": None, "bundle": chosen.base} if is_bundle else {"run_dir": chosen.base}
    source = {"run_dir": made} if name == "full" else base
    adapters = {_adapter(made): 1.0} if name == "low rank" else {}
    masks = [str(entry["label"]) for entry in load_datalist(work, "test", masks=True)]
    settings = SamplingSettings(steps=chosen.steps)
    synthesize_files(**source, masks=masks, out=out, settings=settings, adapters=adapters, allow_extrapolation=True)


def _cost(name: str, made: Path) -> dict[str, float]:
    """What is kept beside the base, and the minutes of training."""
    if name == "none":
        return {"megabytes": 0.0, "minutes": 0.0}
    stage = StageFolder(made, "diffusion")
    whole = sum(part.nbytes for part in stage.weights()["model"].values())
    size = _adapter(made).stat().st_size if name == "low rank" else whole
    return {"megabytes": size / 1e6, "minutes": stage.seconds() / 60}


def _figures(work: Path, synthetic: Path, chosen: argparse.Namespace) -> dict[str, float | None]:
    if not chosen.measure:
        return {}
    first = next(path for path in sorted(synthetic.glob("*.nii.gz")))
    weights = read_json(sidecar(first))["source"]["weights"]
    run = chosen.out / "runs" / "common"
    sections = evaluate(chosen.measure, run_dir=run, work=work, synthetic=synthetic, weights=weights)
    return {
        f"{name}/{key}": figure.value for name, section in sections.items() for key, figure in section.figures.items()
    }


def _adapter(run: Path) -> Path:
    return StageFolder(run, "diffusion").checkpoints / ADAPTER


def _stem(mask: str) -> str:
    return Path(mask).name.removesuffix(".nii.gz")


if __name__ == "__main__":
    main()
