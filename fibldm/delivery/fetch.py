"""Downloads, which happen when somebody asks for one and knows what must come."""

import re
from pathlib import Path
from urllib.error import URLError

from fibldm.errors import FibldmError
from fibldm.files import hash_file

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(url: str, out: Path, sha256: str, *, progress: bool = True) -> bool:
    """Download a file, such as published weights, and keep it only if it is the one that was meant.

    Args:
        url: ``https://``, ``http://`` or ``file://``.
        out: file to write; one that lies there and is the one that is meant stays as it is.
        sha256: of the file, in hexadecimal.
        progress: whether to show a bar on standard error.

    Returns:
        Whether something was downloaded.

    Raises:
        FibldmError: the hash is none, another file lies there or came, or nothing could be downloaded or written.
    """
    from torch.hub import download_url_to_file

    if not _SHA256.fullmatch(sha256.lower()):
        raise FibldmError(f"--sha256 must be 64 hexadecimal digits; got {sha256!r}", "publishers state it beside files")
    if not url.startswith(("https://", "http://", "file://")):
        raise FibldmError(f"a file is fetched by https, http or file; got {url!r}")
    if out.exists():
        if hash_file(out) != sha256.lower():
            raise FibldmError(f"{out} lies there already and has another hash", "choose another --out")
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(out), hash_prefix=sha256.lower(), progress=progress)  # beside, then renamed
    except RuntimeError as error:  # torch's, of the hash
        raise FibldmError(
            f"{url} must have the hash {sha256}; {error}", "compare with what its publisher states"
        ) from error
    except URLError as error:
        raise FibldmError(f"cannot download {url}: {error.reason}", "check the address and the network") from error
    except OSError as error:
        raise FibldmError(f"cannot write {out}: {error.strerror or error}", "check the folder and the disk") from error
    return True
