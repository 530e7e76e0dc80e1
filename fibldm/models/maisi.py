"""MAISI's autoencoder, which convolves a volume slab by slab, guarded against sizes that it would spoil in silence."""

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiConvolution, MaisiGroupNorm3D
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder, Posterior, check_divisible

# MAISI's slabs overlap by 3 cells (4 where they are halved); a thinner slab starts before the volume does.
_THINNEST = 4


class MaisiAutoencoder(Autoencoder):
    """The KL autoencoder of MAISI (Guo et al. 2025).

    Its convolutions cut one axis into ``num_splits`` slabs. Where these do not divide the axis evenly, on every level,
    the rest is lost: of 36 voxels, 2 slabs give back 32.

    Args:
        network: MONAI's ``AutoencoderKlMaisi``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        split = next(part for part in network.modules() if isinstance(part, MaisiConvolution))
        self.splits, self.axis = split.num_splits, split.dim_split
        self.half_norms = any(part.norm_float16 for part in network.modules() if isinstance(part, MaisiGroupNorm3D))

    def encode(self, volume: Tensor) -> Posterior:
        """See `Autoencoder.encode`.

        Raises:
            FibldmError: an axis is not divisible by the compression, an axis is not divisible into the slabs, or
                ``norm_float16`` is used without autocast on CUDA.
        """
        self._check(tuple(volume.shape[2:]), volume.device)
        return super().encode(volume)

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Autoencoder.decode`.

        Raises:
            FibldmError: as for `encode`.
        """
        size = tuple(cells * step for cells, step in zip(latent.shape[2:], self.compression, strict=True))
        self._check(size, latent.device)
        return super().decode(latent, mask)

    def _check(self, size: tuple[int, ...], device: torch.device) -> None:
        if self.half_norms and not (device.type == "cuda" and torch.is_autocast_enabled("cuda")):
            raise FibldmError(
                f"norm_float16 must be used on CUDA and under autocast; the volume is on {device}",
                "set network_def::network::norm_float16 to false",
            )
        if self.splits == 1:
            return
        divisor = list(self.compression)
        divisor[self.axis] *= self.splits
        check_divisible(size, divisor, f"autoencoder compression x {self.splits} slabs of MAISI along axis {self.axis}")
        if size[self.axis] < _THINNEST * divisor[self.axis]:
            raise FibldmError(
                f"a slab of MAISI must hold at least {_THINNEST} cells of the latent; {self.splits} slabs of "
                f"{size[self.axis]} voxels hold {size[self.axis] // divisor[self.axis]}",
                "lower network_def::network::num_splits",
            )
