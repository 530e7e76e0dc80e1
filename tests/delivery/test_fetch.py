"""Downloads: only what was meant is kept, and nothing is left of anything else."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fibldm.cli import run

CONTENT = b"weights " * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        """As any server, but for one that breaks off and one that speaks no HTTP."""
        if self.path == "/short.pt":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"weights")
        elif self.path == "/nonsense":
            self.wfile.write(b"hello\r\n")
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of this machine with one file."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "weights.pt").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_fetched_once_and_has_its_hash(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "weights.pt"
    command = ["fetch", f"{address}/weights.pt", "--out", str(out), "--sha256", HASH.upper()]
    assert run(command) == 0 and out.read_bytes() == CONTENT
    assert "is downloaded and has the hash" in capsys.readouterr().out
    assert run(command) == 0
    assert "was there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        ("weights.pt", "0" * 64, "must have the hash 0000"),
        ("weights.pt", "abc", "--sha256 must be 64 hexadecimal digits; got 'abc'"),
        ("absent.pt", HASH, "absent.pt: HTTP Error 404: File not found"),
        ("short.pt", HASH, "must come as a whole; 7 of 100 bytes came"),
        ("nonsense", HASH, "cannot download"),
    ],
)
def test_what_is_not_meant_leaves_nothing(
    name: str, sha256: str, message: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "weights.pt"
    assert run(["fetch", f"{address}/{name}", "--out", str(out), "--sha256", sha256]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_another_file_or_a_folder_is_not_replaced(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pt").write_text("mine")
    for place, message in ((tmp_path / "weights.pt", " and is not the file with this hash"), (tmp_path, "")):
        assert run(["fetch", f"{address}/weights.pt", "--out", str(place), "--sha256", HASH]) == 2
        assert f"lies there already{message}" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "weights.pt").read_text() == "mine"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/weights.pt",
        "weights.pt",
        "http://127.0.0.1:9/weights.pt",
        "http://127.0.0.1:abc/weights.pt",
        "http://[bad/weights.pt",
        "http://127.0.0.1/two words",
    ],
)
def test_an_address_that_does_not_lead_anywhere_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fetch", url, "--out", str(tmp_path / "weights.pt"), "--sha256", HASH]) == 2
    said = capsys.readouterr().err
    assert "fetched by https, http or file" in said or "cannot download" in said
    assert not list(tmp_path.iterdir())
