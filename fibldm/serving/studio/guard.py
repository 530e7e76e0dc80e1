"""What every request must pass before anything reads it: its host, its token, its size, its patience.

Plain ASGI, outside of FastAPI, so that a body is counted before anything parses it, and whatever goes wrong inside ends
here, without a name of a file in the log.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from fibldm.errors import FibldmError
from fibldm.serving.studio.access import Access
from fibldm.serving.studio.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/api/"
SESSION = "/api/session"
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_logger = logging.getLogger("fibldm")


class Refusal(Exception):
    """A request that is refused, with its status; ``message`` and ``remedy`` are what it is told."""

    def __init__(self, status: int, message: str, remedy: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.remedy, self.headers = status, message, remedy, headers or {}

    @classmethod
    def of(cls, error: FibldmError, status: int = 422) -> "Refusal":
        """An error of the library, as a refusal."""
        return cls(status, error.message, error.remedy)

    def response(self) -> JSONResponse:
        return JSONResponse({"message": self.message, "remedy": self.remedy}, self.status, self.headers)


class Guard:
    """Stands before an application.

    Args:
        app: of ASGI.
        access: what opens it.
        limits: of requests.
    """

    def __init__(self, app: Any, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        begun = False

        async def marked(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._counted(receive), marked)
        except Refusal as refusal:
            refusal.headers["Connection"] = "close"  # its body is left unread
            if not begun:
                await refusal.response()(scope, receive, marked)
        except Exception as error:
            _logger.error("a request failed: %s", type(error).__name__)  # its text may name files
            if begun:
                raise ConnectionAbortedError from None  # no whole answer can follow
            await _failed().response()(scope, receive, marked)

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows(hosts[0]):
            raise Refusal(421, "the host of a request must be a name of this machine; it is not", "see --name")
        if (stated := headers.get("content-length")) is not None and stated.isdigit():
            self._check_size(int(stated))
        if scope["path"].startswith(API) and scope["path"] != SESSION:
            self._check_access(scope["method"], headers)

    def _check_access(self, method: str, headers: Headers) -> None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind:
            if kind.lower() == "bearer" and self._access.is_token(token.strip()):
                return
        elif self._access.is_session(_cookie(headers, self._access.cookie)):
            return _check_same_page(method, headers)
        raise Refusal(
            401,
            "a request must have the token of the studio; this one has none, or another",
            "send it as the header 'Authorization: Bearer TOKEN'; the studio prints a start link for a browser",
            {"WWW-Authenticate": "Bearer"},
        )

    def _check_size(self, size: int) -> None:
        if size > self._limits.upload:
            raise Refusal(
                413, f"a request must have at most {self._limits.upload} bytes; it has more", "send a smaller file"
            )

    def _counted(self, receive: Receive) -> Receive:
        """The body, of which no more comes than is allowed, and none too late."""
        came, waits = 0, True

        async def next_part() -> Message:
            nonlocal came, waits
            if not waits:  # the rest is a disconnection, which may take as long as the answer
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._limits.seconds)
            except TimeoutError:
                raise Refusal(
                    408, "the parts of a request must come without long pauses; none came", "send it again"
                ) from None
            waits = message.get("more_body", False)
            came += len(message.get("body", b""))
            self._check_size(came)
            return message

        return next_part


def _check_same_page(method: str, headers: Headers) -> None:
    """A cookie comes with whatever any page of this machine asks, of other ports too, so its origin is looked at."""
    site = headers.get("sec-fetch-site", "same-origin")
    origin = headers.get("origin", "")
    same = origin.partition("://")[2] == headers["host"]
    if site not in ("same-origin", "none") or (origin and not same) or (method not in _SAFE and not same):
        raise Refusal(
            403, "a request with a cookie must come from the studio's own page; this one does not", "use the token"
        )


def _cookie(headers: Headers, name: str) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _failed() -> Refusal:
    return Refusal(500, "the studio failed to answer", "its log has the kind of the error; send the request again")
