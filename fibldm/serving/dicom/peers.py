"""Who may call the node, and who gets results; both are written AET@HOST."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fibldm.errors import FibldmError

_TITLE = re.compile(r"[ -\[\]-~]{1,16}")  # PS3.5, 6.2: no backslash, no control characters


@dataclass(frozen=True)
class Caller:
    """An application entity that may call.

    Attributes:
        title: of the application entity.
        addresses: from which it may.
    """

    title: str
    addresses: frozenset[str]

    @classmethod
    def of(cls, text: str) -> "Caller":
        """From ``AET@HOST``.

        Raises:
            FibldmError: it is written otherwise, or the host is not known.
        """
        title, host = _parts(text, "--caller", "AET@HOST")
        return cls(title, frozenset(addresses_of(host)))


@dataclass(frozen=True)
class Peer:
    """An application entity that gets results."""

    title: str
    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> "Peer":
        """From ``AET@HOST:PORT``.

        Raises:
            FibldmError: it is written otherwise.
        """
        title, place = _parts(text, "--send", "AET@HOST:PORT")
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise _malformed(text, "--send", "AET@HOST:PORT")
        return cls(title, host, int(port))

    def __str__(self) -> str:
        return f"{self.title}@{self.host}:{self.port}"


def known(callers: Sequence[Caller], title: str, address: str) -> bool:
    """Whether an application entity may call from an address."""
    return any(caller.title == title and address in caller.addresses for caller in callers)


def titled(text: str, option: str) -> str:
    """The title of an application entity.

    Raises:
        FibldmError: DICOM allows no such title.
    """
    title = text.strip()
    if not title or not _TITLE.fullmatch(title):
        raise FibldmError(
            f"{option} must be the title of an application entity, 1 to 16 characters of ASCII; got {text!r}",
            "for example FIBLDM",
        )
    return title


def addresses_of(host: str) -> list[str]:
    """Addresses of a host.

    Raises:
        FibldmError: it is not known.
    """
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise FibldmError(f"{host!r} must be a host that is known; {error.strerror}", "give its address") from None


def _parts(text: str, option: str, form: str) -> tuple[str, str]:
    title, _, place = text.rpartition("@")
    if not title or not place:
        raise _malformed(text, option, form)
    return titled(title, option), place


def _malformed(text: str, option: str, form: str) -> FibldmError:
    example = "ORTHANC@127.0.0.1" + (":4242" if "PORT" in form else "")
    return FibldmError(f"{option} must be {form}; got {text!r}", f"for example {option} {example}")
