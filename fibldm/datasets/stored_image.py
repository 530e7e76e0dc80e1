"""The voxels of an image as a work folder holds them."""

import numpy as np

from fibldm.datasets.checks import AIR, as_float32
from fibldm.volumes.grid import Array


def stored_image(array: Array, modality: str) -> Array:
    """The voxels of an image as written: CT in int16 with padding as air (float32 if it has fractions), else float32.

    Args:
        array: voxels, CT in HU.
        modality: ``ct``, ``mr``, ``pt`` or ``other``.
    """
    if modality != "ct":
        return as_float32(array)
    if array.dtype.kind in "iu":
        signed = array.astype(np.int32) if array.dtype.kind == "u" or array.dtype == np.int8 else array
        return np.maximum(signed, AIR).astype(np.int16, copy=False)
    padded = np.maximum(array, AIR)
    whole = np.rint(padded)
    return as_float32(padded) if np.abs(padded - whole).max() > 1e-3 else whole.astype(np.int16)
