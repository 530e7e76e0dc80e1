"""The page, and the ways in which a browser is signed in."""

from importlib.resources import files
from typing import Annotated

from fastapi import FastAPI, Query, Response
from starlette.responses import RedirectResponse

from fibldm.serving.studio.access import Access
from fibldm.serving.studio.guard import SESSION, Refusal
from fibldm.serving.studio.views import Session

_SCRIPTS = ("studio", "controls", "drawing", "jobs", "nifti", "signin", "slices", "viewer")
_PAGE = {"": "index.html", "studio.css": "studio.css"} | {f"{name}.js": f"{name}.js" for name in _SCRIPTS}
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}


def add_page(app: FastAPI, access: Access) -> None:
    """Give the page, which tells nothing without a token, and the ways to sign in to an application."""
    page = files("fibldm.serving") / "page"
    content = {name: (page / file).read_bytes() for name, file in _PAGE.items()}

    def part(name: str = "") -> Response:
        if name not in content:
            raise Refusal(404, "there is no such page", "see /")
        return Response(content[name], media_type=_TYPES[_PAGE[name].rpartition(".")[2]])

    def start(code: Annotated[str, Query(max_length=128)] = "") -> Response:
        if not access.spend(code):
            return RedirectResponse("/?used", status_code=303)
        response = RedirectResponse("/", status_code=303)
        return _signed_in(response, access)

    def session(asked: Session) -> Response:
        if not access.is_token(asked.token):
            raise Refusal(401, "this is not the token of the studio", "it lies in the file that the studio named")
        return _signed_in(Response(status_code=204), access)

    app.get("/", include_in_schema=False)(part)
    app.get("/page/{name}", include_in_schema=False)(part)
    app.get("/start", include_in_schema=False)(start)
    app.post(SESSION, status_code=204, response_class=Response)(session)


def _signed_in(response: Response, access: Access) -> Response:
    response.set_cookie(access.cookie, access.session, httponly=True, samesite="strict", path="/")
    return response
