"""The model grid: from a volume's own voxels to those of the networks, and back.

Coordinates are RAS+ millimetres; voxel indices count voxel centres from 0. A volume's axes are first turned to the
closest RAS+ order, by exact flips and permutations, so that a volume stored in another order gives the very same
voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError

Array = NDArray[Any]
Affine = NDArray[np.float64]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns millimetres of DICOM and ITK (left, posterior, superior) into those of NIfTI, and back."""

SPACING_TOLERANCE = 0.10

RIGHT_ANGLES = 5e-5
"""Largest cosine between voxel axes that count as perpendicular; ITK opens no NIfTI beyond 1e-4."""

SCANNER = 1
KNOWN_SPACES = range(1, 6)
"""NIfTI's codes of what millimetres are measured in: the scanner, another scan, Talairach, MNI, another template."""

_SAME_SPACING = 1e-3
_COORDINATE_DECIMALS = 6


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: ``shape`` ``(X, Y, Z)`` and ``affine`` ``(4, 4)``, voxel index to RAS+ mm."""

    shape: tuple[int, int, int]
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along each voxel axis, mm."""
        x, y, z = nibabel.affines.voxel_sizes(self.affine)
        return float(x), float(y), float(z)

    @property
    def field_of_view(self) -> tuple[float, float, float]:
        """Extent along each voxel axis, mm, from voxel edge to voxel edge."""
        x, y, z = (length * step for length, step in zip(self.shape, self.spacing, strict=True))
        return x, y, z

    @property
    def centre(self) -> Affine:
        """Centre of the field of view, RAS+ mm, shape ``(3,)``."""
        return nibabel.affines.apply_affine(self.affine, (np.array(self.shape) - 1) / 2)

    @property
    def corners(self) -> Affine:
        """Centres of the outermost voxels, RAS+ mm, shape ``(8, 3)``."""
        corners = np.stack(np.meshgrid(*[(0, length - 1) for length in self.shape]), axis=-1).reshape(-1, 3)
        return nibabel.affines.apply_affine(self.affine, corners)

    def canonical(self) -> "Grid":
        """The same voxels with their axes in the closest RAS+ order."""
        return Volume(np.broadcast_to(np.uint8(0), self.shape), self.affine).canonical().grid


@dataclass(frozen=True)
class Volume:
    """Voxels ``(X, Y, Z)`` and the grid they lie on.

    Attributes:
        array: voxels.
        affine: ``(4, 4)``, voxel index to RAS+ mm.
        space: NIfTI's code of what these mm are measured in, see `SCANNER`.

    Raises:
        FibldmError: the array is not 3-D.
    """

    array: Array
    affine: Affine
    space: int = SCANNER

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise FibldmError(f"a volume must be 3-D (X, Y, Z); its shape is {self.array.shape}")

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        x, y, z = self.array.shape
        return Grid((x, y, z), self.affine)

    def canonical(self) -> "Volume":
        """The same volume with its axes in the closest RAS+ order; only flips and permutations."""
        return self.turned(orientations.io_orientation(self.affine))

    def turned(self, turn: NDArray[Any]) -> "Volume":
        """The same volume with its axes flipped and permuted, as `nibabel.orientations` describes that."""
        array = orientations.apply_orientation(self.array, turn)
        return replace(self, array=array, affine=self.affine @ orientations.inv_ornt_aff(turn, self.array.shape))


