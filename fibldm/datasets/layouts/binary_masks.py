"""Folders of binary masks, one file a label, that become one label map by priority."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fibldm.datasets.layouts.entries import collected, entry_key, volume_entries
from fibldm.datasets.source import Mask
from fibldm.errors import FibldmError


def check_order(order: Sequence[str], folders: Iterable[Path]) -> None:
    """Raise unless ``order`` says which binary masks of ``folders`` are wanted, the most important first.

    Raises:
        FibldmError: it is empty, or names a mask twice.
    """
    if not order:
        found = sorted({name for folder in folders for name in _by_name(folder)})
        raise FibldmError(
            f"binary masks may overlap, so their order must be known; found {', '.join(found) or 'none'}",
            "give --merge-masks NAME,NAME,..., of which an earlier one wins",
        )
    if len(set(order)) < len(order):
        raise FibldmError(f"--merge-masks must name every mask once; got {', '.join(order)}")


def binary_masks(folder: Path, order: Sequence[str], problems: list[str], where: str) -> tuple[Mask, ...]:
    """The masks of ``folder`` in the given order, with the values 1, 2, ...; what is wrong goes to ``problems``."""
    files = _by_name(folder)
    missing = [name for name in order if name not in files]
    if missing:
        problems.append(f"{where} has no mask {', '.join(missing)}")
    return tuple(
        Mask(collected(files[name], problems), value=value)
        for value, name in enumerate(order, start=1)
        if name in files
    )


def _by_name(folder: Path) -> dict[str, Path]:
    return {entry_key(path): path for path in volume_entries(folder) if path.is_file()}
