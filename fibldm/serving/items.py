"""What arrives: a mask, or a folder of masks with what is known of their patient and asked for beside them.

Names of files may tell patients: an item is called by the beginning of a SHA-256 of its content, as are its masks.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value
from fibldm.models.conditions.condition import Condition
from fibldm.synthesis.scans import AskedScan
from fibldm.synthesis.settings import SynthesisSettings
from fibldm.volumes.masks import hash_mask, mask_suffix, parts_of

ASKED = {
    "covariates.json": '{"age": 63, "sex": "F"}',
    "conditions.json": '{"text": "fibrosis of both lower lobes"}',
}
"""Files of an item that are no masks, with an example of what each says."""

DIGITS = 16
"""Of a SHA-256, in names."""

_ASIDE = "take it from the folder of refused items, correct it, and put it into the inbox again"


@dataclass(frozen=True)
class Opened:
    """An item, ready to be made.

    Attributes:
        settings: what is asked, with what the item says.
        masks: files by names that tell no patient.
        left_out: how many files are no masks.
    """

    settings: SynthesisSettings
    masks: Mapping[str, Path]
    left_out: int


@contextmanager
def opened_item(
    item: Path, hashes: Mapping[Path, str], settings: SynthesisSettings, kinds: Mapping[str, Condition]
) -> Iterator[Opened]:
    """What an item asks for, over what is asked of all; scans that it names are open while the block runs.

    Args:
        item: a file or a folder.
        hashes: of its files, see `hashes_of`.
        settings: what is asked of all items.
        kinds: the generator's conditions beside the mask.

    Raises:
        FibldmError: it holds no mask, or what it says beside is wrong.
    """
    known, further = (asked_among(hashes, file) for file in ASKED)
    scans = {kind: scan for kind, scan in further.items() if kind in kinds and kinds[kind].of_scan and scan}
    with aliased_scans(item, scans) as opened:
        conditions = {**settings.conditions, **further, **opened}
        asked = replace(settings, covariates={**settings.covariates, **known}, conditions=conditions)
        others = without_scans(item, hashes, scans)
        masks = masks_among(others)
        yield Opened(asked, masks, _left_out(others, masks))


State = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of every file of an item; empty where there is none."""


def state_of(item: Path) -> State:
    """The state of an item, by which it is told that nobody writes to it any more."""
    try:
        found = [(file, file.lstat()) for file in files_of(item)]
    except FileNotFoundError:  # another watcher took it
        return ()
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def files_of(item: Path) -> list[Path]:
    """The item itself, or all that a folder holds but folders; links as they are."""
    if item.is_symlink() or not item.is_dir():
        return [item]
    return sorted(part for part in item.rglob("*") if part.is_symlink() or not part.is_dir())


def hashes_of(item: Path) -> dict[Path, str]:
    """SHA-256 of every file of an item.

    Raises:
        FibldmError: it holds something else than files, one that cannot be read, or one that leads out of it.
    """
    files = files_of(item)
    if any(file.is_symlink() or not file.is_file() for file in files):
        raise FibldmError("an item must be a file or a folder of files; it is or holds a link or a device", _ASIDE)
    try:
        _check_parts(item, files)
        return {file: hash_file(file) for file in files}
    except OSError as error:
        raise FibldmError(f"an item must be readable; {error.strerror}", "check its permissions") from None


def _check_parts(item: Path, files: Sequence[Path]) -> None:
    """A header may say that its voxels lie in another file, which must not be one of this machine's own.

    Raises:
        FibldmError: it does not lie in the item.
    """
    root = (item if item.is_dir() else item.parent).resolve()
    for file in files:
        if not all(part.resolve().is_relative_to(root) for part in parts_of(file, any_suffix=True)):
            raise FibldmError("voxels of an item must lie in it; a header in this one names another place", _ASIDE)


