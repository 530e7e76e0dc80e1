"""Processes, times and their weights: A22 and D14 (targets), A25 (schedules), D8 (time input), G1 (rectified flow)."""

import dataclasses
import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler
from monai.networks.schedulers.rectified_flow import timestep_transform

from fibldm.errors import FibldmError
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.timesteps import (
    GridTimes,
    LogitNormalTimes,
    ShiftedTimes,
    UniformTimes,
    min_snr_weight,
    resolution_shift,
    sampling_times,
    shifted,
    time_shift,
)
from fibldm.training.losses import weighted_error
from fibldm.training.prepare_batch import LatentPrepareBatch

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
REGULAR = [(name, kind) for name, process in PROCESSES.items() for kind in process.targets]
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
def test_schedule_matches_monai_at_every_index(schedule, upstream, betas):
    arguments = dict(zip(("beta_start", "beta_end"), betas, strict=True)) if betas else {}
    reference = DDPMScheduler(1000, schedule=upstream, **arguments).alphas_cumprod.double()
    ours = VariancePreserving(schedule).alpha(INDEX) ** 2
    torch.testing.assert_close(ours, reference, rtol=2e-3, atol=1e-6)  # MONAI's product of 1000 factors is float32
    ours = VariancePreserving(schedule).alpha(INDEX.float()) ** 2
    torch.testing.assert_close(ours[:600], reference[:600].float(), rtol=2e-5, atol=1e-6)


def test_own_betas_and_number_of_steps():
    process = VariancePreserving("linear", steps=4, beta_start=0.1, beta_end=0.4)
    expected = torch.tensor([1.0, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]).sqrt()
    torch.testing.assert_close(process.alpha(torch.linspace(0, 1, 5)), expected)
    between = math.sqrt(0.9 * math.sqrt(0.8))
    torch.testing.assert_close(process.alpha(torch.tensor(0.375)), torch.tensor(between))


def test_zero_terminal_snr_is_algorithm_1_of_lin():
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


def test_rectified_flow_ends_in_the_noise():
    z_0, noise = gaussian(1), gaussian(2)
    torch.testing.assert_close(RectifiedFlow().diffuse(z_0, noise, torch.ones(5)), noise, rtol=0, atol=0)
    torch.testing.assert_close(RectifiedFlow().target("flow", z_0, noise, torch.rand(5)), noise - z_0)


@every_process
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v", "flow"])
def test_target_round_trip(process, kind):
    if kind not in process.targets:
        with pytest.raises(FibldmError, match=f"{kind!r} needs alpha"):
            process.check_target(kind)
        return
    z_0, noise = gaussian(3).double(), gaussian(4).double()
    t = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    output = process.target(kind, z_0, noise, t)
    torch.testing.assert_close(process.to_z_0(kind, output, process.diffuse(z_0, noise, t), t), z_0)


def test_v_matches_monai():
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


