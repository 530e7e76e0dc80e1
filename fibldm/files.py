"""Files that are whole or absent: atomic writing, JSON, and content hashes."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibldm.errors import FibldmError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` (same ending) that is renamed to it when the block ends without an error.

    Raises:
        FibldmError: the disk is full or the folder cannot be written; ``path`` is as it was before.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the end of the name is enough to tell the format, and all of it may be as long as a name can be
        handle, name = tempfile.mkstemp(prefix=".writing-", suffix=path.name[-16:], dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise FibldmError(f"cannot write {path}: {error.strerror}", "check the folder and its permissions") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FibldmError(f"cannot write {path}: {error.strerror or error}", "check the free disk space") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, parts: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, or whose parts come to lie there, when the block ends without an error.

    Args:
        path: absent or empty, unless parts are named.
        parts: files and folders that the block writes, in the order in which they take the place of those of the same
            name; what else lies in ``path`` stays. Where one cannot, all of before lie there again.

    Raises:
        FibldmError: the disk is full, the folder cannot be written, or holds something where no parts are named.
    """
    path = Path(path)
    temporary = (path if parts else path.parent) / f".writing-{secrets.token_hex(8)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        with ExitStack() as undo:
            for name in parts:
                if (path / name).exists():
                    _move(path / name, temporary / f"{name}.old", undo)
                _move(temporary / name, path / name, undo)
            undo.pop_all()
        if not parts:
            temporary.rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise FibldmError(f"cannot write {path}: {reason}", "check its permissions, and the free disk space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path, undo: ExitStack) -> None:
    source.rename(target)
    undo.callback(target.rename, source)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors to ``path``, whole or not at all.

    Raises:
        FibldmError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise FibldmError(f"cannot write {path}: {error}", "check the free disk space") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of plain values; where PyYAML has its parser in C, in a tenth of the time.

    Raises:
        FileNotFoundError: it does not exist.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FibldmError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FibldmError(f"{path} must exist", "check the path, or run the step that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FibldmError(f"{path} must be JSON; {error}", "write it again with the step that makes it") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 of a JSON-able value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
