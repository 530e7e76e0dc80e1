"""Masks for the page, which reads and writes NIfTI only."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.masks import as_labels, read_mask
from fibldm.volumes.writer import write_labels

_NAME = "mask.nii.gz"


def as_nifti(mask: Path, names: Mapping[int, str]) -> bytes:
    """A mask of any format as the generator sees it: labels in uint8, on its own grid.

    Args:
        mask: the file.
        names: of the generator's labels by value.

    Raises:
        FibldmError: it is no mask of these labels.
    """
    return _written(as_labels(read_mask(mask, names)))


def empty_mask(grid: ModelGrid) -> bytes:
    """Background on the model grid, around the origin."""
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = [-spacing * (length - 1) / 2 for spacing, length in zip(grid.spacing, grid.size, strict=True)]
    return _written(Volume(np.zeros(grid.size, dtype=np.uint8), affine))


def _written(labels: Volume) -> bytes:
    with TemporaryDirectory() as folder:
        write_labels(Path(folder) / _NAME, labels)
        return (Path(folder) / _NAME).read_bytes()
