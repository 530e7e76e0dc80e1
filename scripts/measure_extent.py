"""Does the extent of fibrosis follow its dial, in the mask and in what is synthesized from it?

    python scripts/measure_extent.py --run RUN --data WORK --out OUT

The test masks of a work folder are set to extents of 0 to 60 % of the lungs (`fibldm edit-masks`), and volumes are
synthesized from each with one seed. Measured are:

* the extent in the mask: fibrotic labels by all labels of the lungs;
* the extent that the run's segmenter finds in the volume, and its correlation with the extent asked for;
* voxels of other labels and of the background that the edit changed: there must be none;
* the change outside of the lungs, mean absolute difference to the volume of extent 0, against that of another seed.

OUT/extent.json has every volume, OUT/masks and OUT/volumes the files, which are kept where they are there already.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm.cli.output import as_command
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.files import write_json
from fibldm.mask_editing import edit_masks
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.fibrosis import SetFibrosis
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.formats.nifti import read_volume

PERCENT = (0, 10, 20, 30, 40, 50, 60)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="its work folder")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--masks", type=int, default=6, help="test masks at most")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, help="of the segmenter's training, as it was evaluated")
    chosen = parser.parse_args(arguments)
    with as_command():
        result = measure(Evaluated.open(chosen.run, chosen.data), chosen)
    write_json(chosen.out / "extent.json", result)
    for name, value in result["figures"].items():
        print(f"{name:44} {value:.4g}")


def measure(evaluated: Evaluated, chosen: argparse.Namespace) -> dict[str, Any]:
    """Masks, volumes, and what they show."""
    values = SetFibrosis(0.0).values(Anatomy.of_training(chosen.data))
    lungs = values.pop("lungs")
    fibrotic = [value for kind in values.values() for value in kind]
    segmenter = trained_segmenter(evaluated, overrides=chosen.minutes and {"minutes": chosen.minutes})
    cases = [case for case in evaluated.real("test") if case.label][: chosen.masks]
    masks = {percent: _masks(cases, percent, chosen) for percent in PERCENT}
    volumes = {percent: _volumes(files, f"{percent:02d}", 0, chosen) for percent, files in masks.items()}
    again = _volumes(masks[0], "00_again", 1, chosen)
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        before = read_volume(str(case.label)).array
        outside = ~np.isin(before, [*lungs, *fibrotic])
        for percent in PERCENT:
            labels, volume = read_volume(masks[percent][index]).array, volumes[percent][index]
            found = _found(evaluated, case, masks[percent][index], volume, segmenter)
            rows.append(
                {
                    "case": case.name,
                    "asked": percent / 100,
                    "mask": _extent(labels, lungs, fibrotic),
                    "found": _extent(found, lungs, fibrotic),
                    "changed": int((labels != before)[outside].sum()),
                    "outside": _difference(volume, volumes[0][index], outside),
                    "outside_of_another_seed": _difference(again[index], volumes[0][index], outside),
                }
            )
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "case"}
    figures = {
        "masks": len(cases),
        "extent in the mask, largest error": float(np.abs(columns["mask"] - columns["asked"]).max()),
        "extent in the mask, correlation": float(np.corrcoef(columns["asked"], columns["mask"])[0, 1]),
        "extent in the volume, correlation": float(np.corrcoef(columns["asked"], columns["found"])[0, 1]),
        "extent in the volume, mean absolute error": float(np.abs(columns["found"] - columns["asked"]).mean()),
        "voxels of other labels that changed": int(columns["changed"].sum()),
        "change outside of the lungs": float(columns["outside"][columns["asked"] > 0].mean()),
        "the same between two seeds": float(columns["outside_of_another_seed"].mean()),
    }
    return {"settings": {key: str(value) for key, value in vars(chosen).items()}, "figures": figures, "cases": rows}


def _masks(cases: Sequence[Case], percent: int, chosen: argparse.Namespace) -> list[Path]:
    return edit_masks(
        [str(case.label) for case in cases],
        chosen.out / "masks" / f"{percent:02d}",
        work=chosen.data,
        edits=[f"fibrosis {percent}%"],
        allow_extrapolation=True,
    )


def _volumes(masks: Sequence[Path], name: str, seed: int, chosen: argparse.Namespace) -> list[Path]:
    return synthesize_files(
        chosen.run,
        masks,
        chosen.out / "volumes" / name,
        settings=SamplingSettings(seed=seed, steps=chosen.steps, guidance=chosen.guidance),
        allow_extrapolation=True,
    )


def _found(evaluated: Evaluated, case: Case, mask: Path, volume: Path, segmenter: Segmenter) -> NDArray[np.uint8]:
    sample = evaluated.read(Case(volume.stem, case.subject, case.split, volume, mask))
    return np.where(sample.valid, segmenter.segment(sample.image), 0)


def _extent(labels: NDArray[Any], lungs: Sequence[int], fibrotic: Sequence[int]) -> float:
    return float(np.isin(labels, fibrotic).sum() / max(np.isin(labels, [*lungs, *fibrotic]).sum(), 1))


def _difference(one: Path, other: Path, region: NDArray[np.bool_]) -> float:
    first, second = (read_volume(str(file)).array.astype(np.float64) for file in (one, other))
    return float(np.abs(first - second)[region].mean())


if __name__ == "__main__":
    main()
