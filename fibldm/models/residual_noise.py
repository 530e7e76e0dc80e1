"""What a decoder leaves out of real volumes, as noise that can be drawn.

A decoder gives the middle of what a volume may be, given its latent. Grain that no latent holds, that of the scanner
above all, is missing from it, and a volume without it is smoother than any real one. Drawing from the likelihood
``p(x | z)`` instead of taking its middle gives it back. Kingma & Welling 2014, "Auto-encoding variational Bayes",
appendix C.2, have a Gaussian likelihood without correlation. Here its standard deviation depends on what was decoded:
on the value, as noise of CT and MRI does, and on how steep it is nearby, as a decoder is less sure of edges. It has a
power spectrum of its own, too. All of it is measured on what is left of training cases after their reconstruction.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.files import write_tensors
from fibldm.models.mark import Mark

_VALUES = 16
_SLOPES = 7  # each twice as steep as the one before
_FIRST_SLOPE = 0.01  # per voxel
_BLOCK = 16
_FEWEST = 100  # voxels that tell a standard deviation
_FEWEST_OF_SMALL, _LEVELS_OF_SMALL = 10, 40  # of a small volume fewer do, so that some levels are told
_QUARTILES_OF_NORMAL = 1.349


@dataclass(frozen=True)
class ResidualNoise:
    """Gaussian noise with a level by what was decoded, a spectrum, and a strength that differs between volumes.

    Attributes:
        levels: standard deviation by decoded value, at the centres of ``K`` equal parts of ``[-1, 1]``, and by the
            steepest gradient within a voxel of it, at the centres of ``S`` octaves, ``(C, K, S)``.
        kernel: unit noise without correlation becomes that of the spectrum by convolution, ``(C, x, y, z)``; its
            squares sum to 1.
        spread: standard deviation of the logarithm of a volume's strength, which is the mean over all its levels, so
            that edges, which have most, do not alone say how grainy a volume is.
    """

    levels: Tensor
    kernel: Tensor
    spread: float

    @classmethod
    def fit(cls, cases: Iterable[tuple[Tensor, Tensor, Tensor]]) -> "ResidualNoise":
        """Measure what is left of real volumes.

        Levels come from quartiles: what the decoder misplaces now and then is no noise.

        Args:
            cases: real volume and reconstruction ``(C, X, Y, Z)`` in ``[-1, 1]``, and which voxels count
                ``(1, X, Y, Z)``; all of one size.

        Raises:
            FibldmError: there is no case, or too few voxels count.
        """
        deviations, counts, power = [], [], torch.zeros(())
        for real, decoded, valid in cases:
            residual = real - decoded
            deviation, count = _deviations(residual, decoded, valid[0] > 0.5)
            deviations.append(deviation)
            counts.append(count)
            power = power + _power(residual, valid)
        if not counts or not torch.stack(counts).sum((0, 2, 3)).all():
            raise FibldmError(
                f"residual noise needs cases with at least {_FEWEST} voxels of like brightness that count; got "
                f"{len(counts)} cases"
            )
        by_case, weight = torch.stack(deviations), torch.stack(counts)
        levels = _filled((by_case * weight).sum(0), weight.sum(0))
        strengths = (by_case / levels.clamp_min(1e-12)).clamp_min(1e-3).log() * weight
        spread = (strengths.sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)).std(correction=0)
        sides = [min(_BLOCK, length) for length in real.shape[1:]]
        kernel = torch.fft.fftshift(torch.fft.irfftn(power.sqrt(), s=sides), dim=(1, 2, 3))
        norm = kernel.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        return cls(levels.float(), (kernel / norm).float(), float(spread))

    @classmethod
    def load(cls, file: Path) -> "ResidualNoise":
        """Inverse of `save`.

        Raises:
            FibldmError: the file has another form.
        """
        tensors = load_file(file)
        if tensors["levels"].shape[1:] != (_VALUES, _SLOPES):
            raise FibldmError(
                f"{file} must hold levels by {_VALUES} values and {_SLOPES} slopes; they have the shape "
                f"{tuple(tensors['levels'].shape)}",
                "run `fibldm encode --restart`, and export a bundle again",
            )
        return cls(tensors["levels"], tensors["kernel"], float(tensors["spread"]))

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        tensors = {"levels": self.levels, "kernel": self.kernel, "spread": torch.tensor(self.spread)}
        write_tensors(file, tensors)

    def draw(self, decoded: Tensor, generator: torch.Generator, mark: Mark | None = None) -> Tensor:
        """Noise for a decoded volume ``(C, X, Y, Z)`` in ``[-1, 1]``, of its shape and on its device.

        Args:
            decoded: what the decoder gave.
            generator: of the CPU, so that the noise is the same on any device.
            mark: what the noise is marked with; None leaves it without one.
        """
        strength = math.exp(self.spread * float(torch.randn((), generator=generator)))
        shape = decoded.shape[1:]
        size = [max(pair) for pair in zip(shape, self.kernel.shape[1:], strict=True)]
        white = torch.randn(len(decoded), *size, generator=generator)
        white = (white if mark is None else mark.imprint(white, generator)).to(decoded.device)
        spectrum = torch.fft.rfftn(self.kernel.to(decoded.device), s=size, dim=(1, 2, 3))
        coloured = torch.fft.irfftn(torch.fft.rfftn(white, dim=(1, 2, 3)) * spectrum, s=size, dim=(1, 2, 3))
        return strength * self.level(decoded) * coloured[:, : shape[0], : shape[1], : shape[2]]

    def level(self, decoded: Tensor) -> Tensor:
        """The standard deviation at every voxel of a decoded volume ``(C, X, Y, Z)``, between levels linear."""
        rows = []
        for table, value in zip(self.levels.to(decoded.device), decoded, strict=True):
            places = [2 * (place + 0.5) / length - 1 for place, length in zip(_places(value), table.shape, strict=True)]
            where = torch.stack(places[::-1], dim=-1).flatten(0, 2)[None, None].to(table.dtype)
            rows.append(F.grid_sample(table[None, None], where, padding_mode="border", align_corners=False))
        return torch.stack(rows).view(decoded.shape)


def _places(value: Tensor) -> tuple[Tensor, Tensor]:
    """Where decoded values ``(X, Y, Z)`` and the slopes around them lie between levels, from 0 to their number - 1."""
    by_value = (value.clamp(-1, 1) + 1) / 2 * _VALUES - 0.5
    by_slope = (_slope(value).clamp_min(1e-6) / _FIRST_SLOPE).log2() - 0.5
    return by_value.clamp(0, _VALUES - 1), by_slope.clamp(0, _SLOPES - 1)


def _slope(value: Tensor) -> Tensor:
    """The steepest gradient, per voxel, within a voxel of every place of a volume ``(X, Y, Z)``."""
    axes = [axis for axis, length in enumerate(value.shape) if length > 1]
    slope = torch.stack([part.square() for part in torch.gradient(value, dim=axes)]).sum(0).sqrt()
    return F.max_pool3d(slope[None, None], 3, stride=1, padding=1)[0, 0]


def _deviations(residual: Tensor, decoded: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations by value and slope and how many voxels tell them, each ``(C, K, S)``; 0 for too few."""
    deviations, counts = torch.zeros(2, len(residual), _VALUES * _SLOPES, dtype=torch.float64)
    for channel, (left, value) in enumerate(zip(residual, decoded, strict=True)):
        by_value, by_slope = (place.round().long() for place in _places(value))
        level = (by_value * _SLOPES + by_slope)[valid]
        order = level.argsort()
        parts = left[valid][order].split(level.bincount(minlength=_VALUES * _SLOPES).tolist())
        fewest = min(_FEWEST, max(_FEWEST_OF_SMALL, len(level) // _LEVELS_OF_SMALL))
        for place, part in enumerate(parts):
            if len(part) >= fewest:
                deviations[channel, place], counts[channel, place] = _deviation(part), len(part)
    shape = (len(residual), _VALUES, _SLOPES)
    return deviations.view(shape), counts.view(shape)


def _deviation(part: Tensor) -> float:
    """The standard deviation of normal numbers with the quartiles of these."""
    low, high = (float(part.kthvalue(1 + int(share * (len(part) - 1))).values) for share in (0.25, 0.75))
    return (high - low) / _QUARTILES_OF_NORMAL


def _power(residual: Tensor, valid: Tensor) -> Tensor:
    """Mean power spectrum of blocks, each of power 1 in sum and counting as many as its voxels that count (Welch 1967).

    ``(C, x, y, z // 2 + 1)``.
    """
    sides = [min(_BLOCK, length) for length in residual.shape[1:]]
    window = torch.ones(())
    for axis, side in enumerate(sides):
        hann = torch.hann_window(side + 2)[1:-1] if side > 1 else torch.ones(1)
        window = window * hann.view([-1 if other == axis else 1 for other in range(3)])
    blocks, inside = (_blocks(part, sides) for part in ((residual * valid).double(), valid.double()))
    power = torch.fft.rfftn(blocks * window, dim=(2, 3, 4)).abs().square()
    share = inside.mean((2, 3, 4), keepdim=True)
    return (share * power / power.sum((2, 3, 4), keepdim=True).clamp_min(1e-12)).sum(1)


def _blocks(values: Tensor, sides: list[int]) -> Tensor:
    """Blocks side by side, in the middle of ``(C, X, Y, Z)``, as ``(C, N, x, y, z)``."""
    for axis, side in enumerate(sides, start=1):
        values = values.narrow(axis, values.shape[axis] % side // 2, values.shape[axis] // side * side)
    for axis, side in enumerate(sides, start=1):
        values = values.unfold(axis, side, side)
    return values.flatten(1, 3)


def _filled(total: Tensor, weight: Tensor) -> Tensor:
    """``total / weight`` ``(C, K, S)``; where nothing was seen, that of the nearest that was."""
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in total.shape[1:]))
    rows = []
    for sums, counts in zip(total.flatten(1), weight.flatten(1), strict=True):
        seen = counts.nonzero()[:, 0]
        nearest = seen[torch.cdist(places, places[seen]).argmin(1)]
        rows.append(sums[nearest] / counts[nearest])
    return torch.stack(rows).view(total.shape)
