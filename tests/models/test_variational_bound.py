"""The learned share of a step's variance, by the variational bound: closed forms, respaced steps, stop-gradient."""

import math
from typing import Any

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from oracles import STD, Gaussian, table
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fibldm.errors import FibldmError
from fibldm.models.denoiser import Denoiser, guided
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Prediction, Process, Target, VariancePreserving
from fibldm.models.samplers import draw_noise, sampler
from fibldm.models.timesteps import sampling_times
from fibldm.training.denoising_trainer import DenoisingTrainer
from fibldm.training.losses import DenoisingLoss, Weighted
from fibldm.training.variational_bound import step

STEPS = 50


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hybrid(process: Process, target: Target = "v", **given: Any) -> DenoisingLoss:
    return DenoisingLoss(variance_weight=0.25, process=process, variance="interpolated", target=target, **given)


def respaced(process: VariancePreserving, steps: int) -> list[tuple[float, float, float, float]]:
    """``(alpha-bar of t, of s, beta, beta-tilde)`` of every step of a respaced table, by products of its betas."""
    bars, apart = table(process.schedule, zero_snr=False), 1000 // steps
    betas = [1 - now / before for before, now in zip(bars, bars[1:], strict=False)]
    made, bar = [], 1.0
    for number in range(steps):
        kept = math.prod(1 - beta for beta in betas[number * apart : (number + 1) * apart])
        before, bar = bar, bar * kept
        made.append((bar, before, 1 - kept, (1 - kept) * (1 - before) / (1 - bar)))
    return made


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [STEPS, 1000])
def test_a_step_is_the_product_formula_of_respaced_betas(schedule: Any, steps: int) -> None:
    """From the true previous time, however far away; the last one is held at the variance of that before."""
    process = VariancePreserving(schedule)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    taken = step(process, "sample", t, steps)
    bars, before, betas, lows = torch.tensor(respaced(process, steps), dtype=torch.float64).unbind(dim=1)
    lows[0] = lows[1]
    assert taken.is_last.tolist() == [True] + [False] * (steps - 1)
    torch.testing.assert_close(taken.log_low.exp(), lows, rtol=1e-7, atol=0)
    torch.testing.assert_close((taken.log_low + taken.log_range).exp(), betas, rtol=1e-7, atol=0)
    of_data = before.sqrt() * betas / (1 - bars)  # Ho et al. 2020, eq. 7
    torch.testing.assert_close(taken.precision, of_data.square() / lows, rtol=1e-6, atol=0)
    torch.testing.assert_close(taken.log_clipped, torch.zeros(steps, dtype=torch.float64), rtol=0, atol=1e-9)


def test_between_the_steps_of_a_table_bounds_are_finite_and_in_order() -> None:
    t = torch.rand(20000, generator=torch.Generator().manual_seed(0)).clamp(min=1e-7)
    t[:3] = torch.tensor([1e-3, 1e-3 * (1 + 1e-6), 1.0])
    for schedule in ("linear", "cosine"):
        taken = step(VariancePreserving(schedule), "v", t, 1000)  # type: ignore[arg-type]
        assert all(bool(part.isfinite().all()) for part in taken)
        assert bool((taken.log_range >= 0).all()) and bool((taken.log_clipped <= 1e-12).all())


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_the_bound_is_the_divergence_of_two_normal_distributions_written_out(kind: Target) -> None:
    """One sample a step; the last one, for continuous data, is a density and no probability of 256 values."""
    process = VariancePreserving("linear")
    t = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    z_0, noise, output, raw = (normal(STEPS, 2, 3, 2, 2, seed=seed) for seed in range(4))
    z_t, asked = process.diffuse(z_0, noise, t), process.target(kind, z_0, noise, t)
    found = process.to_z_0(kind, output, z_t, t)
    total, rows = 0.0, respaced(process, STEPS)
    for number, (bar, before, beta, low) in enumerate(rows):
        v = raw[number].sigmoid()
        std = (v * math.log(beta) / 2 + (1 - v) * math.log(low if number else rows[1][3]) / 2).exp()

        def mean(data: Tensor, z: Tensor = z_t[number], row: Any = (bar, before, beta)) -> Tensor:
            bar, before, beta = row
            return (math.sqrt(before) * beta * data + math.sqrt(1 - beta) * (1 - before) * z) / (1 - bar)

        if number:
            nats = kl_divergence(Normal(mean(z_0[number]), math.sqrt(low)), Normal(mean(found[number]), std))
        else:
            nats = -Normal(found[number], std).log_prob(z_0[number])
        total += float(nats.mean()) / math.log(2)
    weighted = Weighted(asked, torch.ones_like(asked[:, :1]), 9 * torch.ones_like(asked[:, :1]), t=t)
    terms = hybrid(process, kind, vlb_steps=STEPS).terms(torch.cat([output, raw], dim=1), weighted)
    assert float(terms["vlb"]) == pytest.approx(total, rel=1e-9)  # min-SNR weighs the error, never the bound


