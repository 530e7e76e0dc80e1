"""Patches for training: anywhere, or about a voxel that a mask names."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError

# Enough to hit a label of a percent of the volume almost always without listing all of its voxels.
_PROBES = 1024


class RandForegroundCropd(Randomizable, MapTransform):
    """Cut one patch, at random or with a random labelled voxel in its middle, as far as the border lets it be there.

    MONAI's crops about labels need a mask in every case and give lists; here a case without one is cut anywhere.

    Args:
        keys: tensors ``(C, X, Y, Z)`` of one size to cut; missing ones are passed over.
        roi_size: voxels along each axis; an axis that is shorter stays whole.
        foreground: probability of a patch about a labelled voxel; a third is that of nnU-Net (Isensee et al. 2021).
        label_key: integers ``(1, X, Y, Z)``; 0 is background, 255 unknown.

    Raises:
        FibldmError: the probability is outside 0..1.
    """

    def __init__(
        self, keys: Sequence[str], roi_size: Sequence[int], *, foreground: float = 1 / 3, label_key: str = "label"
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        if not 0 <= foreground <= 1:
            raise FibldmError(f"foreground must be a probability from 0 to 1; got {foreground}", "change foreground")
        self.roi_size, self.foreground, self.label_key = tuple(roi_size), foreground, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        present = list(self.key_iterator(item))
        window = (slice(None), *self._window(item[present[0]].shape[1:], item.get(self.label_key)))
        return item | {key: item[key][window] for key in present}

    def _window(self, shape: Sequence[int], label: Tensor | None) -> list[slice]:
        size = np.minimum(self.roi_size, shape)
        start = self.R.randint(0, np.array(shape) - size + 1)
        if label is not None and self.R.random_sample() < self.foreground:
            centre = self._labelled(label[0])
            start = start if centre is None else np.clip(centre - size // 2, 0, np.array(shape) - size)
        return [slice(first, first + length) for first, length in zip(start.tolist(), size.tolist(), strict=True)]

    def _labelled(self, label: Tensor) -> np.ndarray | None:
        """Index of a random labelled voxel, ``None`` without one."""
        values = label.numpy().reshape(-1)
        probes = self.R.randint(0, values.size, size=_PROBES)
        hits = probes[_is_foreground(values[probes])]
        if not hits.size:
            every = np.flatnonzero(_is_foreground(values))
            hits = every[[self.R.randint(every.size)]] if every.size else every
        return np.array(np.unravel_index(hits[0], label.shape)) if hits.size else None


def _is_foreground(values: np.ndarray) -> np.ndarray:
    return np.asarray((values > 0) & (values != UNKNOWN_LABEL))
