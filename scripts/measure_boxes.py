"""Do volumes follow their boxes? Phantoms of bright and dark balls, a generator of boxes alone, measured by thresholds.

    python scripts/measure_boxes.py --out OUT [--cases 200] [--minutes 60] [--draws 50] [--guidance 2]

A phantom is a grey body with up to two *bright* and two *dark* ellipsoids, apart from each other. The generator is
trained without masks (``--config boxes``), and draws volumes by boxes that it has not seen. What it drew is found
without masks: connected parts above and below thresholds half way between body and ellipsoid. Measured are:

* centres found: boxes of which a part of the right class has its middle within one latent cell, along every axis
* extent r: correlation of the extents that were asked for and those of these parts, axes together
* absent: volumes without any part of a class of which no box was asked
* none: volumes without any part where no box was asked at all

OUT/boxes.json has all of it with every box; OUT/data, OUT/work, OUT/run and what was drawn are kept and used again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.cli.output import as_command
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.files import write_json
from fibldm.runs.configuration import stage_configuration
from fibldm.synthesis import Synthesizer
from fibldm.volumes.writer import write_nifti

CLASSES = {1: "bright", 2: "dark"}
GREY = {0: 100.0, 1: 180.0, 2: 20.0}
NOISE = 4.0
SMALLEST = 0.02  # of the volume of the smallest ellipsoid: parts below are noise
SPACING = 2.0  # mm


class Ball(NamedTuple):
    """An ellipsoid: the value of its class, and low and high faces of its box in voxels."""

    value: int
    low: NDArray[np.int_]
    high: NDArray[np.int_]

    @property
    def text(self) -> str:
        middle, size = (self.low + self.high) / 2, self.high - self.low
        place = ",".join(f"{part:g}" for part in middle)
        return f"{CLASSES[self.value]} {'x'.join(map(str, size))} voxels at {place} voxels"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--cases", type=int, default=200, help="phantoms to learn from, at least 5")
    parser.add_argument("--size", type=int, default=48, help="voxels along each axis, a multiple of 16")
    parser.add_argument("--minutes", type=float, help="of stage 2; default: its epochs")
    parser.add_argument("--draws", type=int, default=50, help="volumes to measure")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--config", nargs="*", default=[], help="further configurations of all stages, such as tiny")
    parser.add_argument("--device", default=None)
    chosen = parser.parse_args(arguments)
    with as_command():
        result = measure(chosen)
    write_json(chosen.out / "boxes.json", result)
    for name, value in result["figures"].items():
        print(f"{name:16} {'-' if value is None else format(value, '.3g')}")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained, draw, and measure.

    Raises:
        FibldmError: OUT holds something else, or a stage cannot be trained.
    """
    write_data(chosen.out / "data", chosen.cases, chosen.size)
    train(chosen)
    synthesizer = Synthesizer.from_run(chosen.out / "run", unconditional=True, device=chosen.device or "cpu")
    cell = max(synthesizer.mask.factors)
    rows = []
    for number in range(chosen.draws):
        balls = draw_balls(np.random.default_rng([1, number]), chosen.size) if number % 5 else []
        asked = [ball.text for ball in balls]
        made = synthesizer(
            conditions={"boxes": asked}, number=number, steps=chosen.steps, guidance=chosen.guidance,
            allow_extrapolation=True,
        )  # fmt: skip
        rows.append(compared(balls, parts_of(made.volume.canonical().array, chosen.size), cell))
    settings = {key: str(value) for key, value in vars(chosen).items()}
    return {"settings": settings, "figures": figures(rows), "volumes": rows}


