"""Uvicorn in a thread, beside the work of a service in the main one; connections that say nothing are closed."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fibldm.errors import FibldmError

_MOST_CONNECTIONS = 200
_HEAD_SECONDS = 10.0  # in which the head of a request must come
_KEEP_ALIVE = 5
_LAST_ANSWERS = 3  # seconds that answers under way get when the studio ends
_LONGEST_HEAD = 2**14


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no whole request comes in time.

    Uvicorn waits for ever for the first one, and for the rest of a head. Where there are too many connections, the one
    that has said nothing for longest makes room.
    """

    _since: float | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        ours = [one for one in self.connections if isinstance(one, PatientProtocol)]
        held = [one for one in ours if not one.transport.is_closing()]  # many are made before a closed one goes
        if len(held) > _MOST_CONNECTIONS:
            silent = [one for one in held if one._since is not None]
            min(silent, key=lambda one: one._since or 0.0).transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._timer is None:
            self._since = time.monotonic()
            self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._since = None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        FibldmError: another program has the port, or the host is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise FibldmError(
            f"{host} must be an address of this machine and port {port} free; {getattr(error, 'strerror', error)}",
            "choose another `port` or `host`",
        ) from error


@contextmanager
def serving(app: Any, place: socket.socket) -> Iterator[None]:
    """Answer requests while the block runs.

    Raises:
        FibldmError: the server did not begin.
    """
    for name in ("uvicorn.error", "uvicorn.access"):  # its lines would have addresses and errors with names of files
        logging.getLogger(name).setLevel(logging.CRITICAL)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_LAST_ANSWERS,
            h11_max_incomplete_event_size=_LONGEST_HEAD,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    if not server.started:
        raise FibldmError("the server must begin; it did not", "run again with --debug")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=_LAST_ANSWERS + 10)
        place.close()
