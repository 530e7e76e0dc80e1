"""Correction of the MR bias field: a planted field is taken away, and nothing else."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fibldm.datasets.bias_field import correct
from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume
from fibldm.volumes.scan import Scan

SHAPE = (48, 60, 36)
AFFINE = np.array([[0, 0, 4, 3], [-2, 0, 0, -4], [0, 1.5, 0, 50], [0, 0, 0, 1.0]])
"""Axes stored in another order, none like the other."""
NOISE = 0.03


def head() -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]:
    """An image without bias, its three tissues, and a smooth field that is 4 times as bright at one side."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, length) for length in SHAPE), indexing="ij")
    radius = np.sqrt((x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.85) ** 2)
    tissue = np.digitize(-radius, [-1, -0.7, -0.3]).astype(np.uint8)
    noise = 1 + NOISE * np.random.default_rng(0).standard_normal(SHAPE)
    return np.array([0, 400, 700, 250])[tissue] * noise, tissue, np.exp(0.35 * x - 0.25 * y + 0.2 * z**2)


def spread(image: NDArray[np.floating], tissue: NDArray[np.uint8]) -> list[float]:
    """Standard deviation within each tissue, as a fraction of its mean."""
    return [float(image[tissue == label].std() / image[tissue == label].mean()) for label in (1, 2, 3)]


@pytest.mark.slow
def test_a_planted_field_is_taken_away():
    """What is left within each tissue is its noise; background stays 0, the mean stays, and it repeats to the bit."""
    image, tissue, field = head()
    biased = (image * field).astype(np.float32)
    before = biased.copy()
    corrected = correct(Volume(biased, AFFINE))
    assert spread(biased, tissue)[0] > 5 * NOISE
    assert max(spread(corrected, tissue)) < 1.1 * NOISE
    assert corrected.dtype == np.float32
    assert not corrected[tissue == 0].any()
    np.testing.assert_array_equal(biased, before)
    np.testing.assert_array_equal(correct(Volume(biased, AFFINE)), corrected)
    assert corrected[tissue > 0].mean() == pytest.approx(biased[tissue > 0].mean(), rel=0.1)
    ratio = corrected[tissue > 0] / image[tissue > 0]
    assert ratio.std() / ratio.mean() < 0.02


@pytest.mark.slow
def test_every_channel_has_a_field_of_its_own():
    image, tissue, field = head()
    biased = np.stack([image * field, image / field], axis=-1).astype(np.float32)
    corrected = correct(Scan(biased, AFFINE, "0"))
    assert max(spread(corrected[..., 0], tissue) + spread(corrected[..., 1], tissue)) < 1.1 * NOISE


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, np.nan, np.inf])
def test_an_image_without_foreground_is_refused(value):
    array = np.full((9, 10, 11), value, dtype=np.float32)
    with pytest.raises(FibldmError, match="only in a finite image with a foreground above 0; it has none; check"):
        correct(Volume(array, AFFINE))
