"""What the stages minimise, against closed forms; padding weighs nothing in any of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import normal, with_latents_of
from monai.bundle import ConfigParser
from monai.losses import JukeboxLoss
from monai.networks.nets.resnet import ResNetFeatures
from oracles import MU, STD
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior, Quantisation, Reconstruction
from fibldm.models.denoiser import Denoiser
from fibldm.models.process import Process, RectifiedFlow, Target, VariancePreserving
from fibldm.models.samplers import draw_noise, sampler
from fibldm.models.timesteps import sampling_times
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.stages import TABLE
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.training.losses import (
    CHARBONNIER_EPSILON,
    AutoencoderLoss,
    DenoisingLoss,
    Weighted,
    cross_entropy,
    gaussian_likelihood,
    kl_divergence,
    spectral_distance,
    weighted_error,
)
from fibldm.training.perceptual import PerceptualDistance
from fibldm.volumes.masks import read_mask

SIZE = (6, 8, 10)


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def everywhere(value: Tensor) -> Weighted:
    return Weighted(value, torch.ones_like(value[:, :1]))


def reconstruction(volume: Tensor, **parts: Any) -> Reconstruction:
    return Reconstruction(volume, Posterior(normal(2, 3, 2, 2, 2), normal(2, 3, 2, 2, 2, seed=1).abs()), **parts)


def test_the_charbonnier_error_is_the_root_of_square_and_epsilon() -> None:
    target = Weighted(torch.zeros(1, 1, 3), torch.tensor([[[1.0, 3.0, 0.0]]]))
    volume = torch.tensor([[[0.0, 2.0, 100.0]]], requires_grad=True)
    error = weighted_error(volume, target, "charbonnier")
    expected = (CHARBONNIER_EPSILON + 3 * math.sqrt(4 + CHARBONNIER_EPSILON**2)) / 4
    assert number(error) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(error, volume)
    assert gradient.tolist() == [[[0.0, pytest.approx(0.75, rel=1e-6), 0.0]]]


def test_the_error_of_masks_is_cross_entropy_of_the_voxels_that_count() -> None:
    labels = torch.tensor([0, 2, 1, 0]).view(1, 4, 1, 1)
    shown = nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 2 - 1
    logits = normal(1, 3, 4, 1, 1)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1, 1)
    expected = nn.functional.cross_entropy(logits[:, :, [0, 1, 3]], labels[:, [0, 1, 3]])
    torch.testing.assert_close(cross_entropy(logits, Weighted(shown, weight)), expected)
    latent = Posterior(torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))
    terms = AutoencoderLoss("cross_entropy").terms(Reconstruction(logits, latent), Weighted(shown, weight))
    torch.testing.assert_close(terms["reconstruction"], expected)


def test_an_unknown_norm_lists_the_norms() -> None:
    wrong: Any = "l3"
    with pytest.raises(FibldmError, match="norm must be one of l1, l2, huber, charbonnier; got 'l3'"):
        weighted_error(torch.zeros(1, 1, 2), everywhere(torch.zeros(1, 1, 2)), wrong)


# --- spectrum


def wave(amplitude: float, phase: float) -> Tensor:
    """A cosine along X with 2 periods on an anisotropic grid."""
    along = amplitude * torch.cos(2 * math.pi * 2 * torch.arange(SIZE[0]) / SIZE[0] + phase)
    return along[None, None, :, None, None].expand(1, 1, *SIZE)


def test_the_spectrum_of_a_wave_is_its_amplitude_at_two_places() -> None:
    distance = spectral_distance(wave(3.0, 0.4), everywhere(wave(1.0, 2.0)))
    places = SIZE[0] * SIZE[1] * (SIZE[2] // 2 + 1)
    assert number(distance) == pytest.approx(2 * (3.0 - 1.0) * math.sqrt(math.prod(SIZE)) / 2 / places, rel=1e-5)


def test_the_spectrum_does_not_see_where_things_are() -> None:
    volume = normal(1, 1, *SIZE)
    rolled = volume.roll((1, 3, 2), dims=(2, 3, 4))
    assert number(spectral_distance(rolled, everywhere(volume))) == pytest.approx(0, abs=1e-6)
    assert number((rolled - volume).abs().mean()) > 0.5


def test_the_amplitudes_are_those_of_monai() -> None:
    volume, target = normal(1, 1, *SIZE), torch.zeros(1, 1, *SIZE)
    every = torch.fft.fftn(volume, dim=(2, 3, 4), norm="ortho").abs()
    assert number(every.square().mean()) == pytest.approx(number(JukeboxLoss(3)(volume, target)), rel=1e-5)
    half = every[..., : SIZE[2] // 2 + 1]  # the others are equal to these
    assert number(spectral_distance(volume, everywhere(target))) == pytest.approx(number(half.mean()), rel=1e-5)


# --- the sum


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = AutoencoderLoss(
        "l2", kl_weight=0.25, spectral_weight=0.5, perceptual=lambda *_: torch.tensor(7.0), perceptual_weight=2
    )
    volume, target = normal(2, 1, *SIZE), everywhere(normal(2, 1, *SIZE, seed=3))
    found = reconstruction(volume)
    expected = {
        "reconstruction": (volume - target.value).square().mean(),
        "kl": kl_divergence(found.posterior),
        "spectral": spectral_distance(volume, target),
        "perceptual": torch.tensor(7.0),
    }
    terms = loss.terms(found, target)
    assert {name: number(term) for name, term in terms.items()} == pytest.approx(
        {name: number(term) for name, term in expected.items()}
    )
    whole = expected["reconstruction"] + 0.25 * expected["kl"] + 0.5 * expected["spectral"] + 14
    assert number(loss(found, target)) == number(loss.objective(terms)) == pytest.approx(number(whole))


def test_a_codebook_takes_the_place_of_the_kl_divergence_and_its_perplexity_is_only_told() -> None:
    loss = AutoencoderLoss(kl_weight=100.0, codebook_weight=0.5)
    volume = normal(2, 1, *SIZE)
    found = reconstruction(volume, quantisation=Quantisation(torch.tensor(3.0), torch.tensor(40.0)))
    terms = loss.terms(found, everywhere(volume))
    assert {name: number(term) for name, term in terms.items()} == {
        "reconstruction": 0,
        "codebook": 3,
        "perplexity": 40,
    }
    assert number(loss.objective(terms)) == 1.5


def test_a_weight_of_0_computes_and_builds_nothing() -> None:
    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("computed")

    loss = AutoencoderLoss(kl_weight=0, codebook_weight=0, perceptual=forbidden)
    volume = normal(2, 1, *SIZE)
    assert list(loss.terms(reconstruction(volume), everywhere(volume))) == ["reconstruction"]
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}


def test_the_learned_log_variance_is_that_of_the_error() -> None:
    loss = AutoencoderLoss(kl_weight=0.25, log_variance=True)
    terms = {"reconstruction": torch.tensor(0.3), "kl": torch.tensor(8.0)}
    assert loss.log_variance is not None
    with torch.no_grad():
        loss.log_variance.fill_(-1.0)
    assert number(loss.objective(terms)) == pytest.approx(0.3 * math.e - 1 + 2)
    with torch.no_grad():
        loss.log_variance.fill_(math.log(0.3))
    (gradient,) = torch.autograd.grad(loss.objective(terms), loss.log_variance)
    assert number(gradient) == pytest.approx(0, abs=1e-6)


def test_validation_does_not_judge_by_the_learned_log_variance() -> None:
    volume, target = normal(2, 1, *SIZE), everywhere(normal(2, 1, *SIZE, seed=3))
    loss = AutoencoderLoss(log_variance=True)
    assert loss.log_variance is not None
    with torch.no_grad():
        loss.log_variance.fill_(-3.0)
    assert number(loss(reconstruction(volume), target)) == number(AutoencoderLoss()(reconstruction(volume), target))


# --- perceptual


@pytest.fixture(scope="module")
def weights_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet for volumes, as MedicalNet stores it."""
    torch.manual_seed(0)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
    file = tmp_path_factory.mktemp("weights") / "volumes.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, file)
    return file


