"""The slow change of brightness that receive coils leave across an MR image, and its removal by N4."""

from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume
from fibldm.volumes.scan import Scan

_WORKING_SPACING_MM = 4.0
_ITERATIONS = (50, 50, 30)
_FEWEST_VOXELS = 8
"""Along an axis of the coarser grid, so that it still carries the field's splines."""

Image = NDArray[np.float32]


def correct(mr: Scan | Volume) -> Image:
    """The image divided by its bias field (N4: Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    The field is estimated inside Otsu's foreground on a grid of about 4 mm, has a mean logarithm of 0 there, and
    divides the whole image: zeros stay zeros, and nothing changes its sign. One thread, so that it repeats to the bit.

    Args:
        mr: ``(X, Y, Z)``, or ``(X, Y, Z, C)``, whose channels have fields of their own; any unit.

    Returns:
        Of the same shape, in the same unit.

    Raises:
        FibldmError: the image is not finite, or has no foreground with values above 0.
    """
    spacing = voxel_sizes(mr.affine)
    if mr.array.ndim == 4:
        return np.stack([_corrected(channel, spacing) for channel in np.moveaxis(mr.array, 3, 0)], axis=3)
    return _corrected(mr.array, spacing)


def _corrected(array: NDArray[Any], spacing: NDArray[np.float64]) -> Image:
    import SimpleITK

    volume = array.astype(np.float32)
    foreground = _foreground(volume)
    image = SimpleITK.GetImageFromArray(volume.T)
    mask = SimpleITK.GetImageFromArray(foreground.T.astype(np.uint8))
    for part in (image, mask):
        part.SetSpacing(spacing.tolist())
    factors = [_shrink(length, step) for length, step in zip(volume.shape, spacing, strict=True)]
    n4 = SimpleITK.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(_ITERATIONS)
    n4.SetNumberOfThreads(1)
    n4.Execute(SimpleITK.Shrink(image, factors), SimpleITK.Shrink(mask, factors))
    log_field = SimpleITK.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    return volume / np.exp(log_field - log_field[foreground].mean())


def _foreground(volume: Image) -> NDArray[np.bool_]:
    from skimage.filters import threshold_otsu

    if np.isfinite(volume).all() and volume.max() > max(volume.min(), 0):
        found: NDArray[np.bool_] = (volume > threshold_otsu(volume)) & (volume > 0)
        if found.any():
            return found
    raise FibldmError(
        "a bias field can be corrected only in a finite image with a foreground above 0; it has none",
        "check the image, or leave --bias-field out",
    )


def _shrink(length: int, step: float) -> int:
    return int(max(1, min(_WORKING_SPACING_MM // step, length // _FEWEST_VOXELS)))
