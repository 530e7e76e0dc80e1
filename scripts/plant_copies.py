"""Does the audit find copies? Changed training scans among held-out ones, and how well similarities tell them apart.

    python scripts/plant_copies.py --data WORK --out OUT [--run RUN] [--count 12] [--only KIND ...]

Of --count training scans, each kind makes changed copies: turned, moved, scaled, with other contrast, blurred, noisy,
and unions of two. Rows are: the area under the curve between copies and all held-out scans, the share that the
threshold names, and the share whose training scan is right. The threshold comes from half of the held-out patients; the
last row says how many of the others it names. With --run, the baseline stands beside it: area and share of the same
copies by `fibldm evaluate copies`, through the autoencoder of that run. OUT/planted.json has all of it.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.cli.output import as_command
from fibldm.evaluation.audit import scans_of_work
from fibldm.evaluation.audit.calibration import Calibration
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.memorisation import TrainingDetails, detail_of
from fibldm.evaluation.reconstruction import Reconstructor
from fibldm.files import write_json
from fibldm.progress import track
from fibldm.volumes.detail import cube_spacing
from fibldm.volumes.formats.nifti import read_grid
from fibldm.volumes.grid import Volume
from fibldm.volumes.matching import Matcher
from fibldm.volumes.writer import write_nifti

Array = NDArray[Any]
Change = Callable[[Array, np.random.Generator], Array]


def _moved(array: Array, random: np.random.Generator) -> Array:
    shift = random.integers(-4, 5, 3)
    return np.asarray(ndimage.shift(array, shift, order=0, mode="constant", cval=float(array.min())))


def _scaled(array: Array, random: np.random.Generator) -> Array:
    return np.asarray(ndimage.zoom(array, random.choice([0.9, 0.93, 1.07, 1.1]), order=1))


def _contrast(array: Array, random: np.random.Generator) -> Array:
    low, high = np.percentile(array, (1, 99))
    return np.asarray(1000 * np.clip((array - low) / (high - low), 0, 1) ** random.choice([0.6, 1.6]) + 50)


def _noisy(array: Array, random: np.random.Generator) -> Array:
    spread = float(np.subtract(*np.percentile(array, (99, 1))))
    return np.asarray(array + random.normal(0, 0.02 * spread, array.shape))


KINDS: Mapping[str, Change] = {
    "as it is": lambda array, _: array,
    "mirrored": lambda array, random: np.flip(array, int(random.integers(3))),
    "turned": lambda array, random: np.rot90(array, int(random.integers(1, 4)), (0, 1)),
    "moved up to 4 voxels": _moved,
    "scaled 0.9 to 1.1": _scaled,
    "another contrast": _contrast,
    "blurred, 1 voxel": lambda array, _: np.asarray(ndimage.gaussian_filter(array, 1.0)),
    "noisy, 2 %": _noisy,
}
UNIONS = (
    ("mirrored", "scaled 0.9 to 1.1"),
    ("turned", "another contrast"),
    ("moved up to 4 voxels", "blurred, 1 voxel"),
    ("scaled 0.9 to 1.1", "noisy, 2 %"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Plant, look up, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="work folder of fibldm prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder of planted.json")
    parser.add_argument("--run", type=Path, help="run on it, for the baseline")
    parser.add_argument("--count", type=int, default=12, help="copies of each kind")
    parser.add_argument("--only", nargs="*", help="kinds, by name")
    chosen = parser.parse_args(arguments)
    with as_command():
        baseline = None if chosen.run is None else Baseline(chosen.run, chosen.data)
        result = plant(chosen.data, chosen.count, chosen.only, baseline)
        write_json(chosen.out / "planted.json", result)
        print(table(result))


class Baseline:
    """What `fibldm evaluate copies` says of volumes: their similarity to the nearest training scan, as they lie."""

    def __init__(self, run: Path, work: Path) -> None:
        self.evaluated, self.reconstruct = Evaluated.open(run, work), Reconstructor.from_run(run)
        cases = self.evaluated.real("training")
        self.known = TrainingDetails.of(cases, [self._detail(case.image) for case in track(cases, "baseline")])
        self.others = [
            self.known.nearest(case, self._detail(case.image)).similarity
            for case in track(self.evaluated.real("validation", "test"), "baseline, held out")
        ]
        self.threshold = 1 - (1 - max(self.others)) / 2

    def similarity(self, volume: Volume) -> float:
        """With the nearest training scan."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "copy.nii.gz"
            write_nifti(file, volume.array, volume.affine)
            return self.known.nearest(self.known.cases[0], self._detail(file)).similarity

    def figures(self, copies: Sequence[float]) -> dict[str, float]:
        """Of similarities of copies."""
        return {
            "baseline_auc": area(copies, self.others),
            "baseline_named": float(np.mean(np.array(copies) > self.threshold)),
        }

    def _detail(self, file: Path) -> Array:
        case = Case(str(file), "", None, file, None)
        detail = detail_of(self.reconstruct(self.evaluated.read(case).image))
        return np.asarray(detail, dtype=np.float16).astype(np.float32)