def best_share(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Of the way between the bounds of a step, for Gaussian data: the variance of ``z_s`` given ``z_t``."""
    (a, sigma_t), (b, sigma_s) = ((process.alpha(u), process.sigma(u)) for u in (t, s))
    joint = a / b * (b**2 * STD**2 + sigma_s**2)
    exact = b**2 * STD**2 + sigma_s**2 - joint**2 / (a**2 * STD**2 + sigma_t**2)
    high = 1 - (a / b) ** 2
    low = high * (sigma_s / sigma_t) ** 2
    return (exact / low).log() / (high / low).log()


def test_on_gaussian_data_the_bound_is_its_closed_form_and_no_other_share_is_better() -> None:
    process = VariancePreserving("linear")
    t = torch.arange(2, STEPS + 1, dtype=torch.float64) / STEPS
    v = best_share(process, t, t - 1 / STEPS)
    assert bool((v > 0).all()) and bool((v < 1).all())
    a, sigma = process.alpha(t), process.sigma(t)
    # an error as large as the best mean's: the variance of z_0 given z_t
    error = (STD**2 * sigma**2 / (a**2 * STD**2 + sigma**2)).sqrt().view(-1, 1, 1, 1, 1)
    weighted = Weighted(error, torch.ones_like(error), t=t)

    def bound(moved: float) -> tuple[float, Tensor]:
        raw = (v.logit() + moved).view(-1, 1, 1, 1, 1).requires_grad_()
        output = torch.cat([torch.zeros_like(error), raw], dim=1)
        bits = hybrid(process, "sample", vlb_steps=STEPS).terms(output, weighted)["vlb"]
        return float(bits.detach()), torch.autograd.grad(bits, raw)[0]

    bits, gradient = bound(0.0)
    # log(variance / beta-tilde) / 2 a step
    expected = (v * step(process, "sample", t, STEPS).log_range / 2).mean() * STEPS / math.log(2)
    assert bits == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    for other in (-2.0, 2.0):
        more, away = bound(other)
        assert more > bits and bool((away.sign() == math.copysign(1, other)).all())


def test_ten_respaced_ancestral_steps_with_the_best_share_have_the_spread_of_the_data() -> None:
    process, times = VariancePreserving("cosine"), sampling_times(10, spacing="quadratic")
    data = Gaussian(process)
    ends = {float(t): s for t, s in zip(times.tolist(), times[1:], strict=False)}

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        s = ends[float(t[0])]
        share = best_share(process, t[0], s) if s > 0 else torch.zeros(())
        return Prediction(data(z, t).z_0, interpolation=share.expand_as(z))

    z = draw_noise((1, 30, 30, 30), [torch.Generator().manual_seed(1)]).double()

    def std(denoise: Any) -> float:
        generators = [torch.Generator().manual_seed(2)]
        return float(sampler("ancestral")(denoise, z, times, process=process, generators=generators).std())

    assert std(denoise) == pytest.approx(STD, rel=0.02)
    assert std(lambda z, t: denoise(z, t)._replace(interpolation=None)) < 0.9 * STD
    assert std(lambda z, t: denoise(z, t)._replace(interpolation=torch.ones_like(z))) > STD


def test_the_bound_does_not_move_the_mean() -> None:
    process, t = VariancePreserving(), torch.tensor([0.0004, 0.6])
    output, value = normal(2, 6, 2, 2, 2).requires_grad_(), normal(2, 3, 2, 2, 2, seed=1)
    target = Weighted(value, torch.ones_like(value[:, :1]), t=t)
    loss = hybrid(process)
    terms = loss.terms(output, target)
    assert list(terms) == ["denoising", "vlb"]
    assert float(loss.objective(terms).detach()) == pytest.approx(
        float((terms["denoising"] + terms["vlb"] / 4).detach())
    )
    (gradient,) = torch.autograd.grad(loss.objective(terms), output)
    (of_mean,) = torch.autograd.grad(DenoisingLoss()(output[:, :3], target), output)
    assert torch.equal(gradient[:, :3], of_mean[:, :3])
    assert bool((gradient[:, 3:] != 0).all())
    assert float(loss(output, target).detach()) == float(terms["denoising"].detach())


# --- what the network's output means


class Doubling(nn.Module):
    variance = "interpolated"

    def forward(self, z_t: Tensor, timesteps: Tensor) -> Tensor:
        return torch.cat([z_t, -3 * z_t], dim=1)


def test_a_denoiser_says_the_share_and_guidance_keeps_it() -> None:
    z, t = normal(2, 2, 2, 2, 2), torch.tensor([0.2, 0.8])
    denoise = Denoiser(Doubling(), VariancePreserving(), "v")  # type: ignore[arg-type]
    made = guided(denoise, denoise, 2.0)(z, t)
    assert made.log_variance is None and made.interpolation is not None
    torch.testing.assert_close(made.interpolation, (-3 * z).sigmoid())


def network(variance: Any) -> ConditionedNetwork:
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=2, out_channels=4, channels=(8,), attention_levels=(False,), num_res_blocks=1,
        norm_num_groups=4,
    )  # fmt: skip
    return ConditionedNetwork(unet, variance=variance)


def test_a_variance_that_is_taken_for_two_things_is_refused() -> None:
    with pytest.raises(FibldmError, match="variance must be one of free, interpolated; got 'learned'"):
        network("learned")
    with pytest.raises(FibldmError, match="must take the learned variance for the same; got free and interpolated"):
        DenoisingTrainer(
            loss_function=hybrid(VariancePreserving()),
            network=network("free"),
            device="cpu",
            max_epochs=1,
            train_data_loader=[],
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
        )
    with pytest.raises(FibldmError, match="needs the training target and at least 2 steps; got None and 1000"):
        DenoisingLoss(variance_weight=0.1, process=VariancePreserving(), variance="interpolated")
    with pytest.raises(FibldmError, match="got v and 1"):
        hybrid(VariancePreserving(), vlb_steps=1)
