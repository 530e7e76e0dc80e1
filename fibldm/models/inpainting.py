"""Latents that are known in some cells: the others are drawn so that they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.process import Prediction, Process
from fibldm.models.samplers import Denoise, draw_noise

RESAMPLED_FROM = 0.6
"""Where resampling begins again, as a share of the time at which sampling began."""


@dataclass(frozen=True)
class KnownLatents:
    """What is known of latents, and how much of the rest is drawn anew.

    Known cells follow their own path from noise to data: whatever the network says of them is replaced by what is
    known, at every call and so at the noise level of that call (Lugmayr et al. 2022, "RePaint", eq. 8). That alone lets
    the other cells know too little of them; what is drawn is brought back to noise and drawn again to fit better (there
    section 4.2, over a longer stretch of the times as in Xu et al. 2023, "Restart sampling", algorithm 1).

    Pulling at the other cells by the gradient of the network (pseudoinverse guidance) comes closer on Gaussian latents
    in one pass. On real networks, whose gradients are no covariance, it drove regions of scans to black and white.

    Attributes:
        z: normalised latents ``(B, C, x, y, z)``.
        inside: which cells are drawn, booleans ``(B, 1, x, y, z)``.
        strength: how much of what is inside is replaced, in (0, 1]: 1 begins with noise; below, with `z` at the noise
            level of this share of the time, of which coarse structure remains (Meng et al. 2022, "SDEdit").
        resampling: how often what is inside is drawn again.

    Raises:
        FibldmError: strength or resampling is out of range.
    """

    z: Tensor
    inside: Tensor
    strength: float = 1.0
    resampling: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise FibldmError(
                f"strength must lie in (0, 1]; got {self.strength}", "1 draws anew, 0.5 keeps coarse structure"
            )
        if self.resampling < 0:
            raise FibldmError(f"resampling must be at least 0; got {self.resampling}", "0 draws once")

    def around(self, denoise: Denoise) -> Denoise:
        """The denoiser that knows these cells."""

        def knowing(z_t: Tensor, t: Tensor) -> Prediction:
            said = denoise(z_t, t)
            return said._replace(z_0=self._kept(said.z_0))

        return knowing

    def draw(
        self,
        sample: Callable[[Denoise, Tensor, Tensor], Tensor],
        denoise: Denoise,
        noise: Tensor,
        times: Tensor,
        *,
        process: Process,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Latents ``(B, C, x, y, z)``: outside as they are known, to the bit.

        Args:
            sample: a sampler with all but the three arguments ``denoise, z, times`` given.
            denoise: the denoiser.
            noise: standard normal, of the shape of `z`.
            times: of a whole sampling, from 1 down to 0, see `Sampler`.
            process: of the denoiser.
            generators: one for each sample, for what resampling draws.
        """
        knowing, times = self.around(denoise), times * self.strength
        begun = process.diffuse(self.z, noise, times[:1].expand(len(noise)))
        z = sample(knowing, torch.where(self.inside, noise, begun) if self.strength == 1 else begun, times)
        for _ in range(self.resampling):
            again = times * RESAMPLED_FROM
            noise = draw_noise(noise.shape[1:], generators).to(noise)
            z = sample(knowing, process.diffuse(self._kept(z), noise, again[:1].expand(len(noise))), again)
        return self._kept(z)

    def _kept(self, z: Tensor) -> Tensor:
        return torch.where(self.inside, z, self.z.to(z.dtype))