def name_of(item: Path, hashes: Mapping[Path, str]) -> str:
    """The beginning of a file's SHA-256, or of that of a folder's names and contents."""
    if item in hashes:
        return hashes[item][:DIGITS]
    return hash_value(sorted((str(file.relative_to(item)), digest) for file, digest in hashes.items()))[:DIGITS]


def masks_among(hashes: Mapping[Path, str]) -> dict[str, Path]:
    """The masks of an item, by names that tell no patient; all else is left alone.

    Raises:
        FibldmError: there is none.
    """
    kinds = {file: mask_suffix(file) for file in sorted(hashes) if not file.name.startswith(".")}
    masks = {f"{hash_mask(file)[:DIGITS]}{suffix}": file for file, suffix in kinds.items() if suffix is not None}
    if not masks:
        raise FibldmError("an item must hold a mask: NIfTI, NRRD, MetaImage or DICOM segmentation; it does not", _ASIDE)
    return masks


def _left_out(hashes: Mapping[Path, str], masks: Mapping[str, Path]) -> int:
    """How many files of an item are no masks; copies of one count as it does."""
    taken = {hashes.get(file) for mask in masks.values() for file in (mask, *parts_of(mask))}
    return sum(digest not in taken for file, digest in hashes.items() if file.name not in ASKED)


def asked_among(hashes: Mapping[Path, str], name: str) -> dict[str, Any]:
    """What a file of the item says of its patient, or asks for, by name.

    Raises:
        FibldmError: there are two of it, or it is no JSON of values by name.
    """
    files = [file for file in hashes if file.name == name]
    if not files:
        return {}
    try:
        (content,) = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    except (ValueError, OSError) as error:
        raise FibldmError(f"an item may hold one {name}, which is JSON; it does not", _ASIDE) from error
    if not isinstance(content, dict):
        raise FibldmError(f"{name} must be such as {ASKED[name]}, null is unknown", _ASIDE)
    return content


@contextmanager
def aliased_scans(item: Path, named: Mapping[str, Any]) -> Iterator[dict[str, AskedScan]]:
    """Scans that an item names by paths in itself; they are called by their content, as their names may tell patients.

    Raises:
        FibldmError: one is no file of the item, and no folder of one series in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = {}
        for number, (kind, path) in enumerate(named.items()):
            try:
                place = _within(item, path)
                suffix = "" if place.is_dir() else place.suffix
                suffix = ".nii.gz" if place.name.lower().endswith(".nii.gz") else suffix
                scan = AskedScan.of_path(linked(place, Path(folder) / f"{number}", f"scan{suffix}"))
            except (FibldmError, OSError, ValueError):
                raise FibldmError(
                    f"{kind} must name a file of the item, or a folder in it with one series; it does not", _ASIDE
                ) from None
            opened[kind] = replace(scan, name=scan.sha256[:DIGITS])
        yield opened


def without_scans(item: Path, hashes: Mapping[Path, str], named: Mapping[str, Any]) -> dict[Path, str]:
    """What an item holds beside the scans that it names, which are no masks."""
    places = [_within(item, path) for path in named.values()]
    scans = {part for place in places for part in (place, *parts_of(place))}
    return {file: digest for file, digest in hashes.items() if scans.isdisjoint((file, *file.parents))}


def linked(file: Path, folder: Path, name: str) -> Path:
    """A link of another name to a file, or to a folder, in a folder of its own, beside links to what belongs to it."""
    folder.mkdir()
    (folder / name).symlink_to(file.absolute())
    for part in parts_of(file):
        (folder / part.name).symlink_to(part.absolute())
    return folder / name


def _within(item: Path, path: Any) -> Path:
    """The place that a path in an item names.

    Raises:
        FibldmError: it is no path, or leads out of the item.
    """
    place = item / path if isinstance(path, str) else item
    if place.resolve() == item.resolve() or not place.resolve().is_relative_to(item.resolve()):
        raise FibldmError("paths of an item must lie in it", _ASIDE)
    return place
