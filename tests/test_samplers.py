"""Samplers against closed forms: B15 and C12 (DDIM), G1 (rectified flow), H8 (one seed per sample), H9 (few steps).

The data are N(mu, s^2) per dimension or an anisotropic Gaussian mixture, whose exact denoisers are known. For Gaussian
data every step is an affine map, so mean and standard deviation of a sampler's output follow from a recursion in
Python's floats that shares neither code nor form with the samplers.
"""

import math
from functools import partial

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from fibldm.errors import FibldmError
from fibldm.models import samplers
from fibldm.models.process import Prediction, Process, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import SAMPLERS, calls, ddim, dpmpp_2m, heun, sampler
from fibldm.models.timesteps import sampling_times

PROCESSES: dict[str, Process] = {
    "scaled_linear": VariancePreserving(),
    "linear": VariancePreserving("linear"),
    "cosine": VariancePreserving("cosine"),
    "sigmoid": VariancePreserving("sigmoid"),
    "zero_snr": VariancePreserving(zero_terminal_snr=True),
    "flow": RectifiedFlow(),
}
every_process = pytest.mark.parametrize("name", PROCESSES)
every_sampler = pytest.mark.parametrize("method", SAMPLERS)
MU, STD = 0.7, 0.5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost time on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 100_003 + k) for k in range(count)]


class Gaussian:
    """Exact denoiser of N(mu, std^2) per channel."""

    def __init__(self, process: Process, mu=(MU,), std=(STD,), *, learned_variance: bool = False) -> None:
        shape = (1, -1, 1, 1, 1)
        self.process, self.learned_variance = process, learned_variance
        self.mu = torch.tensor(mu, dtype=torch.float64).reshape(shape)
        self.var = torch.tensor(std, dtype=torch.float64).reshape(shape) ** 2

    def __call__(self, z, t):
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        total = alpha**2 * self.var + sigma**2
        z_0 = self.mu + alpha * self.var / total * (z - alpha * self.mu)
        log_variance = (self.var * sigma**2 / total).log().expand_as(z) if self.learned_variance else None
        return Prediction(z_0.to(z.dtype), log_variance)

    def probability_flow(self, z, t, s):
        """Exact map from ``t`` to ``s``: the standardised value stays."""
        (a, sigma_t), (b, sigma_s) = ((self.process.alpha(u), self.process.sigma(u)) for u in (t, s))
        scale = ((b**2 * self.var + sigma_s**2) / (a**2 * self.var + sigma_t**2)).sqrt()
        return b * self.mu + scale * (z - a * self.mu)


class Mixture:
    """Exact denoiser of an anisotropic two-dimensional mixture of two Gaussians; channels are the dimensions."""

    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mu = torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=torch.float64)
    std = torch.tensor([[0.5, 0.1], [0.2, 0.8]], dtype=torch.float64)

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, z, t):
        alpha, sigma = (f(t).double().reshape(-1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        residual = z.double().reshape(len(z), 1, 2) - alpha * self.mu
        total = alpha**2 * self.std**2 + sigma**2
        log_density = self.weight.log() - (residual**2 / total + total.log()).sum(-1) / 2
        means = self.mu + alpha * self.std**2 / total * residual
        z_0 = (log_density.softmax(-1)[..., None] * means).sum(1)
        return Prediction(z_0.reshape(z.shape).to(z.dtype))


# ---------------------------------------------------------------- the independent recursion, in Python's floats


def table(name: str) -> list[float]:
    """Cumulative products of 1 - beta, from 1 at index 0 to index 1000."""
    if name == "cosine":
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(0.999, 1 - f[i + 1] / f[i]) for i in range(1000)]
    elif name == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    elif name == "sigmoid":
        betas = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * i / 999)) for i in range(1000)]
    else:
        low, high = math.sqrt(0.0015), math.sqrt(0.0195)
        betas = [(low + (high - low) * i / 999) ** 2 for i in range(1000)]
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    if name == "zero_snr":
        roots = [math.sqrt(bar) for bar in bars]
        bars = [1.0] + [((r - roots[-1]) * roots[1] / (roots[1] - roots[-1])) ** 2 for r in roots[1:]]
    return bars


