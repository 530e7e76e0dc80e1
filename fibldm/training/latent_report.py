"""Whether latents are fit for diffusion, said before a day is spent on training with them.

All figures are of the latent as stage 2 draws it, ``z = mean + std * noise``, over the cells of all posteriors. They
are computed in closed form, without drawing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import FrozenFirstStage, Posterior
from fibldm.models.latents import LatentSpace
from fibldm.volumes.pictures import PLANES, Panel, planes_of, render, write_picture

# A channel of unit variance counts as dead below a variance of its means of 0.01 (Burda et al. 2016, IWAE, section 2).
DEAD_SIGNAL = 0.01
# Below one half, most of what stage 2 learns in a channel is noise of the encoder.
NOISY_SIGNAL = 0.5
# A normal distribution has 6e-5 outside 4 standard deviations, Laplace's already 3.5e-3; noise starts as a normal one.
MOST_OUTSIDE = 5e-3
# One channel then adds less than 4 % (1 - 0.98^2) to another; of few channels that work well, 0.95 is common.
MOST_CORRELATED = 0.98
# Of another patient's latents: farther away than all training latents are wide, or half or twice as wide.
MOST_SHIFT, MOST_STRETCH = 1.0, 2.0

OUTSIDE = 4.0

REMEDY = "train stage 1 longer, or change kl_weight or latent_channels, before stage 2"
_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Channel:
    """The latents of one channel.

    Attributes:
        mean: in the autoencoder's own scale.
        std: the same.
        signal: share of the variance that the posterior's mean has; the rest is the posterior's own.
        skewness: 0 for a normal distribution.
        kurtosis: in excess of a normal distribution's.
        outside: share more than `OUTSIDE` from 0 once normalised.
        kl: mean divergence of a cell's posterior from the standard normal, in nats; None where it has no spread (VQ).
        validation_mean: of the validation latents, in the normalised scale; None where there are none.
        validation_std: the same.
    """

    mean: float
    std: float
    signal: float
    skewness: float
    kurtosis: float
    outside: float
    kl: float | None
    validation_mean: float | None = None
    validation_std: float | None = None


@dataclass(frozen=True)
class LatentReport:
    """What is said of the latents of a run.

    Attributes:
        channels: one by one.
        correlation: between channels, ``C x C``.
        cells: how many the figures of training are of.
    """

    channels: tuple[Channel, ...]
    correlation: tuple[tuple[float, ...], ...]
    cells: int

    @property
    def warnings(self) -> list[str]:
        """Why the latents are unfit for stage 2, a sentence each; empty where they are fit."""
        found = [text for number, channel in enumerate(self.channels) for text in _findings(number, channel)]
        for one, row in enumerate(self.correlation):
            for other, value in enumerate(row[:one]):
                if abs(value) > MOST_CORRELATED:
                    found.append(f"latent channels {other} and {one} must differ; their correlation is {value:.2f}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, warnings included."""
        return {**asdict(self), "warnings": self.warnings}

    def table(self) -> str:
        """The channels as lines of text."""
        head = "channel      mean       std  signal  skewness  kurtosis  outside 4 std  KL (nats)"
        return "\n".join([head, *(_line(number, channel) for number, channel in enumerate(self.channels))])


def report_latents(
    training: Iterable[Posterior], space: LatentSpace, validation: Iterable[Posterior] = ()
) -> LatentReport:
    """Measure latents.

    Args:
        training: posteriors ``(B, C, x, y, z)`` or ``(B, C, n)`` of any sizes, in the autoencoder's own scale.
        space: fitted to them.
        validation: the same of patients that nothing was fitted to.

    Raises:
        FibldmError: there is no training latent.
    """
    moments, other = _Moments.of(training, space), _Moments.of(validation, space)
    if not moments.cells:
        raise FibldmError("a latent report needs at least one training latent; got none")
    mean, variance = moments.mean, moments.variance
    drawn_mean, drawn_std = space.denormalise(mean[None])[0], variance.sqrt() * torch.tensor(space.std)
    within = moments.products.diagonal() - mean.square()
    figures = {
        "mean": drawn_mean,
        "std": drawn_std,
        "signal": within / variance,
        "skewness": moments.central(3) / variance**1.5,
        "kurtosis": moments.central(4) / variance.square() - 3,
        "outside": moments.terms[4],
        "kl": moments.terms[5],
    }
    if other.cells:
        figures |= {"validation_mean": other.mean, "validation_std": other.variance.sqrt()}
    columns = {
        name: [value if math.isfinite(value) else None for value in row.tolist()] for name, row in figures.items()
    }
    channels = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    correlation = (moments.products - mean[:, None] * mean) / torch.outer(variance, variance).sqrt()
    correlation.fill_diagonal_(1.0)
    return LatentReport(
        tuple(Channel(**channel) for channel in channels), tuple(map(tuple, correlation.tolist())), moments.cells
    )


