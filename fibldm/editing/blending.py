"""What was drawn for a region back into the scan around it, without a seam.

Outside nothing changes. Inside lies what was decoded, and two things fade over some voxels from the border: the
difference there between the decoded surroundings and what was decoded inside, so that values meet (as in Pérez et al.
2003, "Poisson image editing", but local); and the scan's own fine detail, which no latent holds, so that its grain
changes into drawn grain without a jump in strength.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.editing.region import Region

Image = NDArray[np.float32]


def blended(scan: Image, around: Image, edited: Image, noise: Image, region: Region, *, depth: float = 3.0) -> Image:
    """The scan with a region replaced.

    Args:
        scan: ``(X, Y, Z)``, as are all.
        around: the scan as decoded from its own latents.
        edited: as decoded from the edited latents.
        noise: residual noise for the edited volume.
        region: what is replaced.
        depth: over how many voxels from the border the scan fades, above 0.

    Returns:
        Float32; outside the region the values of ``scan``, to the bit.
    """
    faded = fading(region, depth)
    angle = faded * (np.pi / 2)  # squares of both shares sum to 1, so that the strength of grain stays
    correction = (1 - faded) * _from_border(around - edited, ~region, sigma=max(depth / 2, 0.5))
    detail = np.cos(angle) * (scan - around) + np.sin(angle) * noise
    return np.where(region, edited + correction + detail, scan).astype(np.float32)


def fading(region: Region, depth: float) -> Image:
    """How little of the scan is left, from 0 at the border of the region to 1 ``depth`` voxels inside, smoothly."""
    # a voxel beside the border lies half a voxel from it
    inside = ndimage.distance_transform_edt(np.pad(region, 1, mode="edge"))[1:-1, 1:-1, 1:-1] - 0.5
    share = np.clip(inside / depth, 0, 1)
    return np.asarray(share * share * (3 - 2 * share), dtype=np.float32)


def _from_border(difference: Image, outside: Region, sigma: float) -> Image:
    """Inside, the mean of a difference outside, weighted by a Gaussian; 0 where there is nothing outside nearby."""
    weight = ndimage.gaussian_filter(outside.astype(np.float32), sigma, mode="nearest")
    summed = ndimage.gaussian_filter(np.where(outside, difference, 0).astype(np.float32), sigma, mode="nearest")
    return np.divide(summed, weight, out=np.zeros_like(summed), where=weight > 1e-3)
