"""The variational bound of a diffusion model whose steps have a variance between two bounds."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.process import Process, Target
from fibldm.models.transfer import to_device


class VariationalBound:
    """The bound of all steps, as its terms at single times estimate it where times are uniform (L_vlb).

    What no weight changes, the divergence of the last noise from a normal distribution, is left out.

    Args:
        process: variance-preserving.
        target: what the network's output means.
        steps: in which the unit of time is parted.

    Raises:
        FibldmError: there is no target, it is not regular on the process, or there are fewer than 2 steps.
    """

    def __init__(self, process: Process, target: Target | None, steps: int) -> None:
        if target is None or steps < 2:
            raise FibldmError(
                f"the variational bound needs the training target and at least 2 steps; got {target} and {steps}",
                "take configuration learned_variance_vlb",
            )
        process.check_target(target)
        self.process, self.target, self.steps = process, target, steps

    def bits(self, error: Tensor, interpolation: Tensor, t: Tensor) -> Tensor:
        """The bound in bits per value, of every value by itself.

        Args:
            error: squared, of the network's output, ``(B, ...)``.
            interpolation: ``v`` in [0, 1], the same shape.
            t: times (B,), there or on the CPU.
        """

        def shaped(part: Tensor) -> Tensor:
            kept = part if part.dtype == torch.bool else part.to(error.dtype)
            return to_device(kept, error.device).view(-1, *[1] * (error.ndim - 1))

        taken = Step(*map(shaped, step(self.process, self.target, t, self.steps)))
        return nats(error, interpolation, taken) * (self.steps / math.log(2))


class Step(NamedTuple):
    """A step from times ``t`` down to ``s`` as the bound sees it; float64, shape of ``t``.

    Attributes:
        log_low: logarithm of ``beta-tilde``, the variance of ``q(z_s | z_t, z_0)``, or of what takes its place near 0.
        log_range: by how much the logarithm of ``beta``, the variance of ``q(z_t | z_s)``, is above that.
        log_clipped: logarithm of the share that ``beta-tilde`` is of what takes its place.
        precision: of an error of the network's output, ``(d mean / d output)^2`` over the lower variance.
        is_last: whether ``s`` is 0.
    """

    log_low: Tensor
    log_range: Tensor
    log_clipped: Tensor
    precision: Tensor
    is_last: Tensor


def step(process: Process, kind: Target, t: Tensor, steps: int) -> Step:
    """The steps from ``t`` to ``t - 1 / steps``, or to 0, whatever the steps are that the process was tabled for.

    ``beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2`` and ``beta-tilde = beta sigma_s^2 / sigma_t^2`` (Kingma et
    al. 2021, appendix A.2); on the table of a schedule these are the products of its betas. Towards ``s = 0`` the
    second falls to 0; as in Nichol & Dhariwal's code it is held at that of the last step but one.

    Args:
        process: variance-preserving.
        kind: what the network's output means.
        t: in (0, 1], any shape.
        steps: in which the unit of time is parted, at least 2.
    """
    t = t.double()
    s = (t - 1 / steps).clamp(min=0)
    is_last = s == 0
    high = _forward_variance(process, t, s)
    least = _posterior_variance(process, t.clamp(max=1 / steps) + 1 / steps, t.clamp(max=1 / steps))
    exact = torch.where(is_last, least, _posterior_variance(process, t, s))
    low = torch.maximum(exact, least)
    of_data = process.alpha(s) * high / process.sigma(t).square()  # d mean / d z_0
    precision = (of_data * process.output_scale(kind, t)).square() / low
    return Step(low.log(), high.log() - low.log(), exact.log() - low.log(), precision, is_last)


def nats(error: Tensor, interpolation: Tensor, taken: Step) -> Tensor:
    """A term of the bound for every value, in nats (Nichol & Dhariwal 2021, eq. 4 to 7 and 15).

    The variance is ``exp(v log beta + (1 - v) log beta-tilde)``. A step is the Kullback-Leibler divergence of the
    posterior from it. The last one is the likelihood of the data, there of 256 values of a pixel, each with a width;
    latents are continuous, so here it is the Gaussian density itself. It may be negative, and bits of two autoencoders,
    or of latents and pixels, cannot be compared.

    Args:
        error: squared, of the network's output, ``(B, ...)``.
        interpolation: ``v``, the same shape.
        taken: steps, each attribute in a shape that multiplies them.
    """
    above = interpolation * taken.log_range
    of_last = math.log(2 * math.pi) + taken.log_low
    # by expm1, since in small steps what is above is far below 1
    of_others = torch.expm1(taken.log_clipped - above) - taken.log_clipped
    start = torch.where(taken.is_last, of_last, of_others)
    return (above + start + taken.precision * error * (-above).exp()) / 2


def _posterior_variance(process: Process, t: Tensor, s: Tensor) -> Tensor:
    return _forward_variance(process, t, s) * (process.sigma(s) / process.sigma(t)).square()


def _forward_variance(process: Process, t: Tensor, s: Tensor) -> Tensor:
    ratio = process.alpha(t) / process.alpha(s)
    return process.sigma(t).square() - (ratio * process.sigma(s)).square()
