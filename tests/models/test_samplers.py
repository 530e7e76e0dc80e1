"""Samplers against closed forms."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler
from oracles import (
    BY_HAND,
    MU,
    STD,
    Gaussian,
    Grid,
    Mixture,
    RoundTrip,
    ancestral_by_hand,
    flow_grid,
    table,
    variance_preserving_grid,
)

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models import samplers
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import SAMPLERS, calls, ddim, dpmpp_2m, heun, sampler
from fibldm.models.timesteps import sampling_times

SCHEDULES = ("scaled_linear", "linear", "cosine", "sigmoid")
ZERO_SNR, SHIFTED = "_zero_snr", "flow_shifted"
PROCESSES: dict[str, Process] = {
    **{name: VariancePreserving(name) for name in SCHEDULES},
    **{name + ZERO_SNR: VariancePreserving(name, zero_terminal_snr=True) for name in SCHEDULES},
    "flow": RectifiedFlow(),
}
SHIFT = 3.0
every_process = pytest.mark.parametrize("name", PROCESSES)
every_sampler = pytest.mark.parametrize("method", SAMPLERS)
# many steps take long, and differ from ten in nothing that depends on the process
every_process_and_number_of_steps = pytest.mark.parametrize(
    ("name", "steps"),
    [*product([*PROCESSES, SHIFTED], [10, 2, 1]), *product(["scaled_linear", "flow"], [1000, 50, 5])],
)


def seeded(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 100_003 + k) for k in range(count)]


def process_of(name: str) -> Process:
    return PROCESSES["flow" if name == SHIFTED else name]


def times_of(name: str, steps: int) -> torch.Tensor:
    return sampling_times(steps, shift=SHIFT if name == SHIFTED else 1.0)


def grid_of(name: str, steps: int) -> Grid:
    """The same by hand."""
    if name.startswith("flow"):
        return flow_grid(steps, SHIFT if name == SHIFTED else 1.0)
    return variance_preserving_grid(table(name.removesuffix(ZERO_SNR), zero_snr=name.endswith(ZERO_SNR)), steps)


# ---------------------------------------------------------------- oracles


@every_process_and_number_of_steps
@pytest.mark.parametrize("method", BY_HAND)
def test_deterministic_samplers_are_their_recursion_by_every_target(name, method, steps):
    process, starts = process_of(name), [0.0, 1.0, -2.5]
    z = torch.tensor(starts * len(process.targets), dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    denoise = RoundTrip(Gaussian(process), process, process.targets)
    out = sampler(method)(denoise, z, times_of(name, steps), process=process, generators=[])
    grid = grid_of(name, steps)
    expected = [BY_HAND[method](value, grid) for value in starts] * len(process.targets)
    torch.testing.assert_close(out.flatten().tolist(), expected, rtol=1e-8, atol=1e-8)


def ancestral_gains(name: str, times: torch.Tensor, monkeypatch) -> torch.Tensor:
    """The offset and every coefficient of the affine map from start and noises, for each target of the process.

    Element k meets a unit impulse in draw k alone, and the last two start at 0 and 1 without noise.
    """
    process, steps = process_of(name), len(times) - 1
    draws = iter(torch.eye(steps + 2)[:steps])
    monkeypatch.setattr(samplers, "draw_noise", lambda shape, generators: next(draws).reshape(1, 1, -1, 1, 1))
    z = torch.zeros(len(process.targets), 1, steps + 2, 1, 1, dtype=torch.float64)
    z[:, 0, -1] = 1
    denoise = RoundTrip(Gaussian(process), process, process.targets)
    out = sampler("ancestral")(denoise, z, times, process=process, generators=seeded(len(z)))[:, 0, :, 0, 0]
    offset = out[:, -2:-1]
    return torch.cat([offset, out[:, :-2] - offset, out[:, -1:] - offset], dim=1)


@every_process_and_number_of_steps
def test_ancestral_is_its_recursion_exactly_by_every_target(name, steps, monkeypatch):
    mean, var = ancestral_by_hand(0.0, 1.0, grid_of(name, steps))
    for offset, *gains in ancestral_gains(name, times_of(name, steps), monkeypatch).tolist():
        assert offset == pytest.approx(mean, rel=1e-8, abs=1e-8)
        assert sum(gain**2 for gain in gains) == pytest.approx(var, rel=1e-8)


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_ancestral_with_drawn_noise_has_its_mean_and_std(name):
    process = PROCESSES[name]
    z = torch.randn((1, 1, 40_000, 1, 1), generator=torch.Generator().manual_seed(1))
    out = sampler("ancestral")(Gaussian(process), z, sampling_times(50), process=process, generators=seeded(1))
    mean, var = ancestral_by_hand(0.0, 1.0, grid_of(name, 50))
    assert out.dtype == torch.float32
    assert float(out.mean()) == pytest.approx(mean, abs=0.01)
    assert float(out.std()) == pytest.approx(math.sqrt(var), rel=0.015)


def test_monai_strided_ancestral_sampling_is_too_wide_and_ours_is_not():
    process, steps = VariancePreserving("linear"), 50
    z = torch.randn((1, 1, 20_000, 1, 1), generator=torch.Generator().manual_seed(2))
    denoise = Gaussian(process, mu=(0.0,))
    ours = sampler("ancestral")(denoise, z, sampling_times(steps), process=process, generators=seeded(1))
    upstream = DDPMScheduler(1000, schedule="linear_beta", clip_sample=False)
    upstream.set_timesteps(steps)
    generator, theirs = torch.Generator().manual_seed(3), z
    for index in upstream.timesteps:
        t = (index[None] + 1) / 1000
        z_0 = denoise(theirs, t).z_0
        epsilon = (theirs - process.alpha(t) * z_0) / process.sigma(t)
        theirs, _ = upstream.step(epsilon, int(index), theirs, generator=generator)
    assert 0.9 < float(theirs.std()) < 1  # the truth is 0.5
    _, var = ancestral_by_hand(0.0, 1.0, grid_of("linear", steps))
    assert float(ours.std()) == pytest.approx(math.sqrt(var), rel=0.02)
    assert abs(math.sqrt(var) - STD) < 0.06


def observed_order(method: str, process: Process, coarse: torch.Tensor, fine: torch.Tensor) -> float:
    """Order by the error against the exact probability flow; ``fine`` has twice the steps of ``coarse``."""
    denoise = Gaussian(process, mu=(0.7, -0.3, 0.0), std=(0.5, 1.5, 0.8))
    z = torch.randn((4, 3, 1, 1, 1), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    truth = denoise.probability_flow(z, coarse[0], coarse[-1])
    run = partial(sampler(method), denoise, z, process=process, generators=[])
    errors = [float((run(times) - truth).norm()) for times in (coarse, fine)]
    return math.log2(errors[0] / errors[1])


def dense_at_both_ends(steps: int) -> torch.Tensor:
    # kappa is infinite at t = 0, and its logarithm at t = 1 where alpha is 0 there. The first and the last step, which
    # are of first order, must fall faster than what is measured; on uniform times of VP they are all one sees, as
    # sigma(1 / N) is of order sqrt(1 / N).
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return u**3 * (10 - 15 * u + 6 * u**2)


@every_process
@pytest.mark.parametrize(("method", "least"), [("ddim", 0.9), ("heun", 1.8), ("dpmpp_2m", 1.8)])
def test_order_of_convergence_from_noise_to_data(name, method, least):
    measured = observed_order(method, PROCESSES[name], dense_at_both_ends(320), dense_at_both_ends(640))
    print(f"{name:23s} {method:9s} t 1 to 0: order {measured:.2f}")
    assert least <= measured < least + 0.4


@every_process
def test_weak_order_of_ancestral_sampling(name, monkeypatch):
    """The standard deviation of the samples, which start as the process ends, goes to that of the data."""
    process, errors = PROCESSES[name], []
    for steps in (320, 640):
        gains = ancestral_gains(name, dense_at_both_ends(steps), monkeypatch)[:, 1:]
        alpha, sigma = (float(f(torch.ones(1, dtype=torch.float64))) for f in (process.alpha, process.sigma))
        gains[:, -1] *= math.sqrt(alpha**2 * STD**2 + sigma**2)
        errors.append(gains.square().sum(1).sqrt() - STD)
    measured = (errors[0] / errors[1]).log2()
    print(f"{name:23s} ancestral t 1 to 0: weak order {measured.tolist()}")
    assert 0.9 <= float(measured.min()) <= float(measured.max()) < 1.1


@pytest.mark.parametrize(("method", "most"), [("ddim", 0.2), ("heun", 0.2), ("dpmpp_2m", 0.05)])
@pytest.mark.parametrize(("name", "spacing"), [("flow", "uniform"), ("scaled_linear", "quadratic")])
def test_error_of_a_gaussian_at_ten_calls(name, spacing, method, most):
    process, steps = PROCESSES[name], 5 if method == "heun" else 10
    assert calls(method, steps) <= 10
    z = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
    out = sampler(method)(Gaussian(process), z, sampling_times(steps, spacing=spacing), process=process, generators=[])
    error = abs(float(out[1] - out[0]) / STD - 1)
    print(f"{name:14s} {method:9s} relative error of the std at <= 10 calls: {error:.3f}")
    assert error < most


@every_process
@every_sampler
def test_mixture_is_sampled(name, method):
    process, count = PROCESSES[name], 800
    z = samplers.draw_noise((2, 1, 1, 1), generators := seeded(count))
    # Quadratic times: the last step of a uniform grid starts at sigma = 0.2 on VP, wider than the narrowest std.
    times = sampling_times(40, spacing="quadratic")
    out = sampler(method)(Mixture(process), z, times, process=process, generators=generators)
    points = out.reshape(count, 2).double()
    first = points[:, 0] < -0.2
    assert float(first.double().mean()) == pytest.approx(0.3, abs=0.05)
    for component, chosen in enumerate((points[first], points[~first])):
        torch.testing.assert_close(chosen.mean(0), Mixture.mu[component], rtol=0, atol=0.1)
        torch.testing.assert_close(chosen.std(0), Mixture.std[component], rtol=0.15, atol=0.02)


@every_process
@every_sampler
def test_every_target_gives_the_same_samples(name, method):
    process, oracle = PROCESSES[name], Mixture(PROCESSES[name])
    z = samplers.draw_noise((2, 1, 1, 1), seeded(6)).double()

    run = partial(sampler(method), z=z, times=sampling_times(8, shift=2.0), process=process)
    expected = run(oracle, generators=seeded(6))
    for kind in process.targets:
        found = run(RoundTrip(oracle, process, [kind]), generators=seeded(6))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every_process
def test_learned_variance_makes_every_ancestral_step_exact(name, monkeypatch):
    process = PROCESSES[name]
    times = torch.tensor([1.0, 0.6, 0.25, 0.1], dtype=torch.float64)
    draws = iter(torch.eye(5)[:3])
    monkeypatch.setattr(samplers, "draw_noise", lambda shape, generators: next(draws).reshape(1, 1, -1, 1, 1))
    alpha, sigma = process.alpha(times).tolist(), process.sigma(times).tolist()
    start = math.sqrt(alpha[0] ** 2 * STD**2 + sigma[0] ** 2)
    z = alpha[0] * MU + torch.tensor([0, 0, 0, 0, start], dtype=torch.float64).reshape(1, 1, -1, 1, 1)
    denoise = Gaussian(process, learned_variance=True)
    out = ddim(denoise, z, times, process=process, generators=seeded(1), eta=1.0).flatten()
    gains = torch.cat([out[:3], out[4:]]) - out[3]
    assert float(out[3]) == pytest.approx(alpha[-1] * MU, abs=1e-9)
    assert float(gains.square().sum()) == pytest.approx(alpha[-1] ** 2 * STD**2 + sigma[-1] ** 2, rel=1e-9)


def test_one_command_puts_monais_schedulers_beside_them(monkeypatch, tmp_path, capsys):
    """PNDM, of which there is none of our own, is no better than dpmpp_2m."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import compare_samplers

    compare_samplers.main(["--samples", "2000", "--calls", "50", "10", "--json", str(tmp_path / "table.json")])
    written = read_json(tmp_path / "table.json")
    rows = {(row["name"], row["calls"]): row for row in written["rows"]}
    assert all(row["calls_made"] <= row["calls"] for row in rows.values())
    assert rows["heun", 50]["calls_made"] == 49
    assert 0.9 < rows["MONAI DDPMScheduler", 50]["std"] < 1  # it takes the step before t as if it were t - 1
    for name in ("MONAI PNDMScheduler", "MONAI PNDMScheduler, skip_prk_steps"):
        for budget in (50, 10):
            if (name, budget) in rows:
                assert rows["dpmpp_2m", budget]["distance"] < rows[name, budget]["distance"]
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| true 0.500 (0.300) | 50 calls | 10 calls |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(compare_samplers.WAYS)
    assert "| MONAI PNDMScheduler | " in lines[9] and lines[9].endswith("| – |")
    with pytest.raises(SystemExit):
        compare_samplers.main(["--calls", "0"])
    assert "--calls must be from 1 to 1000, the steps of the schedule; got [0]" in capsys.readouterr().err


