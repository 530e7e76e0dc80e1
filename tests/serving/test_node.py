"""The DICOM node: masks come by C-STORE, results leave by it, and nobody gets more of it than is meant."""

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import PLANTED, box_structures, complete, write_segmentation, write_series, write_structures
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.dsutils import split_dataset

from fibldm.cli import run as run_command
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.serving import Job, Service, State
from fibldm.serving.dicom.limits import Limits
from fibldm.serving.dicom.node import Node, tls_contexts
from fibldm.serving.dicom.objects import IMAGES, SEGMENTATIONS, STRUCTURE_SET, keep
from fibldm.serving.dicom.peers import Caller, Peer
from fibldm.synthesis import Output, SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files
from fibldm.volumes.dicom.masks import read_segmentation

QUICK = SynthesisSettings.of(SamplingSettings(steps=1), allow_extrapolation=True, format="dicom")
SHAPE = (18, 22, 20)
GRID = {"spacing": (10.0, 10.0, 10.0), "origin": (-95.0, -110.0, -600.0)}
PATIENT = Limits(idle=20.0)
HOST, CALLER = "127.0.0.1", "SENDER"
SEG, LABELMAP = SEGMENTATIONS
VERIFICATION = "1.2.840.10008.1.1"
ALL = (VERIFICATION, SEG, LABELMAP, STRUCTURE_SET, *IMAGES)


class Until:
    """Stands for `Ending`: asks to end when something has come about."""

    def __init__(self, met: Callable[[], object]) -> None:
        self._met, self._latest = met, time.monotonic() + 60

    @property
    def asked(self) -> int | None:
        assert time.monotonic() < self._latest, "it has not come about"
        return 15 if self._met() else None


