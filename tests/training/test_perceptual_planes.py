"""LPIPS in three planes: of volumes by hand, and in the sections of realism and reconstruction: B21, C18, E8."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets.resnet import ResNetFeatures

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Sample
from fibldm.evaluation.perceptual import PlaneDistance
from fibldm.training.losses import Weighted
from fibldm.training.perceptual import PerceptualDistance, _network_of

SHAPE = (20, 16, 18)


@pytest.fixture(scope="module")
def planes(slice_weights: Path) -> PlaneDistance:
    return PlaneDistance(slice_weights)


def scan(shape: tuple[int, int, int] = SHAPE, *, seed: int = 0) -> Sample:
    image = np.random.default_rng(seed).uniform(-1, 1, size=shape).astype(np.float32)
    return Sample(image, np.zeros(shape, np.uint8), np.ones(shape, bool), (1.0, 1.0, 1.0))


def test_it_is_the_distance_of_the_training_loss_plane_by_plane(slice_weights: Path, planes: PlaneDistance) -> None:
    real, made = scan(), scan(seed=1).image
    value, target = (torch.from_numpy(image)[None, None] for image in (made, real.image))
    whole = PerceptualDistance(slice_weights, slices_per_axis=16)(value, Weighted(target, torch.ones_like(target)))
    mean, *each = planes(real, made)
    assert planes.names(SHAPE) == ["lpips", "lpips/sagittal", "lpips/coronal", "lpips/axial"]
    assert mean == pytest.approx(np.mean(each)) == pytest.approx(float(whole), rel=1e-5)
    assert not planes(real, real.image).any()


@pytest.mark.parametrize("axis", range(3))
def test_a_plane_sees_nothing_of_what_lies_between_its_slices(planes: PlaneDistance, axis: int) -> None:
    shape = [16, 17, 18]
    shape[axis] = 40
    real = scan((shape[0], shape[1], shape[2]))
    made = real.image.copy()
    np.moveaxis(made, axis, 0)[2] *= -1  # slices are in the middle of each 40 / 16: 1, 3, 6, 8, ...
    _, *each = planes(real, made)
    assert [distance > 0 for distance in each] == [other != axis for other in range(3)]


def test_what_lies_outside_of_the_field_of_view_counts_as_equal(planes: PlaneDistance) -> None:
    real = scan()
    real.valid[:, :, 9:] = False
    made = np.where(real.valid, real.image, 0.3).astype(np.float32)
    assert not planes(real, made).any()


def test_slices_have_one_plane_and_channels_count_alike(planes: PlaneDistance) -> None:
    one, other = scan((20, 16, 1)), scan((20, 16, 1), seed=1).image
    assert planes.names((20, 16, 1)) == ["lpips", "lpips/axial"]
    alone = planes(one, other)
    two = one._replace(image=np.stack([one.image, one.image]))
    assert planes(two, np.stack([other, one.image])) == pytest.approx(alone / 2)


@pytest.mark.parametrize("name", ["resnet10", "resnet34", "resnet50", "resnet101"])
def test_the_network_is_told_by_its_layers(name: str) -> None:
    with torch.device("meta"):
        state = ResNetFeatures(name, pretrained=False, spatial_dims=2, in_channels=3).state_dict()
    assert _network_of(state, None) == name


def test_files_that_are_no_network_of_slices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FibldmError, match=r"LPIPS needs a local file of weights \(perceptual\); there is no .*absent.pth"
    ):
        PlaneDistance(tmp_path / "absent.pth")
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
    torch.save(network.state_dict(), tmp_path / "volumes.pth")
    with pytest.raises(FibldmError, match=r"needs a network of slices; .*volumes.pth has kernels of 3 axes"):
        PlaneDistance(tmp_path / "volumes.pth")
    torch.save({"conv1.weight": torch.zeros(1, 1, 7, 7)}, tmp_path / "first.pth")
    with pytest.raises(FibldmError, match=r"must hold one of resnet10, .*; its layers have \[0, 0, 0, 0\] blocks"):
        PlaneDistance(tmp_path / "first.pth")