@pytest.mark.parametrize("weights", ["slice_weights", "weights_3d"])
def test_the_perceptual_distance_is_0_for_equal_volumes_and_leads_towards_the_target(
    request: pytest.FixtureRequest, weights: str
) -> None:
    distance = PerceptualDistance(request.getfixturevalue(weights), slices_per_axis=2)
    target = everywhere(normal(2, 1, 16, 20, 24))
    assert number(distance(target.value, target)) == 0
    volume = normal(2, 1, 16, 20, 24, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(volume, target), volume)
    assert number(distance(volume - 20 * gradient, target)) < number(distance(volume, target))


def test_in_volumes_it_compares_normalised_features_of_every_layer(weights_3d: Path) -> None:
    volume, target = normal(1, 2, 16, 16, 16), normal(1, 2, 16, 16, 16, seed=1)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1).eval()
    stored = torch.load(weights_3d, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    total = 0.0
    for channel in range(2):
        mean, std = target[:, [channel]].mean(), target[:, [channel]].std(correction=0)
        pair = [(part[:, [channel]] - mean) / std for part in (volume, target)]
        for ours, theirs in zip(*(network(part) for part in pair), strict=True):
            ours, theirs = (torch.nn.functional.normalize(part, dim=1) for part in (ours, theirs))
            total += number((ours - theirs).square().sum(1).mean())
    found = PerceptualDistance(weights_3d)(volume, everywhere(target))
    assert number(found) == pytest.approx(total / 10, rel=1e-4)


def test_slices_are_taken_along_every_axis(slice_weights: Path) -> None:
    distance = PerceptualDistance(slice_weights, slices_per_axis=1)
    target = everywhere(normal(1, 1, 16, 20, 24))
    for axis, middle in enumerate((8, 10, 12)):
        inside, outside = target.value.clone(), target.value.clone()
        inside.select(axis + 2, middle).mul_(-1)
        outside.select(axis + 2, middle + 1).mul_(-1)
        assert number(distance(inside, target)) > 2 * number(distance(outside, target)) > 0  # two axes cut a line of it


def test_its_weights_are_frozen_and_in_no_checkpoint(slice_weights: Path) -> None:
    distance = PerceptualDistance(slice_weights)
    loss = AutoencoderLoss(perceptual=distance, perceptual_weight=1.0)
    assert not any(weight.requires_grad for weight in distance.features.parameters())
    assert not distance.features.training
    assert loss.state_dict() == {}


@pytest.mark.parametrize("weights", [None, "absent.pth"])
def test_a_perceptual_distance_needs_its_file(tmp_path: Path, weights: str | None) -> None:
    with pytest.raises(FibldmError, match=r"needs a local file of weights; got (None|.*absent.pth); set"):
        PerceptualDistance(weights and tmp_path / weights)


def test_a_file_that_is_no_state_dict_or_of_another_network_is_refused(tmp_path: Path, slice_weights: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(FibldmError, match=r"text.pth must be a state dict of a ResNet"):
        PerceptualDistance(tmp_path / "text.pth")
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(FibldmError, match=r"other.pth must be a state dict of a ResNet; KeyError"):
        PerceptualDistance(tmp_path / "other.pth")
    with pytest.raises(FibldmError, match=r"of resnet18; \d+ names or shapes differ, layer1.1.bn1.bias first"):
        PerceptualDistance(slice_weights, network="resnet18")
    with pytest.raises(FibldmError, match=r"network must be one of resnet10, .*; got 'vgg'"):
        PerceptualDistance(slice_weights, network="vgg")


def test_a_perceptual_weight_needs_a_distance() -> None:
    with pytest.raises(FibldmError, match=r"a perceptual weight of 0.5 needs a perceptual distance; got none"):
        AutoencoderLoss(perceptual_weight=0.5)


# --- padding


def test_what_is_in_the_padding_changes_no_term(slice_weights: Path) -> None:
    loss = AutoencoderLoss(
        "charbonnier",
        spectral_weight=1.0,
        perceptual=PerceptualDistance(slice_weights, slices_per_axis=2),
        perceptual_weight=1.0,
    )
    volume, value = normal(1, 1, 16, 20, 24), normal(1, 1, 16, 20, 24, seed=1)
    weight = torch.ones_like(value)
    weight[..., 17:] = 0
    changed = torch.where(weight > 0, volume, 5.0)
    before, after = (loss.terms(reconstruction(part), Weighted(value, weight)) for part in (volume, changed))
    assert len(before) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)
    inside = loss.terms(reconstruction(volume * 0.5), Weighted(value, weight))
    assert not any(torch.equal(before[name], inside[name]) for name in before if name != "kl")


# --- denoising


def configured_loss(*configs: str, **changes: Any) -> DenoisingLoss:
    names = ("common", "data_chest_phantom", *TABLE["diffusion"].files, *configs)
    content = ConfigParser.load_config_files([str(shipped(name)) for name in names])
    parser = ConfigParser(content)
    parser.update({key.replace("__", "::"): value for key, value in changes.items()})
    loss: DenoisingLoss = parser.get_parsed_content("loss")
    return loss


@pytest.mark.parametrize(("norm", "expected"), [("l1", 2.5), ("l2", 8.5), ("huber", 2.0)])
def test_a_configuration_chooses_the_error(norm: str, expected: float) -> None:
    """The last place weighs nothing; Huber's error is quadratic up to 1."""
    weight = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1, 1)
    target = Weighted(torch.zeros(1, 2, 3, 1, 1), weight)
    prediction = torch.tensor([[1.0, -4.0, 9.0], [1.0, 4.0, 9.0]]).view(1, 2, 3, 1, 1)
    assert number(configured_loss(loss__norm=norm)(prediction, target)) == expected
    assert number(configured_loss()(prediction, target)) == 8.5


