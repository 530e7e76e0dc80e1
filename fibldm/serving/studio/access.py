"""Who may ask: the token, the cookie that a browser gets for it, and the names by which this machine is called."""

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from fibldm.errors import FibldmError

TOKEN = "token"
_FEWEST = 32
_LOCAL = ("localhost", "127.0.0.1", "::1")


def new_token(folder: Path) -> str:
    """A fresh token, kept in a folder where only its owner can read it.

    Raises:
        FibldmError: it cannot be written.
    """
    token, file = secrets.token_urlsafe(32), folder / TOKEN
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(f"{token}\n")
    except OSError as error:
        raise FibldmError(f"{file} must be writable; {error.strerror}", "choose another folder") from error
    return token


def kept_token(file: Path) -> str:
    """The token in a file.

    Raises:
        FibldmError: it cannot be read, others can read it, or it is no token.
    """
    try:
        mode, text = stat.S_IMODE(file.stat().st_mode), file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in ASCII"
        raise FibldmError(f"{file} must hold a token; {why}", "check the path") from error
    if mode & 0o077:
        raise FibldmError(f"{file} must be readable for its owner alone; its mode is {mode:o}", f"chmod 600 {file}")
    if len(text) < _FEWEST or not text.isprintable() or " " in text:
        raise FibldmError(
            f"{file} must hold a token of at least {_FEWEST} letters and digits; it does not",
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )
    return text


class Access:
    """What opens a studio.

    Args:
        token: for programs, in the header ``Authorization: Bearer``.
        host: where it listens.
        port: of it.
        names: by which this machine may be called beside.
    """

    def __init__(self, token: str, host: str, port: int, names: Sequence[str] = ()) -> None:
        self._token, self._lock = token, threading.Lock()
        self._code: str | None = secrets.token_urlsafe(24)
        self.cookie = f"fibldm_studio_{port}"  # cookies do not know ports
        self.port, self.loopback = port, is_loopback(host)
        own = () if self.loopback else (socket.gethostname(), socket.getfqdn())
        self._names = {name.lower() for name in (*_LOCAL, host, *own, *names)}
        self._where = host if host not in ("0.0.0.0", "::") else "localhost"

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{f'[{self._where}]' if ':' in self._where else self._where}:{self.port}"

    @property
    def start_link(self) -> str:
        """An address that signs one browser in, once."""
        return f"{self.address}/start?code={self._code}"

    @property
    def session(self) -> str:
        """What the cookie says: nothing from which the token could be told."""
        return hmac.new(self._token.encode(), b"studio page", hashlib.sha256).hexdigest()

    def is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def is_session(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.session.encode())

    def spend(self, code: str) -> bool:
        """Whether this is the code of the start link, which is none from then on."""
        with self._lock:
            right = self._code is not None and hmac.compare_digest(code.encode(), self._code.encode())
            if right:
                self._code = None
        return right

    def knows(self, host: str) -> bool:
        """Whether a request may call this machine so.

        A foreign page whose name was made to lead here (DNS rebinding) calls it by that name. A number is no name, and
        is right where the machine is to be reached from others.
        """
        name = _without_port(host).lower().rstrip(".")
        return name in self._names or (not self.loopback and _is_address(name))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
