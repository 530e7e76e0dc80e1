"""From one modality to another: how close volumes come to the patient's own scan, beside a mean and a plain U-Net.

    python scripts/compare_translation.py --target $FIBLDM_DATA/sarcoma_ct --second $FIBLDM_DATA/sarcoma_mri \\
        --modality ct --second-modality mr --window -200 400 --config data_sarcoma_ct --minutes 25 --out compared

Both folders are in the Decathlon layout, with a file of the same name for each patient. Trains a generator that sees
mask and second image (`mask_concat`, `image`) for --minutes in all, and MONAI's 3-D `UNet`, which regresses the target
from the same two by their mean absolute difference, for as long. On the model grid, within the body of the test
patients, the rows are: ``mean``, the mean of the training patients' targets at each place; ``unet``; ``one``, a drawn
volume, and ``all``, the mean of --count of them; ``unseen``, one drawn without the second image. What is finished is
kept, so that it can be stopped and started again; OUT/rows.json has every patient.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from fibldm import UNKNOWN_LABEL
from fibldm.cli.output import emit_error, log_to_standard_error
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.files import write_json, write_tensors
from fibldm.pipeline import synthesize_masks, train_steps
from fibldm.recipe import Recipe
from fibldm.training.inferers import fast_bfloat16
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.second_image import SecondImages, read_on_grid
from fibldm.workers import cores

Array = NDArray[Any]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BONE = 200.0  # HU, and above
AIR = -0.9  # of what is normalised to [-1, 1], and below
LAYERS: Mapping[str, Any] = {"channels": (32, 64, 128, 256), "strides": (2, 2, 2), "num_res_units": 2}
RATE, BATCH = 1e-3, 2


@dataclass(frozen=True)
class Pair:
    """A patient on the model grid.

    Attributes:
        name: of the case.
        target: ``(1, X, Y, Z)`` in ``[-1, 1]``.
        seen: second image, where it is known, and the mask by its labels, ``(2 + L, X, Y, Z)``.
        body: ``(X, Y, Z)``, what is measured: tissue in the field of view of both.
    """

    name: str
    target: Array
    seen: Array
    body: NDArray[np.bool_]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="images to be drawn, and masks")
    parser.add_argument("--second", type=Path, required=True, help="images of the same patients to draw them from")
    parser.add_argument("--modality", required=True, help="of the target: ct, mr or other")
    parser.add_argument("--second-modality", required=True)
    parser.add_argument("--window", type=float, nargs=2, help="of the one that is CT, HU")
    parser.add_argument("--config", nargs="+", required=True, help="configurations of all stages, the grid among them")
    parser.add_argument("--minutes", type=float, default=25, help="of training, for each of the two ways")
    parser.add_argument("--views", type=int, default=4, help="augmented, of each training patient")
    parser.add_argument("--count", type=int, default=4, help="volumes of each test patient")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    log_to_standard_error()
    try:
        print(table(compare(chosen), chosen.modality))
    except FibldmError as error:
        emit_error(error.message, error.remedy, False)
        sys.exit(2)


def compare(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of every test patient and row, also written to ``OUT/rows.json``.

    Raises:
        FibldmError: a step is refused.
    """
    work, run = chosen.out / "work", chosen.out / "run"
    prepare(_pairs(chosen), work, _preparation(chosen), workers=cores())
    train_steps(recipe(chosen, own=True).stages(), work, run, minutes=chosen.minutes)
    masks = [Path(entry["label"]) for entry in load_datalist(work, "test")]
    for name, own in (("drawn", True), ("unseen", False)):
        synthesize_masks(run, masks, chosen.out / name, recipe(chosen, own=own).drawing(work))
    evaluated = Evaluated.open(run, work)
    training, test = ([_pair(evaluated, case) for case in evaluated.real(split)] for split in ("training", "test"))
    network = _unet(chosen, training)
    mean = np.mean([pair.target for pair in training], axis=0)
    rows = []
    for pair in test:
        drawn, unseen = (_drawn(evaluated, chosen.out / name, pair.name) for name in ("drawn", "unseen"))
        with torch.no_grad():
            regressed = network(torch.from_numpy(pair.seen)[None].to(DEVICE))[0].clamp(-1, 1).float().cpu().numpy()
        made = {"mean": mean, "unet": regressed, "one": drawn[0], "all": np.mean(drawn, axis=0), "unseen": unseen[0]}
        for name, volume in made.items():
            figures = measure(volume, pair, evaluated, chosen.modality)
            rows.append({"case": pair.name, "way": name, **figures})
    write_json(chosen.out / "rows.json", {"rows": rows, "settings": {k: str(v) for k, v in vars(chosen).items()}})
    return rows


def recipe(chosen: argparse.Namespace, *, own: bool) -> Recipe:
    """Of the generator; ``own`` draws from each patient's second image."""
    return Recipe(
        configs=chosen.config,
        of_stages={
            "latents": {"views": chosen.views},
            "diffusion": {"configs": ["mask_concat", "image"], "mask_detail": 4},
            "controlnet": None,
        },
        synthesize={
            "steps": chosen.steps,
            "count": chosen.count if own else 1,
            "own_conditions": own,
            "allow_extrapolation": True,
        },
        minutes=chosen.minutes,
    )


