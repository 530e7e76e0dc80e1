"""What of the volumes and of their labels the model grid holds: what lies outside of it, no network ever sees."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.progress import track
from fibldm.volumes.datalist import read_datalist
from fibldm.volumes.grid import Grid, ModelGrid, Volume, resample

_LOOKED_AT = 64  # cases whose labels are counted; a label that none of them holds is looked for in all
_ALL = 0.995  # a share that is told as all of it

_logger = logging.getLogger("fibldm")


@dataclass(frozen=True)
class Coverage:
    """Shares of what the training cases have that lies on the model grid.

    Attributes:
        grid: the model grid.
        cases: training cases whose labels were counted.
        volumes: share of their field of view.
        labels: share of every label's volume, by value; 0 also where no voxel of the grid has the label.
        names: of the labels, by value.
    """

    grid: ModelGrid
    cases: int
    volumes: float
    labels: Mapping[int, float]
    names: Mapping[int, str]

    @property
    def lost(self) -> list[str]:
        """Labels of which no voxel is left."""
        return [f"{self.names[value]} ({value})" for value, share in self.labels.items() if not share]

    def sentence(self) -> str:
        """All of it in words."""
        cut = {f"{self.names[value]} ({value})": share for value, share in self.labels.items() if share < _ALL}
        told = ", ".join(f"{name} {_percent(share)}" for name, share in cut.items())
        rest = f", and of labels: {told}" if cut else (", and all of every label" if self.labels else "")
        return f"the model grid, {self._described()}, holds {_percent(self.volumes)} of the volumes{rest}"

    def require(self) -> None:
        """Refuse a grid that the networks would learn a label on without ever seeing it.

        Raises:
            FibldmError: nothing of a label is left.
        """
        if self.lost:
            raise FibldmError(
                f"the model grid, {self._described()}, must hold some of every label; of {', '.join(self.lost)} it "
                f"holds nothing in any training case (of the volumes, {_percent(self.volumes)} lies on it)",
                "choose a larger size or another spacing, or take the label away (`fibldm prepare --remap VALUE=0`)",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"cases": self.cases, "volumes": self.volumes, "labels": {str(k): v for k, v in self.labels.items()}}

    def _described(self) -> str:
        size, spacing = (" x ".join(f"{part:g}" for part in parts) for parts in (self.grid.size, self.grid.spacing))
        return f"{size} voxels of {spacing} mm"


@dataclass(frozen=True)
class GridCheck:
    """Says what a model grid holds of the training cases of a work folder, when it is called."""

    work: str | Path
    grid: ModelGrid

    def __call__(self) -> None:
        """Say it.

        Raises:
            FibldmError: nothing of a label is left, or a volume is gone.
        """
        found = measure_coverage(Path(self.work), self.grid)
        found.require()
        _logger.info("grid: %s", found.sentence())


def measure_coverage(work: Path, grid: ModelGrid) -> Coverage:
    """What a model grid holds of the training cases.

    Labels are brought to the grid as for training, for up to 64 cases spread over the split.

    Raises:
        FibldmError: ``work`` is no work folder, a volume is gone, or the grid is one slice and the volumes are not.
    """
    datalist = read_datalist(work)
    _refuse_gone(datalist)
    names = {int(value): str(name) for value, name in datalist["labels"].items() if int(value)}
    volumes = {case: _labels_ml(about) for case, about in read_json(work / "report.json")["cases"].items()}
    training = [_Case(entry, volumes[entry["case"]], grid) for entry in datalist["training"]]
    spread = [training[index * len(training) // _LOOKED_AT] for index in range(_LOOKED_AT)]
    chosen = spread if len(training) > _LOOKED_AT else training
    before, after = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    extent = inside = 0.0
    for case in track(chosen, "model grid"):
        extent, inside = extent + case.extent, inside + case.inside
        for value, left in case.left().items():
            before[value], after[value] = before[value] + case.volumes[value], after[value] + left
    for value in [value for value in names if not after[value]]:
        before[value], after[value] = _searched(value, [case for case in training if value in case.volumes])
    shares = {value: min(1.0, after[value] / before[value]) for value in names if before[value]}
    return Coverage(grid, len(chosen), inside / extent, shares, names)


class _Case:
    """A training case: the volumes of its labels as they were prepared, ml, and the grid that training puts it on."""

    def __init__(self, entry: Mapping[str, Any], volumes: Mapping[int, float], grid: ModelGrid) -> None:
        self.entry, self.volumes, self.grid = entry, volumes, grid

    @cached_property
    def source(self) -> Grid:
        """In the closest RAS+ order."""
        header = nibabel.Nifti1Image.from_filename(self.entry["image"])
        x, y, z = header.shape[:3]
        return Grid((x, y, z), header.affine).canonical()

    @cached_property
    def target(self) -> Grid:
        return self.grid.training_grid(self.source)

    @property
    def extent(self) -> float:
        """Volume of the field of view, mm³."""
        return math.prod(self.source.field_of_view)

    @cached_property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the grid begins and ends, in voxels of the case from edge to edge; the axes of both are the same."""
        to_source = np.linalg.inv(self.source.affine) @ self.target.affine
        corners = np.array([[-0.5] * 3, np.array(self.target.shape) - 0.5])
        low, high = np.round(np.sort(nibabel.affines.apply_affine(to_source, corners), axis=0) + 0.5, 6)
        return np.maximum(low, 0), np.minimum(high, self.source.shape)

    @property
    def inside(self) -> float:
        """Volume of it that lies on the grid, mm³."""
        low, high = self.ends
        return float(np.prod(np.maximum(high - low, 0) * self.source.spacing))

    def left(self) -> dict[int, float]:
        """What of the labels lies on the grid, ml; 0 where none of the grid's voxels has the label."""
        as_it_is = np.allclose(self.source.spacing, self.target.spacing)
        if not self.volumes or (as_it_is and math.isclose(self.inside, self.extent, rel_tol=1e-6)):
            return dict(self.volumes)
        image = nibabel.Nifti1Image.from_filename(self.entry["label"])
        label = Volume(np.asanyarray(image.dataobj), image.affine).canonical()
        moved = resample(label, self.target, kind="label", fill=UNKNOWN_LABEL).array
        seen = set(np.unique(moved).tolist())
        x, y, z = (slice(math.ceil(low - 0.5), math.ceil(high - 0.5)) for low, high in zip(*self.ends, strict=True))
        counts = sum((_counts(part) for part in label.array[x, y, z]), start=_counts(label.array[:0]))
        voxel = math.prod(self.source.spacing) / 1000
        return {value: float(counts[value]) * voxel if value in seen else 0.0 for value in self.volumes}