def coefficients(name: str, steps: int) -> list[tuple[float, float]]:
    """(alpha, sigma) on the uniform grid; ``steps`` divides 1000."""
    if name == "flow":
        return [(k / steps, (steps - k) / steps) for k in range(steps + 1)]
    bars = table(name)
    return [(math.sqrt(bars[i]), math.sqrt(1 - bars[i])) for i in range(1000, -1, -1000 // steps)]


def exact(z: float, alpha: float, sigma: float) -> float:
    """Posterior mean by precisions, ``(z alpha / sigma^2 + mu / s^2) / (alpha^2 / sigma^2 + 1 / s^2)``."""
    return (z * alpha / sigma**2 + MU / STD**2) / (alpha**2 / sigma**2 + 1 / STD**2)


def ddim_by_hand(z: float, grid) -> float:
    for (a, s), (b, r) in zip(grid, grid[1:], strict=False):
        data = exact(z, a, s)
        epsilon = (z - a * data) / s
        z = b * data + r * epsilon
    return z


def heun_by_hand(z: float, grid) -> float:
    """Heun's method in y = z / sigma over kappa = alpha / sigma."""
    y = z / grid[0][1]
    for (a, s), (b, r) in zip(grid, grid[1:-1], strict=False):
        slope, step = exact(y * s, a, s), b / r - a / s
        y += step * (slope + exact((y + step * slope) * r, b, r)) / 2
    return exact(y * grid[-2][1], *grid[-2])


def dpmpp_2m_by_hand(z: float, grid) -> float:
    """Lu et al. 2022, algorithm 2, in log-SNR."""
    lam = [math.inf if s == 0 else -math.inf if a == 0 else math.log(a / s) for a, s in grid]
    data = [exact(z, *grid[0])]
    for i in range(1, len(grid)):
        h = lam[i] - lam[i - 1]
        first_order = i == 1 or i == len(grid) - 1 or lam[i - 2] == -math.inf
        ratio = math.inf if first_order else (lam[i - 1] - lam[i - 2]) / h
        guess = data[-1] if first_order else (1 + 1 / (2 * ratio)) * data[-1] - 1 / (2 * ratio) * data[-2]
        z = grid[i][1] / grid[i - 1][1] * z - grid[i][0] * math.expm1(-h) * guess
        if i < len(grid) - 1:
            data.append(exact(z, *grid[i]))
    return z


def ancestral_by_hand(mean: float, var: float, grid) -> tuple[float, float]:
    """Mean and variance through ``q(z_s | z_t, D)``, a product of two Gaussians by Bayes' rule."""
    for (a, s), (b, r) in zip(grid, grid[1:], strict=False):
        zero = exact(0.0, a, s)
        slope = exact(1.0, a, s) - zero
        if r == 0:
            mean, var = zero + slope * mean, slope**2 * var
            continue
        scale = a / b
        step_var = s**2 - scale**2 * r**2
        precision = scale**2 / step_var + 1 / r**2
        of_z, of_data = scale / step_var / precision, b / r**2 / precision
        gain = of_z + of_data * slope
        mean, var = gain * mean + of_data * zero, gain**2 * var + 1 / precision
    return mean, var


BY_HAND = {"ddim": ddim_by_hand, "heun": heun_by_hand, "dpmpp_2m": dpmpp_2m_by_hand}


# ---------------------------------------------------------------- oracles


@every_process
@pytest.mark.parametrize("steps", [1000, 50, 10, 5, 2, 1])
@pytest.mark.parametrize("method", BY_HAND)
def test_h9_b15_c12_deterministic_samplers_are_their_recursion(name, method, steps):
    process = PROCESSES[name]
    z = torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
    out = sampler(method)(Gaussian(process), z, sampling_times(steps), process=process, generators=seeded(3))
    grid = coefficients(name, steps)
    expected = [BY_HAND[method](value, grid) for value in z.flatten().tolist()]
    torch.testing.assert_close(out.flatten().tolist(), expected, rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("steps", [1000, 50, 10, 5, 2, 1])
def test_h9_ancestral_is_its_recursion_exactly(name, steps, monkeypatch):
    # Element k meets a unit impulse in draw k alone and the last two start at 0 and 1 without noise, so that the
    # output holds every coefficient of the affine map from start and noises.
    draws = iter(torch.eye(steps + 2)[:steps])
    monkeypatch.setattr(samplers, "draw_noise", lambda shape, generators: next(draws).reshape(1, 1, -1, 1, 1))
    process, z = PROCESSES[name], torch.zeros(1, 1, steps + 2, 1, 1, dtype=torch.float64)
    z[0, 0, -1] = 1
    out = sampler("ancestral")(Gaussian(process), z, sampling_times(steps), process=process, generators=seeded(1))
    out = out.flatten()
    mean, gains = out[-2], torch.cat([out[:-2], out[-1:]]) - out[-2]
    expected_mean, expected_var = ancestral_by_hand(0.0, 1.0, coefficients(name, steps))
    assert float(mean) == pytest.approx(expected_mean, rel=1e-9, abs=1e-9)
    assert float(gains.square().sum()) == pytest.approx(expected_var, rel=1e-9)


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_h9_ancestral_with_drawn_noise_has_its_mean_and_std(name):
    process = PROCESSES[name]
    z = torch.randn((1, 1, 40_000, 1, 1), generator=torch.Generator().manual_seed(1))
    out = sampler("ancestral")(Gaussian(process), z, sampling_times(50), process=process, generators=seeded(1))
    mean, var = ancestral_by_hand(0.0, 1.0, coefficients(name, 50))
    assert out.dtype == torch.float32
    assert float(out.mean()) == pytest.approx(mean, abs=0.01)
    assert float(out.std()) == pytest.approx(math.sqrt(var), rel=0.015)


def test_h9_monai_strided_ancestral_sampling_is_too_wide_and_ours_is_not():
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
    _, var = ancestral_by_hand(0.0, 1.0, coefficients("linear", steps))
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


@every_process
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_h9_order_of_convergence_inside(name, method, order):
    grids = [torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64) for steps in (200, 400)]
    measured = observed_order(method, PROCESSES[name], *grids)
    print(f"{name:14s} {method:9s} t 0.9 to 0.1: order {measured:.2f}")
    assert order - 0.2 < measured < order + 0.2


@every_process
@pytest.mark.parametrize(("method", "least"), [("ddim", 0.9), ("heun", 1.8), ("dpmpp_2m", 1.75)])
def test_h9_order_of_convergence_from_noise_to_data(name, method, least):
    # kappa is infinite at t = 0, where errors of second order sum to log(N) / N^2, of which 640 steps show 1.8 to 2.
    # Uniform times are of first order on VP, whose sigma(1 / N) is of order sqrt(1 / N).
    grids = [sampling_times(steps, spacing="quadratic") for steps in (640, 1280)]
    measured = observed_order(method, PROCESSES[name], *grids)
    print(f"{name:14s} {method:9s} t 1 to 0: order {measured:.2f}")
    assert least <= measured < least + 0.35


@pytest.mark.parametrize(("method", "most"), [("ddim", 0.2), ("heun", 0.2), ("dpmpp_2m", 0.05)])
@pytest.mark.parametrize(("name", "spacing"), [("flow", "uniform"), ("scaled_linear", "quadratic")])
def test_h9_g1_error_of_a_gaussian_at_ten_calls(name, spacing, method, most):
    process, steps = PROCESSES[name], 5 if method == "heun" else 10
    assert calls(method, steps) <= 10
    z = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
    out = sampler(method)(Gaussian(process), z, sampling_times(steps, spacing=spacing), process=process, generators=[])
    error = abs(float(out[1] - out[0]) / STD - 1)
    print(f"{name:14s} {method:9s} relative error of the std at <= 10 calls: {error:.3f}")
    assert error < most


@every_process
@every_sampler
def test_h9_mixture_is_sampled(name, method):
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
def test_h9_every_target_gives_the_same_samples(name, method):
    process, oracle = PROCESSES[name], Mixture(PROCESSES[name])
    z = samplers.draw_noise((2, 1, 1, 1), seeded(6)).double()

    def through(kind, z_t, t):
        shape = (-1, 1, 1, 1, 1)
        z_0 = oracle(z_t, t).z_0
        noise = (z_t - process.alpha(t).reshape(shape) * z_0) / process.sigma(t).reshape(shape)
        return Prediction(process.to_z_0(kind, process.target(kind, z_0, noise, t), z_t, t))

    run = partial(sampler(method), z=z, times=sampling_times(8, shift=2.0), process=process)
    expected = run(oracle, generators=seeded(6))
    for kind in process.targets:
        torch.testing.assert_close(run(partial(through, kind), generators=seeded(6)), expected, rtol=1e-8, atol=1e-8)


@every_process
def test_d14_learned_variance_makes_every_ancestral_step_exact(name, monkeypatch):
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


# ---------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
@every_sampler
def test_h8_a_sample_is_the_same_in_any_batch_and_order(name, method):
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
