"""TorchIO's random transforms of anatomy and of MR acquisition, on the tensors that training reads."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Randomizable, RandomizableTrait
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError

if TYPE_CHECKING:
    from torchio import Subject

_PLACES = "places"
_SEEDS = 2**32


class TorchIOd(Randomizable, MapTransform):
    """Random transforms of TorchIO, drawn from this transform's own random state; labels move with the image.

    TorchIO draws from torch's global generator and fills what comes from outside the volume with a value of the volume,
    in labels as well. Here the generator is set for one call and put back, and what comes from outside is padding as
    `ToModelGridd` makes it: *unknown* (255), not ``valid``, and ``pad_value`` in the image. Intensities are handed on
    from 0 to 1 instead of -1 to 1, as a bias field multiplies, and clipped to that range.

    Args:
        transforms: of TorchIO, applied one after the other; they keep the grid.
        spacing: mm along R, A, S of tensors that do not say so themselves.
        image_key: ``(C, X, Y, Z)`` in ``[-1, 1]``.
        label_key: ``(1, X, Y, Z)``; a case without a mask has none.
        valid_key: ``(1, X, Y, Z)``, 1 inside the field of view, 0 in the padding.
        pad_value: of the padding of the image.
    """

    def __init__(
        self,
        transforms: Sequence[Callable[["Subject"], "Subject"]],
        *,
        spacing: Sequence[float],
        image_key: str = "image",
        label_key: str = "label",
        valid_key: str = "valid",
        pad_value: float = -1.0,
    ) -> None:
        MapTransform.__init__(self, [image_key, label_key, valid_key], allow_missing_keys=True)
        self.transforms, self.affine = tuple(transforms), np.diag([*map(float, spacing), 1.0])
        self.image_key, self.label_key, self.valid_key, self.pad_value = image_key, label_key, valid_key, pad_value

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """One case with a new draw; the tensors that came are not changed.

        Raises:
            FibldmError: a transform changes the grid.
        """
        item = dict(data)
        before = self._subject(item)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would set the generators of GPUs, too
            torch.default_generator.manual_seed(int(self.R.randint(_SEEDS, dtype=np.uint64)))
            after = before
            for transform in self.transforms:
                after = transform(after)
        image = item[self.image_key]
        if after.spatial_shape != before.spatial_shape or not np.allclose(
            after[self.image_key].affine, before[self.image_key].affine
        ):
            raise FibldmError(
                f"transforms of training must keep the grid; size {tuple(before.spatial_shape)} became "
                f"{tuple(after.spatial_shape)}",
                "leave out those that crop, pad or resample",
            )
        if not torch.equal(after[_PLACES].data, before[_PLACES].data):
            inside = after[_PLACES].data > 0
            item[self.valid_key] = _like(item[self.valid_key], inside)
            if self.label_key in item:
                label = torch.where(inside, after[_PLACES].data - 1, UNKNOWN_LABEL)
                item[self.label_key] = _like(item[self.label_key], label)
        if not torch.equal(after[self.image_key].data, before[self.image_key].data):
            values = (after[self.image_key].data * 2 - 1).clip(-1, 1)
            item[self.image_key] = _like(image, torch.where(item[self.valid_key] > 0, values, self.pad_value))
        return item

    def _subject(self, item: Mapping[Hashable, Any]) -> Any:
        """The image from 0 to 1, and one map to resample: label plus 1, and 0 in the padding."""
        import torchio

        image, valid = item[self.image_key], _plain(item[self.valid_key])
        affine = image.affine.numpy() if isinstance(image, MetaTensor) else self.affine
        places = torch.where(valid > 0, _plain(item.get(self.label_key, valid)) + 1, 0)
        # what comes from outside gets the least value that a map has, which has to be that of the padding
        places[0, 0, 0, 0] = 0
        return torchio.Subject(
            {
                self.image_key: torchio.ScalarImage(tensor=(_plain(image) + 1) / 2, affine=affine),
                _PLACES: torchio.LabelMap(tensor=places, affine=affine),
            }
        )


def before_random(transforms: Compose, inserted: Sequence[Callable[[Any], Any]]) -> Compose:
    """Transforms with others before the first random one: after what is cached, and before a patch is cut."""
    steps = list(transforms.transforms)
    first = next((n for n, step in enumerate(steps) if isinstance(step, RandomizableTrait)), len(steps))
    return Compose([*steps[:first], *inserted, *steps[first:]])


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain.float()


def _like(before: Tensor, values: Tensor) -> Tensor:
    """Values in the type of a tensor, with its metadata if it has any."""
    typed = values.to(before.dtype)
    return MetaTensor(typed, meta=before.meta) if isinstance(before, MetaTensor) else typed