@torch.no_grad()
def draw_interpolation(
    file: Path,
    first_stage: FrozenFirstStage,
    volumes: tuple[Tensor, Tensor],
    latents: tuple[Tensor, Tensor],
    *,
    spacing: Sequence[float],
    masks: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Draw two volumes, their reconstructions, and what is decoded on the straight line between their latents.

    Where a latent space is fit for diffusion, what is between two patients looks like a patient, too.

    Args:
        file: the PNG.
        first_stage: decodes.
        volumes: two ``(C, X, Y, Z)`` in ``[-1, 1]``, RAS+.
        latents: their posterior means ``(c, x, y, z)`` in the autoencoder's own scale, on its device.
        spacing: mm along R, A, S.
        masks: for a first stage that needs them, ``(L + 1, X, Y, Z)``; what is between is decoded with what is between.

    Raises:
        FibldmError: the file cannot be written.
    """
    ends = [latents] if masks is None else [latents, masks]
    decoded = [
        first_stage.decode(*(torch.lerp(*pair, time)[None] for pair in ends))[0].float().clamp(-1, 1).cpu()
        for time in _TIMES
    ]
    names = [
        "input 1",
        "reconstruction 1",
        *(f"{time:.0%} of 2" for time in _TIMES[1:-1]),
        "reconstruction 2",
        "input 2",
    ]
    shown = list(zip(names, [volumes[0].cpu(), *decoded, volumes[1].cpu()], strict=True))
    rows = [
        [Panel(f"{name}\n{PLANES[plane]}", volume[channel], plane) for name, volume in shown]
        for channel in range(len(volumes[0]))
        for plane in planes_of(volumes[0][channel])
    ]
    write_picture(file, render(rows, spacing))


@dataclass(frozen=True)
class _Moments:
    """Means over all cells, of normalised latents, float64.

    Attributes:
        cells: how many.
        terms: ``(6, C)``: ``E[z]`` to ``E[z^4]``, the share outside, and the KL divergence in the own scale.
        products: ``(C, C)``, of the posteriors' means of two channels.
    """

    cells: int
    terms: Tensor
    products: Tensor

    @classmethod
    def of(cls, posteriors: Iterable[Posterior], space: LatentSpace) -> "_Moments":
        channels = len(space.mean)
        cells, terms = 0, torch.zeros(6, channels, dtype=torch.float64)
        products = torch.zeros(channels, channels, dtype=torch.float64)
        for posterior in posteriors:
            own_mean, own_std = _by_channel(posterior)
            mean, std = _by_channel(space.normalise_posterior(Posterior(*(part.double() for part in posterior))))
            cells += mean.shape[1]
            terms += torch.stack([*_raw_moments(mean, std), _outside(mean, std), _kl(own_mean, own_std)]).sum(dim=2)
            products += mean @ mean.T
        return cls(cells, terms / max(cells, 1), products / max(cells, 1))

    @property
    def mean(self) -> Tensor:
        return self.terms[0]

    @property
    def variance(self) -> Tensor:
        return self.central(2)

    def central(self, order: int) -> Tensor:
        """``E[(z - E[z])^order]`` of every channel, by the binomial theorem."""
        raw = torch.cat([torch.ones_like(self.terms[:1]), self.terms[:4]])
        parts = [math.comb(order, k) * raw[k] * (-self.mean) ** (order - k) for k in range(order + 1)]
        return torch.stack(parts).sum(dim=0)


def _by_channel(posterior: Posterior) -> tuple[Tensor, Tensor]:
    mean, std = (part.double().movedim(1, 0).flatten(1) for part in posterior)
    return mean, std


def _raw_moments(mean: Tensor, std: Tensor) -> list[Tensor]:
    """``E[z]`` to ``E[z^4]`` of normal distributions."""
    variance = std.square()
    return [
        mean,
        mean**2 + variance,
        mean**3 + 3 * mean * variance,
        mean**4 + 6 * mean**2 * variance + 3 * variance**2,
    ]


def _outside(mean: Tensor, std: Tensor) -> Tensor:
    spread = math.sqrt(2) * std.clamp(min=1e-12)  # of a quantised latent it is 0
    return (torch.special.erfc((OUTSIDE - mean) / spread) + torch.special.erfc((OUTSIDE + mean) / spread)) / 2


def _kl(mean: Tensor, std: Tensor) -> Tensor:
    """Kingma & Welling 2014, appendix B, of every cell."""
    return (mean.square() + std.square() - 1 - 2 * std.log()) / 2


def _findings(number: int, channel: Channel) -> list[str]:
    name, found = f"latent channel {number}", []
    if channel.signal < DEAD_SIGNAL:
        found.append(f"{name} must carry something of the volume; it is dead ({channel.signal:.2%} is not noise)")
    elif channel.signal < NOISY_SIGNAL:
        found.append(f"{name} must be more volume than noise; only {channel.signal:.0%} of its variance is not noise")
    if channel.outside > MOST_OUTSIDE:
        found.append(f"{name} must not have heavy tails; {channel.outside:.2%} is outside {OUTSIDE:g} std")
    mean, std = channel.validation_mean, channel.validation_std
    if mean is not None and std is not None and (abs(mean) > MOST_SHIFT or not 1 / MOST_STRETCH < std < MOST_STRETCH):
        found.append(f"{name} must be alike in validation; there its mean is {mean:.2f} and its std {std:.2f}")
    return found


def _line(number: int, channel: Channel) -> str:
    kl = "-" if channel.kl is None else f"{channel.kl:.2f}"
    return (
        f"{number:7d} {channel.mean:9.4g} {channel.std:9.4g} {channel.signal:7.3f} {channel.skewness:9.2f} "
        f"{channel.kurtosis:9.2f} {channel.outside:14.2%} {kl:>10}"
    )
