"""Results leave by C-STORE, object by object, until every peer has said that it has them or will not take them."""

import logging
import ssl
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from fibldm.serving.dicom.objects import results_of
from fibldm.serving.dicom.peers import Peer
from fibldm.serving.service import Service
from fibldm.serving.store import Delivery

_FIRST, _LONGEST = 5.0, 900.0  # seconds until a try after the first that broke off, and at most
_TIMEOUT, _CONNECTING = 60.0, 10.0  # seconds for an answer, and for a connection
_SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)

_logger = logging.getLogger("fibldm")


class _BrokeOff(Exception):
    """Sending is to be tried again."""


class Sender(threading.Thread):
    """Sends what is due, until it is ended.

    Args:
        service: has jobs and results.
        title: of this application entity.
        peers: who gets results.
        tls: None is without.
        first: seconds until the second try; each wait is twice the one before.
    """

    def __init__(
        self,
        service: Service,
        title: str,
        peers: Sequence[Peer],
        *,
        tls: ssl.SSLContext | None = None,
        first: float = _FIRST,
    ) -> None:
        super().__init__(name="sender", daemon=True)
        self._service, self._title, self._tls, self._first = service, title, tls, first
        self._peers: Mapping[str, Peer] = {str(peer): peer for peer in peers}
        self._ended = threading.Event()

    def run(self) -> None:
        """Look for what is due, again and again."""
        while not self._ended.wait(0.2):
            try:
                for delivery in self._service.store.due():
                    if delivery.peer in self._peers and not self._ended.is_set():
                        self._deliver(delivery)
            except Exception as error:  # of any kind, such as a full disk: the sender must go on
                _logger.error("cannot send: %s", type(error).__name__)
                self._ended.wait(self._first)

    def end(self) -> None:
        """Send no more after the object in hand, which is waited for."""
        self._ended.set()
        if self.is_alive():
            self.join(2 * _TIMEOUT)

    def _deliver(self, delivery: Delivery) -> None:
        job, peer = delivery.job, delivery.peer
        try:
            told = self._send(delivery, self._peers[peer])
        except Exception as error:  # of any kind: a peer must not end the sender
            reason = str(error) if isinstance(error, _BrokeOff) else type(error).__name__
            pause = min(self._first * 2**delivery.tries, _LONGEST)
            _logger.warning("%s: not sent to %s: %s; again in %.0f s", job, peer, reason, pause)
            return self._service.store.postpone(job, peer, pause)
        if told is None:  # ended in between
            return
        self._service.store.delivered(job, peer, told)
        _logger.info("%s: %d objects sent to %s", job, told["acknowledged"], peer)
        for reason in told["not_taken"]:
            _logger.warning("%s: %s does not take %s", job, peer, reason)

    def _send(self, delivery: Delivery, peer: Peer) -> dict[str, Any] | None:
        """Send what is left; what came of all, or None where the sender ended.

        Raises:
            _BrokeOff: something is left.
        """
        files = self._objects(delivery.job)
        if left := files[delivery.settled :]:
            classes = {file: _class_of(file) for file in left}
            with _Called(self._title, peer, sorted(set(classes.values())), self._tls) as call:
                for file in left:
                    if self._ended.is_set():
                        return None
                    self._service.store.settle(delivery.job, str(peer), call.store(file, classes[file]))
        now = next(item for item in self._service.store.deliveries(delivery.job) if item.peer == str(peer))
        return {"acknowledged": now.settled - len(now.refused), "not_taken": sorted(set(now.refused))}

    def _objects(self, id: str) -> list[Path]:
        job = self._service.store.get(id)
        if job is None or job.outcome is None:
            raise _BrokeOff("its results are gone")
        return results_of(self._service.results(job), job.outcome["outputs"])


class _Called:
    """An association with a peer, within ``with``."""

    def __init__(self, title: str, peer: Peer, classes: Sequence[str], tls: ssl.SSLContext | None) -> None:
        self._entity, self._peer = AE(ae_title=title), peer
        self._contexts = [build_context(UID(name), syntax) for name in classes for syntax in _SYNTAXES]
        self._tls = (tls, peer.host) if tls is not None else None
        self._association: Association | None = None
        entity = self._entity
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = _TIMEOUT
        entity.connection_timeout = _CONNECTING

    def __enter__(self) -> "_Called":
        peer = self._peer
        association = self._entity.associate(
            peer.host, peer.port, self._contexts, ae_title=peer.title, tls_args=self._tls
        )
        self._association = association
        if not association.is_established and not association.rejected_contexts:
            raise _BrokeOff("it rejected the association" if association.is_rejected else "it could not be reached")
        return self

    def __exit__(self, *_: object) -> None:
        if self._association is not None and self._association.is_established:
            self._association.release()

    def store(self, file: Path, sop_class: str) -> str | None:
        """Send an object; None where the peer has it, else why it will not take it.

        Raises:
            _BrokeOff: it may take it later.
        """
        association = self._association
        assert association is not None
        syntaxes = [cx.transfer_syntax[0] for cx in association.accepted_contexts if cx.abstract_syntax == sop_class]
        if not syntaxes:
            return f"{UID(sop_class).name}: no presentation context was accepted"
        if not association.is_established:
            raise _BrokeOff("the association was lost")
        as_it_is = _meta(file).TransferSyntaxUID in syntaxes  # sent without being read
        answer = association.send_c_store(file if as_it_is else pydicom.dcmread(file))
        status = answer.get("Status")
        if status is None:
            raise _BrokeOff("it did not answer")
        if status == 0 or status & 0xF000 == 0xB000:  # warnings: it has the object
            return None
        if status & 0xFF00 == 0xA700:
            raise _BrokeOff(f"it is out of resources (status {status:04X})")
        return f"{UID(sop_class).name}: refused with status {status:04X}"


def _class_of(file: Path) -> str:
    return str(_meta(file).MediaStorageSOPClassUID)


def _meta(file: Path) -> pydicom.dataset.FileMetaDataset:
    return pydicom.filereader.read_file_meta_info(file)
