"""One process at a time in a folder: a lock that no killed process leaves behind.

The kernel's `flock` holds it, and takes it back however its process ends. Where several machines share a file system,
`flock` may know this machine's processes only, or be missing: there the file says which machine holds it, and its time
of change, which the holder renews, says whether the holder still works.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError

BEAT = 5.0
"""Seconds after which a holder renews the time of its file."""

SILENCE = 30.0
"""Seconds without a sign of a holder on another machine, after which it is taken to be dead."""

_LONG_AGO = 600.0  # seconds; more than clocks of two machines differ by
_SETTLE = 1.0  # seconds in which another process may write the file as well, where there is no flock
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_logger = logging.getLogger("fibldm")
_held: set[int] = set()


@contextmanager
def alone(file: Path, what: str, remedy: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock while the block runs.

    Nothing is locked where the folder is not writable: neither could anything be written there.

    Args:
        file: of the lock; it is there while the lock is held, and so is its folder.
        what: is written by one process at a time, for the error.
        remedy: for the error.
        patience: seconds to wait for another holder.

    Raises:
        FibldmError: another process holds it; says which one and since when.
    """
    file, made = Path(file), not Path(file).parent.exists()
    handle = _acquired(file, what, remedy, patience)
    if handle is None:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_beat, args=(handle, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        file.unlink(missing_ok=True)  # while it is still locked, so that nobody holds a file that is gone
        _close(handle)
        if made:
            with suppress(OSError):  # not empty
                file.parent.rmdir()


def beside(folder: Path) -> Path:
    """The lock of a folder that has no place for it inside."""
    return folder.resolve().with_name(f".{folder.resolve().name}.lock")


def _acquired(file: Path, what: str, remedy: str, patience: float) -> int | None:
    until = time.monotonic() + patience
    while True:
        handle, supported = _opened(file)
        if handle is None:
            return None
        try:
            if supported is not None and _is_ours_now(file, handle, supported=supported):
                return handle
            holder = _holder(file)
        except OSError as error:
            raise FibldmError(f"cannot write {file}: {error.strerror}", "check the free disk space") from error
        finally:
            if handle not in _held:
                os.close(handle)
        if time.monotonic() >= until:
            raise FibldmError(f"{what} must be written by one process at a time; {_named(holder)}", remedy)
        time.sleep(0.1)


def _opened(file: Path) -> tuple[int | None, bool | None]:
    """The file, opened, and whether flock holds it: None where another process does, False where it cannot be told."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not file.exists():
                return None, None
            raise FibldmError(f"cannot write {file}: {error.strerror}", "check the folder and its rights") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return handle, None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise FibldmError(f"cannot lock {file}: {error.strerror}", "check the file system") from error
            return handle, False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle, True
        os.close(handle)  # who held it has removed it meanwhile


def _is_ours_now(file: Path, handle: int, *, supported: bool) -> bool:
    """Take the lock, unless a process that flock does not know of holds it."""
    holder = _holder(file)
    # on this machine flock knows better than the file, which a killed process has left
    may_work = bool(holder) and not (supported and holder.get("machine") == _machine())
    if may_work and _gives_signs(file, holder):
        return False
    mine = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "machine": _machine(),
            "thread": threading.get_ident(),
        }
    )
    os.ftruncate(handle, 0)
    os.pwrite(handle, mine.encode(), 0)
    os.fsync(handle)
    if not supported:
        time.sleep(_SETTLE)
    if _holder(file) != json.loads(mine):
        return False
    _held.add(handle)
    return True


def _gives_signs(file: Path, holder: dict[str, Any]) -> bool:
    seen = _changed(file)
    if seen is None or time.time() - seen > _LONG_AGO:
        return False
    _logger.info("%s: looking for %g s whether its process on %s still works", file, SILENCE, holder.get("host"))
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(0.2)
        if (now := _changed(file)) != seen:
            return now is not None
    return False


def _changed(file: Path) -> float | None:
    try:
        with file.open("rb") as stream:  # opening asks the server, which a mere look at the name may not
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def _beat(handle: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(handle)


def _holder(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # gone, or about to be written
        return {}
    return content if isinstance(content, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another one has just begun"
    return f"process {holder.get('pid')} on {holder.get('host')} has held it since {holder.get('since')}"


def _machine() -> str:
    """What no two machines share, and all containers of one do, as its kernel's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _let_go() -> None:
    """A child that was forked must not hold the locks of a parent that is killed."""
    for handle in [*_held]:
        _close(handle)


os.register_at_fork(after_in_child=_let_go)
