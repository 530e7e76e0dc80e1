"""What stage 1 minimises, against closed forms; the padding weighs nothing in any of it (A11, B13, B14)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import JukeboxLoss
from monai.networks.nets.resnet import ResNetFeatures
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior, Quantisation, Reconstruction
from fibldm.training.losses import (
    CHARBONNIER_EPSILON,
    AutoencoderLoss,
    Weighted,
    kl_divergence,
    spectral_distance,
    weighted_error,
)
from fibldm.training.perceptual import PerceptualDistance

SIZE = (6, 8, 10)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def everywhere(value: Tensor) -> Weighted:
    return Weighted(value, torch.ones_like(value[:, :1]))


def reconstruction(volume: Tensor, **parts: Any) -> Reconstruction:
    return Reconstruction(volume, Posterior(drawn(2, 3, 2, 2, 2), drawn(2, 3, 2, 2, 2, seed=1).abs()), **parts)


def test_b13_the_charbonnier_error_is_the_root_of_square_and_epsilon() -> None:
    target = Weighted(torch.zeros(1, 1, 3), torch.tensor([[[1.0, 3.0, 0.0]]]))
    volume = torch.tensor([[[0.0, 2.0, 100.0]]], requires_grad=True)
    error = weighted_error(volume, target, "charbonnier")
    expected = (CHARBONNIER_EPSILON + 3 * math.sqrt(4 + CHARBONNIER_EPSILON**2)) / 4
    assert number(error) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(error, volume)
    assert gradient.tolist() == [[[0.0, pytest.approx(0.75, rel=1e-6), 0.0]]]


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
    volume = drawn(1, 1, *SIZE)
    rolled = volume.roll((1, 3, 2), dims=(2, 3, 4))
    assert number(spectral_distance(rolled, everywhere(volume))) == pytest.approx(0, abs=1e-6)
    assert number((rolled - volume).abs().mean()) > 0.5


def test_the_amplitudes_are_those_of_monai() -> None:
    volume, target = drawn(1, 1, *SIZE), torch.zeros(1, 1, *SIZE)
    every = torch.fft.fftn(volume, dim=(2, 3, 4), norm="ortho").abs()
    assert number(every.square().mean()) == pytest.approx(number(JukeboxLoss(3)(volume, target)), rel=1e-5)
    half = every[..., : SIZE[2] // 2 + 1]  # the others are equal to these
    assert number(spectral_distance(volume, everywhere(target))) == pytest.approx(number(half.mean()), rel=1e-5)


# --- the sum


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = AutoencoderLoss(
        "l2", kl_weight=0.25, spectral_weight=0.5, perceptual=lambda *_: torch.tensor(7.0), perceptual_weight=2
    )
    volume, target = drawn(2, 1, *SIZE), everywhere(drawn(2, 1, *SIZE, seed=3))
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


def test_b14_a_codebook_takes_the_place_of_the_kl_divergence_and_its_perplexity_is_only_told() -> None:
    loss = AutoencoderLoss(kl_weight=100.0, codebook_weight=0.5)
    volume = drawn(2, 1, *SIZE)
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
    volume = drawn(2, 1, *SIZE)
    assert list(loss.terms(reconstruction(volume), everywhere(volume))) == ["reconstruction"]
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}


def test_b13_the_learned_log_variance_is_that_of_the_error() -> None:
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
    volume, target = drawn(2, 1, *SIZE), everywhere(drawn(2, 1, *SIZE, seed=3))
    loss = AutoencoderLoss(log_variance=True)
    assert loss.log_variance is not None
    with torch.no_grad():
        loss.log_variance.fill_(-3.0)
    assert number(loss(reconstruction(volume), target)) == number(AutoencoderLoss()(reconstruction(volume), target))


# --- perceptual


@pytest.fixture(scope="module")
def weights_2d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet for colour slices, as torchvision stores it: with a classifier."""
    torch.manual_seed(0)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=2, in_channels=3)
    file = tmp_path_factory.mktemp("weights") / "slices.pth"
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}, file)
    return file