def draw_balls(rng: np.random.Generator, size: int) -> list[Ball]:
    """Up to two of each class, whose boxes are apart."""
    balls: list[Ball] = []
    for value in CLASSES:
        for _ in range(int(rng.integers(0, 3))):
            extent = rng.integers(size // 6, size // 3 + 1, 3)
            low = np.array([rng.integers(1, size - length) for length in extent])
            ball = Ball(value, low, low + extent)
            if all((ball.high + 2 < other.low).any() or (other.high + 2 < ball.low).any() for other in balls):
                balls.append(ball)
    return balls


def phantom(rng: np.random.Generator, size: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Grey values and labels, ``(X, Y, Z)``."""
    labels = np.zeros((size,) * 3, dtype=np.uint8)
    places = np.moveaxis(np.indices(labels.shape), 0, -1) + 0.5
    for ball in draw_balls(rng, size):
        middle, half = (ball.low + ball.high) / 2, (ball.high - ball.low) / 2
        labels[(((places - middle) / half) ** 2).sum(axis=-1) <= 1] = ball.value
    grey = np.vectorize(GREY.get, otypes=[float])(labels) + rng.normal(0, NOISE, labels.shape)
    return grey.round().astype(np.int16), labels


def write_data(folder: Path, cases: int, size: int) -> None:
    """Phantoms as images and labels; what lies there is kept."""
    affine = np.diag([SPACING] * 3 + [1.0])
    for number in range(cases):
        name = f"case-{number:04d}.nii.gz"
        if not (folder / "labels" / name).exists():
            made = phantom(np.random.default_rng([0, number]), size)
            for kind, array in zip(("images", "labels"), made, strict=True):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                write_nifti(folder / kind / name, array, affine, "SYNTHETIC phantom")


def train(chosen: argparse.Namespace) -> None:
    """Autoencoder, latents, and a generator that knows boxes and no mask."""
    settings = PrepareSettings(layout="folders", modality="other", range=(0.0, 200.0), labels=CLASSES)
    prepare(chosen.out / "data", chosen.out / "work", settings)
    grid = {"spacing": [SPACING] * 3, "size": [chosen.size] * 3}
    device = {} if chosen.device is None else {"device": chosen.device}
    for stage, configs in (("autoencoder", ()), ("latents", ()), ("diffusion", ("boxes",))):
        timed = {"minutes": chosen.minutes} if stage == "diffusion" and chosen.minutes else {}
        stage_configuration(
            stage,
            work=chosen.out / "work",
            run_dir=chosen.out / "run",
            configs=[*configs, *chosen.config],
            overrides={**grid, **device, **timed},
        ).run()


def parts_of(grey: NDArray[Any], size: int) -> dict[int, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Low and high faces of what is bright and of what is dark, by thresholds half way to the body."""
    least = SMALLEST * (size / 6) ** 3
    found = {}
    for value in CLASSES:
        middle = (GREY[0] + GREY[value]) / 2
        parts, count = ndimage.label(grey > middle if GREY[value] > GREY[0] else grey < middle)
        counts = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        ends = [[(part.start, part.stop) for part in place] for place in ndimage.find_objects(parts)]
        kept = [np.array(end, dtype=float).T for end, voxels in zip(ends, counts, strict=True) if voxels >= least]
        found[value] = [(low, high) for low, high in kept]
    return found


def compared(
    balls: Sequence[Ball], found: dict[int, list[tuple[NDArray[np.float64], NDArray[np.float64]]]], cell: int
) -> dict[str, Any]:
    """Each box with the nearest part of its class, and which classes were asked for and which are there."""
    boxes = []
    for ball in balls:
        middle, extent = (ball.low + ball.high) / 2, ball.high - ball.low
        parts = [((low + high) / 2 - middle, high - low) for low, high in found[ball.value]]
        off, length = min(parts, key=lambda part: float(np.abs(part[0]).max()), default=(None, None))
        boxes.append(
            {
                "class": CLASSES[ball.value],
                "asked": extent.tolist(),
                "found": None if length is None else length.tolist(),
                "off_voxels": None if off is None else off.tolist(),
                "within_a_cell": off is not None and bool((np.abs(off) <= cell).all()),
            }
        )
    asked = {CLASSES[ball.value] for ball in balls}
    return {"asked": sorted(asked), "there": [CLASSES[value] for value in CLASSES if found[value]], "boxes": boxes}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    boxes = [box for row in rows for box in row["boxes"]]
    near = [box for box in boxes if box["within_a_cell"]]
    extents = np.array([[box["asked"], box["found"]] for box in near], dtype=float).reshape(-1, 2, 3)
    asked, found = extents[:, 0].ravel(), extents[:, 1].ravel()
    varied = len(near) > 1 and asked.std() > 0 and found.std() > 0
    absent = [name not in row["there"] for row in rows for name in CLASSES.values() if name not in row["asked"]]
    none = [not row["there"] for row in rows if not row["asked"]]
    return {
        "boxes": len(boxes),
        "centres found": len(near) / len(boxes) if boxes else None,
        "extent r": float(np.corrcoef(asked, found)[0, 1]) if varied else None,
        "absent": float(np.mean(absent)) if absent else None,
        "none": float(np.mean(none)) if none else None,
    }


if __name__ == "__main__":
    main()
