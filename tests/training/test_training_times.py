"""Times that follow the loss, and the logarithm of the loss that is learned by time: oracles, grouping, resume."""

import math
import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.loss_aware_times import LossAwareTimes, following
from fibldm.models.process import RectifiedFlow, VariancePreserving
from fibldm.models.timesteps import ShiftedTimes, UniformTimes, shifted
from fibldm.runs import StageFolder
from fibldm.training import loss_aware
from fibldm.training.denoising_trainer import DenoisingTrainer
from fibldm.training.distributed import rows_of_ranks
from fibldm.training.losses import DenoisingLoss, Weighted
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.training.uncertainty import LogVariance


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def middle(*bins: int, of: int = 4) -> Tensor:
    return (torch.tensor(bins) + 0.5) / of


def warm(*losses: float, uniform_share: float = 0.001) -> LossAwareTimes:
    """One loss is the history of each bin."""
    times = LossAwareTimes(bins=len(losses), history=1, uniform_share=uniform_share)
    times.observe(middle(*range(len(losses)), of=len(losses)), torch.tensor(losses))
    return times


# --- loss-aware times


def test_times_are_uniform_to_the_bit_until_every_bin_has_its_history() -> None:
    times = LossAwareTimes(bins=4, history=3)
    times.observe(middle(0, 1, 2, 3).repeat(3)[:-1], torch.arange(1.0, 12.0))
    assert not times.is_warm
    assert torch.equal(times.sample(seeded(0), 100), UniformTimes().sample(seeded(0), 100))
    assert times.importance(middle(0, 1, 2, 3)).tolist() == [1.0] * 4
    times.observe(middle(3), torch.tensor([5.0]))
    assert times.is_warm
    assert not torch.equal(times.sample(seeded(0), 100), UniformTimes().sample(seeded(0), 100))


