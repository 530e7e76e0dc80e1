"""Connections of the node, bounded in number, time and size before anything of them is understood.

pynetdicom reads as many bytes as a header announces, up to 4 GiB and without end of time, and wraps a connection in TLS
in the loop that accepts the next ones.
"""

import logging
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from socketserver import BaseServer
from typing import Any

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from fibldm.serving.dicom.limits import Limits

_SPARE = 8  # connections beyond the associations: those are told that they are too many, more are closed
_LARGEST_REQUEST = 2**17  # bytes of a request for an association: 128 contexts with all their syntaxes are less
_CHUNK = 2**16
_ABORT = bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, 0))  # A-ABORT of the service provider, PS3.8, 9.3.8

_logger = logging.getLogger("fibldm")


class Server(ThreadedAssociationServer):
    """Accepts connections, at most so many at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, ae: AE, address: tuple[str, int], *args: Any, limits: Limits, **kwargs: Any) -> None:
        self.limits, self._open = limits, list[socket.socket]()
        kwargs["request_handler"] = Handler
        super().__init__(ae, address, *args, **kwargs)

    def close(self) -> None:
        """Accept no connections any more."""
        BaseServer.shutdown(self)
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection; called by one thread only."""
        self._open = [other for other in self._open if other.fileno() != -1]
        if len(self._open) >= self.limits.associations + _SPARE:
            return False
        self._open.append(request)
        return True

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; of TLS, one that has not shaken hands yet, as a peer may take its time for it."""
        assert self.socket is not None
        connection, address = self.socket.accept()
        connection.settimeout(self.limits.idle)
        if self.ssl_context is not None:
            connection = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, in the thread of the connection, and read what is asked."""
        if isinstance(request, ssl.SSLSocket):
            request.do_handshake()
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What keeps a connection from being used: no traceback, as anyone may cause it."""
        _logger.warning("a connection from %s failed; is it one of TLS, with a known certificate?", client_address[0])


def tidy(event: Any) -> None:
    """Handler of ``EVT_CONN_CLOSE``: what came of an object goes, and who asked for nothing is not waited for."""
    association = event.assoc
    if association.requestor.primitive is None:
        association.dul.to_user_queue.put(None)
    if (message := association.dimse.message) is not None and message._data_set_file is not None:
        message._data_set_file.close()
        Path(message._data_set_file.name).unlink(missing_ok=True)


class Handler(RequestHandler):
    """Makes an association whose socket reads within limits."""

    def _create_association(self) -> Association:
        association = super()._create_association()
        limits = self.server.limits  # type: ignore[attr-defined]
        bounded = _Bounded(association, self.request, limits)
        association.dul.socket.recv = bounded.recv  # type: ignore[union-attr, method-assign]
        return association


class _Bounded:
    """Reads of the socket of an association."""

    def __init__(self, association: Association, connection: socket.socket, limits: Limits) -> None:
        self._association, self._connection, self._limits, self._came = association, connection, limits, 0

    def recv(self, count: int) -> bytearray:
        """So many bytes, or fewer where the peer ends; in the place of `AssociationSocket.recv`.

        Raises:
            OSError: too many are announced, too many came, or the peer is too slow.
        """
        self._came += count
        if count > max(self._limits.pdu, _LARGEST_REQUEST):
            raise cut(self._association, "a message announced more bytes than are taken")
        if self._came > self._limits.association_bytes:
            raise cut(self._association, "an association brought more bytes than are taken")
        read, until = bytearray(), time.monotonic() + self._limits.idle
        while len(read) < count:
            left = until - time.monotonic()
            if left <= 0:
                raise cut(self._association, "a message took too long")
            self._connection.settimeout(left)
            if not (part := self._connection.recv(min(_CHUNK, count - len(read)))):
                break
            read += part
        self._connection.settimeout(self._limits.idle)  # for what is sent
        return read


class Sizes:
    """How much came of the object in hand, of every association; cuts off what grows too large."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def count(self, event: Any) -> None:
        """Handler of ``EVT_PDU_RECV``."""
        if not isinstance(event.pdu, P_DATA_TF):
            return
        size = getattr(event.assoc, "object_size", 0)
        for item in event.pdu.presentation_data_value_items:
            value = item.presentation_data_value or b""
            size += len(value)
            if size > self._limits.object_bytes:
                cut(event.assoc, "an object had more bytes than are taken")
            if value[:1] and value[0] & 2:  # the last fragment of a command or of an object
                size = 0
        event.assoc.object_size = size


def close_socket(transport: Any) -> None:
    """In the place of `AssociationSocket._shutdown_socket`, which leaves a socket open whose peer has gone."""
    if (connection := transport.socket) is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def cut(association: Association, reason: str) -> OSError:
    """Abort an association from the thread that reads it, and give the error that says so."""
    _logger.warning("cut off %s: %s", association.requestor.address, reason)
    association.is_cut = True  # type: ignore[attr-defined]
    if (transport := association.dul.socket) is not None and transport.socket is not None:
        with suppress(OSError):  # it is gone already
            transport.socket.settimeout(1.0)
            transport.socket.send(_ABORT)
        close_socket(transport)
    return OSError(reason)