def measure(made: Array, pair: Pair, evaluated: Evaluated, modality: str) -> dict[str, float]:
    """Mean absolute difference in units of the target and correlation, within the body; of CT the Dice of bone too."""
    units = [evaluated.intensity.to_disk(volume)[0][pair.body].astype(np.float64) for volume in (made, pair.target)]
    figures = {"mae": float(np.abs(units[0] - units[1]).mean()), "r": float(np.corrcoef(*units)[0, 1])}
    if modality == "ct":
        bone = [part > BONE for part in units]
        total = sum(int(part.sum()) for part in bone)
        figures["bone"] = float(2 * (bone[0] & bone[1]).sum() / total) if bone[1].any() else float("nan")
    return figures


def table(rows: Sequence[Mapping[str, Any]], modality: str) -> str:
    """Means over patients, as text."""
    names = ["mae", "r", *(["bone"] if modality == "ct" else [])]
    lines = ["".join([f"{'':<10}", *(f"{name:>10}" for name in names)])]
    for way in dict.fromkeys(row["way"] for row in rows):
        values = [np.nanmean([row[name] for row in rows if row["way"] == way]) for name in names]
        lines.append("".join([f"{way:<10}", *(f"{value:>10.3g}" for value in values)]))
    return "\n".join(lines)


def body_of(image: Array) -> NDArray[np.bool_]:
    """What is no air, without specks and holes, of an image in ``[-1, 1]``."""
    return ndimage.binary_fill_holes(ndimage.binary_opening(image > AIR, iterations=1))


def _pairs(chosen: argparse.Namespace) -> Path:
    file = chosen.out / "cases.csv"
    chosen.out.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "subject", "second_image"])
        for image in sorted((chosen.target / "imagesTr").glob("*.nii.gz")):
            paths = [image, chosen.target / "labelsTr" / image.name, chosen.second / "imagesTr" / image.name]
            first, label, second = (str(path.resolve()) for path in paths)
            writer.writerow([first, label, image.name.removesuffix(".nii.gz"), second])
    return file


def _preparation(chosen: argparse.Namespace) -> PrepareSettings:
    window = tuple(chosen.window) if chosen.window else None
    return PrepareSettings(
        modality=chosen.modality,
        window=window if chosen.modality == "ct" else None,
        second_modality=chosen.second_modality,
        second_window=window if chosen.second_modality == "ct" else None,
    )


def _pair(evaluated: Evaluated, case: Case) -> Pair:
    sample = evaluated.read(case)
    entries = {entry["case"]: entry for entry in load_datalist(evaluated.work, str(case.split))}
    file = entries[case.name]["second_image"]
    grid = evaluated.grid.training_grid(read_volume(case.image).grid)
    second, known = read_on_grid(file, grid)
    labels = torch.from_numpy(np.where(sample.labels == UNKNOWN_LABEL, 0, sample.labels).astype(np.int64))[None, None]
    mask = one_hot(labels, max(evaluated.labels) + 1)[0, 1:].numpy()
    is_ct = SecondImages.beside(file).modality == "ct"
    body = body_of(second if is_ct else sample.image) & sample.valid & (known > 0.5)
    return Pair(case.name, sample.image[None], np.concatenate([second[None], known[None], mask]).astype("f4"), body)


def _drawn(evaluated: Evaluated, folder: Path, name: str) -> list[Array]:
    files = sorted(folder.glob(f"{name}_[0-9][0-9][0-9].nii.gz"))
    return [evaluated.read(Case(file.name, name, None, file, None)).image[None] for file in files]


def _unet(chosen: argparse.Namespace, training: Sequence[Pair]) -> nn.Module:
    """Trained for its minutes, mirrored at random from left to right; as it was, where it is finished."""
    torch.manual_seed(0)
    channels = len(training[0].seen)
    network = UNet(spatial_dims=3, in_channels=channels, out_channels=1, norm="INSTANCE", **LAYERS).to(DEVICE)
    file = chosen.out / "unet.safetensors"
    if not file.exists():
        _regress(network, training, 60 * chosen.minutes)
        write_tensors(file, network.state_dict())
    network.load_state_dict(load_file(file))
    return network.eval()


def _regress(network: nn.Module, training: Sequence[Pair], seconds: float) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    began, steps, reduced = time.monotonic(), 0, fast_bfloat16(DEVICE)
    for seen, target, body in _batches(training):
        share = (time.monotonic() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - share)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=reduced):
            made = network(seen)
        loss = (made.float() - target).abs()[body].mean()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(f"unet: {steps} steps, {share:.0%} of the time, loss {float(loss.detach()):.4f}", file=sys.stderr)
    print(f"unet: {steps} steps in {time.monotonic() - began:.0f} s", file=sys.stderr)


def _batches(training: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    random = np.random.default_rng(0)
    while True:
        for chosen in np.array_split(random.permutation(len(training)), -(-len(training) // BATCH)):
            parts = []
            for pair in (training[index] for index in chosen):
                turned = slice(None, None, -1) if random.random() < 0.5 else slice(None)
                parts.append([part[:, turned].copy() for part in (pair.seen, pair.target, pair.body[None])])
            seen, target, body = (torch.from_numpy(np.stack(part)).to(DEVICE) for part in zip(*parts, strict=True))
            yield seen, target, body


if __name__ == "__main__":
    main()