def test_probabilities_are_the_second_moments_of_the_last_losses_and_a_uniform_share() -> None:
    """Nichol & Dhariwal's formula by NumPy, after 11 to 14 losses of four bins, to which their ends belong."""
    drawn, times = np.random.default_rng(0).exponential(size=(4, 14)), LossAwareTimes(bins=4, history=10)
    for number in range(14):
        for place, count in enumerate((11, 12, 14, 10)):
            if number < count:
                times.observe(torch.tensor([(place + 1) / 4]), torch.tensor(drawn[place : place + 1, number]))
    last = np.stack([drawn[0, 1:11], drawn[1, 2:12], drawn[2, 4:14], drawn[3, :10]])
    moments = np.sqrt((last**2).mean(axis=1))
    expected = moments / moments.sum() * (1 - 0.001) + 0.001 / 4
    np.testing.assert_allclose(times.probabilities.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(times.importance(middle(0, 1, 2, 3)).numpy(), 1 / (4 * expected), rtol=1e-6)


def test_drawn_times_have_these_probabilities_and_are_uniform_within_a_bin() -> None:
    times = warm(1.0, 5.0, 0.0, 2.0, uniform_share=0.2)
    drawn = times.sample(seeded(1), 40000)
    assert float(drawn.min()) > 0 and float(drawn.max()) <= 1
    place = ((drawn * 4).ceil() - 1).long()
    shares = torch.bincount(place, minlength=4) / len(drawn)
    torch.testing.assert_close(shares.double(), times.probabilities, atol=0.01, rtol=0)
    for number in range(4):
        within = drawn[place == number] * 4 - number
        quantiles = torch.quantile(within, torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.04, rtol=0)
    one_by_one = torch.cat([times.sample(seeded(seed)) for seed in range(5)])
    assert torch.equal(one_by_one, torch.cat([times.sample(seeded(seed)) for seed in range(5)]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_weights_leave_the_mean_over_uniform_times_as_it_is(shift: float) -> None:
    """Also where all times are shifted after they were drawn."""
    follows = following(ShiftedTimes(times := warm(1.0, 5.0, 0.5, 2.0), shift))
    assert follows is not None and follows.times is times
    assert float((times.probabilities * times.importance(middle(0, 1, 2, 3))).sum()) == pytest.approx(1)
    drawn = ShiftedTimes(times, shift).sample(seeded(2), 200000)
    uniform = shifted((torch.arange(100000) + 0.5) / 100000, shift).square().mean()
    assert float((follows.importance(drawn) * drawn.square()).mean()) == pytest.approx(float(uniform), rel=0.02)
    assert abs(float(drawn.square().mean() / uniform) - 1) > 0.03
    follows.observe(shifted(middle(2), shift), torch.tensor([50.0]))
    assert int(times.probabilities.argmax()) == 2


def test_times_that_do_not_follow_have_no_weights() -> None:
    assert following(ShiftedTimes(UniformTimes(), 2.0)) is None


def test_losses_of_nothing_but_0_are_drawn_uniformly() -> None:
    assert warm(0.0, 0.0).probabilities.tolist() == [0.5, 0.5]


def test_a_state_goes_on_and_one_of_other_numbers_is_refused() -> None:
    times, again = warm(1.0, 5.0, 0.5, 2.0), LossAwareTimes(bins=4, history=1)
    state = times.state_dict()
    times.observe(middle(0), torch.tensor([9.0]))  # what was kept is a copy
    again.load_state_dict(state)
    again.observe(middle(0), torch.tensor([9.0]))
    assert torch.equal(again.sample(seeded(3), 50), times.sample(seeded(3), 50))
    with pytest.raises(FibldmError, match=r"must be \(bins, history\) \(8, 10\); the checkpoint has \(4, 1\); keep"):
        LossAwareTimes(bins=8).load_state_dict(state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bins": 0}, "bins and history of LossAwareTimes must be at least 1; got 0 and 10"),
        ({"history": 0}, "got 50 and 0"),
        ({"uniform_share": 0.0}, "uniform_share of LossAwareTimes must be above 0 and at most 1; got 0.0"),
        ({"uniform_share": 1.5}, "got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        LossAwareTimes(**given)


# --- in a training


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(2, 2, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, z_t: Tensor, timesteps: Tensor) -> Tensor:
        made: Tensor = self.layer(z_t)
        return made


def batches(count: int, size: int) -> list[dict[str, Tensor]]:
    """Samples whose places count differently, in batches of a size."""
    mean = torch.randn(count, 2, 2, 2, 2, generator=seeded(5))
    valid = (torch.rand(count, 1, 2, 2, 2, generator=seeded(6)) > 0.3).float()
    whole = {"mean": mean, "std": torch.full_like(mean, 0.1), "valid": valid, "seed": torch.arange(count)}
    whole["view"] = torch.zeros(count)
    return [{name: part[start : start + size] for name, part in whole.items()} for start in range(0, count, size)]


def trained(size: int, accumulation: int, loss: DenoisingLoss | None = None) -> tuple[DenoisingTrainer, LossAwareTimes]:
    times, network = LossAwareTimes(bins=2, history=3), Pointwise()
    loss = DenoisingLoss() if loss is None else loss
    trainer = DenoisingTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=batches(24, size),
        network=network,
        optimizer=torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.05),
        loss_function=loss,
        prepare_batch=LatentPrepareBatch(RectifiedFlow(), target="flow", times=ShiftedTimes(times, 2.0)),
        inferer=SimpleInferer(),
        accumulation_steps=accumulation,
        decollate=False,
    )
    trainer.run()
    return trainer, times


def test_a_training_tells_its_losses_whatever_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step, in the order of the samples: the same of one batch and of two that make a step."""
    monkeypatch.setattr(loss_aware, "LOOK_EVERY", 2)
    valid = {name: part for name, part in batches(24, 24)[0].items() if name == "valid"}
    assert valid["valid"].any()
    whole, parts = trained(4, 1), trained(2, 2)
    assert whole[1].is_warm and float(whole[1].probabilities.std()) > 0.01
    # the mean over all places weighs samples as their places, which differ between a batch and its halves
    torch.testing.assert_close(whole[1].probabilities, parts[1].probabilities, atol=0.02, rtol=0)


def test_a_loss_is_that_of_the_sample_alone_without_its_importance() -> None:
    value, prediction = (torch.randn(3, 2, 4, 2, 2, generator=seeded(seed)) for seed in (1, 2))
    weight = (torch.rand(3, 1, 4, 2, 2, generator=seeded(3)) > 0.4).float()
    factor = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
    target = Weighted(value, weight, factor, torch.tensor([0.1, 0.5, 0.9]), 7 * factor)
    errors = [
        float(factor[n] * ((value - prediction)[n].square() * weight[n]).sum() / weight[n].sum() / 2) for n in range(3)
    ]
    assert DenoisingLoss().by_sample(prediction, target).tolist() == pytest.approx(errors)
    whole = (7 * factor**2 * (value - prediction).square() * weight).sum() / weight.sum() / 2
    assert float(DenoisingLoss()(prediction, target)) == pytest.approx(float(whole))


def test_rows_of_ranks_come_in_the_order_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks each has every third draw."""
    rows = torch.arange(12).view(6, 2)
    assert rows_of_ranks(rows) is rows
    monkeypatch.setattr(idist, "get_world_size", lambda: 3)
    monkeypatch.setattr(idist, "all_gather", lambda own: torch.cat([rows[rank::3] for rank in range(3)]))
    assert torch.equal(rows_of_ranks(rows[0::3]), rows)


# --- the learned logarithm of the error


def timed(error: Tensor, t: Tensor) -> tuple[Tensor, Weighted]:
    """An output whose squared error at each time is known, and its target."""
    output = error.sqrt().view(-1, 1, 1, 1, 1).expand(-1, 2, 2, 2, 2)
    return output, Weighted(torch.zeros_like(output), torch.ones_like(output[:, :1]), t=t)


def test_it_changes_nothing_at_first_and_is_least_at_the_logarithm_of_the_error() -> None:
    t, error = torch.tensor([0.2, 0.7]), torch.tensor([0.25, 4.0])
    loss = DenoisingLoss(log_variance=LogVariance(RectifiedFlow()))
    terms = loss.terms(*timed(error, t))
    assert list(terms) == ["denoising", "scaled", "log_variance"]
    assert float(loss.objective(terms).detach()) == float(terms["denoising"]) == pytest.approx(2.125)
    u = torch.tensor([0.3, -0.5])
    loss.log_variance.forward = lambda times: torch.where(times < 0.5, *u)  # type: ignore[union-attr, assignment]
    expected = (error * (-u).exp() + u).mean()
    assert float(loss.objective(loss.terms(*timed(error, t)))) == pytest.approx(float(expected))
    torch.testing.assert_close(loss.by_sample(*timed(error, t)), error * (-u).exp())
    u = error.log().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.objective(loss.terms(*timed(error, t))), u)
    torch.testing.assert_close(gradient, torch.zeros(2))
    assert float(loss(*timed(error, t))) == pytest.approx(2.125)  # what validation compares


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving("cosine", zero_terminal_snr=True)])
def test_it_learns_the_error_of_every_time(process: Any) -> None:
    """Also at both ends, where the noise level is 0 or infinite."""
    loss = DenoisingLoss(log_variance=LogVariance(process))
    t = torch.linspace(0, 1, 101)[1:]
    error = 0.02 + 2 * t**2
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss.objective(loss.terms(*timed(error, t))).backward()
        optimizer.step()
    with torch.no_grad():
        assert float((loss.log_variance(t) - error.log()).abs().mean()) < 0.15  # type: ignore[misc]


