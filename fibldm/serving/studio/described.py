"""What OpenAPI says of bodies that are no JSON of a model."""

from typing import Any


def body(schema: dict[str, Any], kind: str = "multipart/form-data") -> dict[str, Any]:
    """Of a request."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def answer(description: str, *types: str) -> dict[int | str, dict[str, Any]]:
    """Of an answer."""
    return {200: {"content": {name: {} for name in types}, "description": description}}
