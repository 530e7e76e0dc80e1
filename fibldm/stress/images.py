"""Changes of an image in its own units; the same image, change and seed give the same voxels."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.volumes.grid import Volume

_SOFT_VOXELS = 0.7  # of the border of a label whose contrast changes
_FWHM = 2 * np.sqrt(2 * np.log(2))

Floats = NDArray[np.float64]


class ImageChange(Protocol):
    """One change of an image."""

    def __call__(self, image: Floats, mask: Volume, rng: np.random.Generator) -> Floats:
        """The image after it.

        Args:
            image: ``(X, Y, Z)`` in the units of the file.
            mask: labels on the same grid.
            rng: of this change of this image.
        """


@dataclass(frozen=True)
class Noise:
    """Noise added to an image.

    Attributes:
        sigma: standard deviation in the image's units (HU, SUV, or as they are).
        rician: whether the image is the magnitude of a complex one, as in MRI, and the noise lies on both of its parts
            (Gudbjartsson & Patz 1995, "The Rician distribution of noisy MRI data", equation 1).
    """

    sigma: float
    rician: bool

    def __call__(self, image: Floats, mask: Volume, rng: np.random.Generator) -> Floats:
        noisy = image + rng.normal(0, self.sigma, image.shape)
        return np.hypot(noisy, rng.normal(0, self.sigma, image.shape)) if self.rician else noisy


@dataclass(frozen=True)
class Blur:
    """An image blurred by a Gaussian.

    Attributes:
        mm: its full width at half maximum.
    """

    mm: float

    def __call__(self, image: Floats, mask: Volume, rng: np.random.Generator) -> Floats:
        blurred: Floats = ndimage.gaussian_filter(
            image, self.mm / _FWHM / np.asarray(mask.grid.spacing), mode="nearest"
        )
        return blurred


@dataclass(frozen=True)
class Contrast:
    """A label made brighter or darker than it is, softly at its border.

    Attributes:
        label: value.
        shift: added to it, in the image's units.
    """

    label: int
    shift: float

    def __call__(self, image: Floats, mask: Volume, rng: np.random.Generator) -> Floats:
        share = ndimage.gaussian_filter((mask.array == self.label).astype(np.float64), _SOFT_VOXELS)
        changed: Floats = image + self.shift * share
        return changed


def changed(image: Volume, mask: Volume, change: ImageChange, rng: np.random.Generator) -> Volume:
    """An image after a change, of the same type; integers are rounded and stay within their range."""
    dtype: Any = image.array.dtype
    array = change(image.array.astype(np.float64), mask, rng)
    if np.issubdtype(dtype, np.integer):
        array = np.clip(np.rint(array), np.iinfo(dtype).min, np.iinfo(dtype).max)
    return Volume(array.astype(dtype), image.affine, image.space)
