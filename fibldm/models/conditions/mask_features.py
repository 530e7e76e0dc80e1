"""What is said of a label's shape beyond where it is: its distance and its contour."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def signed_distance(shapes: Tensor, spacing: Sequence[float], reach: float) -> Tensor:
    """How far every voxel is from the border of each shape, positive inside, in units of ``reach``.

    Distances are Euclidean, between centres of voxels, less the half voxel to the border.

    Args:
        shapes: booleans ``(B, L, X, Y, Z)``.
        spacing: mm along the axes.
        reach: mm, at which distances end.

    Returns:
        ``(B, L, X, Y, Z)`` in ``[-1, 1]``, float32, on the device of ``shapes``; -1 everywhere where a shape is empty,
        1 where it fills the volume.
    """
    step = [float(length) for length in spacing[: shapes.ndim - 2]]
    distances = np.stack([_signed(shape, step) for shape in shapes.flatten(0, 1).cpu().numpy()])
    return torch.from_numpy(distances).clamp(-reach, reach).div(reach).view(shapes.shape).to(shapes.device)


def contour(shapes: Tensor) -> Tensor:
    """The voxels of each shape that share a face with a voxel outside of it; what lies outside the volume is no border.

    Args:
        shapes: booleans ``(B, L, X, Y, Z)``.

    Returns:
        0 or 1, ``(B, L, X, Y, Z)``, float32.
    """
    border = torch.zeros_like(shapes)
    for axis in range(2, shapes.ndim):
        before, after = (shapes.narrow(axis, start, shapes.shape[axis] - 1) for start in (0, 1))
        edge = torch.zeros_like(border)
        edge.narrow(axis, 0, shapes.shape[axis] - 1).copy_(before & ~after)
        edge.narrow(axis, 1, shapes.shape[axis] - 1).logical_or_(after & ~before)
        border |= edge
    return border.float()


def _signed(shape: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    if shape.all() or not shape.any():
        return np.full(shape.shape, np.inf if shape.all() else -np.inf, np.float32)
    inside, outside = (distance_transform_edt(part, sampling=spacing) for part in (shape, ~shape))
    half = min(spacing) / 2
    signed: np.ndarray = np.where(shape, inside - half, half - outside).astype(np.float32)
    return signed
