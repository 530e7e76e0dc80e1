"""Figures of chest CT against closed forms on boxes: A4 (the volume follows the labels), A32."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fibldm.demo import chest_metrics
from fibldm.demo.chest_metrics import Match, measure
from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_synthetic

AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])
SHAPE = (20, 16, 12)
LEFT, RIGHT = np.s_[4:8, 4:12, 2:10], np.s_[12:16, 4:12, 2:10]
AIRWAY, SCAR = np.s_[5:7, 6:8, 2:12], np.s_[13:15, 4:6, 3:9]


def chest(shift: int = 0, fibrosis: bool = True) -> NDArray[np.uint8]:
    """Two boxes of lung, an airway in one, which leaves at the top, and a scar in the other; moved along x."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[LEFT], labels[RIGHT], labels[AIRWAY] = 2, 1, 3
    if fibrosis:
        labels[SCAR] = 5
    return np.roll(labels, shift, axis=0)


def body(labels: NDArray[np.uint8], scar: float = -400) -> NDArray[np.int16]:
    """Air around a body of 40 HU, lung of -850 HU, airway of -1000 HU."""
    volume = np.full(SHAPE, -1000, dtype=np.int16)
    volume[2:18, 2:14] = 40
    for value, hu in ((1, -850), (2, -850), (3, -1000), (5, scar)):
        volume[labels == value] = hu
    return volume


def test_dice_of_a_volume_that_follows_its_mask_is_one():
    assert chest_metrics.lung_dice(body(chest()), chest()) == 1


def test_dice_of_a_shifted_volume_by_counting():
    """One of four layers of each lung lies beside the labels; airways and scars do not count."""
    labels, moved = chest(), chest(shift=1)
    lung, airways = np.isin(labels, (1, 2)), np.isin(labels, (3, 5))
    dense = np.isin(moved, (1, 2, 3)) & ~airways
    wanted = 2 * (dense & lung).sum() / (dense.sum() + lung.sum())
    assert 0.5 < wanted < 0.9
    assert chest_metrics.lung_dice(body(moved), labels) == pytest.approx(wanted)


def test_air_around_the_body_and_an_empty_volume_are_no_lung():
    hull = chest_metrics.body_hull(body(chest()))
    np.testing.assert_array_equal(hull, np.broadcast_to(_inside(), SHAPE))
    air = np.full(SHAPE, -1000, dtype=np.int16)
    assert not chest_metrics.body_hull(air).any()
    assert chest_metrics.lung_dice(air, chest()) == 0


def test_a_table_beside_the_body_is_no_body():
    volume = body(chest())
    volume[:, 15] = 100
    assert not chest_metrics.body_hull(volume)[:, 15].any()
    assert chest_metrics.lung_dice(volume, chest()) == 1


def test_fibrosis_contrast():
    assert chest_metrics.fibrosis_contrast(body(chest()), chest()) == pytest.approx(450)
    assert chest_metrics.fibrosis_contrast(body(chest()), chest(fibrosis=False)) is None
    only_scar = np.where(chest() == 5, 5, 0)
    assert chest_metrics.fibrosis_contrast(body(chest()), only_scar) is None


def test_texture_and_spreads_against_numpy():
    rng = np.random.default_rng(1)
    labels = chest()
    volumes = [body(labels) + rng.normal(0, 30, SHAPE) for _ in range(3)]
    lung, scar = np.isin(labels, (1, 2)), labels == 5
    assert chest_metrics.texture(volumes[0], labels) == {
        "lung": pytest.approx(volumes[0][lung].std()),
        "fibrosis": pytest.approx(volumes[0][scar].std()),
    }
    assert set(chest_metrics.texture(volumes[0], chest(fibrosis=False))) == {"lung"}
    both = np.stack(volumes)[:, lung | scar]
    assert chest_metrics.spread_between(volumes, labels) == pytest.approx(np.sqrt(both.var(axis=0, ddof=1).mean()))
    residuals = np.concatenate(
        [volumes[0][labels == value] - volumes[0][labels == value].mean() for value in (1, 2, 5)]
    )
    assert chest_metrics.spread_within(volumes[0], labels) == pytest.approx(residuals.std())
    assert chest_metrics.spread_between([volumes[0]] * 2, labels) == 0
    with pytest.raises(FibldmError, match="at least two of them; got 1"):
        chest_metrics.spread_between(volumes[:1], labels)


