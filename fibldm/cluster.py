"""Work done on a cluster: the workers of a Dask scheduler, on machines that see the same folders.

Dask gives the items of a lost worker to the others, and a slow worker only those that it comes to. Scheduler and
workers run whatever they are sent: they belong into a network that nobody else is in, or behind Dask's TLS.
"""

import hashlib
import logging
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname
from types import ModuleType
from typing import Any

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.files import atomic_path
from fibldm.progress import Bar
from fibldm.workers import Told, Work, retold, told

_PATIENCE = 30  # seconds to reach the scheduler
_logger = logging.getLogger("fibldm")


@dataclass(frozen=True)
class Cluster:
    """The workers of a Dask scheduler.

    Attributes:
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``, or the path of the file that
            ``dask scheduler --scheduler-file`` writes.

    Raises:
        FibldmError: Dask's distributed is not installed.
    """

    address: str

    def __post_init__(self) -> None:
        _distributed()

    @property
    def here(self) -> bool:
        return False

    @property
    def on_this_machine(self) -> bool:
        return False

    def each(self, work: Work, items: Sequence[tuple[Any, ...]], bar: Bar) -> Iterator[Any]:
        """See `fibldm.workers.Engine`."""
        if not items:
            return
        distributed = _distributed()
        with self._client(distributed) as client, _sent(work) as parcel:
            if not client.scheduler_info()["workers"]:
                _logger.info("%s has no workers yet; the work waits for them", self.address)
            futures = client.map(partial(_on_worker, parcel), items, pure=False, key=f"fibldm-{uuid.uuid4().hex}")
            try:
                for place in bar(range(len(futures))):
                    made = futures[place].result()
                    futures[place] = None  # the cluster may forget it
                    yield retold(made)
            except distributed.KilledWorker as error:
                raise FibldmError(
                    f"an item that {work.what} must not end its workers; {error.allowed_failures + 1} ended",
                    "look into their logs, and give them more memory, or fewer of them a machine",
                ) from error
            except (distributed.CancelledError, OSError) as error:
                raise FibldmError(
                    f"the scheduler {self.address} must stay reachable; it went away: {error}",
                    "start it again, and give the same command again; what is there is kept",
                ) from error

    @contextmanager
    def _client(self, distributed: ModuleType) -> Iterator[Any]:
        file = Path(self.address)
        place = {"scheduler_file": str(file)} if file.is_file() else {"address": self.address}
        try:
            client = distributed.Client(**place, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise FibldmError(
                f"a scheduler of Dask must answer at {self.address}; {error}",
                "start `dask scheduler` and `dask worker`, or check the address",
            ) from error
        with client:
            yield client


@dataclass(frozen=True)
class _Parcel:
    """Work on its way to workers.

    Attributes:
        name: of this work alone.
        file: that holds the work, in the folder that workers must see; None where they need none.
        content: the work itself, where there is no such folder.
        version: of FibLDM.
        place: the command's working directory, in which paths may be relative.
    """

    name: str
    file: Path | None
    content: bytes
    version: str
    place: str

    def opened(self) -> Work:
        if self.version != __version__:
            raise FibldmError(
                f"workers must have the same FibLDM as the command, {self.version}; {gethostname()} has {__version__}",
                "install the same everywhere",
            )
        if self.file is not None and not self.file.is_file():
            raise FibldmError(
                f"workers must see {self.file.parent} as the command does; {gethostname()} does not",
                "put it on a file system that all machines share, under the same path",
            )
        with suppress(OSError):  # it need not be there for paths that are absolute
            os.chdir(self.place)
        work = pickle.loads(self.content if self.file is None else self.file.read_bytes())
        assert isinstance(work, Work)
        return work


@contextmanager
def _sent(work: Work) -> Iterator[_Parcel]:
    """The work, once for all its items, in a file that also shows whether a worker sees the folder."""
    name, content = uuid.uuid4().hex, pickle.dumps(work)
    if work.folder is None:
        yield _Parcel(name, None, content, __version__, os.getcwd())
        return
    file = Path(work.folder).resolve() / f".work-{name}"
    with atomic_path(file) as temporary:
        temporary.write_bytes(content)
    try:
        yield _Parcel(name, file, b"", __version__, os.getcwd())
    finally:
        file.unlink(missing_ok=True)


_turn = threading.Lock()
_opened: tuple[str, Callable[..., Any]] | None = None
_kit: tuple[bytes, Any] | None = None


def _on_worker(parcel: _Parcel, arguments: tuple[Any, ...]) -> Told:
    """An item, on a worker; one at a time in a process, also where Dask gives it several threads."""
    global _opened
    with _turn:
        if _opened is None or _opened[0] != parcel.name:
            _opened = None
            _opened = (parcel.name, told(_with_kit, (parcel.opened(),)).made)
        return told(_opened[1], arguments)


def _with_kit(work: Work) -> Callable[..., Any]:
    """The work, with the kit of the work before where that had the same, such as a generator that is loaded."""
    global _kit
    if work.kit is None:
        return work.function
    name = hashlib.sha256(pickle.dumps(work.kit)).digest()
    if _kit is None or _kit[0] != name:
        _kit = None  # two need not fit into memory
        _kit = (name, work.kit())
    return work.given(_kit[1])


def _distributed() -> ModuleType:
    try:
        import distributed
    except ImportError as error:
        raise FibldmError(
            "a cluster needs Dask's distributed, which is not installed", "pip install 'fibldm[cluster]'"
        ) from error
    return distributed