def test_it_is_trained_with_the_network() -> None:
    loss = DenoisingLoss(log_variance=LogVariance(RectifiedFlow()))
    trainer, _ = trained(4, 1, loss)
    assert float(loss.log_variance.layer.weight.detach().abs().max()) > 0  # type: ignore[union-attr, operator]
    (output,) = trainer.state.output  # type: ignore[misc]
    assert set(output["losses"]) == {"denoising", "scaled", "log_variance"}
    assert math.isfinite(float(output["loss"].detach()))


def test_a_loss_of_times_says_that_there_are_none() -> None:
    output, target = timed(torch.ones(2), torch.ones(2))
    with pytest.raises(FibldmError, match="needs the times of the samples; got none"):
        DenoisingLoss(log_variance=LogVariance(RectifiedFlow())).terms(output, target._replace(t=None))


@pytest.mark.slow
def test_a_run_keeps_it_in_its_checkpoint_and_not_in_the_network(
    tiny_stage: Any, tiny_run: Path, tmp_path: Path
) -> None:
    for stage in ("autoencoder", "latents"):
        shutil.copytree(tiny_run / stage, tmp_path / stage)
    tiny_stage("diffusion", tmp_path, "loss_log_variance").run()
    kept, plain = StageFolder(tmp_path, "diffusion"), StageFolder(tiny_run, "diffusion")
    learned = kept.weights("last")["objects"]["loss"]
    assert float(learned["log_variance.layer.weight"].abs().max()) > 0
    assert kept.weights()["model"].keys() == plain.weights()["model"].keys()
    kept.trained()
