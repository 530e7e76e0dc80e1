"""Formats that hold numbers and no geometry: HDF5, MATLAB, NumPy and PNG slices.

The spacing comes from the user, and so does the promise that the axes are what is assumed here:

* HDF5, MATLAB and NumPy: index order ``(X, Y, Z)`` or ``(X, Y, Z, C)``, taken as R, A, S, as MATLAB and NumPy index it.
* PNG: every file an axial slice as radiologists look at it, rows from front to back, columns from the patient's right
  to left; slices from feet to head in the natural order of their names (``s2`` before ``s10``). Grey, or in colours:
  three channels, red, green and blue.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.volumes.formats.raw_volume import damaged
from fibldm.volumes.scan import Files

Key = Literal["image", "label"]
Array = NDArray[Any]

PACK_NAMES: Mapping[Key, tuple[str, ...]] = {
    "image": ("images", "image", "volumes", "volume"),
    "label": ("masks", "mask", "labels", "label", "segmentations", "segmentation"),
}
"""What arrays of images and masks may be called in a pack."""

_KINDS = "biufcV"
_GREY, _RGB = 0, 2
_PNG_END = b"IEND\xaeB`\x82"
_MATRIX, _COMPRESSED = 14, 15
_TYPES = {*range(1, 8), 9, 12, 13, _MATRIX, 16, 17, 18}
_ORDER_OF_KEYS: tuple[Key, ...] = ("image", "label")


def read_array(path: Path, key: Key) -> Array:
    """The array of an HDF5, MATLAB or NumPy file, in index order ``(X, Y, Z[, C])``.

    Args:
        path: ends in ``.h5``, ``.hdf5``, ``.mat``, ``.npz`` or ``.npy``.
        key: the array's name; a file without one of that name must hold a single array.

    Raises:
        FibldmError: the file is damaged, is not what its name says, or holds no array of that name and not one only.
    """
    try:
        arrays = _READERS[path.suffix.lower()](path)
    except Exception as error:  # the libraries raise whatever falls out of damaged bytes
        raise damaged(path, str(error)) from error
    candidates = {name: array for name, array in arrays.items() if sum(length > 1 for length in array.shape) > 1}
    if key in candidates:
        return candidates[key]
    others = [name for name in candidates if name not in _ORDER_OF_KEYS]
    if len(candidates) != 1 or not others:
        found = ", ".join(candidates) or "none"
        raise FibldmError(
            f"{path.name} must hold an array named {key!r}, or a single array; it holds {found}",
            "name the array, or save it alone",
        )
    return candidates[others[0]]


def read_item(path: Path, key: Key, item: str) -> Array:
    """One image or mask of an HDF5 pack, in index order ``(X, Y[, Z[, C]])``.

    Args:
        path: of the pack.
        key: image or label.
        item: a group of the pack that holds an array of that name, or the number of the image in its array.

    Raises:
        FibldmError: the file is damaged, or holds no such image.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            place = file.get(item)
            group = file if place is None else place
            found = next((group[name] for name in PACK_NAMES[key] if name in group and _numeric(group[name])), None)
            if found is None:
                raise FibldmError(f"{path.name} must hold {key} {item}; it does not", "make the pack again")
            part: Array = _stored(found) if place is not None else _stored(found, int(item))
            return part
    except FibldmError:
        raise
    except Exception as error:  # as above
        raise damaged(path, str(error)) from error


