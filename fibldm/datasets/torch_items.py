"""What an item of any torch dataset holds: image, mask, affine and class, whatever form they come in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError

_MODES = ("1", "L", "I", "I;16", "F", "RGB")
_SLICE = "a slice is a PIL image, (1, rows, columns) as torchvision gives it, or (X, Y, 1)"


@dataclass(frozen=True)
class Keys:
    """Where the parts of an item stand that is a mapping.

    Attributes:
        image: key of the image.
        mask: key of the mask; ``None``, or absent from an item: no mask.
        affine: key of the affine; as ``mask``.
        label: key of the class; as ``mask``.
    """

    image: str
    mask: str | None
    affine: str | None
    label: str | None


@dataclass(frozen=True)
class Parts:
    """An item taken apart.

    Attributes:
        image: as the dataset gives it.
        mask: as the dataset gives it, or ``None``.
        affine: voxel index to RAS+ mm, or ``None``.
        label: the class, or ``None``.
    """

    image: Any
    mask: Any = None
    affine: Any = None
    label: str | float | None = None


def parts_of(item: Any, keys: Keys, name: str) -> Parts:
    """An item: a mapping, or an image alone, with its mask, or with its class.

    Raises:
        FibldmError: it is neither, or has no image.
    """
    if isinstance(item, Mapping):
        if keys.image not in item:
            raise FibldmError(f"{name}: an item must have the key {keys.image!r}; it has {', '.join(map(str, item))}")
        image, mask, affine, label = (
            None if key is None else item.get(key) for key in (keys.image, keys.mask, keys.affine, keys.label)
        )
        return Parts(image, mask, getattr(image, "affine", None) if affine is None else affine, _class(label, name))
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        second = item[1] if len(item) == 2 else None
        affine = getattr(item[0], "affine", None)
        if second is None or _is_class(second):
            return Parts(item[0], affine=affine, label=_class(second, name))
        return Parts(item[0], second, affine)
    raise FibldmError(
        f"{name}: an item must be a mapping or a pair of image and mask; got {type(item).__name__}",
        "a pair may be an image and its class, too",
    )


def volume_of(values: Any, name: str, *, placed: bool) -> NDArray[Any]:
    """The voxels ``(X, Y, Z)`` or ``(C, X, Y, Z)``, of a slice ``(X, Y, 1)``, along R, A, S.

    Rows of a slice run from front to back and columns from the patient's right to left, as it is looked at.

    Args:
        values: a PIL image, or an array.
        name: of the case, for messages.
        placed: whether an affine says where its indices lie, so that it cannot be rows and columns.

    Raises:
        FibldmError: it is no volume and no slice, in a colour mode that is not known, or no numbers.
    """
    if hasattr(values, "getbands"):  # of PIL, which has no need to be imported
        return _narrow(_turned(_picture(values, name)))
    given = np.asarray(values)
    array = given[0] if given.ndim == 4 and len(given) == 1 else given
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf":
        raise FibldmError(
            f"{name}: a volume must be numbers (X, Y, Z) or (C, X, Y, Z); got {given.dtype} {given.shape}", _SLICE
        )
    if given.ndim == 3 and len(given) == 1:
        if placed:
            raise FibldmError(
                f"{name}: a volume with an affine must be wider than one voxel along X; its size is {given.shape}",
                "give a slice as (X, Y, 1), as its affine has it",
            )
        return _narrow(_turned(given[0]))
    return _narrow(array)


def _picture(image: Any, name: str) -> NDArray[Any]:
    if image.mode not in _MODES:
        raise FibldmError(
            f"{name}: a picture must be of one of the modes {', '.join(_MODES)}; it is {image.mode}",
            'convert it, for example image.convert("L")',
        )
    return np.asarray(image)


def _turned(rows: NDArray[Any]) -> NDArray[Any]:
    """``(rows, columns[, C])`` as ``([C, ]X, Y, 1)``."""
    turned = np.swapaxes(rows, 0, 1)[::-1, ::-1]
    return turned[:, :, None] if turned.ndim == 2 else np.moveaxis(turned, 2, 0)[..., None]


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    narrow = {"b": np.uint8, "i": np.int32, "u": np.int32}  # NIfTI readers are few that take 64 bits
    return array.astype(narrow.get(array.dtype.kind, np.float32))


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int | float | np.generic) or getattr(value, "shape", None) == ()


def _class(value: Any, name: str) -> str | float | None:
    if value is None or isinstance(value, str):
        return value
    if not _is_class(value):
        raise FibldmError(f"{name}: a class must be one number or text; got {type(value).__name__}")
    return float(value)