@pytest.fixture
def matches(tmp_path) -> list[Match]:
    """Two patients; the synthetic volumes have half the contrast, a third of the noise, and two seeds of the first."""
    return [_match(tmp_path, "a", shift=-1, seeds=2), _match(tmp_path, "b", shift=1, seeds=1)]


def test_measure(matches):
    """The shuffled Dice is the lower one; ratios are those that were put in."""
    figures = measure(matches)
    assert figures["lung_dice"] == figures["lung_dice_real"] == 1
    assert figures["lung_dice_shuffled"] < 0.6
    assert figures["fibrosis_contrast_ratio"] == pytest.approx(0.5, abs=0.05)
    assert figures["texture_ratio"] == pytest.approx(1 / 3, abs=0.1)
    assert figures["seed_ratio"] == pytest.approx(1 / 3, abs=0.1)
    assert [case["shuffled_with"] for case in figures["cases"]] == ["b", "a"]
    assert ["seed_ratio" in case for case in figures["cases"]] == [True, False]


def test_measure_refuses_what_it_cannot_compare(matches, tmp_path):
    with pytest.raises(FibldmError, match="at least two patients"):
        measure(matches[:1])
    same = [Match("c", "a", matches[1].mask, matches[1].real, matches[1].synthetic), matches[0]]
    with pytest.raises(FibldmError, match="at least two patients"):
        measure(same)
    with pytest.raises(FibldmError, match="seed_ratio needs at least one case"):
        measure([Match(m.case, m.subject, m.mask, m.real, m.synthetic[:1]) for m in matches])
    write_labels(tmp_path / "empty.nii.gz", Volume(np.zeros(SHAPE, dtype=np.uint8), AFFINE))
    empty = Match("e", "e", tmp_path / "empty.nii.gz", matches[0].real, matches[0].synthetic)
    with pytest.raises(FibldmError, match=r"lung labels \(1, 2\); .*empty.nii.gz has none"):
        measure([matches[0], empty])


def test_measure_refuses_a_volume_of_another_grid(matches, tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] += 5
    nibabel.save(nibabel.Nifti1Image(body(chest()), moved), tmp_path / "moved.nii.gz")
    wrong = Match("a", "a", matches[0].mask, matches[0].real, [tmp_path / "moved.nii.gz"])
    with pytest.raises(FibldmError, match="moved.nii.gz must lie on its mask's grid; .*affines 1 voxels apart"):
        measure([wrong, matches[1]])


def _inside() -> NDArray[np.bool_]:
    inside = np.zeros(SHAPE, dtype=bool)
    inside[2:18, 2:14] = True
    return inside


def _match(folder: Path, name: str, *, shift: int, seeds: int) -> Match:
    rng = np.random.default_rng(10 + shift)
    labels = chest(shift)
    write_labels(folder / f"{name}.nii.gz", Volume(labels, AFFINE))
    real = np.rint(body(labels) + rng.normal(0, 30, SHAPE)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(real, AFFINE), folder / f"{name}_real.nii.gz")
    paths = [folder / f"{name}_{number:03d}.nii.gz" for number in range(seeds)]
    for path in paths:
        array = np.rint(body(labels, scar=-625) + rng.normal(0, 10, SHAPE)).astype(np.int16)
        write_synthetic(path, Volume(array, AFFINE), {})
    return Match(name, name, folder / f"{name}.nii.gz", folder / f"{name}_real.nii.gz", paths)
