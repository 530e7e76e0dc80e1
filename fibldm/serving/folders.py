"""Folders that several processes share: what one has in hand, and how results and items get to their place."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fibldm.errors import FibldmError

_LOCK = ".lock"


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process, which others can tell to be abandoned when the process is no more.

    The lock on a file in it says so: the kernel takes it back however the process ends.

    Raises:
        FibldmError: it cannot be made.
    """
    name = secrets.token_hex(8)
    try:
        (parent / f".{name}").mkdir(parents=True)
        lock = (parent / f".{name}" / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = (parent / f".{name}").rename(parent / name)  # not to be seen before it is locked
    except OSError as error:
        raise FibldmError(f"{parent.parent} must be writable; {error.strerror}", "check its permissions") from error
    with lock:
        try:
            yield folder
        finally:
            remove_if_empty(folder)


def abandoned(parent: Path, own: Path) -> list[Path]:
    """Folders beside an own one whose process is no more."""
    return [folder for folder in sorted(parent.glob("[!.]*")) if folder != own and not _is_held(folder)]


def _is_held(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # locked, or not ours to lock
        return True
    return False


def remove_if_empty(folder: Path) -> None:
    if not any(folder.glob("*/*")):
        shutil.rmtree(folder, ignore_errors=True)  # another watcher may do the same


def publish(staging: Path, place: Path) -> None:
    """Rename results to their place, unless another watcher made the same meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def hand_over(item: Path, folder: Path) -> None:
    """Move an item into a folder, of another file system as well.

    What has its name there is the same item, or what a killed watcher had copied of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / item.name
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    shutil.move(item, place)


def to_disk(path: Path) -> None:
    """What is written of a file, or of the names in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
