"""Folders as a zip that is sent while it is made, so that it is never whole in memory or on the disk."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)


class _Pieces:
    """What a zip writes, until it is taken."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken = b"".join(self._written)
        self._written.clear()
        return taken


def zipped(root: Path, files: list[Path]) -> Iterator[bytes]:
    """Files under their paths in a folder, stored: volumes are compressed already, and DICOM hardly gets smaller.

    Args:
        root: the folder.
        files: of it.
    """
    pieces = _Pieces()
    with zipfile.ZipFile(pieces, "w") as archive:  # type: ignore[call-overload]
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(root).as_posix(), _EPOCH)
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield pieces.take()
    yield pieces.take()
