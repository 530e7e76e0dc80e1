"""Randomness keyed by (seed, epoch, case, view): orders, seeds and crops that depend on nothing else."""

from collections import Counter

import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandSpatialCropd

from fibldm.errors import FibldmError
from fibldm.training.draws import Draw, EpochSampler, KeyedDataset, key_seed


def draws(epoch: int, **settings: object) -> list[Draw]:
    sampler = EpochSampler(5, **{"seed": 3, "views": 2, **settings})
    sampler.set_epoch(epoch)
    return list(sampler)


def dataset() -> KeyedDataset:
    cases = [{"image": torch.arange(12.0**3).reshape(1, 12, 12, 12) + 10_000 * case} for case in range(5)]
    crop = RandSpatialCropd(keys=["image"], roi_size=(3, 3, 3), random_size=False)
    return KeyedDataset(cases, transform=Compose([crop]), progress=False)


def corners(loader: DataLoader) -> list[float]:
    return [float(volume[0, 0, 0, 0]) for batch in loader for volume in batch["image"]]


def test_an_epoch_is_the_same_every_time() -> None:
    assert draws(4) == draws(4)


@pytest.mark.parametrize("changed", [{"epoch": 5}, {"seed": 4}])
def test_another_epoch_or_seed_is_another_order_with_other_seeds(changed: dict[str, int]) -> None:
    one, other = draws(4), draws(**{"epoch": 4, **changed})
    assert [(draw.index, draw.view) for draw in one] != [(draw.index, draw.view) for draw in other]
    assert not {draw.seed for draw in one} & {draw.seed for draw in other}


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_view_comes_once_in_an_epoch_with_a_seed_of_its_own(shuffle: bool) -> None:
    made = draws(2, shuffle=shuffle)
    expected = {(index, view): 1 for index in range(5) for view in range(2)}
    assert Counter((draw.index, draw.view) for draw in made) == expected
    assert len({draw.seed for draw in made}) == len(made) == len(EpochSampler(5, seed=3, views=2))


def test_validation_draws_the_same_in_every_epoch() -> None:
    assert draws(1, shuffle=False) == draws(7, shuffle=False)
    assert [draw.index for draw in draws(1, shuffle=False)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_seed_of_a_draw_does_not_depend_on_how_many_cases_there_are() -> None:
    few = {(draw.index, draw.view): draw.seed for draw in draws(4)}
    sampler = EpochSampler(9, seed=3, views=2)
    sampler.set_epoch(4)
    many = {(draw.index, draw.view): draw.seed for draw in sampler}
    assert few.items() <= many.items()


def test_keys_in_another_order_are_other_seeds() -> None:
    assert len({key_seed(*key) for key in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0,)]}) == 5
    assert 0 <= key_seed(2**40, 1) < 2**32


def test_a_draw_gives_the_same_crop_whatever_was_drawn_before() -> None:
    first, second = dataset(), dataset()
    draw = Draw(index=2, view=1, seed=77)
    alone = first[draw]
    for other in draws(1):
        second[other]
    torch.manual_seed(99)
    again = second[draw]
    assert torch.equal(alone["image"], again["image"])
    assert alone["image"].shape == (1, 3, 3, 3)
    assert (alone["seed"], alone["view"]) == (77, 1)
    assert not torch.equal(alone["image"], first[Draw(index=2, view=1, seed=78)]["image"])


def test_crops_are_the_same_in_any_batch_and_in_workers() -> None:
    def loaded(batch_size: int, workers: int) -> list[float]:
        sampler = EpochSampler(5, seed=3, views=2)
        sampler.set_epoch(4)
        return corners(DataLoader(dataset(), sampler=sampler, batch_size=batch_size, num_workers=workers))

    alone = loaded(batch_size=1, workers=0)
    assert len(set(alone)) == 10
    assert loaded(batch_size=4, workers=0) == alone
    assert loaded(batch_size=3, workers=2) == alone


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(FibldmError, match="seeds must be whole numbers of at least 0; got -3"):
        key_seed(-3, 1)
