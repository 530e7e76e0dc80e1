"""Every refusal of the API is ``{message, remedy}``, and OpenAPI says so."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fibldm.errors import FibldmError
from fibldm.serving.studio.guard import Refusal
from fibldm.serving.studio.views import Refused

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refused, "description": text}
    for status, text in (
        (400, "not readable"), (401, "no token"), (403, "another page"), (404, "not there"),
        (406, "of no type that is asked for"), (408, "too slow"),
        (409, "not now"), (413, "too large"), (415, "another type"), (421, "another host"), (422, "refused"),
        (429, "too many"),
    )
}  # fmt: skip


def tell_refusals(app: FastAPI) -> None:
    """Every refusal is ``{message, remedy}``."""

    def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        if error.status in (408, 413, 429):
            error.headers["Connection"] = "close"  # the rest of the body is left unread
        return error.response()

    def wrong(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, FibldmError)
        return Refusal.of(error).response()

    def not_there(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return Refusal(error.status_code, f"{error.detail}".lower(), "see /api/openapi.json", headers).response()

    def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()[:5])
        return Refusal(422, f"a request must be as /api/openapi.json describes it; {told}", "change it").response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(FibldmError, wrong)
    app.add_exception_handler(HTTPException, not_there)
    app.add_exception_handler(RequestValidationError, invalid)


def describe_token(app: FastAPI) -> None:
    """Say in OpenAPI that the token is asked for."""
    schema = app.openapi()
    schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]
    schema["paths"]["/api/session"]["post"]["security"] = []
