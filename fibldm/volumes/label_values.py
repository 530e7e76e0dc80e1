"""Label values as files hold them: whole numbers, some of them nearly so, and what is said of all others."""

from collections.abc import Sequence

import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.volumes.grid import Array

NEARLY_WHOLE = 1e-3
"""So near to a whole number is a label: nibabel scales floats on writing, and 1 comes back as 1.0000153."""

_SHOWN = 5


def settled(array: Array) -> tuple[Array, bool]:
    """Labels, nearly whole numbers made whole in a copy, and whether there were any; fractions come back as is."""
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return array, False
    whole = np.rint(array)
    off = float(np.abs(array - whole).max(initial=0.0))
    return (whole, True) if 0 < off <= NEARLY_WHOLE else (array, False)


def are_whole(array: Array) -> bool:
    """Whether all values are finite whole numbers."""
    return array.dtype.kind in "iu" or bool(np.isfinite(array).all() and np.array_equal(array, np.rint(array)))


def fractions_shown(array: Array) -> str:
    """Some of the values that are no whole numbers, as many digits as tell them from one."""
    values = np.unique(array[~(np.isfinite(array) & (array == np.rint(array)))])
    return shown(values.tolist(), digits=7)


def shown(values: Sequence[float], digits: int = 6) -> str:
    """The first values of a list, for a message."""
    listed = ", ".join(f"{value:.{digits}g}" for value in values[:_SHOWN])
    return f"{listed}, ... ({len(values)} values)" if len(values) > _SHOWN else listed


def remap_remedy(values: Sequence[float]) -> str:
    """What to do about label values that are too large: the ``--remap`` that brings them to 1, 2, ... in their order.

    Empty where there are so many that they are hardly labels, or some are negative, which no ``--remap`` takes.
    """
    large = [int(value) for value in values if value >= UNKNOWN_LABEL]
    free = [value for value in range(1, UNKNOWN_LABEL) if value not in values]
    if not large or len(values) > 2 * _SHOWN or min(values) < 0 or len(large) > len(free):
        return ""
    return "--remap " + ",".join(f"{old}={new}" for old, new in zip(large, free, strict=False))
