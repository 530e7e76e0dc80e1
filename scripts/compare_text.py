"""Does a volume follow a sentence? Trains on phantoms with written findings, and measures side and extent of volumes.

    python scripts/compare_text.py --encoder FOLDER --out compared [--subjects N] [--epochs A D] [--only ROW ...]

``text`` knows sentences only, ``lungs`` masks of both lungs as well, which leave the disease open, and ``mask`` whole
masks, whose patients are asked for with a sentence of the other side: how often the mask wins. Sentences are none of
training. Side and extent are read off the grey values of a volume by a ridge regression that was fitted to phantoms of
training and is tried out on those of test (row ``phantoms``). What is finished is kept, so that it can be stopped and
started again; the table goes to OUT/rows.json.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.cli.output import as_command
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import unknown_choice
from fibldm.files import write_json
from fibldm.phantoms.phantoms import FINDINGS, write_phantoms
from fibldm.runs.configuration import stage_configuration
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_nifti
from fibldm.workers import cores

Array = NDArray[Any]

SENTENCES: Mapping[str, tuple[str | None, str | None]] = {
    "The right lung shows mild fibrosis with ground glass.": ("right", "mild"),
    "Slight fibrosis on the right, mostly reticulation.": ("right", "mild"),
    "Moderate fibrosis on the right side with honeycombing.": ("right", "moderate"),
    "In the right lung there is moderate fibrosis, reticulation.": ("right", "moderate"),
    "Severe fibrosis, right lung, honeycombing.": ("right", "severe"),
    "The right lung has extensive fibrosis with ground glass.": ("right", "severe"),
    "The left lung shows mild fibrosis with reticulation.": ("left", "mild"),
    "Slight fibrosis on the left, mostly ground glass.": ("left", "mild"),
    "Moderate fibrosis on the left side with reticulation.": ("left", "moderate"),
    "In the left lung there is moderate fibrosis, ground glass.": ("left", "moderate"),
    "Severe fibrosis, left lung, ground glass.": ("left", "severe"),
    "The left lung has extensive fibrosis with honeycombing.": ("left", "severe"),
    "Both lungs show mild fibrosis with honeycombing.": ("both", "mild"),
    "Slight fibrosis on both sides, mostly ground glass.": ("both", "mild"),
    "Moderate fibrosis on both sides with reticulation.": ("both", "moderate"),
    "In both lungs there is moderate fibrosis, honeycombing.": ("both", "moderate"),
    "Severe fibrosis, both lungs, reticulation.": ("both", "severe"),
    "Both lungs have extensive fibrosis with ground glass.": ("both", "severe"),
    "There is no fibrosis in the lungs.": (None, None),
    "Lungs without any fibrosis.": (None, None),
}
_BOTH = ("mask_concat", "text")
ROWS: Mapping[str, Sequence[str]] = {"text": ("text",), "lungs": _BOTH, "mask": _BOTH}
_OTHER = {"right": "left", "left": "right"}
_BINS = np.array([-1100, *range(-900, -150, 50)])
_HEALTHY, _SHARE, _LIMITS = 0.05, 0.35, {"mild": 0.2, "moderate": 0.42, "severe": np.inf}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a text encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder of phantoms, runs and rows.json")
    parser.add_argument("--subjects", type=int, default=160, help="phantoms")
    parser.add_argument("--seed", type=int, default=3, help="of the phantoms")
    parser.add_argument("--epochs", type=int, nargs=2, default=[60, 300], help="of autoencoder and diffusion")
    parser.add_argument("--config", nargs="*", default=["data_chest_phantom", "demo"], help="grid and networks")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="rows to train, by name")
    parser.add_argument("--count", type=int, default=2, help="volumes of each sentence")
    parser.add_argument("--guidance", type=float, default=2.0)
    chosen = parser.parse_args(arguments)
    with as_command():
        compare(chosen)


def compare(chosen: argparse.Namespace) -> None:
    """Write ``OUT/rows.json`` and print it.

    Raises:
        FibldmError: a row is unknown, or a step is refused.
    """
    for name in chosen.only:
        if name not in ROWS:
            raise unknown_choice("row", name, ROWS)
    write_phantoms(chosen.out / "phantoms", subjects=chosen.subjects, seed=chosen.seed, findings=True, workers=cores())
    works = {name: _work(chosen.out, name) for name in dict.fromkeys(["text", *chosen.only])}
    ruler = Ruler.fit([read_case(entry) for entry in load_datalist(works["text"], "training")])
    test = load_datalist(works["text"], "test")
    tried = [(_none(entry["side"]), _none(entry["extent"]), ruler(read_case(entry)[0])) for entry in test]
    rows = {"phantoms": accuracy(tried)}
    for name in chosen.only:
        run = _train(chosen, name, works[name])
        rows[name] = accuracy(_drawn(chosen, name, run, works[name], ruler))
        write_json(chosen.out / "rows.json", rows)
    print(table(rows))


class Ruler:
    """Reads off a volume which fraction of each lung is diseased.

    Args:
        mean: of the features.
        std: of the features.
        weights: of the regression, the intercept last.
    """

    def __init__(self, mean: Array, std: Array, weights: Array) -> None:
        self.mean, self.std, self.weights = mean, std, weights

    @classmethod
    def fit(cls, cases: Sequence[tuple[Volume, Volume]], penalty: float = 1.0) -> "Ruler":
        """To volumes and their labels, each lung an example."""
        features = np.concatenate([lung_features(volume) for volume, _ in cases])
        shares = np.concatenate([diseased(labels) for _, labels in cases])
        mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
        design = np.hstack([(features - mean) / std, np.ones((len(features), 1))])
        normal = design.T @ design + penalty * np.eye(design.shape[1])
        return cls(mean, std, np.linalg.solve(normal, design.T @ shares))

    def __call__(self, volume: Volume) -> Array:
        """Of the right and the left lung."""
        features = (lung_features(volume) - self.mean) / self.std
        return np.clip(np.hstack([features, np.ones((2, 1))]) @ self.weights, 0, 1)


def lung_features(volume: Volume) -> Array:
    """Shares of HU in the right and the left half of what lies within the body, ``(2, bins)``."""
    turned = volume.canonical()
    array = turned.array.astype(np.float32)
    body = ndimage.binary_opening(array > -300, iterations=1)
    inside = np.stack([ndimage.binary_fill_holes(body[..., z]) for z in range(body.shape[2])], axis=2)
    inside = ndimage.binary_erosion(inside, iterations=2) & (ndimage.uniform_filter(array, 3) < -150)
    middle = np.nonzero(body)[0].mean()  # x grows to the right in RAS+
    right = np.arange(array.shape[0])[:, None, None] > middle
    counted = [np.histogram(array[inside & half], _BINS)[0] for half in (right, ~right)]
    return np.stack([part / max(part.sum(), 1) for part in counted])


def diseased(labels: Volume) -> Array:
    """The same fraction by labels."""
    array = labels.canonical().array
    right = np.arange(array.shape[0])[:, None, None] > np.nonzero(array)[0].mean()
    lungs = [np.isin(array, (1, 2, 4, 5, 6)) & half for half in (right, ~right)]
    return np.array([(array[lung] > 3).mean() if lung.any() else 0.0 for lung in lungs])


def read_case(entry: Mapping[str, Any]) -> tuple[Volume, Volume]:
    """Image and labels."""
    return read_volume(str(entry["image"])), read_volume(str(entry["label"]))


def said(shares: Array) -> tuple[str | None, str | None]:
    """Side and extent of fractions."""
    most = shares.max()
    if most < _HEALTHY:
        return None, None
    extent = next(name for name, limit in _LIMITS.items() if most < limit)
    affected = shares > max(_HEALTHY, _SHARE * most)
    return ("both" if affected.all() else "right" if affected[0] else "left"), extent


def accuracy(measured: Sequence[tuple[str | None, str | None, Array]]) -> dict[str, float]:
    """How often side and extent are those that were asked for, of all volumes."""
    pairs = [(side, extent, *said(shares)) for side, extent, shares in measured]
    sides = [side == found for side, _, found, _ in pairs]
    extents = [extent == found for _, extent, _, found in pairs]
    return {"volumes": len(pairs), "side": float(np.mean(sides)), "extent": float(np.mean(extents))}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of figures as text."""
    lines = [f"{name:<10}{row['volumes']:>8g}{row['side']:>8.2f}{row['extent']:>8.2f}" for name, row in rows.items()]
    return "\n".join([f"{'':<10}{'volumes':>8}{'side':>8}{'extent':>8}", *lines])


