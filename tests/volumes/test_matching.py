"""Spectra do not depend on shifts and turn as volumes do; correlations at all shifts are those of each shift."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from fibldm.volumes.detail import FREQUENCIES, SIDE, Opened, Prepared, _pooled, cube_spacing
from fibldm.volumes.grid import Volume
from fibldm.volumes.matching import _ALL_TURNS, _NEAR, _STEPS, Matcher, Turn, _correlation, _correlations, _moved

Array = NDArray[np.float32]
CENTRE = (FREQUENCIES,) * 3


def scan(seed: int, shape: tuple[int, int, int] = (40, 36, 44)) -> Volume:
    noise = np.random.default_rng(seed).normal(size=shape)
    return Volume(ndimage.gaussian_filter(noise, 1.5).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))


def prepared(volume: Volume) -> Prepared:
    return Opened(volume, 2.0).at()


def test_there_are_48_turns_and_each_is_another_one() -> None:
    cube = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
    assert len({turn(cube).tobytes() for turn in _ALL_TURNS}) == 48


@pytest.mark.parametrize("turn", _ALL_TURNS[::7], ids=str)
def test_the_spectrum_of_a_turned_volume_is_the_spectrum_turned(turn: Turn) -> None:
    """For a volume turned before it is brought to the cube; in its middle there are no frequencies."""
    volume = scan(1)
    turned = Volume(np.ascontiguousarray(turn(volume.array)), volume.affine)
    expected, found = turn(prepared(volume).spectrum), prepared(turned).spectrum
    off_centre = np.ones(found.shape, bool)
    off_centre[CENTRE] = False
    assert np.corrcoef(expected[off_centre], found[off_centre])[0, 1] > 0.999


def test_the_spectrum_of_a_cube_does_not_depend_on_shifts_or_on_a_mirror_in_a_point() -> None:
    """To rounding, where nothing leaves the cube: closed forms of the Fourier transform."""
    detail = np.zeros((SIDE,) * 3, np.float32)
    detail[12:30, 10:30, 14:30] = np.random.default_rng(2).normal(size=(18, 20, 16))
    whole = (4 * SIDE,) * 3  # so long that all of the cube counts alike
    spectra = [
        Prepared(part, whole, detail).spectrum
        for part in (detail, np.roll(detail, (3, -4, 5), axis=(0, 1, 2)), detail[::-1, ::-1, ::-1])
    ]
    assert np.allclose(spectra[0], spectra[1], rtol=1e-3, atol=1e-3)
    assert np.allclose(spectra[0], spectra[2], rtol=1e-3, atol=1e-3)


def test_correlations_at_all_shifts_are_those_of_each_shift() -> None:
    """Of weighted values without means, as Padfield 2012 has them, computed one by one."""
    one, two = prepared(scan(3)), prepared(scan(4, (44, 40, 36)))
    together = _correlations(one, two, Turn())
    left = one.weight**2
    for step in [(0, 0, 0), (2, -3, 1), (-6, 0, 6)]:
        weight, detail = (_moved(part, step) for part in (two.weight**2, two.detail))
        both = left * weight
        norms = (both * one.detail**2).sum() * (both * detail**2).sum()
        expected = (both * one.detail * detail).sum() / np.sqrt(norms)
        place = tuple(int(np.flatnonzero(part == _STEPS)[0]) for part in step)
        assert together[place] == pytest.approx(expected, abs=1e-4)
    assert together.shape == np.zeros((SIDE,) * 3)[_NEAR].shape


def test_the_correlation_is_that_of_numpy_with_weights() -> None:
    random = np.random.default_rng(5)
    left, right = random.normal(size=(2, 500))
    weight = random.random(500)
    covariance = np.cov(left, right, aweights=weight)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert _correlation(weight, left, right) == pytest.approx(expected, abs=1e-6)


def test_a_cube_moved_by_whole_voxels_is_that_of_scipy() -> None:
    cube = np.random.default_rng(6).normal(size=(7, 8, 9)).astype(np.float32)
    for step in itertools.product((-6, -2, 0, 3), repeat=3):
        assert np.array_equal(_moved(cube, step), ndimage.shift(cube, step, order=0, mode="constant"))


def test_a_volume_of_fine_voxels_is_the_one_of_their_means() -> None:
    """So that the time and memory of large volumes are those of small ones; copies are found across both."""
    known = [scan(seed) for seed in range(6)]
    matcher = Matcher.of(known, cube_spacing([volume.grid for volume in known]))
    fine = np.repeat(np.repeat(known[2].array, 8, 0), 8, 1)
    match = matcher.match(matcher.open(Volume(fine, np.diag([0.25, 0.25, 2.0, 1.0]))))
    assert match.scan == 2 and match.similarity > 0.97
    numbers = np.arange(11, dtype=np.int16).reshape(11, 1, 1)
    assert _pooled(numbers, np.array([4, 1, 1])).ravel().tolist() == [2.5, 6.5]  # of 1 to 8: the borders lose the rest
    assert str(match.transform) == "none"
