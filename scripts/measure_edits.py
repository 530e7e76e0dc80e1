"""Do edits hold? A label of real test scans is drawn anew, and taken out, and both are measured.

    python scripts/measure_edits.py --run RUN --data WORK --label tumour --out OUT

Of every test scan with the label, `fibldm edit` makes two: *redrawn*, where the label and what lies within --margin mm
of it is drawn anew by the scan's own mask, and *removed*, by a mask without the label. Measured are:

* voxels outside the region that are not as they were: there must be none;
* Dice of the run's segmenter on redrawn labels, beside that on real ones;
* how many removed labels the segmenter still finds, by more than a tenth of their voxels;
* the step across the border of the region, mean absolute difference of neighbours, against the same border before;
* how well the radiomics of the border's shell tell edited from untouched scans: area under the ROC curve of a linear
  discriminant, trained without the patient; 0.5 is chance.

OUT/edits.json has all of it, OUT/redrawn and OUT/removed the volumes, which are kept where they are there already.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from fibldm.cli.output import as_command
from fibldm.editing import EditSettings, edit_files
from fibldm.editing.region import grown
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.cases import Case, Evaluated, Sample
from fibldm.evaluation.radiomics import Radiomics
from fibldm.evaluation.segmentation_metrics import overlaps
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.files import write_json
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels

SHELL = 2  # voxels on each side of the border
SHRINKAGE = 0.3  # of the discriminant's covariance towards its diagonal


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="its work folder")
    parser.add_argument("--label", required=True, help="name of the label")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--margin", type=float, default=6.0, help="mm around the label that are drawn as well")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--resampling", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="of the segmenter's training, as it was evaluated")
    chosen = parser.parse_args(arguments)
    with as_command():
        evaluated = Evaluated.open(chosen.run, chosen.data)
        by_name = {name: value for value, name in evaluated.labels.items() if value}
        if chosen.label not in by_name:
            raise unknown_choice("label", chosen.label, by_name)
        result = measure(evaluated, by_name[chosen.label], chosen)
    write_json(chosen.out / "edits.json", result)
    for name, value in result["figures"].items():
        print(f"{name:32} {value:.3g}")


def measure(evaluated: Evaluated, label: int, chosen: argparse.Namespace) -> dict[str, Any]:
    segmenter = trained_segmenter(evaluated, overrides=chosen.minutes and {"minutes": chosen.minutes})
    rows: list[dict[str, Any]] = []
    shells: list[tuple[str, bool, NDArray[np.float64]]] = []
    for case in evaluated.real("test"):
        mask = read_volume(str(case.label))
        if not (mask.array == label).any():
            continue
        row: dict[str, Any] = {"case": case.name}
        region = grown(mask.array == label, chosen.margin, mask.grid.spacing)
        for kind, new in (("redrawn", mask.array), ("removed", np.where(mask.array == label, 0, mask.array))):
            path = _edited(case, kind, Volume(new, mask.affine), Volume(region.astype(np.uint8), mask.affine), chosen)
            real, made = (read_volume(str(file)).array for file in (case.image, path))
            row[f"{kind}/changed_outside"] = int((real != made)[~region].sum())
            row[f"{kind}/step"] = _step(made, region) / _step(real, region)
            row |= {f"{kind}/{name}": value for name, value in _found(evaluated, case, path, label, segmenter).items()}
            if kind == "redrawn":
                shells += [(case.subject, edited, _shell(array, region, mask, evaluated)) for edited, array in
                           ((False, real), (True, made))]  # fmt: skip
        rows.append(row)
    if not rows:
        raise FibldmError("test scans must have the label; none has", "name another one")

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    figures = {
        "cases": len(rows),
        "voxels changed outside": sum(
            row[f"{kind}/changed_outside"] for row in rows for kind in ("redrawn", "removed")
        ),
        "dice of real labels": mean("redrawn/dice_real"),
        "dice of redrawn labels": mean("redrawn/dice"),
        "removed labels not found": float(np.mean([row["removed/share"] < 0.1 for row in rows])),
        "step across border, redrawn": mean("redrawn/step"),
        "step across border, removed": mean("removed/step"),
        "auc of border shells": _auc(shells),
    }
    return {"settings": {key: str(value) for key, value in vars(chosen).items()}, "figures": figures, "cases": rows}


def _edited(case: Case, kind: str, mask: Volume, region: Volume, chosen: argparse.Namespace) -> Path:
    files = {}
    for name, volume in (("mask", mask), ("region", region)):
        files[name] = chosen.out / "asked" / f"{case.name}_{kind}_{name}.nii.gz"
        write_labels(files[name], volume)
    (path,) = edit_files(
        case.image,
        files["mask"],
        chosen.out / kind,
        run=chosen.run,
        region=files["region"],
        edit=EditSettings(resampling=chosen.resampling),
        steps=chosen.steps,
        guidance=chosen.guidance,
        allow_extrapolation=True,
    )
    return path


def _found(evaluated: Evaluated, case: Case, path: Path, label: int, segmenter: Segmenter) -> dict[str, float]:
    """Dice of the label in the edited and in the real scan, and the share of its voxels that is found in the edited."""
    real, made = evaluated.read(case), evaluated.read(Case(path.stem, case.subject, case.split, path, case.label))
    found = {name: segmenter.segment(sample.image) for name, sample in (("", made), ("_real", real))}
    dice = {
        f"dice{name}": overlaps(part, real.labels, [label], real.spacing)[label].dice for name, part in found.items()
    }
    inside = real.labels == label
    return {**dice, "share": float((found[""] == label)[inside].mean())}


def _step(volume: NDArray[Any], region: NDArray[np.bool_]) -> float:
    """Mean absolute difference of neighbours of which one lies inside."""
    steps = []
    for axis in range(3):
        crossing = np.diff(region.astype(np.int8), axis=axis) != 0
        steps.append(np.abs(np.diff(volume.astype(np.float64), axis=axis))[crossing])
    return float(np.concatenate(steps).mean())


def _shell(volume: NDArray[Any], region: NDArray[np.bool_], mask: Volume, evaluated: Evaluated) -> NDArray[np.float64]:
    around = ndimage.binary_dilation(region, iterations=SHELL) & ~ndimage.binary_erosion(region, iterations=SHELL)
    image = evaluated.intensity.normalise(volume.astype(np.float32))
    sample = Sample(image, around.astype(np.uint8), np.ones(around.shape, dtype=bool), mask.grid.spacing)
    features = Radiomics.on_grid({0: "background", 1: "shell"}, mask.grid.spacing)
    of_shell = [name.startswith("shell/") for name in features.names]
    return features(sample)[of_shell]


def _auc(shells: Sequence[tuple[str, bool, NDArray[np.float64]]]) -> float:
    """Of a linear discriminant (Fisher 1936) that never saw the patient; 0.5 where it cannot tell."""
    subjects = np.array([subject for subject, _, _ in shells])
    edited, features = np.array([part for _, part, _ in shells]), np.stack([part for *_, part in shells])
    scores = np.zeros(len(shells))
    for subject in np.unique(subjects):
        seen = subjects != subject
        centre, scale = features[seen].mean(0), features[seen].std(0) + 1e-9
        x = (features - centre) / scale
        means = [x[seen & (edited == kind)].mean(0) for kind in (False, True)]
        rest = np.concatenate([x[seen & (edited == kind)] - means[int(kind)] for kind in (False, True)])
        covariance = rest.T @ rest / max(len(rest) - 2, 1)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance) + 1e-6)
        direction = np.linalg.solve(covariance, means[1] - means[0])
        scores[~seen] = (x[~seen] - (means[0] + means[1]) / 2) @ direction
    rank = stats.mannwhitneyu(scores[edited], scores[~edited]).statistic
    return float(rank / (edited.sum() * (~edited).sum()))


if __name__ == "__main__":
    main()