@pytest.fixture(scope="module")
def weights_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet for volumes, as MedicalNet stores it."""
    torch.manual_seed(0)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
    file = tmp_path_factory.mktemp("weights") / "volumes.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, file)
    return file


@pytest.mark.parametrize("weights", ["weights_2d", "weights_3d"])
def test_a11_the_perceptual_distance_is_0_for_equal_volumes_and_leads_towards_the_target(
    request: pytest.FixtureRequest, weights: str
) -> None:
    distance = PerceptualDistance(request.getfixturevalue(weights), slices_per_axis=2)
    target = everywhere(drawn(2, 1, 16, 20, 24))
    assert number(distance(target.value, target)) == 0
    volume = drawn(2, 1, 16, 20, 24, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(volume, target), volume)
    assert number(distance(volume - 20 * gradient, target)) < number(distance(volume, target))


def test_a11_in_volumes_it_compares_normalised_features_of_every_layer(weights_3d: Path) -> None:
    volume, target = drawn(1, 2, 16, 16, 16), drawn(1, 2, 16, 16, 16, seed=1)
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


def test_a11_slices_are_taken_along_every_axis(weights_2d: Path) -> None:
    distance = PerceptualDistance(weights_2d, slices_per_axis=1)
    target = everywhere(drawn(1, 1, 16, 20, 24))
    for axis, middle in enumerate((8, 10, 12)):
        inside, outside = target.value.clone(), target.value.clone()
        inside.select(axis + 2, middle).mul_(-1)
        outside.select(axis + 2, middle + 1).mul_(-1)
        assert number(distance(inside, target)) > 2 * number(distance(outside, target)) > 0  # two axes cut a line of it


def test_its_weights_are_frozen_and_in_no_checkpoint(weights_2d: Path) -> None:
    distance = PerceptualDistance(weights_2d)
    loss = AutoencoderLoss(perceptual=distance, perceptual_weight=1.0)
    assert not any(weight.requires_grad for weight in distance.features.parameters())
    assert not distance.features.training
    assert loss.state_dict() == {}


@pytest.mark.parametrize("weights", [None, "absent.pth"])
def test_a_perceptual_distance_needs_its_file(tmp_path: Path, weights: str | None) -> None:
    with pytest.raises(FibldmError, match=r"needs a local file of weights; got (None|.*absent.pth); set"):
        PerceptualDistance(weights and tmp_path / weights)


def test_a_file_that_is_no_state_dict_or_of_another_network_is_refused(tmp_path: Path, weights_2d: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(FibldmError, match=r"text.pth must be a state dict of a ResNet"):
        PerceptualDistance(tmp_path / "text.pth")
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(FibldmError, match=r"other.pth must be a state dict of a ResNet; KeyError"):
        PerceptualDistance(tmp_path / "other.pth")
    with pytest.raises(FibldmError, match=r"of resnet18; \d+ names or shapes differ, layer1.1.bn1.bias first"):
        PerceptualDistance(weights_2d, network="resnet18")
    with pytest.raises(FibldmError, match=r"network must be one of resnet10, .*; got 'vgg'"):
        PerceptualDistance(weights_2d, network="vgg")


def test_a_perceptual_weight_needs_a_distance() -> None:
    with pytest.raises(FibldmError, match=r"a perceptual weight of 0.5 needs a perceptual distance; got none"):
        AutoencoderLoss(perceptual_weight=0.5)


# --- padding


def test_what_is_in_the_padding_changes_no_term(weights_2d: Path) -> None:
    loss = AutoencoderLoss(
        "charbonnier",
        spectral_weight=1.0,
        perceptual=PerceptualDistance(weights_2d, slices_per_axis=2),
        perceptual_weight=1.0,
    )
    volume, value = drawn(1, 1, 16, 20, 24), drawn(1, 1, 16, 20, 24, seed=1)
    weight = torch.ones_like(value)
    weight[..., 17:] = 0
    changed = torch.where(weight > 0, volume, 5.0)
    before, after = (loss.terms(reconstruction(part), Weighted(value, weight)) for part in (volume, changed))
    assert len(before) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)
    inside = loss.terms(reconstruction(volume * 0.5), Weighted(value, weight))
    assert not any(torch.equal(before[name], inside[name]) for name in before if name != "kl")