def read_slices(files: Files, *, colours: bool = False) -> Array:
    """A stack of PNG slices as ``(X, Y, Z)`` in R, A, S, of colours as ``(X, Y, Z, 3)``.

    Args:
        files: in any order.
        colours: whether RGB with 8 bits is read; else it is refused.

    Raises:
        FibldmError: a file is damaged, is no PNG, or is not grey with 8 or 16 bits (nor in ``colours``); two differ in
            size or depth, or two names are equal but for leading zeros.
    """
    ordered = sorted(files, key=_natural)
    if len({tuple(_natural(file)) for file in ordered}) < len(ordered):
        raise FibldmError("names of slices must tell their order; two have equal numbers", "number them uniquely")
    slices = [_slice(file, colours) for file in ordered]
    kinds = sorted(
        {f"{' x '.join(map(str, (*array.shape[1::-1], *array.shape[2:])))} {array.dtype}" for array in slices}
    )
    if len(kinds) > 1:
        raise FibldmError(f"slices must have one size and depth; {ordered[0].name} ... have {', '.join(kinds)}")
    return np.swapaxes(np.stack(slices, axis=2), 0, 1)[::-1, ::-1]


def _hdf5(path: Path) -> dict[str, Array]:
    import h5py

    with h5py.File(path) as file:
        return {name: _stored(item) for name, item in file.items() if isinstance(item, h5py.Dataset) and _numeric(item)}


def _numeric(dataset: Any) -> bool:
    """Texts of MATLAB are stored as numbers."""
    return dataset.dtype.kind in _KINDS and dataset.attrs.get("MATLAB_class", b"") != b"char"


def _stored(dataset: Any, index: int | tuple[()] = ()) -> Array:
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"the voxels of {dataset.name} lie in other files")
    array: Array = dataset[index]
    return array


def _matlab(path: Path) -> dict[str, Array]:
    import h5py
    import scipy.io

    if h5py.is_hdf5(path):
        # MATLAB writes its index order backwards into HDF5
        return {name: array.T for name, array in _hdf5(path).items()}
    data = path.read_bytes()
    if not data.startswith(b"MATLAB 5.0") or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("it is no MATLAB file of version 5 or 7.3")
    _check_elements(data[128:], ">" if data[126:128] == b"MI" else "<")
    return _numbers(scipy.io.loadmat(path))


def _check_elements(data: bytes, order: str) -> None:
    """Refuse an element of a type that MATLAB 5 does not have: SciPy ends the whole process on one."""
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            _check_elements(zlib.decompress(content), order)
        elif kind == _MATRIX:
            unknown = [kind for kind, _ in _elements(content, order) if kind not in _TYPES]
            if unknown:
                raise ValueError(f"it has an element of the unknown type {unknown[0]}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of the data elements one after the other; one of up to 4 bytes is packed into its own tag."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}2I", data, at)
        small = kind >> 16
        start, length = (at + 4, small) if small else (at + 8, size)
        yield kind & 0xFFFF, data[start : start + length]
        at = at + 8 if small else start + length + (0 if kind == _COMPRESSED else -length % 8)


def _numpy(path: Path) -> dict[str, Array]:
    with path.open("rb") as stream:
        if not stream.read(6).startswith((b"\x93NUMPY", b"PK")):
            raise ValueError("it is no NumPy file")
        stream.seek(0)
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _numbers({"array": loaded})
        return _numbers({name: loaded[name] for name in loaded.files})


def _numbers(values: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS
    }


def _slice(path: Path, coloured: bool) -> Array:
    from PIL import Image

    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 26:
        raise FibldmError(f"{path.name} must be PNG, as its name says, and is not", "export it again")
    bits, colours = data[24:26]
    if (colours, bits) not in ((_GREY, 8), (_GREY, 16), *([(_RGB, 8)] if coloured else [])):
        raise FibldmError(
            f"a PNG slice must be grey with 8 or 16 bits; {path.name} is not",
            "export grey values (RGB is read with `modality` other)",
        )
    if _PNG_END not in data:
        raise damaged(path, "its last chunk is missing")
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            return np.asarray(image)
    except Exception as error:  # as above
        raise damaged(path, str(error)) from error


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


_READERS: Mapping[str, Callable[[Path], dict[str, Array]]] = {
    ".h5": _hdf5, ".hdf5": _hdf5, ".mat": _matlab, ".npz": _numpy, ".npy": _numpy,
}  # fmt: skip
