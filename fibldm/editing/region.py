"""Which voxels of a scan are drawn anew."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Grid, Volume

Region = NDArray[np.bool_]

_SAME_PLACE = 1e-3  # voxels


def check_same_grid(volume: Volume, scan: Grid, what: str) -> None:
    """Refuse what does not lie on the voxels of the scan; both in canonical order.

    Raises:
        FibldmError: size or place differ.
    """
    if volume.grid.shape != scan.shape:
        raise FibldmError(
            f"{what} must lie on the voxels of the scan, {_shown(scan.shape)}; it has {_shown(volume.grid.shape)}",
            "resample it to the scan with nearest neighbours, or draw it on the scan",
        )
    off = np.abs(np.linalg.solve(scan.affine, volume.affine) - np.eye(4))[:3]
    if (apart := float((off[:, :3] @ scan.shape + off[:, 3]).max())) > _SAME_PLACE * max(scan.shape):
        raise FibldmError(
            f"{what} must lie where the scan lies; they are up to {apart:.2g} voxels apart",
            "resample it to the scan with nearest neighbours, or draw it on the scan",
        )


def grown(region: Region, margin: float, spacing: tuple[float, float, float]) -> Region:
    """The region and all voxels whose centres lie within ``margin`` mm of one of it."""
    if margin <= 0 or not region.any():
        return region
    inside: Region = ndimage.distance_transform_edt(~region, sampling=spacing) <= margin
    return inside


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
