"""Folders of binary masks, one file a label, that become one label map by priority."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fibldm.datasets.findings import Findings
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
            "give `merge_masks` NAME,NAME,..., of which an earlier one wins",
        )
    if len(set(order)) < len(order):
        raise FibldmError(f"`merge_masks` must name every mask once; got {', '.join(order)}")


def binary_masks(
    folder: Path, order: Sequence[str], findings: Findings, where: str, *, may_lack: bool = False
) -> tuple[Mask, ...]:
    """The masks of ``folder`` in the given order, with the values 1, 2, ...; what is wrong goes to ``findings``.

    Args:
        folder: of one case.
        order: the masks that are wanted, the most important first.
        findings: gets what is wrong.
        where: before what is wrong.
        may_lack: whether some of them may be missing, but not all.
    """
    files = _by_name(folder)
    missing = [name for name in order if name not in files]
    if missing and not (may_lack and len(missing) < len(order)):
        findings.error(f"{where} has no mask {', '.join(missing)}")
    numbered = enumerate(order, start=1)
    return tuple(Mask(collected(files[name], findings), value) for value, name in numbered if name in files)


def _by_name(folder: Path) -> dict[str, Path]:
    return {entry_key(path): path for path in volume_entries(folder) if path.is_file()}