def test_the_likelihood_is_that_of_a_gaussian() -> None:
    mean, log_variance, value = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=1), normal(2, 3, 4, 2, 2, seed=2)
    gaussian = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = -gaussian.log_prob(value)[:, :, :3].mean() - math.log(2 * math.pi) / 2
    weight = torch.ones(2, 1, 4, 2, 2)
    weight[:, :, 3:] = 0
    torch.testing.assert_close(gaussian_likelihood(mean, log_variance, Weighted(value, weight)), expected)


def test_the_variance_learns_from_the_mean_and_does_not_move_it() -> None:
    output, target = normal(2, 6, 2, 2, 2).requires_grad_(), everywhere(normal(2, 3, 2, 2, 2, seed=1))
    plain, hybrid = DenoisingLoss(), DenoisingLoss(variance_weight=0.25, process=VariancePreserving())
    terms = hybrid.terms(output, target)
    assert list(terms) == ["denoising", "variance"]
    (gradient,) = torch.autograd.grad(hybrid.objective(terms), output)
    (of_mean,) = torch.autograd.grad(plain(output[:, :3], target), output)
    assert torch.equal(gradient[:, :3], of_mean[:, :3])
    error = (output[:, :3] - target.value).detach().square()
    expected = 0.25 * (1 - error * (-output[:, 3:].detach()).exp()) / 2 / error.numel()
    torch.testing.assert_close(gradient[:, 3:], expected)
    assert number(hybrid(output, target)) == number(terms["denoising"]) == number(plain(output[:, :3], target))
    assert list(plain.terms(output[:, :3], target)) == ["denoising"]


