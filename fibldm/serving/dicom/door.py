"""Associations of the node: who is let in, and what of C-STORE is taken on."""

import errno
import logging
import ssl
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from fibldm.errors import FibldmError
from fibldm.serving.dicom.intake import Intake
from fibldm.serving.dicom.limits import Limits, Pace
from fibldm.serving.dicom.listening import Server, Sizes, tidy
from fibldm.serving.dicom.objects import STORED, SYNTAXES, Unwanted
from fibldm.serving.dicom.peers import Caller, known

_UNKNOWN_CALLER, _UNKNOWN_CALLED, _BUSY = (1, 1, 3), (1, 1, 7), (2, 3, 1)  # result, source, reason: PS3.8, 9.3.4
_SUCCESS, _OUT_OF_RESOURCES, _CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000  # PS3.4, B.2.3

_logger = logging.getLogger("fibldm")


@dataclass
class Door:
    """Listens, and takes on masks.

    Attributes:
        intake: gets the objects.
        title: of this application entity.
        callers: who may call.
        limits: of what comes.
        tls: None is without.
    """

    intake: Intake
    title: str
    callers: Sequence[Caller]
    limits: Limits
    tls: ssl.SSLContext | None = None
    _paces: dict[tuple[str, str], Pace] = field(init=False, repr=False)
    _server: Server | None = field(init=False, default=None)
    _closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._paces = defaultdict(lambda: Pace(self.limits.objects_per_minute))
        self._entity = AE(ae_title=self.title)
        self._entity.require_called_aet = False  # see `_admit`
        self._entity.maximum_associations = self.limits.associations
        self._entity.maximum_pdu_size = self.limits.pdu
        self._entity.acse_timeout = min(self.limits.idle, 30.0)
        self._entity.network_timeout = self._entity.dimse_timeout = self.limits.idle
        for sop_class in (Verification, *STORED):
            self._entity.add_supported_context(sop_class, list(SYNTAXES))

    def open(self, host: str, port: int) -> int:
        """Listen, from other threads.

        Returns:
            The port, which the system chooses where 0 is asked for.

        Raises:
            FibldmError: one cannot listen there.
        """
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._admit),
            (evt.EVT_PDU_RECV, Sizes(self.limits).count),
            (evt.EVT_C_STORE, self._answer),
            (evt.EVT_CONN_CLOSE, tidy),
        ]
        try:
            server = self._entity.make_server(
                (host, port), ssl_context=self.tls, evt_handlers=handlers, server_class=Server, limits=self.limits
            )
        except OSError as error:
            raise FibldmError(f"cannot listen on {host}:{port}; {error.strerror}", "choose another port") from error
        assert isinstance(server, Server)
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return int(server.server_address[1])

    def close(self) -> None:
        """No association is let in any more; those that are open go on."""
        if not self._closed and self._server is not None:
            self._closed = True
            self._server.close()

    @property
    def busy(self) -> bool:
        """Whether an association is open."""
        return self._server is not None and bool(self._server.active_associations)

    def abort(self) -> None:
        """End what is still open."""
        for association in self._server.active_associations if self._server is not None else ():
            association.abort()

    def _admit(self, event: Any) -> None:
        """Handler of ``EVT_REQUESTED``: reject whom the node does not know."""
        caller, request = event.assoc.requestor, event.assoc.requestor.primitive
        title, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
        if not known(self.callers, title, caller.address):
            reason, told = _UNKNOWN_CALLER, "no known caller"
        elif called != self.title:
            reason, told = _UNKNOWN_CALLED, "it called another title"
        elif self._closed:
            reason, told = _BUSY, "the node is ending"
        else:
            return
        _logger.warning("rejected an association of %r from %s: %s", title, caller.address, told)
        event.assoc.acse.send_reject(*reason)
        event.assoc.kill()  # waits until it is sent

    def _answer(self, event: Any) -> Dataset:
        """Handler of ``EVT_C_STORE``."""
        answer = Dataset()
        try:
            self._take(event)
            answer.Status = _SUCCESS
        except Unwanted as unwanted:
            answer.Status, answer.ErrorComment = unwanted.status, unwanted.comment
        except FibldmError:
            answer.Status, answer.ErrorComment = _CANNOT_UNDERSTAND, "the object cannot be taken on"
        except Exception as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            answer.Status = _OUT_OF_RESOURCES
            answer.ErrorComment = "the disk is full" if full else "the node has a fault"
            _logger.error("an object could not be kept: %s", type(error).__name__)
        if answer.Status != _SUCCESS:
            _logger.warning("an object of %s was not taken: %s", event.assoc.requestor.address, answer.ErrorComment)
        return answer

    def _take(self, event: Any) -> None:
        caller, request = event.assoc.requestor, event.request
        if getattr(event.assoc, "is_cut", False):  # by its last bytes
            raise Unwanted(_OUT_OF_RESOURCES, "more bytes than are taken")
        if not self._paces[caller.ae_title, caller.address].allows():
            raise Unwanted(_OUT_OF_RESOURCES, "more objects a minute than are taken")
        sop_class, sop_instance = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        self.intake.take(Path(event.dataset_path), sop_class, sop_instance)