@pytest.mark.parametrize(("name", "kind"), REGULAR)
def test_the_output_scale_is_the_slope_of_z_0(name, kind):
    process, t = PROCESSES[name], torch.tensor([1e-6, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    output, error, z_t = (gaussian(seed).double() for seed in (5, 6, 7))
    moved = process.to_z_0(kind, output + error, z_t, t) - process.to_z_0(kind, output, z_t, t)
    sign = 1 if kind == "sample" else -1
    torch.testing.assert_close(moved, sign * process.output_scale(kind, t).view(5, 1, 1, 1, 1) * error)
    assert process.output_scale(kind, t.float()).dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_min_snr_weights_are_those_of_hang(name, gamma):
    """Hang et al. 2023, section 3.4: in terms of the noise, of the data and of v."""
    process, t = PROCESSES[name], torch.linspace(0.01, 1, 60, dtype=torch.float64)
    snr = process.alpha(t) ** 2 / process.sigma(t) ** 2
    least = torch.minimum(snr, torch.tensor(gamma))
    table = {"epsilon": least / snr, "sample": least, "v": least / (snr + 1)}
    for kind in table.keys() & set(process.targets):
        torch.testing.assert_close(min_snr_weight(process, kind, t, gamma), table[kind])
    assert (least < snr).any() and (least == snr).any()


def test_min_snr_weights_of_rectified_flow():
    t = [0.1, 0.25, 0.5, 0.75, 1.0]
    expected = [min((1 - time) ** 2, 5 * time**2) for time in t]
    weight = min_snr_weight(RectifiedFlow(), "flow", torch.tensor(t, dtype=torch.float64), 5.0)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("name", "kind"), REGULAR)
def test_min_snr_weights_are_finite_at_every_time(name, kind):
    """Also where alpha or sigma is 0, as alpha is at zero terminal SNR."""
    t = torch.cat([torch.tensor([0.0, torch.finfo(torch.float32).tiny]), torch.linspace(1e-6, 1, 500)])
    weight = min_snr_weight(PROCESSES[name], kind, t, 5.0)
    assert weight.isfinite().all() and (weight >= 0).all() and weight.max() <= 5 and weight.sum() > 0
    if name in ("zero_snr", "flow"):
        assert weight[-1] == 0


def latent_batch(count: int) -> dict[str, torch.Tensor]:
    mean, seeds = gaussian(11, (count, 2, 3, 4, 1)), torch.arange(count)
    valid = torch.rand(count, 1, 3, 4, 1, generator=torch.Generator().manual_seed(12))
    return {"mean": mean, "std": torch.zeros_like(mean), "valid": valid, "seed": seeds, "view": seeds}


def test_snr_gamma_weighs_the_error_of_a_sample_by_its_time_whatever_its_batch():
    """Validation, which gives none, and everything but the factor stay as they are."""
    batch, process = latent_batch(4), VariancePreserving("linear")
    plain, weighing = (
        LatentPrepareBatch(process, target="v", times=GridTimes(4), **given)(batch, device="cpu")
        for given in ({}, {"snr_gamma": 5.0})
    )
    torch.testing.assert_close((plain[0], plain[1].value, plain[2]), (weighing[0], weighing[1].value, weighing[2]))
    assert torch.equal(plain[1].weight, batch["valid"]) and plain[1].factor is None
    assert torch.equal(weighing[1].weight, batch["valid"])
    of_time = min_snr_weight(process, "v", torch.tensor([1, 3, 5, 7]) / 8, 5.0)
    torch.testing.assert_close(weighing[1].factor, of_time.view(4, 1, 1, 1, 1))
    error = (weighing[0] - weighing[1].value).square() * of_time.view(4, 1, 1, 1, 1)
    expected = (error * batch["valid"]).sum() / (2 * batch["valid"].sum())
    torch.testing.assert_close(weighted_error(weighing[0], weighing[1], "l2"), expected)
    first = weighing[1].sample(0)
    alone = weighted_error(weighing[0][:1], first, "l2")
    torch.testing.assert_close(alone, (error[:1] * batch["valid"][:1]).sum() / (2 * batch["valid"][:1].sum()))


@pytest.mark.parametrize("process", [VariancePreserving(), VariancePreserving(zero_terminal_snr=True), RectifiedFlow()])
def test_the_network_may_be_told_the_noise_instead_of_the_time(process):
    t = torch.cat([torch.zeros(1), INDEX.float()])
    alpha, log_snr = (dataclasses.replace(process, time_input=kind).network_time(t) for kind in ("alpha", "log_snr"))
    assert dataclasses.replace(process, time_input="time") == process
    torch.testing.assert_close(alpha, 1000 * process.alpha(t))
    assert log_snr[0] == 0 and log_snr.min() >= 0 and log_snr.max() <= 1000 and (log_snr.diff() >= 0).all()
    middle = t[(log_snr > 300) & (log_snr < 700)].double()
    expected = 500 - 25 * (process.alpha(middle) ** 2 / process.sigma(middle) ** 2).log()
    torch.testing.assert_close(log_snr[(log_snr > 300) & (log_snr < 700)].double(), expected, rtol=1e-5, atol=1e-3)
    assert len(middle) > 100


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
        (lambda: RectifiedFlow("t"), "time_input must be one of time, alpha, log_snr; got 't'"),
        (lambda: VariancePreserving(time_input="beta"), "time_input must be one of time, alpha, log_snr; got 'beta'"),
        (lambda: RectifiedFlow().output_scale("epsilon", torch.ones(1)), "'epsilon' needs alpha"),
        (lambda: min_snr_weight(RectifiedFlow(), "epsilon", torch.ones(1), 5), "'epsilon' needs alpha"),
        (lambda: min_snr_weight(RectifiedFlow(), "flow", torch.ones(1), 0), "snr_gamma must be above 0; got 0; 5 is"),
        (
            lambda: LatentPrepareBatch(RectifiedFlow(), target="flow", times=UniformTimes(), snr_gamma=-1),
            "snr_gamma must be above 0; got -1; 5 is usual, null",
        ),
        (lambda: ShiftedTimes(UniformTimes(), 0), "a time shift must be a number above 0, or auto in a .*; got 0"),
        (lambda: time_shift("large", size=(8, 8, 8), compression=(4, 4, 4)), "above 0, or auto.*; got 'large'"),
        (lambda: time_shift(math.inf, size=(8, 8, 8), compression=(4, 4, 4)), "above 0, or auto.*; got inf"),
        (lambda: resolution_shift(0), "needs at least 1 cell; got 0, and 1024 to compare with"),
        (lambda: resolution_shift(8, 0), "needs at least 1 cell; got 8, and 0 to compare with"),
        (lambda: sampling_times(0), "sampling needs steps >= 1; got 0"),
        (lambda: sampling_times(5, shift=0), "a time shift must be a number above 0.*; got 0"),
        (lambda: sampling_times(5, spacing="cubic"), "spacing must be one of uniform, quadratic; got 'cubic'"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(FibldmError, match=message):
        make()


@pytest.mark.parametrize(
    "times",
    [
        UniformTimes(),
        LogitNormalTimes(0.5, 2.0),
        GridTimes(7),
        ShiftedTimes(UniformTimes(), 0.2),
        ShiftedTimes(LogitNormalTimes(), 5.0),
    ],
)
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


def test_a_shift_of_1_changes_no_bit():
    for base in (UniformTimes(), LogitNormalTimes(-3.0, 4.0)):
        plain, moved = (times.sample(torch.Generator().manual_seed(8), 50_000) for times in (base, ShiftedTimes(base)))
        assert torch.equal(plain, moved)
    t = torch.linspace(1, 0, 31, dtype=torch.float64)
    assert torch.equal(sampling_times(30), t) and torch.equal(sampling_times(30, spacing="quadratic"), t**2)


def test_training_and_sampling_are_shifted_alike():
    base, moved = UniformTimes(), ShiftedTimes(UniformTimes(), 2.5)
    plain, drawn = (times.sample(torch.Generator().manual_seed(9), 1000) for times in (base, moved))
    torch.testing.assert_close(drawn, 2.5 * plain / (1 + 1.5 * plain))
    torch.testing.assert_close(shifted(sampling_times(20), 2.5), sampling_times(20, shift=2.5), rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [0.25, 8.0, 27.0])
def test_the_shift_is_that_of_monai(ratio):
    """MONAI takes the root of as many powers as there are axes; ours is always the square root."""
    t = torch.linspace(0.01, 1, 30)
    theirs = timestep_transform(1000 * t, ratio, 1.0, num_train_timesteps=1000, spatial_dim=3) / 1000
    torch.testing.assert_close(shifted(t, ratio ** (1 / 3)), theirs)


@pytest.mark.parametrize(("cells", "base"), [(4096, 1024), (2304, 1024), (100, 1024), (5, 7)])
def test_as_much_is_known_of_a_constant_at_both_resolutions(cells, base):
    """Esser et al. 2024, section 5.3.2: the mean of n cells, over ``1 - t``, has one deviation at both."""
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    moved = shifted(t, resolution_shift(cells, base))
    torch.testing.assert_close(moved / (1 - moved) / math.sqrt(cells), t / (1 - t) / math.sqrt(base))


@pytest.mark.parametrize(
    ("given", "size", "compression", "expected"),
    [
        ("auto", (48, 64, 48), (4, 4, 4), 1.5),
        ("auto", (64, 32, 48), (4, 4, 2), math.sqrt(3)),
        ("auto", (256, 256, 1), (16, 16, 1), 0.5),
        (2, (48, 64, 48), (4, 4, 4), 2.0),
    ],
)
def test_time_shift_of_a_configuration(given, size, compression, expected):
    assert time_shift(given, size=size, compression=compression) == pytest.approx(expected)
