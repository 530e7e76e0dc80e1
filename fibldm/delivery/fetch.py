"""Downloads, which happen when somebody asks for one and knows what must come."""

import re
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from fibldm.errors import FibldmError
from fibldm.files import atomic_path, hash_file
from fibldm.progress import reading

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATIENCE = 60  # seconds without a byte


def fetch(url: str, out: Path, sha256: str) -> bool:
    """Download a file, such as published weights, and keep it only if it is the one that was meant.

    Args:
        url: ``https://``, ``http://`` or ``file://``.
        out: file to write; one that lies there and is the one that is meant stays as it is.
        sha256: of the file, in hexadecimal.

    Returns:
        Whether something was downloaded.

    Raises:
        FibldmError: the hash is none, another file lies there or came, or nothing could be downloaded or written.
    """
    if not _SHA256.fullmatch(sha256.lower()):
        raise FibldmError(f"`sha256` must be 64 hexadecimal digits; got {sha256!r}", "publishers state it beside files")
    if not url.startswith(("https://", "http://", "file://")):
        raise FibldmError(f"a file is fetched by https, http or file; got {url!r}")
    if out.exists():
        if not out.is_file() or hash_file(out) != sha256.lower():
            raise FibldmError(f"{out} lies there already and is not the file with this hash", "choose another `out`")
        return False
    with atomic_path(out) as temporary:
        _download(url, temporary)
        if (came := hash_file(temporary)) != sha256.lower():
            raise FibldmError(
                f"{url} must have the hash {sha256.lower()}; {came} came", "compare with what its publisher states"
            )
    return True


def _download(url: str, file: Path) -> None:
    try:
        with urlopen(url, timeout=_PATIENCE) as answer:
            length = int(answer.headers.get("Content-Length") or 0)
            name = url.rpartition("/")[2]
            with reading(answer, length, name) as stream, file.open("wb") as target:
                shutil.copyfileobj(stream, target)
    except (OSError, HTTPException, ValueError) as error:
        raise FibldmError(f"cannot download {url}: {error}", "check the address, the network and the disk") from error
    if length and file.stat().st_size != length:
        raise FibldmError(
            f"{url} must come as a whole; {file.stat().st_size} of {length} bytes came", "run the same command again"
        )
