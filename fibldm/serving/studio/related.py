"""multipart/related of DICOM objects (PS3.18, 8.6.1.2.1; RFC 2387), in and out, a piece at a time."""

import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from fibldm.serving.studio.guard import Refusal
from fibldm.serving.studio.limits import Limits

DICOM = "application/dicom"
_WHAT = f'a request must be multipart/related; type="{DICOM}"'
_HOW = "PS3.18, 10.5 describes it; dicomweb-client's store_instances sends it"
_CHUNK = 2**20


class Parts:
    """Writes the parts of a body to files while it comes.

    Args:
        content_type: of the request.
        folder: of the files, ``0.dcm`` and so on.
        limits: of requests.

    Raises:
        Refusal: it is of another type.
    """

    def __init__(self, content_type: str, folder: Path, limits: Limits) -> None:
        kind, options = parse_options_header(content_type)
        stated, boundary = options.get(b"type", b"").decode("latin-1").lower(), options.get(b"boundary", b"")
        if kind.lower() != b"multipart/related" or stated != DICOM or not boundary:
            raise Refusal(415, f"{_WHAT}, with a boundary; it has another Content-Type", _HOW)
        self.files: list[Path] = []
        self._folder, self._limits, self._ended = folder, limits, False
        self._out: IO[bytes] | None = None
        self._field, self._value, self._kind = b"", b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._name,
                "on_header_value": self._say,
                "on_header_end": self._heard,
                "on_headers_finished": self._check_kind,
                "on_part_data": self._write,
                "on_part_end": self._close,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """The next piece of the body.

        Raises:
            Refusal: it is malformed, a part is of another type, or there is too much.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise Refusal(400, f"{_WHAT}; its parts are malformed", _HOW) from None

    def finish(self) -> None:
        """After the last piece.

        Raises:
            Refusal: something is missing, or there is no part.
        """
        if not self._ended or not self.files:
            raise Refusal(400, f"{_WHAT}, with its last boundary; it ends before it, or has no part", _HOW)

    def close(self) -> None:
        """Nothing more comes."""
        if self._out is not None:
            self._out.close()
            self._out = None

    def _begin(self) -> None:
        if len(self.files) >= self._limits.objects:
            raise Refusal(413, f"a request must have at most {self._limits.objects} objects; it has more", "send fewer")
        self._kind = b""
        self.files.append(self._folder / f"{len(self.files)}.dcm")
        self._out = self.files[-1].open("xb")

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _say(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _heard(self) -> None:
        if self._field.lower() == b"content-type":
            self._kind = parse_options_header(self._value)[0].lower()
        self._field = self._value = b""

    def _check_kind(self) -> None:
        if self._kind != DICOM.encode():
            raise Refusal(415, f"every part must be {DICOM}; one is not", _HOW)

    def _write(self, data: bytes, start: int, end: int) -> None:
        assert self._out is not None
        if self._out.tell() + end - start > self._limits.dicom:
            raise Refusal(413, f"an object must have at most {self._limits.dicom} bytes; one has more", "send less")
        self._out.write(data[start:end])

    def _close(self) -> None:
        self.close()

    def _end(self) -> None:
        self._ended = True


def related(files: Iterable[Path], boundary: str) -> Iterator[bytes]:
    """A body of files."""
    for file in files:
        with file.open("rb") as stream:
            head = f"\r\n--{boundary}\r\nContent-Type: {DICOM}\r\nContent-Length: {file.stat().st_size}\r\n\r\n"
            yield head.encode()
            while chunk := stream.read(_CHUNK):
                yield chunk
    yield f"\r\n--{boundary}--\r\n".encode()


def new_boundary() -> str:
    """One that no file has."""
    return secrets.token_hex(24)