def test_the_shipped_configuration_learns_a_variance() -> None:
    loss = configured_loss("learned_variance")
    assert loss.variance_weight == 0.001
    assert configured_loss("learned_variance", variance_weight=0.5).variance_weight == 0.5
    assert configured_loss().variance_weight == 0


def test_a_variance_is_refused_where_it_cannot_be_learned() -> None:
    with pytest.raises(FibldmError, match="needs a variance-preserving process; got RectifiedFlow; choose fibldm"):
        DenoisingLoss(variance_weight=0.001, process=RectifiedFlow())
    with pytest.raises(FibldmError, match="needs a variance-preserving process; got NoneType"):
        DenoisingLoss(variance_weight=0.001)
    with pytest.raises(FibldmError, match="variance_weight must be a number of at least 0; got -1"):
        DenoisingLoss(variance_weight=-1)
    target = everywhere(normal(1, 3, 2, 2, 2))
    with pytest.raises(FibldmError, match=r"of 3 channels must give 6 with variance_weight 0.001; got 3; put config"):
        DenoisingLoss(variance_weight=0.001, process=VariancePreserving())(target.value, target)
    with pytest.raises(FibldmError, match=r"of 3 channels must give 3 with variance_weight 0; got 6; put config"):
        DenoisingLoss()(normal(1, 6, 2, 2, 2), target)


