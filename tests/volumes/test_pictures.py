"""Pictures of volumes side by side: A32 (pictures of volumes)."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from fibldm.errors import FibldmError
from fibldm.volumes.pictures import Pair, comparison, show, slice_of, write_comparison

SHAPE = (12, 16, 10)
SPACING = (2.0, 3.0, 5.0)


@pytest.fixture
def pair() -> Pair:
    """Air against the same with a bright corner at the patient's right, front and top."""
    left = np.full(SHAPE, -1, dtype=np.float32)
    right = left.copy()
    right[6:, 8:, 5:] = 0.2
    return Pair("one", left, right, SPACING)


def write(path, pairs) -> np.ndarray:
    write_comparison(path, pairs)
    return imread(path)


def test_slices_show_the_patients_right_and_front_on_the_left(pair):
    """Radiologists look from the feet and from the front; the first row lies at the bottom."""
    for plane in range(3):
        picture, _ = slice_of(pair.right, SPACING, plane, (9, 12, 7))
        rows, columns = np.nonzero(picture == picture.max())
        assert columns.max() < picture.shape[1] / 2 and rows.min() >= picture.shape[0] / 2


def test_slices_go_through_the_centre_in_their_proportions():
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    coded = 10_000 * x + 100 * y + z
    views = [slice_of(coded, SPACING, plane, (3, 5, 7)) for plane in range(3)]
    assert [aspect for _, aspect in views] == pytest.approx([3 / 2, 5 / 2, 5 / 3])
    assert [picture.shape for picture, _ in views] == [(16, 12), (10, 12), (10, 16)]
    assert [picture[0, 0] for picture, _ in views] == [110_007, 110_500, 31_500]
    assert [picture[-1, -1] for picture, _ in views] == [1_507, 509, 30_009]


def test_comparison_holds_left_right_and_their_difference_row_by_row(pair):
    other = replace(pair, title="two", left=pair.right, right=pair.left, names=("a", "b"))
    figure = comparison([pair, other])
    assert [row.get_suptitle() for row in figure.subfigs] == ["one", "two"]
    for row, shown in zip(figure.subfigs, (pair, other), strict=True):
        titles = [axis.get_title().split("\n") for axis in row.axes]
        assert [title[1] for title in titles] == ["axial", "coronal", "sagittal"] * 3
        assert [title[0] for title in titles[::3]] == [*shown.names, "difference, ±0.5"]
        left, right, difference = (np.asarray(axis.images[0].get_array()) for axis in row.axes[2::3])
        assert (left == shown.left[8, ::-1, :].T).all() and (right == shown.right[8, ::-1, :].T).all()
        assert difference == pytest.approx(right - left)
        assert np.abs(difference).max() == pytest.approx(1.2)
    assert [axis.images[0].get_clim() for axis in figure.subfigs[0].axes[::3]] == [(-1, 1), (-1, 1), (-0.5, 0.5)]


def test_difference_does_not_wrap_around_in_small_integers(pair):
    bytes_ = replace(pair, left=np.full(SHAPE, 200, np.uint8), right=np.full(SHAPE, 100, np.uint8))
    figure = comparison([bytes_])
    assert (np.asarray(figure.subfigs[0].axes[-1].images[0].get_array()) == -100).all()


def test_written_picture_shows_differences_in_colour_and_volumes_in_grey(tmp_path, pair):
    picture = write(tmp_path / "new" / "all.png", [pair])
    grey, difference = np.split(picture, [2 * picture.shape[1] // 3], axis=1)
    assert np.ptp(difference[..., :3], axis=2).max() > 0.3 and np.ptp(grey[..., :3], axis=2).max() < 0.01
    assert np.isclose(grey[..., 0], 0.6, atol=0.01).mean() > 0.02


def test_same_picture_every_time_and_rows_add_height(tmp_path, pair):
    one, two = write(tmp_path / "1.png", [pair]), write(tmp_path / "2.png", [pair, pair])
    assert two.shape[0] == 2 * one.shape[0]
    before = (tmp_path / "1.png").read_bytes()
    write(tmp_path / "1.png", [pair])
    assert (tmp_path / "1.png").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_refusals(tmp_path, pair):
    with pytest.raises(FibldmError, match="needs at least one pair; got none"):
        write_comparison(tmp_path / "x.png", [])
    with pytest.raises(FibldmError, match=re.escape("got (12, 16, 10) and (12, 16, 9); resample one")):
        replace(pair, right=pair.right[..., 1:])
    with pytest.raises(FibldmError, match="two 3-D volumes of one shape"):
        Pair("flat", pair.left[0], pair.right[0], SPACING)
    assert not list(tmp_path.iterdir())


def test_show_draws_upwards_without_axes(pair):
    figure = comparison([pair])
    axis = figure.subfigs[0].axes[0]
    show(axis, np.zeros((3, 2)), 2.5)
    assert axis.images[-1].origin == "lower" and axis.get_aspect() == 2.5 and not axis.axison
