"""From the parts of a request to the files of an item; names that the client has for them are never used."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fibldm.errors import FibldmError
from fibldm.files import write_json
from fibldm.models.conditions.condition import Condition
from fibldm.serving.studio.bounds import check_bounds, suffix_of
from fibldm.serving.studio.guard import Refusal
from fibldm.serving.studio.limits import Limits

MASK, OPTIONS = "mask", "options"
_WHAT = "a request must be multipart/form-data with the file 'mask', and may have 'options', a JSON object"


async def form_of(request: Request, kinds: Mapping[str, Condition], limits: Limits) -> FormData:
    """The parts of a request, on the disk where they are large.

    Raises:
        Refusal: it has no such parts, or others.
    """
    scans = scans_of(kinds)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, f"{_WHAT}; it has another Content-Type")
    try:
        form = await request.form(max_files=1 + len(scans), max_fields=1, max_part_size=limits.options)
    except HTTPException as error:
        raise Refusal(400, f"{_WHAT}; {error.detail}", "see /api/openapi.json") from None
    strange = [name for name in form if name not in (MASK, OPTIONS, *scans)]
    if strange or any(len(form.getlist(name)) > 1 for name in form):
        await form.close()
        raise Refusal(
            422, f"{_WHAT}{''.join(f', and the file {name}' for name in scans)}; it has other parts, or one twice"
        )
    if any(isinstance(form[name], str) != (name == OPTIONS) for name in form):
        await form.close()
        raise Refusal(422, f"{_WHAT}; one of them is the other")
    return form


def scans_of(kinds: Mapping[str, Condition]) -> list[str]:
    """The conditions that are asked for by a file."""
    return [name for name, kind in kinds.items() if kind.of_scan]


def options_of(form: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked.

    Raises:
        FibldmError: it is no JSON object.
    """
    text = form.get(OPTIONS, "{}")
    try:
        options = json.loads(str(text), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FibldmError(f"options must be JSON; {error}", "see /api/openapi.json") from None
    if not isinstance(options, dict):
        raise FibldmError(f"options must be a JSON object; got {type(options).__name__}", 'such as {"seed": 1}')
    return options


def files_into(folder: Path, form: FormData, kinds: Mapping[str, Condition], limits: Limits) -> Path:
    """Write the files of a request into a folder, by names of our own, once they are known to have bounds.

    Returns:
        The mask.

    Raises:
        FibldmError: there is no mask, or a file is refused.
    """
    if not isinstance(form.get(MASK), UploadFile):
        raise FibldmError(f"{_WHAT}; it has no mask", "send one")
    mask = _into(folder, MASK, form[MASK], limits)
    scans = {name: _into(folder, f"scan_{name}", form[name], limits).name for name in scans_of(kinds) if name in form}
    if scans:
        write_json(folder / "conditions.json", scans)
    return mask


def _into(folder: Path, name: str, part: UploadFile | str, limits: Limits) -> Path:
    if isinstance(part, str):
        raise FibldmError(f"{name} must be a file; got a text", "send it as a file")
    whole = folder / f".{name}"
    with whole.open("wb") as stream:
        shutil.copyfileobj(part.file, stream)
    file = whole.rename(folder / f"{name}{suffix_of(whole)}")
    check_bounds(file, limits)
    return file


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
