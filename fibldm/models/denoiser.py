"""From a network and a condition to a denoiser, the only thing samplers know."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Prediction, Process, Target
from fibldm.models.samplers import Denoise


@dataclass(frozen=True)
class Denoiser:
    """What a network says of the latent behind ``z_t``.

    Attributes:
        network: in evaluation mode.
        process: the one it was trained on.
        target: what its output means.
        conditions: encoded, by name, see `ConditionedNetwork.forward`.
    """

    network: ConditionedNetwork
    process: Process
    target: Target
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, z_t: Tensor, t: Tensor) -> Prediction:
        """The expected latent at ``z_t`` ``(B, C, x, y, z)`` and times ``t`` ``(B,)`` in (0, 1].

        A network with 2C output channels has learned a variance in the second half of them, see its ``variance``: free,
        it is ``log Var[target | z_t]``, and ``z_0`` is affine in the target at one ``z_t``, so its variance is that one
        times the square of `Process.output_scale`; interpolated, it is a share, through a sigmoid.

        Raises:
            FibldmError: the network has neither C nor 2C output channels.
        """
        known = [self.conditions] if self.conditions else []
        output, channels = self.network(z_t, self.process.network_time(t), *known), z_t.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise FibldmError(
                f"a network on latents of {channels} channels must give {channels}, or {2 * channels} with a learned "
                f"variance; got {output.shape[1]}",
                "change out_channels",
            )
        z_0 = self.process.to_z_0(self.target, output[:, :channels], z_t, t)
        if output.shape[1] == channels:
            return Prediction(z_0)
        if self.network.variance == "interpolated":
            return Prediction(z_0, interpolation=output[:, channels:].sigmoid())
        scale = _per_sample(self.process.output_scale(self.target, t).to(z_t.device), z_t)
        return Prediction(z_0, output[:, channels:] + 2 * scale.log())

    def beside(self, other: "Denoiser") -> "Denoiser":
        """What this one says of the first half of a batch, and one with other conditions of the second, in one call.

        Args:
            other: of the same network, with conditions of the same names and sizes, such as their nulls.
        """
        pairs = {name: torch.cat([part, other.conditions[name]]) for name, part in self.conditions.items()}
        return replace(self, conditions=pairs)

    def within(self, windows: Sequence[tuple[slice, ...]], cells: Sequence[int]) -> "Denoiser":
        """Of parts cut out of the latent: all samples of the first window, then all of the second, and so on.

        Args:
            windows: where the parts lie, in cells.
            cells: size of the latent.
        """
        conditions = {
            name: torch.cat(
                [_cut(part, window, cells) if name in self.network.in_space else part for window in windows]
            )
            for name, part in self.conditions.items()
        }
        return replace(self, conditions=conditions)


def guided(
    conditional: Denoise,
    unconditional: Denoise,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: Sequence[float] = (0.0, 1.0),
    both: Denoise | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), in terms of ``z_0``.

    Guidance alone is the same in terms of any target, as each is affine in ``z_0`` at one ``z_t``. ``rescale`` is not:
    Lin et al. 2024 (section 3.4) give the guided output of the network the standard deviation of its conditional one.
    Here it is always ``z_0`` that gets it: its contrast is what guidance drives beyond the data, and so the remedy does
    not depend on the target. For ``sample`` it is theirs, near noise for ``v`` too; ``epsilon``, mostly noise there, it
    holds back more than theirs. A learned variance is that of the condition.

    Args:
        conditional: with the condition.
        unconditional: with its null, the same that dropout trains.
        scale: 1 is no guidance and costs no second call; 2 goes as far again beyond the condition.
        rescale: share of the rescaled ``z_0``, in [0, 1]; 0.7 in the paper, 0 leaves it out.
        interval: guides at ``low < t <= high`` only, and spares the second call elsewhere (Kynkäänniemi et al. 2024,
            there in noise levels); 1 is noise.
        both: says in one call what both say: of a batch twice, with the condition and with its null; see
            `Denoiser.beside`. None calls one after the other. They differ in rounding.
    """
    if scale == 1:
        return conditional
    low, high = interval

    def denoise(z_t: Tensor, t: Tensor) -> Prediction:
        inside = (low < t) & (t <= high)
        if not inside.any():
            return conditional(z_t, t)
        if both is None:
            prediction, null = conditional(z_t, t), unconditional(z_t, t).z_0
        else:
            said = both(torch.cat([z_t, z_t]), torch.cat([t, t]))
            null = said.z_0[len(z_t) :]
            halves = (None if part is None else part[: len(z_t)] for part in said[1:])
            prediction = Prediction(said.z_0[: len(z_t)], *halves)
        given = prediction.z_0
        beyond = torch.lerp(null, given, scale)
        if rescale:
            beyond = torch.lerp(beyond, beyond * (_deviation(given) / _deviation(beyond)), rescale)
        return prediction._replace(z_0=torch.where(_per_sample(inside, given), beyond, given))

    return denoise


def thresholded(denoise: Denoise, space: LatentSpace, share: float) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3), for diffusion on the voxels themselves.

    Where the absolute value below which ``share`` of a sample's voxels lie is above 1, which no volume is, they are
    clamped there and divided by it.

    Args:
        denoise: says ``z_0``, a volume in [-1, 1] as `space` scales it.
        space: scale of the "latents" of an autoencoder that changes nothing.
        share: in (0, 1]; 0.995 is usual, 1 only divides.
    """

    def inside(z_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(z_t, t)
        volume = space.denormalise(prediction.z_0)
        size = volume.flatten(1).abs()
        # not `quantile`, which refuses more than 16 million values
        limit = size.kthvalue(math.ceil(share * size.shape[1]), dim=1).values.clamp(min=1)
        limit = _per_sample(limit, volume)
        return prediction._replace(z_0=space.normalise(volume.clamp(-limit, limit) / limit))

    return inside


def _cut(condition: Tensor, window: Sequence[slice], cells: Sequence[int]) -> Tensor:
    """A window, in cells of the latent, of a condition that has one or more of its own places for each of them."""
    grains = [length // count for length, count in zip(condition.shape[2:], cells, strict=True)]
    parts = zip(window, grains, strict=True)
    return condition[:, :, *(slice(part.start * grain, part.stop * grain) for part, grain in parts)]


def _deviation(z: Tensor) -> Tensor:
    """Standard deviation of each sample, ``(B, 1, 1, 1, 1)``."""
    return z.std(dim=tuple(range(1, z.ndim)), keepdim=True)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
