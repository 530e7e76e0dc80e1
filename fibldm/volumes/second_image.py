"""A second image of a patient: brought to the model grid of the first, and whether it shows the same place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid, Volume, resample
from fibldm.volumes.intensity import Intensity

FOLDER = "second_images"
"""Of a work folder: ``CASE.nii.gz`` on their own grids, and `ABOUT`."""

ABOUT = "about.json"

LEAST_OVERLAP = 0.5
"""Share of the smaller field of view that must lie in the other one."""


@dataclass(frozen=True)
class SecondImages:
    """What the second images of a work folder have in common.

    Attributes:
        modality: ``ct``, ``mr``, ``pt`` or ``other``.
        intensity: how they are normalised, each with its own percentiles where it is by percentiles.
    """

    modality: str
    intensity: Intensity

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"modality": self.modality, "intensity": self.intensity.to_dict()}

    @classmethod
    def beside(cls, file: str | Path) -> "SecondImages":
        """Those of the folder in which a second image lies.

        Raises:
            FibldmError: the folder does not say it.
        """
        about = read_json(Path(file).parent / ABOUT)
        return cls(str(about["modality"]), Intensity.from_dict(about["intensity"]))


def read_on_grid(file: str | Path, grid: Grid) -> NDArray[np.float32]:
    """A second image of a work folder as `on_grid` gives it.

    Raises:
        FibldmError: the file cannot be read.
    """
    return on_grid(read_volume(file), grid, SecondImages.beside(file).intensity)


def on_grid(image: Volume, grid: Grid, intensity: Intensity) -> NDArray[np.float32]:
    """An image, normalised on its own grid, on another one: ``(2, X, Y, Z)``, voxels and where they are known.

    Both are 0 outside of its field of view; known is 1 elsewhere.

    Args:
        image: in any axis order, in its units.
        grid: where to.
        intensity: of the image; its percentiles are those of all of it.

    Raises:
        FibldmError: a voxel is not finite, or the image is constant.
    """
    turned = image.canonical()
    normalised = Volume(intensity.normalise(turned.array), turned.affine)
    voxels = resample(normalised, grid, kind="image", fill=0).array
    return np.stack([voxels, _inside(turned.grid, grid)]).astype(np.float32)


def check_overlap(image: Grid, grid: Grid) -> None:
    """See that two grids show the same place.

    Raises:
        FibldmError: less than `LEAST_OVERLAP` of the smaller field of view lies in the other one.
    """
    one, two = (float(np.prod(part.field_of_view)) for part in (image, grid))
    share = min(covered(image, grid) * two / min(one, two), 1.0)
    if share < LEAST_OVERLAP:
        raise FibldmError(
            f"a second image must show the same place; {100 * share:.0f} % of the smaller field of view lies in the "
            f"other one (at least {100 * LEAST_OVERLAP:.0f} %)",
            "check that both are in one coordinate system, of one patient; register them first where they are not",
        )


def covered(image: Grid, grid: Grid) -> float:
    """The share of the voxels of ``grid`` that lie in the field of view of ``image``."""
    return float(_inside(image, grid).mean())


def _inside(image: Grid, grid: Grid) -> NDArray[np.uint8]:
    """1 where a voxel of ``grid`` lies in the field of view of ``image``, which ends at its voxels' edges."""
    ones = Volume(np.ones(image.shape, np.uint8), image.affine)
    inside: NDArray[np.uint8] = resample(ones, grid, kind="label", fill=0).array
    return inside