@dataclass(frozen=True)
class ModelGrid:
    """The voxels that a run's networks were trained on.

    A size of 1 along S is that of networks in two dimensions. They take single slices, whose thickness is their own.

    Attributes:
        spacing: mm along R, A, S.
        size: voxels along R, A, S in training.
    """

    spacing: tuple[float, float, float]
    size: tuple[int, int, int]

    def training_grid(self, source: Grid) -> Grid:
        """The training grid around the centre of ``source`` (canonical): cropped or padded to ``size``.

        As in synthesis, a source within 10 % of the model spacing that fits keeps its own, moved by whole voxels only,
        so that image and labels are what was measured and drawn; its centre may then lie half a voxel off.

        Raises:
            FibldmError: the model grid is one slice and the source is not.
        """
        spacing = self._spacing_for(source)
        fits = all(length <= limit for length, limit in zip(source.shape, self.size, strict=True))
        exact = np.allclose(source.spacing, spacing, rtol=_SAME_SPACING, atol=0)
        if exact or (fits and self._near(source)):
            return _cropped_or_padded(source, self.size)
        return _centred(source, spacing, self.size)

    def synthesis_grid(self, source: Grid, multiple: int | Sequence[int]) -> Grid:
        """A grid that covers ``source`` (canonical): of the training size where that covers it, else of a multiple.

        A network is at its best at the size it was trained on. The source's own spacing is kept, and nothing
        interpolated, where it is within 10 % of the model's and does not ask for a larger grid than the model's would.

        Args:
            source: grid of a mask in canonical order.
            multiple: what every axis must be divisible by, or one number for each; not that of a single slice.

        Raises:
            FibldmError: the model grid is one slice and the source is not.
        """
        spacing = self._spacing_for(source)
        extent = np.ceil(np.round(np.array(source.field_of_view) / spacing, 3)).astype(int)
        resampled = self._padded(extent, multiple)
        own = self._padded(source.shape, multiple)
        if self._near(source) and all(length <= limit for length, limit in zip(own, resampled, strict=True)):
            return _cropped_or_padded(source, own)
        return _cropped_or_padded(_centred(source, spacing, tuple(extent)), resampled)

    def _padded(self, shape: Sequence[int] | NDArray[np.int_], multiple: int | Sequence[int]) -> tuple[int, ...]:
        multiples = (multiple,) * len(self.size) if isinstance(multiple, int) else tuple(multiple)
        multiples = (*multiples[:2], 1) if self._is_slice else multiples
        return tuple(
            -(-max(int(length), trained) // step) * step
            for length, trained, step in zip(shape, self.size, multiples, strict=True)
        )

    @property
    def _is_slice(self) -> bool:
        return long_axes(self.size) == [0, 1]

    def _spacing_for(self, source: Grid) -> tuple[float, float, float]:
        """The model's spacing, but for the thickness of a slice."""
        if not self._is_slice:
            return self.spacing
        if source.shape[2] != 1:
            raise FibldmError(
                f"a model grid of one slice, {self.size}, takes single axial slices; the size is {source.shape}",
                "cut volumes with `fibldm slices`, or give a model grid in three dimensions",
            )
        return (*self.spacing[:2], source.spacing[2])

    def _near(self, source: Grid) -> bool:
        off = np.abs(np.array(source.spacing) / self._spacing_for(source) - 1)
        return bool((np.round(off, _COORDINATE_DECIMALS) <= SPACING_TOLERANCE).all())


def resample(
    volume: Volume, target: Grid, *, kind: Literal["image", "label"], fill: float | Literal["edge"] = "edge"
) -> Volume:
    """The volume on another grid.

    Images are interpolated linearly, after a Gaussian that keeps finer detail than the target's from aliasing; labels
    take the nearest voxel.

    Args:
        volume: in any axis order.
        target: where to.
        kind: "image" or "label"; labels keep their type, images become float32.
        fill: value outside the field of view, which ends at the voxels' edges; "edge" repeats the outermost voxel.
    """
    matrix = np.round(np.linalg.inv(volume.affine) @ target.affine, _COORDINATE_DECIMALS)
    if kind == "label":
        return Volume(_nearest(volume.array, matrix, target.shape, fill), target.affine)
    smooth = _smooth(volume.array.astype(np.float32), np.linalg.norm(matrix[:3, :3], axis=1))
    moved = ndimage.affine_transform(
        smooth, matrix[:3, :3], matrix[:3, 3], output_shape=target.shape, order=1, mode="nearest"
    )
    if fill != "edge":
        # SciPy's own constant fill ends at the centres of the outermost voxels, half a voxel too early
        inside = _nearest(np.ones(smooth.shape, dtype=np.uint8), matrix, target.shape, 0)
        moved[inside == 0] = fill
    return Volume(moved, target.affine)


def long_axes(shape: Sequence[int]) -> list[int]:
    """The axes of more than one voxel: all three of a volume, two of a slice."""
    return [axis for axis, length in enumerate(shape) if length > 1]


def turned_like(volume: Volume, grid: Grid) -> Volume:
    """A canonical volume with its axes in the order of ``grid``, the inverse of `Volume.canonical`; exact."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(volume.affine), orientations.io_orientation(grid.affine)
    )
    return replace(volume, array=orientations.apply_orientation(volume.array, turn), affine=grid.affine)


def shear(affine: Affine) -> float:
    """The largest cosine between two voxel axes, 0 of axes at right angles."""
    directions = affine[:3, :3] / nibabel.affines.voxel_sizes(affine)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def squared_up(grid: Grid) -> tuple[Grid, float]:
    """The nearest grid with axes at right angles, of the same spacing and centre, and by how many mm its corners moved.

    What is flipped or permuted comes out as the same flip or permutation of what would come out otherwise.
    """
    u, _, v = np.linalg.svd(grid.affine[:3, :3] / np.array(grid.spacing))
    matrix = u @ v * np.array(grid.spacing)
    middle = (np.array(grid.shape) - 1) / 2
    straight = Grid(grid.shape, nibabel.affines.from_matvec(matrix, grid.centre - matrix @ middle))
    return straight, float(np.linalg.norm(straight.corners - grid.corners, axis=1).max())


def _nearest(array: Array, matrix: Affine, shape: tuple[int, int, int], fill: float | Literal["edge"]) -> Array:
    mode, value = ("nearest", 0.0) if fill == "edge" else ("grid-constant", float(fill))
    moved: Array = ndimage.affine_transform(
        array, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=0, mode=mode, cval=value
    )
    return moved


def _smooth(array: NDArray[np.float32], step: NDArray[np.float64]) -> NDArray[np.float32]:
    sigma = np.maximum(step - 1, 0) / 2
    if (sigma < SPACING_TOLERANCE / 2).all():
        return array
    return ndimage.gaussian_filter(array, sigma, mode="nearest")


def _cropped_or_padded(source: Grid, size: tuple[int, ...]) -> Grid:
    x, y, z = (int(length) for length in size)
    before = (np.array(size) - source.shape) // 2
    return Grid((x, y, z), source.affine @ nibabel.affines.from_matvec(np.eye(3), -before))


def _centred(source: Grid, spacing: tuple[float, float, float], size: tuple[int, ...]) -> Grid:
    matrix = source.affine[:3, :3] / np.array(source.spacing) * np.array(spacing)
    x, y, z = (int(length) for length in size)
    return Grid((x, y, z), nibabel.affines.from_matvec(matrix, source.centre - matrix @ ((np.array(size) - 1) / 2)))