def _none(text: str) -> str | None:
    return None if text in ("no side", "healthy") else text


def _work(out: Path, name: str) -> Path:
    """A work folder; that of ``lungs`` has masks in which the disease of a lung is the lung."""
    source = out / "phantoms"
    if name == "lungs":
        source = out / "lungs"
        _whole_lungs(out / "phantoms", source)
    work = out / ("work_lungs" if name == "lungs" else "work")
    prepare(
        source / FINDINGS,
        work,
        PrepareSettings(text="finding", keep_columns=("side", "extent", "pattern")),
        workers=cores(),
    )
    return work


def _whole_lungs(phantoms: Path, out: Path) -> None:
    for part in ("images", "labels"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for name in ("dataset.json", FINDINGS):
        shutil.copyfile(phantoms / name, out / name)
    for file in sorted((phantoms / "labels").iterdir()):
        if (out / "labels" / file.name).exists():
            continue
        shutil.copyfile(phantoms / "images" / file.name, out / "images" / file.name)
        labels = read_volume(str(file))
        nearest = ndimage.distance_transform_edt(~np.isin(labels.array, (1, 2)), return_indices=True)[1]
        whole = np.where(labels.array > 3, labels.array[tuple(nearest)], labels.array)
        write_nifti(out / "labels" / file.name, whole.astype(np.uint8), labels.affine, "SYNTHETIC phantom")


def _train(chosen: argparse.Namespace, name: str, work: Path) -> Path:
    base, run = chosen.out / "runs" / "autoencoder", chosen.out / "runs" / name
    autoencoder, diffusion = chosen.epochs
    given: dict[str, Any] = {"configs": chosen.config, "work": chosen.out / "work", "run_dir": base}
    stage_configuration("autoencoder", **given, overrides={"epochs": autoencoder}).run()
    if not (run / "autoencoder").exists():
        shutil.copytree(base / "autoencoder", run / "autoencoder")
    given |= {"work": work, "run_dir": run}
    stage_configuration("latents", **given, overrides={}).run()
    asked = {"epochs": diffusion, "text_encoder": str(chosen.encoder.resolve())}
    asked |= {"mask_dropout": 0.1} if name != "text" else {}
    given["configs"] = [*chosen.config, *ROWS[name]]
    stage_configuration("diffusion", **given, overrides=asked).run()
    return run


def _drawn(
    chosen: argparse.Namespace, name: str, run: Path, work: Path, ruler: Ruler
) -> list[tuple[str | None, str | None, Array]]:
    """What was asked for, and what was measured; of ``mask`` the side and extent of the mask were asked for."""
    synthesizer = Synthesizer.from_run(run, unconditional=name == "text")
    settings = SamplingSettings(steps=10, guidance=chosen.guidance)
    far = [text for text in SENTENCES if synthesizer.conditions["text"].outside(text)]
    print(f"{name}: {len(far)} of {len(SENTENCES)} sentences are out of range and were allowed")
    test = load_datalist(work, "test")
    masks: list[dict[str, Any]] = [{"label": None, "case": "none"}] if name == "text" else test
    jobs = [(text, *asked, masks[number % len(masks)]) for number, (text, asked) in enumerate(SENTENCES.items())]
    if name == "mask":
        of_side = {side: next(text for text, asked in SENTENCES.items() if asked[0] == side) for side in _OTHER}
        jobs = [(of_side[_OTHER[e["side"]]], e["side"], e["extent"], e) for e in test if e["side"] in _OTHER]
    made = []
    for number in range(chosen.count):
        for text, side, extent, entry in jobs:
            mask = None if entry["label"] is None else read_volume(str(entry["label"]))
            asked: dict[str, Any] = {"name": f"{entry['case']} {text}", "number": number, "conditions": {"text": text}}
            volume = synthesizer(mask, settings=settings, allow_extrapolation=True, **asked).volume
            made.append((side, extent, ruler(volume)))
    return made


if __name__ == "__main__":
    main()
