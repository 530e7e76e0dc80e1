"""Features of a volume that need no network: intensity, edges and texture within each label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Sample, each_channel
from fibldm.files import hash_value
from fibldm.volumes.grid import long_axes

WHOLE = "whole"

_VERSION = 1  # Count up whenever the same volume gives other features.
_BACKGROUND = 0
_PERCENTILES = (10, 50, 90)
_INTENSITY = ("mean", "std", *(f"p{percent}" for percent in _PERCENTILES))


@dataclass(frozen=True)
class Radiomics:
    """A fixed list of features.

    In each label but the background, and in the whole field of view: mean, standard deviation and percentiles of the
    intensity; mean and standard deviation of the gradient's magnitude, per mm; at each scale ``s`` the mean of
    ``s^2 |Laplacian of Gaussian|`` (Lindeberg 1998, "Feature detection with automatic scale selection", section 3),
    which compares across scales.

    Attributes:
        labels: names by value, as `Evaluated.labels`.
        scales: standard deviations of the Gaussians, mm.
    """

    labels: dict[int, str]
    scales: tuple[float, ...]

    @classmethod
    def on_grid(cls, labels: dict[int, str], spacing: Sequence[float]) -> "Radiomics":
        """Texture of one and of two voxels along the finest axis of a model grid, the same mm for all its cases."""
        return cls(labels, (min(spacing), 2 * min(spacing)))

    @property
    def names(self) -> list[str]:
        """What each feature is, such as ``left lung/gradient_mean``."""
        texture = [f"texture_{scale:g}mm" for scale in self.scales]
        each = [*_INTENSITY, "gradient_mean", "gradient_std", *texture]
        return [f"{region}/{name}" for region in (*self._names_by_value().values(), WHOLE) for name in each]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return hash_value([_VERSION, sorted(self.labels), self.scales, self.names])

    def __call__(self, sample: Sample) -> NDArray[np.float64]:
        """The features, ``(d,)`` in the order of `names`, one channel after the other; NaN for labels that are absent.

        Raises:
            FibldmError: the volume has fewer than two axes.
        """
        if len(long_axes(sample.valid.shape)) < 2:
            raise FibldmError(f"features need at least two voxels along two axes; got {sample.image.shape}")
        regions = [(sample.labels == value) & sample.valid for value in self._names_by_value()]
        features = []
        for image in each_channel(sample.image):
            texture = [scale**2 * np.abs(blurred_laplacian(image, sample.spacing, scale)) for scale in self.scales]
            gradient = gradient_magnitude(image, sample.spacing)
            features += [_features(region, image, gradient, texture) for region in (*regions, sample.valid)]
        return np.concatenate(features)

    def _names_by_value(self) -> dict[int, str]:
        return {value: name for value, name in sorted(self.labels.items()) if value != _BACKGROUND}


def gradient_magnitude(image: NDArray[np.float32], spacing: Sequence[float]) -> NDArray[np.float32]:
    """Length of the gradient, per mm, ``(X, Y, Z)``; central differences, one-sided at the border."""
    axes = long_axes(image.shape)
    return np.sqrt(sum(np.square(part) for part in np.gradient(image, *(spacing[axis] for axis in axes), axis=axes)))


def blurred_laplacian(image: NDArray[np.float32], spacing: Sequence[float], scale: float) -> NDArray[np.float32]:
    """Laplacian of Gaussian, per mm^2, ``(X, Y, Z)``.

    Second differences of the blurred volume: sampled derivatives of a Gaussian narrower than a voxel, as thick slices
    make it, would not sum to zero.

    Args:
        image: ``(X, Y, Z)``.
        spacing: mm along each axis.
        scale: standard deviation of the Gaussian, mm.
    """
    smooth = ndimage.gaussian_filter(image, [scale / step for step in spacing], mode="nearest")
    parts = [
        ndimage.correlate1d(smooth, [1.0, -2.0, 1.0], axis=axis, mode="nearest") / step**2
        for axis, step in enumerate(spacing)
    ]
    laplacian: NDArray[np.float32] = np.sum(parts, axis=0)
    return laplacian


def _features(
    region: NDArray[np.bool_],
    image: NDArray[np.float32],
    gradient: NDArray[np.float32],
    texture: Sequence[NDArray[np.floating[Any]]],
) -> NDArray[np.float64]:
    if not region.any():
        return np.full(len(_INTENSITY) + 2 + len(texture), np.nan)
    inside, edges = image[region].astype(np.float64), gradient[region].astype(np.float64)
    return np.array(
        [
            inside.mean(),
            inside.std(),
            *np.percentile(inside, _PERCENTILES),
            edges.mean(),
            edges.std(),
            *(values[region].mean(dtype=np.float64) for values in texture),
        ]
    )
