"""A dataset whose patients have a second image: a CT with its mask, and an MR on a grid of its own."""

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from builders import write_nifti

CT_AFFINE = np.array([[4.0, 0, 0, -60], [0, 4, 0, -50], [0, 0, 4, 10], [0, 0, 0, 1]])
MR_AFFINE = np.array([[0, 0, 5.0, -70], [-3.0, 0, 0, 60], [0, 3.0, 0, 15], [0, 0, 0, 1]])  # turned axes, other voxels
MR_SHAPE = (40, 38, 28)
PLACE = np.array([5.0, -8.0, 70.0])  # of what is bright, RAS+ mm


def ball(shape: tuple[int, ...], affine: np.ndarray, radius: float, centre: np.ndarray = PLACE) -> np.ndarray:
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    return np.asarray(np.linalg.norm(nibabel.affines.apply_affine(affine, voxels) - centre, axis=-1) < radius)


def write_dataset(folder: Path, *, without: tuple[int, ...] = (), **changes: Any) -> Path:
    """Five patients: a CT with its mask, and an MR on a grid of its own in which a small ball is bright."""
    rows, splits = [], ("training", "training", "training", "validation", "test")
    for number, split in enumerate(splits):
        draw = np.random.default_rng(number)
        body = ball((32, 32, 32), CT_AFFINE, 40 + number)
        ct = np.where(body, 40, -1000) + draw.integers(-5, 5, body.shape)
        mr = 100.0 + 400 * ball(MR_SHAPE, MR_AFFINE, 18) + draw.normal(0, 3, MR_SHAPE)
        write_nifti(folder / f"ct{number}.nii.gz", ct.astype(np.int16), CT_AFFINE)
        write_nifti(folder / f"mask{number}.nii.gz", body.astype(np.uint8), CT_AFFINE)
        write_nifti(folder / f"mr{number}.nii.gz", mr.astype(np.float32), MR_AFFINE)
        row = {"image": f"ct{number}.nii.gz", "label": f"mask{number}.nii.gz", "subject": f"p{number}", "split": split}
        row |= {"second_image": "" if number in without else f"mr{number}.nii.gz", "months": 3 * number}
        rows.append(row | (changes if number == 0 else {}))
    with (folder / "cases.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "cases.csv"
