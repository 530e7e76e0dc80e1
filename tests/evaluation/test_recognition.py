"""Volumes with the mark are recognised whatever was done to them; others are not, and the chance of that is a bound."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.cli import run
from fibldm.evaluation.recognition import Recognition, recognise
from fibldm.evaluation.recognition.folding import folded, folded_at, ladder
from fibldm.evaluation.recognition.recognition import log_chance
from fibldm.models.mark import PUBLIC_KEY, SITE_KEY, Mark
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_nifti, write_synthetic

Array = NDArray[Any]

SHAPE = (40, 48, 36)
SMALL = (24, 28, 20)
SITE = "a key that only one site knows"


def scan(seed: int, mark: Mark | None, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float32]:
    """A smooth body in HU with a sharp border and noise of 20 HU, whose neighbours correlate."""
    draws = torch.Generator().manual_seed(seed)
    white = torch.randn(1, *shape, generator=draws)
    noise = (white if mark is None else mark.imprint(white, draws))[0].numpy()
    noise = ndimage.gaussian_filter(noise, 0.4)
    body = ndimage.gaussian_filter(torch.randn(shape, generator=draws).numpy(), 4) * 2000
    inside = sum(((np.indices(shape)[axis] / length - 0.5) * 2.2) ** 2 for axis, length in enumerate(shape)) < 1
    return np.where(inside, body + 20 * noise / noise.std(), -1000 + 5 * noise).astype(np.float32)


def resampled(array: Array, *sizes: float, order: int = 1) -> Array:
    shape = [round(length * size) for length, size in zip(array.shape, sizes, strict=True)]
    start = (np.array(array.shape) - 1) / 2 - (np.array(shape) - 1) / 2 / sizes + 0.3
    return ndimage.affine_transform(array, 1 / np.array(sizes), start, output_shape=shape, order=order, mode="nearest")


def windowed(array: Array, centre: float, width: float) -> NDArray[np.uint8]:
    return np.rint(((array - centre) / width + 0.5).clip(0, 1) * 255).astype(np.uint8)


def edited(array: Array) -> Array:
    whole = scan(99, None, (80, 80, 80))
    whole[17:41, 30:58, 40:64] = array[8:32, 8:36, 6:30]
    return whole


MANIPULATIONS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda array: array,
    "int16": lambda array: np.rint(array).astype(np.int16),
    "turned and mirrored": lambda array: array.transpose(2, 0, 1)[::-1, :, ::-1],
    "inverted": lambda array: 1000 - array,
    "cropped to an eighth": lambda array: array[10:30, 12:36, 9:27],
    "lung window in 8 bits": lambda array: windowed(array, -600, 1500),
    "soft tissue window in 8 bits": lambda array: windowed(array, 40, 400),
    "blurred": lambda array: np.rint(ndimage.gaussian_filter(array, 0.7)),
    "voxels of 0.9": lambda array: resampled(array, 1.1, 1.1, 1.1),
    "voxels of 1.1": lambda array: resampled(array, 0.9, 0.9, 0.9),
    "thinner slices": lambda array: resampled(array, 1.0, 1.0, 1.13, order=3),
    "on a finer grid": lambda array: resampled(array, 2.2, 2.2, 2.2),
    "pasted into a scan": edited,
}
SLOW = ("on a finer grid", "pasted into a scan")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MANIPULATIONS]
)
def test_the_mark_survives(name: str) -> None:
    found = recognise([MANIPULATIONS[name](scan(1, Mark()))])
    assert found.synthetic and found.p <= 1e-4, found


def test_the_mark_of_a_large_slice_is_found() -> None:
    assert recognise([scan(1, Mark(), (160, 150, 1))]).synthetic


@pytest.mark.parametrize("name", ["as it is", "lung window in 8 bits"])
def test_volumes_without_the_mark_are_not_recognised(name: str) -> None:
    found = recognise([MANIPULATIONS[name](scan(5, None, SMALL))])
    assert not found.synthetic and 0.01 < found.p <= 1


def test_the_bound_holds_for_every_way_in_which_coins_can_fall() -> None:
    """Of all 4096, for correlated and very unequal numbers too."""
    signs = np.array(list(product([-1, 1], repeat=12)))
    for values in (np.ones(12), np.arange(12.0) ** 3, np.r_[np.ones(6), np.zeros(6)], np.r_[100, np.ones(11)]):
        sums = np.abs(signs @ values)
        for t in np.unique(sums):
            exact = float((sums >= t).mean())
            assert exact <= math.exp(log_chance(float(t), float((values**2).sum()))) * (1 + 1e-9)
    assert log_chance(0.0, 0.0) == 0


@pytest.mark.parametrize(
    "array",
    [np.zeros((20, 20, 20)), np.full((3, 4, 5), np.nan), np.ones((1, 1, 1)), np.arange(27.0).reshape(3, 3, 3)],
    ids=["constant", "no number", "one voxel", "few voxels"],
)
def test_a_volume_without_grain_is_not_recognised(array: Array) -> None:
    found = recognise([array])
    assert not found.synthetic and found.described == "no mark found (p = 1)"


def test_a_voxel_that_is_no_number_hides_nothing() -> None:
    array = scan(1, Mark())
    array[3, 4, 5] = np.nan
    assert recognise([array]).synthetic


def test_the_mark_of_a_site_needs_its_key() -> None:
    array = scan(2, Mark(SITE))
    assert recognise([array]).synthetic and recognise([array], key=SITE).synthetic
    assert not recognise([scan(2, Mark(), SMALL)], key=SITE).synthetic


def test_one_of_several_channels_is_enough() -> None:
    assert recognise([scan(3, None), scan(4, Mark())]).synthetic


def test_folding_adds_what_is_whole_periods_apart() -> None:
    grain = np.random.default_rng(0).standard_normal((19, 16, 40)).astype(np.float32)
    expected = np.zeros((16, 16, 16), dtype=np.float32)
    for x, y, z in np.ndindex(grain.shape):
        expected[x % 16, y % 16, z % 16] += grain[x, y, z]
    assert np.allclose(folded(grain), expected, atol=1e-5)
    odd = grain[:17, :15, :33]  # whose middle is a voxel, from which other sizes are counted
    assert np.allclose(folded_at(odd, (1.0, 1.0, 1.0))[0], np.roll(folded(odd), (-8, -7, -16), (0, 1, 2)), atol=1e-4)
    assert [len(folded_at(grain, sizes)) for sizes in ((1.1, 1.1, 1.1), (1.0, 1.1, 1.0))] == [8, 2]
    assert len(folded_at(grain, (1.1, 1.1, 1.1), quick=True)) == 2


def test_sizes_lie_so_near_each_other_that_one_is_right_everywhere() -> None:
    sizes = list(ladder((50, 40, 30), 0.85, 1.18))
    assert sizes[0] == 0.85 and 1.15 < sizes[-1] <= 1.18
    for small, large in zip(sizes, sizes[1:], strict=False):
        assert (large / small - 1) / 2 * 50 / small / 2 <= 0.25 + 1e-9


def test_p_is_told_in_words_even_where_it_is_no_number() -> None:
    found = Recognition(-400.0, "as it is", (1.0, 1.0, 1.0))
    assert found.described == "synthetic (p < 1e-300)" and found.to_dict()["log10_p"] == -400


@pytest.fixture
def three_files(tmp_path: Path) -> Path:
    """A synthetic volume, the same as another tool saved it, and one without a mark."""
    write_synthetic(tmp_path / "made.nii.gz", Volume(scan(1, Mark()), np.eye(4)), {})
    nibabel.save(nibabel.Nifti1Image(np.rint(scan(1, Mark())).astype(np.int16), np.eye(4)), tmp_path / "saved.nii.gz")
    write_nifti(tmp_path / "scan.nii.gz", scan(7, None, SMALL), np.eye(4))
    return tmp_path


def test_the_command_says_what_voxels_and_headers_say(
    three_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["recognise", str(three_files)]) == 0
    made, saved, plain = capsys.readouterr().out.splitlines()
    assert "made.nii.gz: synthetic (p = " in made and made.endswith("; header: synthetic")
    assert "saved.nii.gz: synthetic (p = " in saved and saved.endswith("; header says nothing of it")
    assert "scan.nii.gz: no mark found (p = " in plain and "real" not in plain
    monkeypatch.setenv(SITE_KEY, SITE)
    assert run(["recognise", str(three_files / "saved.nii.gz"), "--expect", "synthetic"]) == 0
    told = capsys.readouterr().out
    assert "key of this site: no mark found" in told and SITE not in told


def test_the_command_ends_with_one_where_another_outcome_was_expected(three_files: Path) -> None:
    made, plain = (str(three_files / name) for name in ("made.nii.gz", "scan.nii.gz"))
    assert [run(["recognise", made, "--expect", word]) for word in ("synthetic", "none", "real")] == [0, 1, 2]
    assert [run(["recognise", *files, "--expect", "none"]) for files in ([plain], [plain, made])] == [0, 1]


def test_all_files_that_cannot_be_read_are_told(three_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (three_files / "broken.nii.gz").write_bytes(b"no volume")
    assert run(["recognise", str(three_files / "none.nii.gz"), str(three_files)]) == 2
    out, told = capsys.readouterr()
    assert "2 are not" in told and "broken.nii.gz" in told and "none.nii.gz does not exist" in told
    assert out.count("synthetic (p") == 2


def test_nothing_is_looked_for_but_the_key_that_is_named() -> None:
    assert recognise([scan(1, Mark())], key=PUBLIC_KEY).way == "as it is"
