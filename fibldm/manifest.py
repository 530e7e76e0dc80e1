"""The manifest of a bundle: the SHA-256 of its files as they were exported, so that later changes are seen.

It tells what changed on the way or by mistake. It is no signature: who can write files can write a manifest as well.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json, write_json

MANIFEST = "manifest.json"

_FOLDERS = ("configs", "docs", "models")
_LICENCE = "LICENSE"
_CODE = (".py", ".pyc", ".pyd", ".so", ".zip", ".egg")  # Python looks for modules in a bundle's folder first of all
_SHOWN = 10

_logger = logging.getLogger("fibldm")


def write_manifest(root: Path) -> Path:
    """Write the manifest of the files that lie there now."""
    file = root / MANIFEST
    write_json(file, {"sha256": {name: hash_file(path) for name, path in sorted(_files(root))}})
    return file


def differences(root: Path) -> list[str] | None:
    """What is not as the manifest says, in words with the names of files; None where there is no manifest.

    Files of a bundle are ``LICENSE``, all in ``configs``, ``docs`` and ``models``, and whatever Python could import,
    wherever it lies. Names that begin with a dot, and what people keep beside it, such as masks and volumes, are not.

    Raises:
        FibldmError: the manifest is none, or a file cannot be read.
    """
    file = root / MANIFEST
    if not file.exists():
        return None
    told, there = _read(file), dict(_files(root))
    try:
        now = {name: hash_file(path) if path.is_file() else "" for name, path in there.items() if name in told}
        changed = [name for name in told if name in now and now[name] != told[name]]
    except OSError as error:
        raise FibldmError(f"files of {root} must be readable; {error}", "check their permissions") from error
    return [
        *(f"changed: {name}" for name in changed),
        *(f"added: {name}" for name in sorted(there) if name not in told),
        *(f"missing: {name}" for name in told if name not in there),
    ]


def check_manifest(root: Path, *, trust: bool = False, named: bool = False) -> list[str]:
    """Refuse a bundle whose files are not those of its manifest, before anything of it is read or run.

    Args:
        root: folder of the bundle.
        trust: go on nevertheless, and say so.
        named: whether the bundle says that it has a manifest, which must lie there then.

    Returns:
        The `differences` that were gone on with; empty where there are none, or no manifest.

    Raises:
        FibldmError: something changed, was added or is missing; names it.
    """
    found = differences(root)
    if found is None and named:
        found = [f"missing: {MANIFEST}"]
    if found is None:
        _logger.warning("note: %s has no %s: whether files changed since its export cannot be told", root, MANIFEST)
        return []
    if not found:
        return []
    shown = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    if not trust:
        raise FibldmError(
            f"files of {root} must be those that were exported; {shown}",
            "ask for the bundle again; `fibldm verify --update-manifest` where you changed it yourself, "
            "--trust to go on nevertheless",
        )
    _logger.warning("warning: --trust: files of %s are not those that were exported; %s", root, shown)
    return found


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file; a link to a folder counts as one, and is not followed."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        for name in (*links, *names):
            path = Path(folder) / name
            parts = path.relative_to(root).parts
            own = (
                parts[0] in _FOLDERS or parts == (_LICENCE,) or (_holds_code(path) if name in links else _is_code(name))
            )
            if own and not name.startswith("."):
                yield "/".join(parts), path


def _is_code(name: str) -> bool:
    return name.lower().endswith(_CODE)


def _holds_code(link: Path) -> bool:
    return any(_is_code(part.name) for part in link.iterdir())


def _read(file: Path) -> Mapping[str, str]:
    content = read_json(file)
    told = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(told, dict) or not all(isinstance(digest, str) for digest in told.values()):
        raise FibldmError(f"{file} must hold the SHA-256 of files by name", "ask for the bundle again")
    return told
