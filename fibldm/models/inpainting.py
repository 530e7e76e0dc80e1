"""Latents that are known in some cells: the others are drawn so that they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.process import SMALLEST_ALPHA, Prediction, Process
from fibldm.models.samplers import Denoise, draw_noise

_ITERATIONS = 4
_LEAST = 1e-3  # gradient, as a share of 1, below which nothing is said of one cell by another

RESAMPLED_FROM = 0.6
"""Where resampling begins again, as a share of the time at which sampling began."""


@dataclass(frozen=True)
class KnownLatents:
    """What is known of latents, and how much of the rest is drawn anew.

    Known cells follow their own path from noise to data: whatever the network says of them is replaced by what is
    known, at every call and so at the noise level of that call (Lugmayr et al. 2022, "RePaint", eq. 8). That alone lets
    the other cells know too little of them. Their mean, given the known cells, is ``C_ok C_kk^-1`` times what the
    network was wrong about those away, where ``C``, the covariance of the latent given ``z_t``, is proportional to the
    gradient of the network's own prediction (Song et al. 2023, "Pseudoinverse-guided diffusion models"; Boys et al.
    2024, "Tweedie moment projected diffusions"). The inverse is taken by a few conjugate gradients,
    none of which moves the prediction by more than it was wrong, however much cells depend on each other.

    What is drawn can be brought back to noise and drawn again, to fit better still (Xu et al. 2023, "Restart sampling",
    algorithm 1).

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

    def around(self, denoise: Denoise, process: Process) -> Denoise:
        """The denoiser that knows these cells, all of one call at one time."""

        def knowing(z_t: Tensor, t: Tensor) -> Prediction:
            if float(process.alpha(t[:1].double().cpu())) < SMALLEST_ALPHA:  # all is noise, of which nothing is known
                said = denoise(z_t, t)
                return said._replace(z_0=self._kept(said.z_0))
            with torch.enable_grad():
                z_t = z_t.detach().requires_grad_()
                said = denoise(z_t, t)
            wrong = torch.where(self.inside, 0, self.z - said.z_0).detach()
            pulled = said.z_0.detach() + self._pull(said.z_0, z_t, wrong)
            others = (None if part is None else part.detach() for part in said[1:])
            return Prediction(self._kept(pulled), *others)

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
        knowing, times = self.around(denoise, process), times * self.strength
        begun = process.diffuse(self.z, noise, times[:1].expand(len(noise)))
        z = sample(knowing, torch.where(self.inside, noise, begun) if self.strength == 1 else begun, times)
        for _ in range(self.resampling):
            again = times * RESAMPLED_FROM
            noise = draw_noise(noise.shape[1:], generators).to(noise)
            z = sample(knowing, process.diffuse(self._kept(z), noise, again[:1].expand(len(noise))), again)
        return self._kept(z)

    def _pull(self, z_0: Tensor, z_t: Tensor, wrong: Tensor) -> Tensor:
        """``C C_kk^-1 wrong``, by conjugate gradients (Hestenes & Stiefel 1952), each sample by itself."""
        pull, rest = torch.zeros_like(wrong), wrong
        direction, size = rest, _dot(rest, rest)
        for _ in range(_ITERATIONS):
            (moved,) = torch.autograd.grad(z_0, z_t, direction, retain_graph=True)
            along = _dot(direction, moved)
            step = torch.where(along > _LEAST * _dot(direction, direction), size / along, 0)
            pull, rest = pull + step * moved, torch.where(self.inside, 0, rest - step * moved)
            left = _dot(rest, rest)
            direction, size = rest + torch.where(size > 0, left / size, 0) * direction, left
        return pull

    def _kept(self, z: Tensor) -> Tensor:
        return torch.where(self.inside, z, self.z.to(z.dtype))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each sample, ``(B, 1, 1, 1, 1)``."""
    return (one * other).sum(dim=tuple(range(1, one.ndim)), keepdim=True)
