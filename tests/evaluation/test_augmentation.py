"""TorchIO's transforms in training: labels go where the image goes, and the same key draws the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
import yaml
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, RandSpatialCropd

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.segmenter import trained_segmenter
from fibldm.runs import StageFolder
from fibldm.runs.config_files import configs_folder
from fibldm.runs.configuration import Configuration
from fibldm.training.draws import Draw, KeyedDataset
from fibldm.volumes.augmentation import TorchIOd, before_random
from fibldm.volumes.transforms import AsPlainTensorsd

SHAPE = (14, 12, 9)
SPACING = (2.0, 3.0, 4.0)
Item = dict[str, Any]


def case(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Item:
    """Labels of blocks, and an image that says the label of each voxel; a rim at the end of X is padding."""
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, [-(-n // 3) for n in shape]))
    for axis, length in enumerate(shape):
        labels = labels.repeat_interleave(3, axis).narrow(axis, 0, length)
    valid = torch.ones(1, *shape)
    valid[:, -2:] = 0
    labels = torch.where(valid > 0, labels[None], UNKNOWN_LABEL)
    return {"image": torch.where(valid > 0, labels / 4 * 1.8 - 0.9, -1.0), "label": labels, "valid": valid}


def drawn(transforms: list[Any], item: Item, seed: int = 0, spacing: tuple[float, float, float] = SPACING) -> Item:
    augment = TorchIOd(transforms, spacing=spacing)
    augment.set_random_state(seed=seed)
    return augment(item)


def shipped(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> list[Any]:
    """The transforms of the configuration, each of which is drawn every time."""
    config = yaml.safe_load((configs_folder() / "augment_torchio_mr.yaml").read_text(encoding="utf-8"))
    certain = [{**step, "p": 1.0} for step in (*config["anatomy"], *config["artefacts"])]
    parser = ConfigParser({"steps": certain, "size": list(size), "spacing": list(spacing)})
    return list(parser.get_parsed_content("steps"))


def test_labels_move_with_the_image() -> None:
    nearest: Any = {"image_interpolation": "nearest"}
    steps = [
        torchio.RandomAffine(scales=0.2, degrees=20, **nearest),
        torchio.RandomElasticDeformation(max_displacement=(2, 2, 2), num_control_points=5, **nearest),
    ]
    moved = drawn(steps, case())
    known = moved["valid"] > 0
    assert 0.3 < known.float().mean() < 1 and not torch.equal(moved["label"], case()["label"])
    torch.testing.assert_close(moved["image"][known], (moved["label"][known] / 4 * 1.8 - 0.9).float())
    assert (moved["label"][~known] == UNKNOWN_LABEL).all() and (moved["image"][~known] == -1).all()
    assert moved["label"].dtype == case()["label"].dtype


def test_millimetres_are_those_of_the_grid_and_what_comes_from_outside_is_padding() -> None:
    item = case()
    moved = drawn([torchio.RandomAffine(scales=(1, 1), degrees=0, translation=(4, 4, 6, 6, -4, -4))], item)
    # 4, 6 and -4 mm are 2 voxels along X, 2 along Y and one back along Z
    for key, outside in (("label", UNKNOWN_LABEL), ("valid", 0), ("image", -1)):
        torch.testing.assert_close(moved[key][:, 2:, 2:, :-1], item[key][:, :-2, :-2, 1:], atol=1e-5, rtol=0)
        for rim in (moved[key][:, :2], moved[key][:, :, :2], moved[key][..., -1:]):
            assert (rim == outside).all(), key


@pytest.mark.parametrize("displacement", [(0, 0, 0), (3, 3, 3)])
def test_a_volume_of_one_label_has_unknown_where_something_comes_from_outside(displacement: Any) -> None:
    item = {"image": torch.zeros(1, *SHAPE), "label": torch.full((1, *SHAPE), 3), "valid": torch.ones(1, *SHAPE)}
    steps = [
        torchio.RandomElasticDeformation(num_control_points=4, locked_borders=0, max_displacement=displacement),
        torchio.RandomAffine(scales=(1, 1), degrees=0, translation=(4, 4, 0, 0, 0, 0)),
    ]
    moved = drawn(steps, item)
    assert set(moved["label"].unique().tolist()) == {3, UNKNOWN_LABEL}
    assert torch.equal(moved["label"] == UNKNOWN_LABEL, moved["valid"] == 0)
    assert (moved["valid"][:, :2] == 0).all()


def test_artefacts_change_intensities_only_and_stay_in_range() -> None:
    item = case()
    made = drawn([torchio.RandomBiasField(0.5)], item)
    assert torch.equal(made["label"], item["label"]) and torch.equal(made["valid"], item["valid"])
    assert not torch.equal(made["image"], item["image"]) and made["image"].abs().max() <= 1
    # a field multiplies: air stays air
    air = {**item, "image": torch.full((1, *SHAPE), -1.0)}
    assert torch.equal(drawn([torchio.RandomBiasField(0.5)], air)["image"], air["image"])


def test_the_same_seed_draws_the_same_and_leaves_torchs_own_numbers_alone() -> None:
    steps, item = shipped(SHAPE, SPACING), case()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = drawn(steps, item, seed=3)
    assert torch.equal(torch.rand(3), expected)
    same, other = drawn(steps, item, seed=3), drawn(steps, item, seed=4)
    assert all(torch.equal(one[key], same[key]) for key in item) and not torch.equal(one["image"], other["image"])
    assert all(torch.equal(value, case()[key]) for key, value in item.items()), "what came was changed"


def test_a_draw_that_changes_nothing_is_the_case_to_the_bit() -> None:
    made = drawn([torchio.RandomAffine(p=0), torchio.RandomNoise(p=0)], case())
    assert all(torch.equal(value, case()[key]) for key, value in made.items())


def test_the_affine_of_a_tensor_stays_and_counts() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([5.0, -7.0, 11.0])
    item = {key: MetaTensor(value, affine=affine) for key, value in case().items()}
    step = torchio.RandomAffine(scales=(1, 1), degrees=0, translation=(4, 4, 0, 0, 0, 0))
    made, plain = drawn([step], item, spacing=(1, 1, 1)), drawn([step], case())
    assert all(torch.equal(made[key].affine, affine) for key in item)
    torch.testing.assert_close(made["image"].as_tensor(), plain["image"])


def test_cases_without_a_mask_and_with_channels_are_augmented() -> None:
    item = {key: value for key, value in case().items() if key != "label"}
    item["image"] = torch.cat([item["image"], -item["image"].clip(-0.9)])
    made = drawn(shipped(SHAPE, SPACING), item, seed=2)
    assert made.keys() == item.keys() and made["image"].shape == (2, *SHAPE) and made["image"].isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_a_slice_stays_in_its_plane(seed: int) -> None:
    shape, spacing = (24, 20, 1), (1.0, 1.0, 5.0)
    made = drawn(shipped(shape, spacing), case(shape), seed, spacing)
    assert made["image"].shape == (1, *shape) and (made["valid"] > 0).float().mean() > 0.5


def test_transforms_that_change_the_grid_are_refused() -> None:
    for step in (torchio.CropOrPad((8, 8, 8)), torchio.Resample(1.5)):
        with pytest.raises(FibldmError, match="must keep the grid; size .* became .*leave out those that crop"):
            drawn([step], case())


def test_whole_volumes_are_augmented_before_a_patch_is_cut() -> None:
    crop = RandSpatialCropd(["image", "label", "valid"], roi_size=(6, 6, 6), random_size=False)
    plain = Compose([AsPlainTensorsd(["image", "label", "valid"]), crop])
    shift = TorchIOd([torchio.RandomAffine(scales=(1, 1), degrees=0, translation=(4, 4, 0, 0, 0, 0))], spacing=SPACING)
    steps = before_random(plain, [shift])
    assert [type(step).__name__ for step in steps.transforms] == ["AsPlainTensorsd", "TorchIOd", "RandSpatialCropd"]
    assert [type(step).__name__ for step in before_random(Compose([]), [shift]).transforms] == ["TorchIOd"]
    assert len(plain.transforms) == 2


def test_a_training_example_is_that_of_its_key() -> None:
    crop = RandSpatialCropd(["image", "label", "valid"], roi_size=(6, 6, 6), random_size=False)
    augment = TorchIOd(shipped(SHAPE, SPACING), spacing=SPACING)
    steps = before_random(Compose([AsPlainTensorsd(["image", "label", "valid"]), crop]), [augment])
    dataset = KeyedDataset([case(seed=1), case(seed=2)], transform=steps, progress=False)
    draws = [Draw(0, 0, 7), Draw(1, 0, 8), Draw(0, 1, 9)]
    forward = [dataset[draw] for draw in draws]
    backward = [dataset[draw] for draw in reversed(draws)][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "label", "valid"))
    assert not torch.equal(forward[0]["image"], forward[2]["image"])


@pytest.mark.slow
def test_stage_1_trains_on_it_wherever_it_is_drawn(
    tiny_stage: Callable[..., Configuration], tiny_run: Path, tmp_path: Path
) -> None:
    hashes = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        tiny_stage("autoencoder", run, "augment_torchio_mr", num_workers=workers).run()
        hashes.append(StageFolder(run, "autoencoder").require()["weights"])
    assert hashes[0] == hashes[1] != StageFolder(tiny_run, "autoencoder").require()["weights"]


@pytest.mark.slow
def test_the_segmenter_that_measures_trains_on_it(phantom_work: Path, tiny_run: Path, tmp_path: Path) -> None:
    evaluated = replace(Evaluated.open(tiny_run, phantom_work), run_dir=tmp_path)
    smallest = {"steps": 2, "batch_size": 2, "segmenter_channels": [4, 8, 8], "precision": "float32"}
    found = [
        trained_segmenter(evaluated, overrides={**smallest, **more}, device="cpu").fingerprint
        for more in ({}, {"configs": ["augment_torchio_mr"]})
    ]
    assert found[0] != found[1]