def _counts(labels: NDArray[Any]) -> NDArray[np.int_]:
    return np.bincount(labels.astype(np.uint8).ravel(), minlength=UNKNOWN_LABEL + 1)


def _searched(value: int, cases: Sequence[_Case]) -> tuple[float, float]:
    """Volume of a label, and what is left of it, ml, in all cases up to the first one that has some left."""
    before = 0.0
    for case in cases:
        before += case.volumes[value]
        if left := case.left()[value]:
            return before, left
    return before, 0.0


def _labels_ml(about: Mapping[str, Any]) -> dict[int, float]:
    volumes = about["label_volume_ml"] or {}  # a case without a mask has none
    return {int(value): ml for value, ml in volumes.items() if ml and int(value) not in (0, UNKNOWN_LABEL)}


def _refuse_gone(datalist: Mapping[str, Any]) -> None:
    entries = [entry for split in ("training", "validation") for entry in datalist[split]]
    files = [Path(entry[key]) for entry in entries for key in ("image", "label") if key in entry]
    if gone := [file for file in files if not file.exists()]:
        raise FibldmError(
            f"{len(gone)} of {len(files)} volumes of the work folder are gone, the first is {gone[0]}",
            "put them back, or write the folder anew with fibldm prepare --restart",
        )


def _percent(share: float) -> str:
    if share >= _ALL:
        return "all"
    return "nothing" if not share else f"{100 * share:.2g} %"
