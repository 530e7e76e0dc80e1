"""Processes and times: A22 and D14 (targets), A25 (schedules), G1 (rectified flow)."""

import dataclasses
import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from fibldm.errors import FibldmError
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.timesteps import GridTimes, LogitNormalTimes, UniformTimes, sampling_times

PROCESSES: dict[str, Process] = {
    "linear": VariancePreserving("linear"),
    "scaled_linear": VariancePreserving("scaled_linear"),
    "cosine": VariancePreserving("cosine"),
    "sigmoid": VariancePreserving("sigmoid"),
    "zero_snr": VariancePreserving(zero_terminal_snr=True),
    "flow": RectifiedFlow(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_vp = pytest.mark.parametrize("process", list(PROCESSES.values())[:-1], ids=list(PROCESSES)[:-1])
INDEX = torch.arange(1, 1001, dtype=torch.float64) / 1000


def gaussian(seed: int, shape: tuple[int, ...] = (5, 2, 3, 4, 1)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("schedule", "upstream", "betas"),
    [
        ("linear", "linear_beta", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear_beta", (0.0015, 0.0195)),
        ("sigmoid", "sigmoid_beta", (1e-4, 0.02)),
        ("cosine", "cosine", None),
    ],
)
def test_a25_schedule_matches_monai_at_every_index(schedule, upstream, betas):
    arguments = dict(zip(("beta_start", "beta_end"), betas, strict=True)) if betas else {}
    reference = DDPMScheduler(1000, schedule=upstream, **arguments).alphas_cumprod.double()
    ours = VariancePreserving(schedule).alpha(INDEX) ** 2
    torch.testing.assert_close(ours, reference, rtol=2e-3, atol=1e-6)  # MONAI's product of 1000 factors is float32
    ours = VariancePreserving(schedule).alpha(INDEX.float()) ** 2
    torch.testing.assert_close(ours[:600], reference[:600].float(), rtol=2e-5, atol=1e-6)


def test_a25_own_betas_and_number_of_steps():
    process = VariancePreserving("linear", steps=4, beta_start=0.1, beta_end=0.4)
    expected = torch.tensor([1.0, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]).sqrt()
    torch.testing.assert_close(process.alpha(torch.linspace(0, 1, 5)), expected)
    between = math.sqrt(0.9 * math.sqrt(0.8))
    torch.testing.assert_close(process.alpha(torch.tensor(0.375)), torch.tensor(between))


def test_a25_zero_terminal_snr_is_algorithm_1_of_lin():
    root = PROCESSES["scaled_linear"].alpha(INDEX)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    process = PROCESSES["zero_snr"]
    torch.testing.assert_close(process.alpha(INDEX), expected)
    assert process.alpha(INDEX)[-1] == 0 and process.sigma(INDEX)[-1] == 1


@every_process
def test_schedule_is_smooth_bounded_and_monotone(process):
    t = torch.linspace(0, 1, 5001, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()
    assert alpha.diff().abs().max() < 0.01
    assert alpha[0] == 1 and sigma[0] == 0 and not sigma[0].signbit()


@every_vp
def test_variance_is_preserved(process):
    t = torch.linspace(0, 1, 777, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=1e-13, atol=0)


def test_sigma_keeps_its_digits_near_zero():
    sigma = PROCESSES["linear"].sigma(torch.tensor([1e-3, 1e-6, 1e-9]))
    expected = [math.sqrt(1e-4), math.sqrt(-math.expm1(1e-3 * math.log1p(-1e-4))), math.sqrt(1e-4 * 1e-6)]
    torch.testing.assert_close(sigma, torch.tensor(expected), rtol=1e-4, atol=0)
    assert sigma.dtype == torch.float32


@every_process
def test_half_precision_leaves_the_schedule_alone(process):
    t = torch.tensor([0.25, 0.5, 1.0])
    before = process.alpha(t), process.sigma(t), process.network_time(t)
    z = gaussian(0)[:3].half()
    assert process.diffuse(z, z, t).dtype == torch.float16
    assert process.target("v", z, z, t).dtype == torch.float16
    assert process.to_z_0("v", z, z.float(), t).dtype == torch.float32
    for values, again in zip(before, (process.alpha, process.sigma, process.network_time), strict=True):
        assert again(t.half()).dtype == torch.float32
        torch.testing.assert_close(again(t), values, rtol=0, atol=0)
        torch.testing.assert_close(again(t.half()), values, rtol=0, atol=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        process.steps = 10


def test_monai_schedule_is_changed_by_a_half_precision_batch():
    scheduler = DDPMScheduler(1000)
    scheduler.add_noise(torch.zeros(1, 1, 2).half(), torch.zeros(1, 1, 2).half(), torch.tensor([3]))
    assert scheduler.alphas_cumprod.dtype == torch.float16


@every_process
def test_diffuse_at_both_ends_and_inputs_untouched(process):
    z_0, noise = gaussian(1), gaussian(2)
    kept = z_0.clone(), noise.clone()
    t = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.9])
    z_t = process.diffuse(z_0, noise, t)
    torch.testing.assert_close(z_t[0], z_0[0], rtol=0, atol=0)
    torch.testing.assert_close(z_t[1], process.alpha(t)[1] * z_0[1] + noise[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z_t[2:3], process.diffuse(z_0[2:3], noise[2:3], t[2:3]))
    torch.testing.assert_close((z_0, noise), kept, rtol=0, atol=0)


def test_g1_rectified_flow_ends_in_the_noise():
    z_0, noise = gaussian(1), gaussian(2)
    torch.testing.assert_close(RectifiedFlow().diffuse(z_0, noise, torch.ones(5)), noise, rtol=0, atol=0)
    torch.testing.assert_close(RectifiedFlow().target("flow", z_0, noise, torch.rand(5)), noise - z_0)


@every_process
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v", "flow"])
def test_a22_d14_target_round_trip(process, kind):
    if kind not in process.targets:
        with pytest.raises(FibldmError, match=f"{kind!r} needs alpha"):
            process.check_target(kind)
        return
    z_0, noise = gaussian(3).double(), gaussian(4).double()
    t = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    output = process.target(kind, z_0, noise, t)
    torch.testing.assert_close(process.to_z_0(kind, output, process.diffuse(z_0, noise, t), t), z_0)


def test_a22_v_matches_monai():
    z_0, noise, index = gaussian(3), gaussian(4), torch.tensor([0, 10, 499, 900, 999])
    scheduler = DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
    ours = VariancePreserving().target("v", z_0, noise, (index + 1) / 1000)
    torch.testing.assert_close(ours, scheduler.get_velocity(z_0, noise, index), rtol=1e-4, atol=1e-4)


def test_regular_targets():
    regular = {name: process.targets for name, process in PROCESSES.items()}
    with_epsilon = ("epsilon", "sample", "v", "flow")
    assert regular == {
        "linear": with_epsilon,
        "scaled_linear": with_epsilon,
        "sigmoid": with_epsilon,
        "cosine": with_epsilon[1:],
        "zero_snr": with_epsilon[1:],
        "flow": with_epsilon[1:],
    }


def test_network_time_is_the_index_of_the_table():
    torch.testing.assert_close(VariancePreserving().network_time(INDEX.float()), torch.arange(1000.0))
    assert VariancePreserving().network_time(torch.zeros(1)) == 0
    torch.testing.assert_close(RectifiedFlow().network_time(torch.tensor([0.25, 1.0])), torch.tensor([250.0, 1000.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreserving("exponential"), "schedule must be one of linear, scaled_linear, cosine, sigmoid"),
        (lambda: VariancePreserving(steps=1), "at least 2; got 1"),
        (lambda: VariancePreserving("cosine", beta_start=0.1), "cosine schedule has no beta_start"),
        (lambda: VariancePreserving(beta_start=0.1), r"got 0.1 and 0.0195; the usual ones of scaled_linear are"),
        (lambda: RectifiedFlow().check_target("noise"), "target must be one of sample, v, flow; got 'noise'"),
        (lambda: RectifiedFlow().check_target("epsilon"), "RectifiedFlow has alpha.1. = 0.0e.00; choose v or flow"),
        (
            lambda: VariancePreserving("cosine").to_z_0("epsilon", *[gaussian(0)] * 2, torch.ones(5)),
            "VariancePreserving has alpha.1. = 4.9e-05",
        ),
        (lambda: LogitNormalTimes(std=0), "std of LogitNormalTimes must be above 0; got 0"),
        (lambda: GridTimes(0), "at least 1; got 0"),
        (lambda: sampling_times(0), "steps >= 1 and shift > 0; got steps 0, shift 1.0"),
        (lambda: sampling_times(5, shift=0), "got steps 5, shift 0"),
        (lambda: sampling_times(5, spacing="cubic"), "spacing must be one of uniform, quadratic; got 'cubic'"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(FibldmError, match=message):
        make()


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormalTimes(0.5, 2.0), GridTimes(7)])
def test_training_times_are_in_range_and_repeatable(times):
    drawn = times.sample(torch.Generator().manual_seed(5), 20_000)
    assert drawn.shape == (20_000,) and drawn.dtype == torch.float32
    assert drawn.min() > 0 and drawn.max() <= 1
    assert torch.equal(drawn, times.sample(torch.Generator().manual_seed(5), 20_000))
    assert times.sample(torch.Generator()).shape == (1,)


def test_training_times_have_their_distribution():
    generator = torch.Generator().manual_seed(6)
    uniform = UniformTimes().sample(generator, 100_000).double()
    assert abs(uniform.mean() - 0.5) < 4e-3 and abs(uniform.var() - 1 / 12) < 1e-3
    logit = LogitNormalTimes(0.5, 2.0).sample(generator, 100_000).double().logit()
    assert abs(logit.mean() - 0.5) < 0.03 and abs(logit.std() - 2) < 0.03
    extreme = LogitNormalTimes(-1000.0).sample(generator, 10)
    assert (extreme > 0).all()


def test_grid_times_are_midpoints():
    torch.testing.assert_close(torch.cat([GridTimes(4).at(k) for k in range(5)]), torch.tensor([1, 3, 5, 7, 1]) / 8)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0])
def test_sampling_times(spacing, shift):
    times = sampling_times(30, spacing=spacing, shift=shift)
    base = torch.linspace(1, 0, 31, dtype=torch.float64) ** (2 if spacing == "quadratic" else 1)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 31
    assert (times.diff() < 0).all()
    torch.testing.assert_close(times, shift * base / (1 + (shift - 1) * base))
