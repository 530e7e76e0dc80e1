"""Is the mark in the voxels found again, and only where it is?

    python scripts/measure_mark.py --synthetic FOLDER --real FOLDER --out OUT

Both options may be given several times. Of every synthetic volume (NIfTI) `fibldm recognise` is asked as it is, and
after each of what other software may do to it: saving as whole numbers, turning and mirroring, cropping to half along
each axis, windows in 8 bits, blur, other voxels. Real volumes are asked as they are. OUT/mark.json has the logarithm of
p of every volume, OUT/mark.md the tables: the share recognised, and the least p among real ones. What was measured
before is kept, so that the same command goes on where it was stopped.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.cli.output import as_command
from fibldm.errors import FibldmError
from fibldm.evaluation.recognition import SYNTHETIC, recognise
from fibldm.files import read_json, write_json
from fibldm.progress import track
from fibldm.volumes.formats.nifti import read_volume

Array = NDArray[Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=Path, action="append", default=[], help="folder of volumes with the mark")
    parser.add_argument("--real", type=Path, action="append", default=[], help="folder of volumes without it")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    chosen = parser.parse_args(arguments)
    with as_command():
        measure(chosen.synthetic, chosen.real, chosen.out)


def measure(synthetic: Sequence[Path], real: Sequence[Path], out: Path) -> None:
    """Ask all volumes, and write what they say to ``out``."""
    kept = out / "mark.json"
    results: dict[str, dict[str, dict[str, float]]] = read_json(kept) if kept.is_file() else {}
    for folders, kinds in ((synthetic, MANIPULATIONS), (real, {"as it is": MANIPULATIONS["as it is"]})):
        for folder in folders:
            files = sorted(folder.glob("[!.]*.nii.gz"))
            if not files:
                raise FibldmError(f"{folder} must hold volumes (.nii.gz); it holds none", "check the path")
            told = results.setdefault(str(folder), {})
            for file in track([file for file in files if file.name not in told], folder.name):
                told[file.name] = _asked(file, kinds)
                write_json(kept, results)
    table = _tables([results[str(folder)] for folder in synthetic], [results[str(folder)] for folder in real])
    (out / "mark.md").write_text(table, encoding="utf-8")
    print(table)


def _asked(file: Path, kinds: dict[str, Callable[[Array, np.random.Generator], Array]]) -> dict[str, float]:
    array = read_volume(file).array
    draws = np.random.default_rng(zlib.crc32(file.name.encode()))
    return {name: recognise([changed(array, draws)]).log10_p for name, changed in kinds.items()}


def _turned(array: Array, draws: np.random.Generator) -> Array:
    turned = array.transpose(draws.permutation(3))
    return np.flip(turned, tuple(axis for axis in range(3) if draws.random() < 0.5))


def _cropped(array: Array, draws: np.random.Generator) -> Array:
    """Half of the length along each axis, anywhere."""
    starts = [int(draws.integers(0, length - length // 2 + 1)) for length in array.shape]
    return array[tuple(slice(at, at + length // 2) for at, length in zip(starts, array.shape, strict=True))]


def _windowed(low: float, high: float) -> Callable[[Array, np.random.Generator], Array]:
    """In 8 bits: HU of CT (whole numbers); of others, shares of their range without its ends."""

    def windowed(array: Array, draws: np.random.Generator) -> Array:
        first, last = low, high
        if array.dtype.kind == "f":
            least, most = np.percentile(array, [1, 99])
            first, last = (least + (most - least) * (end + 1000) / 2000 for end in (low, high))
        return np.rint(((array - first) / (last - first)).clip(0, 1) * 255).astype(np.uint8)

    return windowed


def _whole(array: Array) -> Array:
    """As the volume is stored after all: whole numbers of CT, which has them, and of others."""
    return np.rint(array).astype(np.int16)


def _blurred(sigma: float) -> Callable[[Array, np.random.Generator], Array]:
    return lambda array, draws: _whole(ndimage.gaussian_filter(array.astype(np.float32), sigma))


def _resampled(*sizes: float, order: int = 1) -> Callable[[Array, np.random.Generator], Array]:
    """With voxels ``1 / sizes`` as long; along the axes where they change, from a place between voxels on."""

    def resampled(array: Array, draws: np.random.Generator) -> Array:
        shape = [round(length * size) for length, size in zip(array.shape, sizes, strict=True)]
        moved = np.where(np.array(sizes) == 1, 0, draws.random(3) - 0.5)
        start = (np.array(array.shape) - 1) / 2 - (np.array(shape) - 1) / 2 / sizes + moved
        values = array.astype(np.float32)
        options = {"output_shape": shape, "order": order, "mode": "nearest"}
        return _whole(ndimage.affine_transform(values, 1 / np.array(sizes), start, **options))

    return resampled


MANIPULATIONS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "as it is": lambda array, draws: array,
    "saved as int16": lambda array, draws: _whole(array),
    "turned and mirrored": _turned,
    "cropped to half of each axis": _cropped,
    "8 bits, lung window (-1350 to 150 HU)": _windowed(-1350, 150),
    "8 bits, soft tissue window (-160 to 240 HU)": _windowed(-160, 240),
    "blurred, 0.5 voxels": _blurred(0.5),
    "blurred, 0.7 voxels": _blurred(0.7),
    "10 % more voxels along each axis": _resampled(1.1, 1.1, 1.1),
    "10 % fewer voxels along each axis": _resampled(0.9, 0.9, 0.9),
    "10 % fewer voxels, splines": _resampled(0.9, 0.9, 0.9, order=3),
    "10 % more slices": _resampled(1.0, 1.0, 1.1),
}


def _tables(synthetic: Sequence[dict[str, dict[str, float]]], real: Sequence[dict[str, dict[str, float]]]) -> str:
    limit = np.log10(SYNTHETIC)
    lines = ["| what was done | recognised | of | largest p |", "|---|---|---|---|"]
    for name in MANIPULATIONS:
        asked = [told[name] for folder in synthetic for told in folder.values()]
        if asked:
            share = 100 * np.mean([each <= limit for each in asked])
            lines.append(f"| {name} | {share:.1f} % | {len(asked)} | 10^{max(asked):.1f} |")
    without = [told["as it is"] for folder in real for told in folder.values()]
    if without:
        count = sum(each <= limit for each in without)
        lines += ["", f"Of {len(without)} volumes without the mark {count} were called synthetic; least p "]
        lines[-1] += f"{10 ** min(without):.2g}."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
