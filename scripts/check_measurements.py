"""Do the measurements grow with what is wrong? Real test scans, degraded more and more, measured as synthetic ones.

    python scripts/check_measurements.py --data WORK --run RUN [--out FILE]

Degradations: blur, noise, masks shifted by voxels, labels permuted. Every figure is printed for each strength, 0 being
the scans as they are, and whether it only ever gets worse. Figures may fall a little where one measures something
else (noise says nothing of a mask), so the table is to be read, and the ones that must grow are marked.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.cli.output import emit_error
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated, Sample
from fibldm.evaluation.faithfulness import measure_faithfulness
from fibldm.evaluation.realism import measure_realism
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.files import write_json
from fibldm.runs.options import parse_overrides
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_synthetic

Degradation = Callable[[Sample, float], Sample]

# The figures that are printed; -1 where lower is worse.
WORSE = {
    "dice": -1,
    "hd95": 1,
    "kid/radiomics": 1,
    "kid/segmenter": 1,
    "mmd/radiomics": 1,
    "mmd/segmenter": 1,
    "spectrum": 1,
}


def blur(sample: Sample, sigma: float) -> Sample:
    """A Gaussian of ``sigma`` voxels."""
    return sample._replace(image=ndimage.gaussian_filter(sample.image, sigma))


def noise(sample: Sample, std: float) -> Sample:
    """White noise of this standard deviation, of the range ``[-1, 1]``."""
    drawn = np.random.default_rng(int(1e6 * np.abs(sample.image).mean())).standard_normal(sample.image.shape)
    return sample._replace(image=(sample.image + std * drawn).clip(-1, 1).astype(np.float32))


def shift_mask(sample: Sample, voxels: float) -> Sample:
    """The mask moved along the first axis."""
    return sample._replace(labels=ndimage.shift(sample.labels, (voxels, 0, 0), order=0, mode="nearest"))


def permute_labels(sample: Sample, labels: float) -> Sample:
    """The names of this many labels handed round."""
    known = [int(label) for label in np.unique(sample.labels) if label not in (0, UNKNOWN_LABEL)][: int(labels)]
    permuted = sample.labels.copy()
    for label, other in zip(known, known[1:] + known[:1], strict=True):
        permuted[sample.labels == label] = other
    return sample._replace(labels=permuted)


DEGRADATIONS: dict[str, tuple[Degradation, Sequence[float], Sequence[str]]] = {
    "blur, voxels": (blur, (0, 0.5, 1, 2), ("kid/radiomics", "mmd/radiomics", "spectrum")),
    "noise, of [-1, 1]": (noise, (0, 0.05, 0.1, 0.2), ("kid/radiomics", "mmd/radiomics", "spectrum")),
    "shifted masks, voxels": (shift_mask, (0, 1, 2, 4), ("dice", "hd95")),
    "permuted labels": (permute_labels, (0, 2, 6), ("dice",)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Do the measurements grow with what is wrong?")
    parser.add_argument("--data", type=Path, required=True, help="work folder")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--set", action="append", default=[], help="key=value, of the segmenter's configuration")
    parser.add_argument("--out", type=Path, default=Path("measurements.json"), help="the JSON to write")
    given = parser.parse_args(arguments)
    evaluated = Evaluated.open(given.run, given.data)
    segmenter = trained_segmenter(evaluated, overrides=parse_overrides(given.set))
    results = {}
    for name, (degrade, strengths, must) in DEGRADATIONS.items():
        if degrade is permute_labels:
            strengths = sorted({min(strength, len(evaluated.labels) - 1) for strength in strengths})
        rows = {strength: measure(evaluated, segmenter, degrade, strength) for strength in strengths}
        print(table(name, rows, must), flush=True)
        results[name] = {str(strength): row for strength, row in rows.items()}
    write_json(given.out, results)


def measure(
    evaluated: Evaluated, segmenter: Segmenter, degrade: Degradation, strength: float
) -> dict[str, dict[str, Any]]:
    """Figures of the test scans after a degradation, written to files and measured from there."""
    with tempfile.TemporaryDirectory() as folder:
        for case in evaluated.real("test"):
            sample = evaluated.read(case)
            degraded = degrade(sample, strength) if strength else sample
            affine = np.diag([*sample.spacing, 1.0])
            scanned = ndimage.find_objects(sample.valid.astype(np.uint8))[0]  # written with padding, it would be air
            image = evaluated.intensity.to_disk(degraded.image[scanned])
            write_synthetic(Path(folder) / f"{case.name}_000.nii.gz", Volume(image, affine), {})
            write_labels(Path(folder) / "masks" / f"{case.name}.nii.gz", Volume(degraded.labels[scanned], affine))
        cases = evaluated.synthetic(folder)
        sections = (measure_faithfulness(evaluated, cases, segmenter), measure_realism(evaluated, cases, segmenter))
        figures = {name: figure for section in sections for name, figure in section.figures.items()}
        return {name: figures[name].to_dict() for name in WORSE}


def table(name: str, rows: Mapping[float, Mapping[str, Mapping[str, Any]]], must: Sequence[str]) -> str:
    """One line per strength, and whether every figure only gets worse."""
    lines = [f"{name:<24}" + "".join(f"{figure + ('*' if figure in must else ''):>16}" for figure in WORSE)]
    real = next(iter(rows.values()))
    lines.append(
        f"{'real against real':<24}" + "".join(f"{_number(real[figure]['real_vs_real']):>16}" for figure in WORSE)
    )
    for strength, row in rows.items():
        lines.append(f"{strength:<24g}" + "".join(f"{_number(row[figure]['value']):>16}" for figure in WORSE))
    grows = {
        figure: all(sign * a[figure]["value"] < sign * b[figure]["value"] for a, b in pairwise(rows.values()))
        for figure, sign in WORSE.items()
    }
    lines.append(f"{'only ever worse':<24}" + "".join(f"{'yes' if grows[figure] else 'no':>16}" for figure in WORSE))
    return "\n".join([*lines, ""])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    try:
        main()
    except FibldmError as error:
        emit_error(error.message, error.remedy, as_json=False)
        sys.exit(2)
