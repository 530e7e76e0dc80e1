"""The model grid that holds every volume of a work folder at the spacing that most of them have."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.files import read_json
from fibldm.volumes.grid import ModelGrid

_MULTIPLE = 16
_OWN_VOXELS = 0.1  # within this share of the model's spacing, volumes are not resampled


def fitting_grid(work: Path) -> ModelGrid:
    """The median spacing, and the smallest size, a multiple of 16, that cuts nothing off; slices stay slices."""
    report = read_json(work / "report.json")
    return _grid([about for name, about in report["cases"].items() if name not in report["left_out"]])


def _grid(cases: list[Mapping[str, Any]]) -> ModelGrid:
    shapes = np.array([about["shape"][:3] for about in cases])
    spacings = np.array([about["spacing_mm"] for about in cases])
    right, front, up = (float(f"{step:.3g}") for step in np.median(spacings, axis=0))
    ratios = spacings / (right, front, up)
    kept = np.all(abs(ratios - 1) <= _OWN_VOXELS, axis=1, keepdims=True)
    needed = np.where(kept, shapes, (shapes * ratios).round(2)).max(axis=0)
    size = [math.ceil(length / _MULTIPLE) * _MULTIPLE for length in needed]
    x, y, z = size
    return ModelGrid((right, front, up), (x, y, z if shapes[:, 2].max() > 1 else 1))
