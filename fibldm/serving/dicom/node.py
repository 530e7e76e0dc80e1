"""The node: a service whose door is DICOM, and whose results leave by it."""

import logging
import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pydicom
import pynetdicom
from pynetdicom.transport import AssociationSocket

from fibldm.errors import FibldmError
from fibldm.serving.dicom.door import Door
from fibldm.serving.dicom.intake import Intake
from fibldm.serving.dicom.limits import Limits
from fibldm.serving.dicom.listening import close_socket
from fibldm.serving.dicom.peers import Caller, Peer
from fibldm.serving.dicom.sending import Sender
from fibldm.serving.dicom.structure_sets import StructureSets
from fibldm.serving.ending import Ending
from fibldm.serving.service import Service

_GRACE = 10.0  # seconds for open associations, after the node was asked to end
_ABANDONED = 300.0  # seconds without change, of what came of an object whose transfer broke off

_logger = logging.getLogger("fibldm")


class Node:
    """A DICOM node around a service; open within ``with``.

    Args:
        service: is open.
        title: of this application entity.
        callers: who may call.
        peers: who gets results.
        limits: of what comes.
        tls: certificate, key and authorities; all that is sent and received is by TLS then.
        settled: see `StructureSets`.
        first: see `Sender`.
    """

    def __init__(
        self,
        service: Service,
        title: str,
        callers: Sequence[Caller],
        peers: Sequence[Peer] = (),
        *,
        limits: Limits = Limits(),  # noqa: B008
        tls: "tuple[ssl.SSLContext, ssl.SSLContext] | None" = None,
        settled: float = 5.0,
        first: float = 5.0,
    ) -> None:
        inward, outward = tls or (None, None)
        names = [str(peer) for peer in peers]
        self._service, self._held = service, ExitStack()
        self._structures = StructureSets(service, wait=limits.wait, settled=settled)
        intake = Intake(service, self._structures, lambda job: service.store.owe(job.id, names))
        self._door = Door(intake, title, callers, limits, inward)
        self._sender = Sender(service, title, peers, tls=outward, first=first)
        self._received = service.folder / ".received"
        self._ended = threading.Event()

    def open(self, host: str, port: int) -> int:
        """Listen, and send what is left of before; gives the port.

        Raises:
            FibldmError: one cannot listen there.
        """
        with ExitStack() as undo:
            undo.enter_context(_kept_to_itself(self._received))
            port = self._door.open(host, port)
            self._held = undo.pop_all()
        self._sender.start()
        return port

    def run(self, ending: Ending, *, until_idle: bool = False) -> None:
        """Work until asked to end, and close; who calls meanwhile is let in until the node is asked to end.

        Raises:
            FibldmError: see `Service.run`.
        """
        tending = threading.Thread(target=self._tend, args=(ending,), daemon=True)
        tending.start()
        try:
            self._service.run(ending, until_idle=until_idle)
        finally:
            self._ended.set()
            tending.join()
            self.close()

    def close(self) -> None:
        """Let nobody in any more, wait for who is, and end."""
        self._door.close()
        until = time.monotonic() + _GRACE
        while self._door.busy and time.monotonic() < until:
            time.sleep(0.05)
        self._door.abort()
        self._sender.end()
        self._held.close()

    def _tend(self, ending: Ending) -> None:
        while not self._ended.wait(0.2):
            if ending.asked is not None:
                self._door.close()
            try:
                self._structures.look()
                for file in self._received.glob("*.dcm"):
                    if time.time() - file.stat().st_mtime > _ABANDONED:
                        file.unlink(missing_ok=True)
            except Exception as error:  # of any kind, as this must go on; its text would name files
                _logger.error("cannot tidy up: %s", getattr(error, "strerror", None) or type(error).__name__)


@contextmanager
def _kept_to_itself(received: Path) -> Iterator[None]:
    """While the node runs: objects come to a folder of its own, and libraries log nothing, as they quote values.

    Sockets are closed whatever their peers do.
    """
    shutil.rmtree(received, ignore_errors=True)
    received.mkdir(parents=True, mode=0o700)
    config, settings, temporary = pynetdicom._config, pydicom.config.settings, tempfile.tempdir
    chunked = config.STORE_RECV_CHUNKED_DATASET, config.STORE_SEND_CHUNKED_DATASET
    validation = settings.reading_validation_mode
    loggers = [logging.getLogger(name) for name in ("pynetdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    config.STORE_RECV_CHUNKED_DATASET = config.STORE_SEND_CHUNKED_DATASET = True
    settings.reading_validation_mode = pydicom.config.IGNORE
    shuts, AssociationSocket._shutdown_socket = AssociationSocket._shutdown_socket, close_socket  # type: ignore[method-assign, assignment]
    tempfile.tempdir = str(received)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        config.STORE_RECV_CHUNKED_DATASET, config.STORE_SEND_CHUNKED_DATASET = chunked
        AssociationSocket._shutdown_socket = shuts  # type: ignore[method-assign]
        settings.reading_validation_mode, tempfile.tempdir = validation, temporary
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        shutil.rmtree(received, ignore_errors=True)


def tls_contexts(certificate: Path, key: Path, authorities: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For who calls, and for who is called; both must show a certificate of one of the authorities.

    Raises:
        FibldmError: a file is none of its kind.
    """
    inward = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    outward = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    try:
        for context in (inward, outward):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(certificate, key)
            context.load_verify_locations(authorities)
    except (OSError, ssl.SSLError) as error:
        raise FibldmError(
            f"--tls-cert, --tls-key and --tls-ca must be files in PEM, and the key that of the certificate; "
            f"{type(error).__name__}: {error.strerror or error}",
            "check them with openssl",
        ) from None
    inward.verify_mode = ssl.CERT_REQUIRED
    return inward, outward
