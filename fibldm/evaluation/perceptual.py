"""LPIPS in three planes, in the features of a network of slices whose weights are a local file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Sample
from fibldm.files import hash_file, hash_value
from fibldm.training.losses import Weighted
from fibldm.training.perceptual import PerceptualDistance
from fibldm.volumes.grid import long_axes

PLANES = ("sagittal", "coronal", "axial")  # slices across X, Y and Z of RAS+

_SLICES = 16
_VERSION = 1  # Count up whenever the same volumes get another distance.


class PlaneDistance:
    """The mean over slices of each plane, see `fibldm.training.perceptual.PerceptualDistance`; 0 is equal.

    Args:
        weights: state dict of a ResNet of slices; which one is told by its layers.
        device: to compute on.

    Raises:
        FibldmError: there is no such file, it holds no ResNet, or one of volumes.
    """

    def __init__(self, weights: str | Path, *, device: str | torch.device = "cpu") -> None:
        if not Path(weights).is_file():
            raise FibldmError(
                f"LPIPS needs a local file of weights (perceptual); there is no {weights}", "check the path"
            )
        self.distance = PerceptualDistance(weights, network=None, slices_per_axis=_SLICES)
        if self.distance.kernel_axes != 2:
            raise FibldmError(
                f"LPIPS needs a network of slices; {weights} has kernels of {self.distance.kernel_axes} axes",
                "give the weights of a ResNet of RadImageNet or ImageNet",
            )
        self.device = torch.device(device)
        self.file = hash_file(Path(weights))
        self.fingerprint = hash_value([_VERSION, _SLICES, self.file])

    @property
    def facts(self) -> dict[str, object]:
        """What a reader of the figures must know."""
        return {
            "weights": self.file,
            "network": self.distance.network,
            "slices": _SLICES,
            "definition": "Zhang et al. 2018, equation 1, with w = 1",
        }

    def names(self, shape: Sequence[int]) -> list[str]:
        """``lpips``, the mean of the planes, and ``lpips/<plane>`` of those planes that volumes of a shape have."""
        return ["lpips", *(f"lpips/{PLANES[axis]}" for axis in planes_of(shape))]

    def __call__(self, real: Sample, made: NDArray[np.float32]) -> NDArray[np.float64]:
        """The distances of a volume from a real scan of the same shape, as `names` has them.

        Slices are standardised by the scan; what lies outside of its field of view counts as equal.
        """
        target = Weighted(self._tensor(real.image), self._tensor(real.valid.astype(np.float32)))
        with torch.inference_mode():
            views = self.distance.views(self._tensor(made), target, axes=planes_of(real.valid.shape))
        planes = torch.stack(views).double().cpu().numpy()
        return np.concatenate([[planes.mean()], planes])

    def _tensor(self, image: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(image).reshape(1, -1, *image.shape[-3:]).to(self.device)


def planes_of(shape: Sequence[int]) -> list[int]:
    """The axes across which slices lie that have more than one voxel both ways."""
    long = set(long_axes(shape))
    return [axis for axis in range(3) if long | {axis} == {0, 1, 2}]