# ---------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
@every_sampler
def test_a_sample_is_the_same_in_any_batch_and_order(name, method):
    process = PROCESSES[name]

    def draw(indices):
        generators = [seeded(4)[k] for k in indices]
        z = samplers.draw_noise((2, 1, 1, 1), generators)
        return sampler(method)(Mixture(process), z, sampling_times(6), process=process, generators=generators)

    whole = draw([0, 1, 2, 3])
    assert len(whole.flatten(1).unique(dim=0)) == 4
    torch.testing.assert_close(draw([3, 1]), whole[[3, 1]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([draw([k]) for k in range(4)]), whole, rtol=1e-6, atol=1e-6)


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls_callback_dtype_and_untouched_input(method, steps):
    seen, progress, process = [], [], RectifiedFlow()
    z = samplers.draw_noise((1, 2, 3, 4), seeded(2))
    kept, oracle = z.clone(), Gaussian(process)

    def denoise(z_t, t):
        seen.append(t)
        return oracle(z_t, t)

    out = sampler(method)(
        denoise,
        z,
        sampling_times(steps).float(),
        process=process,
        generators=seeded(2),
        callback=lambda done, total: progress.append((done, total)),
    )
    assert len(seen) == calls(method, steps) == (2 * steps - 1 if method == "heun" else steps)
    assert all(t.shape == (2,) and t.min() > 0 for t in seen)
    assert progress == [(k, steps) for k in range(1, steps + 1)]
    assert out.shape == z.shape and out.dtype == torch.float32 and torch.equal(z, kept)


@every_process
def test_ddim_between_zero_and_one_lies_between(name):
    process = PROCESSES[name]
    z = torch.randn((1, 1, 20_000, 1, 1), generator=torch.Generator().manual_seed(5))
    run = partial(ddim, Gaussian(process), z, sampling_times(20), process=process)
    still, half, full = (run(generators=seeded(1), eta=eta) for eta in (0.0, 0.5, 1.0))
    assert torch.equal(still, run())
    correlation = [
        float(torch.corrcoef(torch.stack([z.flatten(), out.flatten()]))[0, 1]) for out in (still, half, full)
    ]
    assert correlation[0] > 0.999 and correlation[0] > correlation[1] > correlation[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: sampler("euler"), "sampler must be one of ddim, ancestral, heun, dpmpp_2m; got 'euler'"),
        (lambda run: sampler("heun", eta=0.0), "eta is for the sampler ddim only; got 0.0 for heun; leave it out, or"),
        (lambda run: calls("euler", 5), "sampler must be one of ddim, ancestral"),
        (lambda run: run(ddim, generators=seeded(1), eta=1.0), "one generator per sample; got 1 for 2 samples"),
        (lambda run: run(ddim, eta=1.5), r"eta must be in \[0, 1\]; got 1.5; 0 is deterministic"),
        (lambda run: run(heun, times=torch.tensor([0.0, 1.0])), r"must decrease strictly .* got \[0.0, 1.0\]; take"),
        (lambda run: run(dpmpp_2m, times=torch.tensor([1.0])), "at least two of them"),
        (lambda run: run(ddim, times=torch.tensor([2.0, 0.0])), r"within \[0, 1\]"),
        (lambda run: run(ddim, times=torch.tensor([1.0, 0.5, 0.5])), "decrease strictly"),
    ],
)
def test_errors_say_what_to_do(call, message):
    process = RectifiedFlow()

    def run(method, times=None, **options):
        times = sampling_times(3) if times is None else times
        return method(Gaussian(process), torch.zeros(2, 1, 1, 1, 1), times, process=process, **options)

    with pytest.raises(FibldmError, match=message):
        call(run)