class AffineNetwork(nn.Module):
    """The best network for Gaussian data: at each of its times an affine map and one logarithm of a variance."""

    variance = "free"

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        self.times = times
        self.gain, self.offset, self.log_variance = (nn.Parameter(torch.zeros(len(times))) for _ in range(3))

    def forward(self, z_t: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        at = (timesteps[:, None] - self.times).abs().argmin(dim=1)
        gain, offset, log_variance = (
            part[at].view(-1, 1, 1, 1, 1).expand_as(z_t) for part in (self.gain, self.offset, self.log_variance)
        )
        return torch.cat([gain * z_t + offset, log_variance], dim=1)


def trained_on_gaussian(process: Process, target: Target, times: Tensor) -> AffineNetwork:
    network = AffineNetwork(process.network_time(times))
    loss = DenoisingLoss(variance_weight=0.5, process=process)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    generator = torch.Generator().manual_seed(0)
    shape = (len(times), 1, 20, 20, 20)
    for _ in range(300):
        z_0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        z_0 = MU + STD * z_0
        output = network(process.diffuse(z_0, noise, times), process.network_time(times))
        objective = loss.objective(loss.terms(output, everywhere(process.target(target, z_0, noise, times))))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
    return network


@pytest.mark.parametrize("target", ["v", "sample"])
def test_on_gaussian_data_the_variance_becomes_the_closed_form_and_ten_ancestral_steps_are_exact(
    target: Target,
) -> None:
    process = VariancePreserving("cosine")
    times = sampling_times(10, spacing="quadratic").float()
    denoise = Denoiser(trained_on_gaussian(process, target, times[:-1]), process, target)  # type: ignore[arg-type]
    alpha, sigma = process.alpha(times[:-1]), process.sigma(times[:-1])
    expected = (STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)).log()
    z = draw_noise((1, 30, 30, 30), [torch.Generator().manual_seed(1)])
    with torch.no_grad():
        learned = torch.cat([denoise(z, t[None]).log_variance.flatten()[:1] for t in times[:-1]])
    torch.testing.assert_close(learned, expected, rtol=0, atol=0.05)

    def std(denoise: Any) -> float:
        generators = [torch.Generator().manual_seed(2)]
        return number(sampler("ancestral")(denoise, z, times, process=process, generators=generators).std())

    assert std(denoise) == pytest.approx(STD, rel=0.02)
    assert std(lambda z_t, t: denoise(z_t, t)._replace(log_variance=None)) < 0.9 * STD


@pytest.mark.slow
@pytest.mark.parametrize(("option", "term"), [("learned_variance", "variance"), ("learned_variance_vlb", "vlb")])
def test_both_stages_learn_a_variance_that_ancestral_sampling_uses(
    tmp_path: Path, tiny_run: Path, phantom_work: Path, tiny_data: Path, option: str, term: str
) -> None:
    with_latents_of(tiny_run, tmp_path)
    configs = [str(tiny_data), "tiny", option]
    settings = {"device": "cpu", "precision": "float32"}
    for stage in ("diffusion", "controlnet"):
        stage_configuration(stage, work=phantom_work, run_dir=tmp_path, configs=configs, overrides=settings).run()
        columns = (tmp_path / stage / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"loss/denoising", f"loss/{term}"} <= set(columns)
    synthesizer = Synthesizer.from_run(tmp_path)
    mask = read_mask(sorted((phantom_work / "labels").glob("*.nii.gz"))[0], {})
    drawn_with = [
        synthesizer(mask, settings=SamplingSettings(sampler="ancestral", steps=2, seed=seed)).volume.array
        for seed in (0, 0, 1)
    ]
    assert np.isfinite(drawn_with[0]).all()
    assert np.array_equal(drawn_with[0], drawn_with[1])
    assert not np.array_equal(drawn_with[0], drawn_with[2])
