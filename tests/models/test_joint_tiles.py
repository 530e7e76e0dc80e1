"""Latents drawn as one from overlapping tiles."""

import pytest
import torch
from torch import Tensor

from fibldm.models.joint_tiles import OVERLAP, JointTiles
from fibldm.models.process import Prediction


@pytest.mark.parametrize(
    ("cells", "trained"), [((30, 16, 9), (8, 8, 4)), ((17, 8, 4), (8, 8, 4)), ((40, 9, 1), (8, 8, 1))]
)
def test_tiles_cover_the_latent_and_overlap(cells: tuple[int, ...], trained: tuple[int, ...]) -> None:
    tiles = JointTiles.plan(cells, trained)
    assert tiles is not None and tiles.size == trained
    seen = torch.zeros(cells)
    for window in tiles.windows:
        assert tuple(seen[window].shape) == trained
        seen[window] += 1
    assert seen.min() >= 1
    for axis, side in enumerate(trained):
        starts = sorted({window[axis].start for window in tiles.windows})
        assert all(later - start <= (1 - OVERLAP) * side for start, later in zip(starts, starts[1:], strict=False))


def test_a_latent_of_the_training_size_is_one() -> None:
    assert JointTiles.plan((8, 8, 8), (8, 8, 8)) is None


def test_what_is_local_is_said_as_of_the_whole() -> None:
    """Each value depends on its own cell: blended, all that tiles say of it agrees. The variance is blended, too."""
    tiles = JointTiles.plan((30, 16, 9), (8, 8, 4))
    assert tiles is not None
    condition = torch.randn(2, 3, 30, 16, 9)

    def within(windows):
        shown = torch.cat([condition[:, :, *window] for window in windows])

        def denoise(z: Tensor, t: Tensor) -> Prediction:
            return Prediction(z * t.view(-1, 1, 1, 1, 1) + shown, shown[:, :1])

        return denoise

    z, t = torch.randn(2, 3, 30, 16, 9), torch.tensor([0.2, 0.7])
    said = tiles.around(within)(z, t)
    assert torch.allclose(said.z_0, z * t.view(-1, 1, 1, 1, 1) + condition, atol=1e-5)
    assert said.log_variance is not None and torch.allclose(said.log_variance, condition[:, :1], atol=1e-5)
    assert said.interpolation is None


def test_disagreeing_tiles_leave_no_step() -> None:
    """Each tile says its own number; across the latent that changes by small steps only."""
    tiles = JointTiles.plan((64, 16, 16), (16, 16, 16))
    assert tiles is not None

    def within(windows):
        levels = torch.tensor([float(window[0].start > 0) for window in windows])
        return lambda z, t: Prediction(levels.view(-1, 1, 1, 1, 1).expand_as(z))

    said = tiles.around(within)(torch.zeros(1, 1, 64, 16, 16), torch.ones(1)).z_0[0, 0, :, 8, 8]
    assert said[0] == 0 and said[-1] == 1
    assert said.diff().abs().max() < 0.5 and (said.diff() >= 0).all()
