"""What is known of phantoms beside their labels: a class and a number to steer by, a table for ``fibldm prepare``."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm.files import write_text
from fibldm.phantoms.fibrosis import GROUND_GLASS, HONEYCOMBING, RETICULATION

TABLE = "cases.csv"
HEALTHY, FIBROSIS = "healthy", "fibrosis"
_DISEASED = (GROUND_GLASS, RETICULATION, HONEYCOMBING)
_LUNG = (1, 2, *_DISEASED)


def fibrotic_share(labels: NDArray[np.uint8]) -> float:
    """Fraction of the lung (airways left out) that is labelled fibrotic."""
    return float(np.isin(labels, _DISEASED).sum() / np.isin(labels, _LUNG).sum())


def write_table(out: Path, images: Sequence[Path]) -> Path:
    """Write ``out/cases.csv``: image, label, patient, ``disease`` (healthy or fibrosis) and ``extent_percent``.

    Args:
        out: folder of phantoms.
        images: in it, their labels beside them.

    Raises:
        FibldmError: the disk is full.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "subject", "disease", "extent_percent"])
    for image in images:
        labels = np.asarray(nibabel.Nifti1Image.from_filename(out / "labels" / image.name).dataobj)
        share = fibrotic_share(labels)
        subject = image.name.removesuffix(".nii.gz").split("_")[0]
        files = [f"{folder}/{image.name}" for folder in ("images", "labels")]
        writer.writerow([*files, subject, FIBROSIS if share > 0 else HEALTHY, round(100 * share, 2)])
    write_text(out / TABLE, text.getvalue())
    return out / TABLE