@dataclass
class Archive:
    """A peer that stores what it is sent, as bytes by SOP Instance UID."""

    classes: tuple[str, ...] = (SEG, *IMAGES)
    syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian,)
    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    came: list[str] = field(default_factory=list)

    @contextmanager
    def opened(self) -> Iterator["Archive"]:
        entity = AE(ae_title="ARCHIVE")
        for sop_class in self.classes:
            entity.add_supported_context(sop_class, list(self.syntaxes))
        server = entity.start_server((HOST, self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._keep)])
        assert server is not None
        self.port = server.server_address[1]
        try:
            yield self
        finally:
            server.shutdown()

    def _keep(self, event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.came.append(uid)
        self.objects[uid] = encoded(event.dataset_path)
        return 0x0000

    @property
    def peer(self) -> Peer:
        return Peer("ARCHIVE", HOST, self.port)


def encoded(file: Path) -> bytes:
    """An object without what programs write before it."""
    _, offset = split_dataset(file)
    return file.read_bytes()[offset:]


def undated(content: bytes) -> bytes:
    """Without Content Date and Content Time, which a segmentation must have: when it was written."""
    return re.sub(rb"\x08\x00(\x23\x00DA\x08\x00.{8}|\x33\x00TM\x0e\x00.{14})", b"", content, flags=re.DOTALL)


@dataclass
class House:
    """A node that runs, and where it listens."""

    service: Service
    node: Node
    port: int

    def work(self, met: Callable[[], object]) -> None:
        self.node.run(Until(met))  # type: ignore[arg-type]

    @property
    def jobs(self) -> list[Job]:
        return self.service.store.jobs()

    @property
    def delivered(self) -> bool:
        """Whether nothing is left to make or send."""
        done = [job for job in self.jobs if job.state is State.DONE]
        sent = [delivery.ended for job in done for delivery in self.service.store.deliveries(job.id)]
        return len(done) == len(self.jobs) and all(sent)


@pytest.fixture(scope="module")
def synthesizer(tiny_bundle: Path) -> Synthesizer:
    return Synthesizer.from_bundle(tiny_bundle)


@pytest.fixture
def house(synthesizer: Synthesizer, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A node on a free port; in the end its folder holds nothing of a patient."""

    @contextmanager
    def opened(*peers: Peer, limits: Limits = PATIENT, masks: str | None = None, **options: Any) -> Iterator[House]:
        asked = SynthesisSettings.of(QUICK, mask_format=masks)
        with Service(Output(synthesizer, tmp_path, asked), tmp_path / "node") as service:
            callers = [Caller(CALLER, frozenset({HOST}))]
            node = Node(service, "FIBLDM", callers, peers, limits=limits, settled=0.0, first=0.2, **options)
            port = node.open(HOST, 0)
            try:
                yield House(service, node, port)
            finally:
                node.close()

    yield opened
    assert not (tmp_path / "node" / ".received").exists()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT of a planted patient, ``ct/``, and a segmentation on all of its slices, ``seg.dcm``; read only."""
    folder = tmp_path_factory.mktemp("study")
    files = write_series(folder / "ct", np.zeros(SHAPE, dtype=np.int16), change=complete, **GRID)  # type: ignore[arg-type]
    series = [pydicom.dcmread(file) for file in files]
    write_segmentation(folder / "seg.dcm", series, labels(), names=("left lung", "right lung"), omit_empty_frames=False)
    return folder


def labels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``(slice, row, column)`` without any symmetry."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[2:15, 5:17, 11:18], array[3:14, 6:15, 2:9] = 1, 2
    return array


@contextmanager
def association(port: int, title: str = CALLER, called: str = "FIBLDM", tls: Any = None) -> Iterator[Any]:
    entity = AE(ae_title=title)
    contexts = [
        build_context(sop_class, syntax)
        for sop_class in ALL
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    ]
    entity.dimse_timeout = 5
    opened = entity.associate(HOST, port, contexts, ae_title=called, tls_args=tls)
    try:
        yield opened
    finally:
        if opened.is_established:
            opened.release()


def store(port: int, *files: Path) -> list[int | None]:
    """Status of every file; none where the association was cut off."""
    with association(port) as opened:
        assert opened.is_established
        return [opened.send_c_store(file).get("Status") if opened.is_established else None for file in files]


# --- masks come, results leave


@pytest.mark.parametrize(("masks", "objects"), [(None, ("masks",)), ("both", ("masks", "structures"))])
def test_results_are_those_of_synthesize(
    house: Callable[..., Any],
    study: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    masks: str | None,
    objects: tuple[str, ...],
) -> None:
    """Bit by bit, of the file that the node made of what came; once, though the mask came twice."""
    keep(study / "seg.dcm", tmp_path / "kept.dcm")
    mask = (tmp_path / "kept.dcm").rename(tmp_path / f"{hash_file(tmp_path / 'kept.dcm')[:16]}.dcm")
    caplog.set_level("INFO", logger="fibldm")
    archives = Archive((SEG, STRUCTURE_SET, *IMAGES), (ExplicitVRLittleEndian, ImplicitVRLittleEndian))
    with archives.opened() as archive, house(archive.peer, masks=masks) as node:
        with association(node.port) as opened:
            assert opened.send_c_echo().Status == 0x0000
        assert store(node.port, study / "seg.dcm", study / "seg.dcm") == [0x0000, 0x0000]
        node.work(lambda: node.delivered)
        (job,) = node.jobs
        assert list((node.service.folder / "spool").iterdir()) == []
    assert job.outcome is not None
    told = {"acknowledged": SHAPE[0] + len(objects), "not_taken": []}
    assert job.outcome["deliveries"] == {str(archive.peer): told}
    (folder,) = synthesize_files(
        *(None, [mask], tmp_path / "out"),
        **{"settings": SynthesisSettings.of(QUICK, mask_format=masks), "bundle": tiny_bundle, "device": "cpu"},
    )
    wanted = [*folder.glob("*.dcm"), *(folder.parent / part / f"{folder.name}.dcm" for part in objects)]
    assert sorted(map(undated, archive.objects.values())) == sorted(undated(encoded(file)) for file in wanted)
    assert len(archive.came) == len(wanted) == SHAPE[0] + len(objects)
    assert not any(text in caplog.text for text in (*PLANTED, "seg.dcm", "1.2.826"))


def test_a_structure_set_waits_for_its_series(house: Callable[..., Any], study: Path, tmp_path: Path) -> None:
    images = sorted((study / "ct").iterdir())
    structures = box_structures(tmp_path / "structures.dcm", images)
    with Archive().opened() as archive, house(archive.peer) as node:
        assert store(node.port, images[0], structures, *images[1:-1]) == [0x0000] * (SHAPE[0])
        (job,) = node.jobs
        time.sleep(0.6)
        assert node.jobs == [job] and job.state is State.HELD
        assert store(node.port, images[-1]) == [0x0000]
        node.work(lambda: node.delivered)
    uid, segmentation = next(item for item in archive.objects.items() if item[0] == archive.came[-1])
    file = tmp_path / "result.dcm"
    written = pydicom.dcmread(next((node.service.results(job) / "masks").glob("*.dcm")))
    assert str(written.SOPInstanceUID) == uid
    written.save_as(file)
    mask = read_segmentation(file, {"left lung": 1, "right lung": 2})
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[3:6, 4:9, 12:17] = 1
    assert np.array_equal(np.flip(mask.array, (0, 1)).transpose(2, 1, 0), expected)
    assert segmentation == encoded(next((node.service.results(job) / "masks").glob("*.dcm")))


def test_a_structure_set_without_its_series_is_refused(house: Callable[..., Any], study: Path, tmp_path: Path) -> None:
    images = sorted((study / "ct").iterdir())
    structures = box_structures(tmp_path / "structures.dcm", images)
    with house(limits=Limits(idle=20.0, wait=0.5)) as node:
        assert store(node.port, structures, images[0]) == [0x0000, 0x0000]
        node.work(lambda: node.jobs[0].state is State.REFUSED)
        outcome = node.jobs[0].outcome
        assert outcome is not None and "17 of 18 images did not come" in outcome["message"]
    write_structures(structures, {"left lung": []})
    with house() as node:
        assert store(node.port, structures) == [0xA900]
        time.sleep(0.7)
        node.node._structures._wait = 0.0
        node.node._structures.look()
        assert list((node.service.folder / "series").iterdir()) == []


def test_what_a_peer_does_not_take_is_said_and_not_tried_again(
    house: Callable[..., Any], study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes images only, and no explicit encoding."""
    archive = Archive(IMAGES, (ImplicitVRLittleEndian,))
    with archive.opened(), house(archive.peer) as node:
        assert store(node.port, study / "seg.dcm") == [0x0000]
        node.work(lambda: node.delivered)
        (job,) = node.jobs
        written = sorted((node.service.results(job) / job.outcome["outputs"][0]).glob("*.dcm"))
    assert len(archive.came) == len(written) == SHAPE[0]
    reason = "Segmentation Storage: no presentation context was accepted"
    assert job.outcome["deliveries"][str(archive.peer)] == {"acknowledged": SHAPE[0], "not_taken": [reason]}
    assert f"does not take {reason}" in caplog.text


def test_delivery_goes_on_after_a_restart(house: Callable[..., Any], study: Path) -> None:
    """The peer is away at first, and later breaks off in the middle."""
    archive = Archive()
    with archive.opened():
        pass
    with house(archive.peer) as node:
        assert store(node.port, study / "seg.dcm") == [0x0000]
        node.work(lambda: [item for item in node.jobs if delivery_tries(node, item)])
    keep_all = archive._keep

    def breaks_off(event: Any) -> int:
        return keep_all(event) if len(archive.came) < 5 else 0xA700

    archive._keep = breaks_off  # type: ignore[method-assign]
    with archive.opened(), house(archive.peer) as node:
        node.work(lambda: len(archive.came) == 5 and delivery_tries(node, node.jobs[0]))
    archive._keep = keep_all  # type: ignore[method-assign]
    with archive.opened(), house(archive.peer) as node:
        node.work(lambda: node.delivered)
    assert len(archive.came) == len(set(archive.came)) == SHAPE[0] + 1


def delivery_tries(node: House, job: Job) -> int:
    with node.service.store._lock:
        row = node.service.store._connection.execute("SELECT tries FROM deliveries WHERE job = ?", (job.id,))
        return int(row.fetchone()[0])


def test_what_was_not_acknowledged_comes_again_and_is_made_once(
    house: Callable[..., Any], study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node fails between the job and the answer; its next one works on, and the sender sends again."""

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Archive().opened() as archive:
        with monkeypatch.context() as patch, house(archive.peer) as node:
            patch.setattr(node.service.store, "owe", fails)
            assert store(node.port, study / "seg.dcm") == [0xA700]
        with house(archive.peer) as node:
            node.service.run(Until(lambda: node.jobs[0].state is State.DONE))  # type: ignore[arg-type]
            assert archive.came == []
            assert store(node.port, study / "seg.dcm") == [0x0000]
            node.work(lambda: node.delivered and archive.came)
    assert len(archive.came) == SHAPE[0] + 1


# --- what is refused


@pytest.mark.parametrize(
    ("title", "called", "reason"), [("STRANGER", "FIBLDM", 3), (CALLER, "OTHER", 7)], ids=["caller", "called"]
)
def test_who_is_not_known_is_rejected(house: Callable[..., Any], title: str, called: str, reason: int) -> None:
    with house() as node, association(node.port, title, called) as opened:
        assert opened.is_rejected
        answer = opened.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, reason)


def test_a_known_title_from_an_unknown_address_is_rejected(house: Callable[..., Any]) -> None:
    with house() as node:
        node.node._door.callers = [Caller(CALLER, frozenset({"192.0.2.1"}))]
        with association(node.port) as opened:
            assert opened.is_rejected and opened.acceptor.primitive.diagnostic == 3


def test_objects_that_are_not_taken(house: Callable[..., Any], study: Path, tmp_path: Path) -> None:
    """Another name of a segment, a result that comes round, and one that cannot be read: the reason is the answer."""
    series = [pydicom.dcmread(file) for file in sorted((study / "ct").iterdir())]
    write_segmentation(tmp_path / "other.dcm", series, labels(), names=("left lung", "spleen"))
    own = pydicom.dcmread(study / "seg.dcm")
    own.Manufacturer, own.SyntheticData = "FibLDM", "YES"
    own.save_as(tmp_path / "own.dcm")
    drawn = pydicom.dcmread(box_structures(tmp_path / "drawn.dcm", sorted((study / "ct").iterdir())))
    drawn.Manufacturer, drawn.SyntheticData = "FibLDM", "YES"
    drawn.save_as(tmp_path / "drawn.dcm")
    _, offset = split_dataset(study / "seg.dcm")
    (tmp_path / "torn.dcm").write_bytes((study / "seg.dcm").read_bytes()[: offset + 60])
    with house() as node, association(node.port) as opened:
        answers = [opened.send_c_store(tmp_path / name) for name in ("other.dcm", "own.dcm", "torn.dcm", "drawn.dcm")]
        assert [answer.Status for answer in answers] == [0xA900] * 4
        assert answers[0].ErrorComment == "segments must be labelled as the generator's labels are"
        assert node.jobs == [] and not list(node.service.folder.glob("spool/*"))


def test_too_much_is_cut_off(house: Callable[..., Any], study: Path) -> None:
    """An object or an association that is too large, and too many objects; the node goes on."""
    size = (study / "seg.dcm").stat().st_size
    for limits, answers in (
        (Limits(idle=20.0, object_bytes=size // 2), [None, None]),
        (Limits(idle=20.0, association_bytes=3 * size // 2), [0x0000, None]),
        (Limits(idle=20.0, objects_per_minute=1), [0x0000, 0xA700]),
    ):
        with house(limits=limits) as node:
            assert store(node.port, study / "seg.dcm", study / "seg.dcm") == answers
            assert len(node.jobs) == answers.count(0x0000)
            with association(node.port) as opened:
                assert opened.send_c_echo().Status == 0x0000


def test_a_header_that_announces_gigabytes_is_cut_off(house: Callable[..., Any]) -> None:
    with house() as node, socket.create_connection((HOST, node.port), timeout=10) as connection:
        connection.sendall(b"\x01\x00\xff\xff\xff\xff")
        assert connection.recv(10)[:1] == b"\x07" and connection.recv(1) == b""


def test_silent_connections_are_closed_and_do_not_keep_others_out(house: Callable[..., Any]) -> None:
    with house(limits=Limits(idle=2.0, associations=2)) as node:
        silent = [socket.create_connection((HOST, node.port), timeout=10) for _ in range(40)]
        assert all(connection.recv(1) == b"" for connection in silent)
        assert sum(thread.name.startswith("AcceptorThread") for thread in threading.enumerate()) < 20
        with association(node.port) as opened:
            assert opened.is_established
        for connection in silent:
            connection.close()


def test_a_node_that_ends_lets_nobody_in(house: Callable[..., Any], study: Path) -> None:
    """Who is in may go on."""
    with house() as node, association(node.port) as opened:
        node.node._door.close()
        assert opened.send_c_store(study / "seg.dcm").Status == 0x0000
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, node.port), timeout=10)


def test_tls_asks_for_a_certificate_of_the_authorities(house: Callable[..., Any], study: Path, tmp_path: Path) -> None:
    """Whoever shows none, or does not speak TLS, is not let in, and keeps nobody waiting meanwhile."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificates")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = "req -x509 -newkey rsa:2048 -nodes -subj /CN=node -addext subjectAltName=IP:127.0.0.1 -days 1"
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([openssl, *request.split(), *files], check=True, capture_output=True)
    tls = tls_contexts(certificate, key, certificate)
    with house(tls=tls) as node, socket.create_connection((HOST, node.port)):
        with association(node.port, tls=(tls[1], HOST)) as opened:
            assert opened.send_c_store(study / "seg.dcm").Status == 0x0000
        stranger = ssl.create_default_context(cafile=str(certificate))
        for other in ((stranger, HOST), None):
            with association(node.port, tls=other) as opened:
                assert not opened.is_established
    with pytest.raises(FibldmError, match="must be files in PEM"):
        tls_contexts(key, certificate, certificate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caller", "ORTHANC"], "--caller must be AET@HOST; got 'ORTHANC'"),
        (["--caller", "ORTHANC@nowhere.invalid"], "'nowhere.invalid' must be a host that is known"),
        (["--aet", "back\\slash"], "--aet must be the title of an application entity"),
        (["--tls-cert", "certificate.pem"], "TLS needs --tls-cert, --tls-key and --tls-ca; got 1 of them"),
        (["--keep", "0"], "--keep must be above 0; got 0"),
        (["--max-associations", "0"], "limits of a node must be above 0; associations is 0"),
        (["--bundle", "/absent"], "a bundle must be a folder or a zip archive; /absent is neither"),
    ],
)
def test_it_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = ["--bundle", str(tmp_path), "--out", str(tmp_path / "node"), "--caller", f"{CALLER}@{HOST}", "--json"]
    assert run_command(["node", *given, *options]) == 2
    assert message in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]


@pytest.mark.parametrize("text", ["ORTHANC", "@host:1", "ORTHANC@host", "ORTHANC@host:0", "SEVENTEEN_LETTERS@host:1"])
def test_peers_are_written_in_one_way(text: str) -> None:
    with pytest.raises(FibldmError, match="--send|title of an application entity"):
        Peer.of(text)
    assert str(Peer.of("ORTHANC@127.0.0.1:4242")) == "ORTHANC@127.0.0.1:4242"