def area(copies: Sequence[float], others: Sequence[float]) -> float:
    """Under the curve between copies and scans that were held out; half where they are equal."""
    one, two = np.array(copies)[:, None], np.array(others)
    return float(np.mean((one > two) + 0.5 * (one == two)))


def plant(
    work: Path, count: int, only: Sequence[str] | None = None, baseline: Baseline | None = None
) -> dict[str, Any]:
    """Figures of each kind, and of the scans that were held out.

    Raises:
        FibldmError: a set has too few scans.
    """
    training, held_out = scans_of_work(work, "training"), scans_of_work(work, "validation", "test")
    matcher = Matcher.of(
        (scan.volume() for scan in training), cube_spacing([read_grid(scan.file) for scan in training])
    )
    others = {scan.name: matcher.match(matcher.open(scan.volume())).similarity for scan in track(held_out, "held out")}
    calibration = Calibration.of(others, {scan.name: scan.subject for scan in held_out})
    kinds = {name: (change,) for name, change in KINDS.items()}
    kinds |= {f"{one}, {two}": (KINDS[one], KINDS[two]) for one, two in UNIONS}
    rows = {}
    for name in track([name for name in kinds if only is None or name in only], "copies"):
        random = np.random.default_rng(len(rows))
        found, beside = [], []
        for place in random.choice(len(training), min(count, len(training)), replace=False):
            scan = training[place].volume().canonical()
            array = scan.array.astype(np.float32)
            for change in kinds[name]:
                array = change(array, random)
            copy = Volume(np.ascontiguousarray(array, dtype=np.float32), np.diag([*scan.grid.spacing, 1.0]))
            match = matcher.match(matcher.open(copy))
            found.append((match.similarity, match.scan == place))
            beside += [] if baseline is None else [baseline.similarity(copy)]
        similarities = np.array([similarity for similarity, _ in found])
        rows[name] = {
            "auc": area(list(similarities), list(others.values())),
            "named": float(np.mean(similarities > calibration.threshold)),
            "right": float(np.mean([right for _, right in found])),
            **({} if baseline is None else baseline.figures(beside)),
        }
    return {"threshold": calibration.threshold, "held_out_named": calibration.false.to_dict(), "kinds": rows}


COLUMNS = {
    "AUC": ("auc", ".3f"),
    "named": ("named", ".2f"),
    "right patient": ("right", ".2f"),
    "AUC, baseline": ("baseline_auc", ".3f"),
    "named, baseline": ("baseline_named", ".2f"),
}


def table(result: Mapping[str, Any]) -> str:
    """As text, in Markdown."""
    rows, false = result["kinds"], result["held_out_named"]
    there = {name: how for name, how in COLUMNS.items() if all(how[0] in row for row in rows.values())}
    lines = [["copies", *there]]
    lines += [[name, *(format(row[key], how) for key, how in there.values())] for name, row in rows.items()]
    lines += [["held-out scans", "", f"{false['count']} of {false['of']}", *[""] * (len(there) - 2)]]
    head, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{'---|' * (1 + len(there))}", *others])


if __name__ == "__main__":
    main()
