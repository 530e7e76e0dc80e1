"""The studio: volumes by HTTP are those of `fibldm synthesize`, and what must not come in is refused with a reason."""

import bz2
import gzip
import io
import json
import logging
import select
import shutil
import socket
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import complete, write_segmentation, write_series
from starlette.datastructures import FormData, UploadFile
from starlette.testclient import TestClient

from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.serving import Service
from fibldm.serving.studio import Access, Limits, kept_token, listening, new_token, server, serving, studio_app
from fibldm.serving.studio.bounds import check_bounds, suffix_of
from fibldm.serving.studio.uploads import files_into
from fibldm.synthesis import Output, SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files
from fibldm.volumes.formats.nifti import read_volume

QUICK = SynthesisSettings(SamplingSettings(steps=1), allow_extrapolation=True)
TOKEN = "t" * 43
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
HOST = "http://127.0.0.1:8080"
SECRET = "Planted^Paula.nii.gz"
SMALL = Limits(upload=2**18, inflated=2**20, voxels=2**18, dicom=2**17, waiting=2)


class Never:
    """Stands for `Ending`: nobody asks to end."""

    asked: int | None = None


@pytest.fixture(scope="module")
def synthesizer(tiny_bundle: Path) -> Synthesizer:
    return Synthesizer.from_bundle(tiny_bundle)


@pytest.fixture
def service(synthesizer: Synthesizer, tmp_path: Path) -> Iterator[Service]:
    with Service(Output(synthesizer, tmp_path, QUICK), tmp_path / "studio", most=3) as made:
        yield made


@pytest.fixture
def ask(service: Service, tiny_bundle: Path) -> TestClient:
    """Asks with the token."""
    return client(service, tiny_bundle)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    labels = np.zeros((20, 22, 18), dtype=np.uint8)
    labels[2:15, 5:17, 11:18], labels[3:14, 6:15, 2:9] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([10.0, 10.0, 10.0, 1.0])), tmp_path / SECRET)
    return tmp_path / SECRET


def client(service: Service, bundle: Path, limits: Limits = SMALL, **headers: str) -> TestClient:
    app = studio_app(service, bundle, Access(TOKEN, "127.0.0.1", 8080), limits)
    return TestClient(app, base_url=HOST, headers=headers or AUTHORIZED, raise_server_exceptions=False)


def send(ask: TestClient, mask: Path | bytes, name: str = SECRET, **asked: Any) -> httpx.Response:
    content = mask if isinstance(mask, bytes) else mask.read_bytes()
    return ask.post("/api/jobs", files={"mask": (name, content)}, data={"options": json.dumps(asked)})


def work(service: Service) -> None:
    service.run(Never(), until_idle=True)  # type: ignore[arg-type]


def refused(response: httpx.Response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"message", "remedy"} and message in response.json()["message"]


# --- what comes out


def test_volumes_are_those_of_synthesize(
    ask: TestClient, service: Service, mask: Path, tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    job = send(ask, mask, count=2, seed=3)
    assert job.status_code == 202 and job.json()["state"] == "waiting"
    address = f"/api/jobs/{job.json()['id']}"
    refused(ask.get(f"{address}/results"), 409, "a job must be done; this one is waiting")
    work(service)
    done = ask.get(address).json()
    assert (done["state"], done["made"], [volume["number"] for volume in done["volumes"]]) == ("done", 2, [0, 1])
    assert send(ask, mask, count=2, seed=3).json() == done
    renamed = Path(shutil.copy(mask, tmp_path / f"{hash_file(mask)[:16]}.nii.gz"))
    wanted = synthesize_files(
        *(None, [renamed], tmp_path / "out"),
        **{"count": 2, "settings": SamplingSettings(steps=1, seed=3), "allow_extrapolation": True, "device": "cpu"},
        bundle=tiny_bundle,
    )
    for volume, file in zip(done["volumes"], wanted, strict=True):
        assert ask.get(volume["address"]).content == file.read_bytes()
        assert ask.get(volume["sidecar"]).json()["synthetic"] is True
    (tmp_path / "used.nii.gz").write_bytes(ask.get(done["mask"]).content)
    np.testing.assert_array_equal(read_volume(tmp_path / "used.nii.gz").array, read_volume(mask).array)
    with zipfile.ZipFile(io.BytesIO(ask.get(f"{address}/results").content)) as archive:
        assert archive.testzip() is None
        assert {file.name for file in wanted} <= set(archive.namelist())
    assert "Planted" not in caplog.text + json.dumps(ask.get("/api/jobs").json())
    assert not [file for file in (tmp_path / "studio").rglob("*") if "Planted" in file.name]


def test_dicom_comes_as_a_zip(ask: TestClient, service: Service, mask: Path) -> None:
    job = send(ask, mask, format="dicom").json()
    work(service)
    (volume,) = ask.get(f"/api/jobs/{job['id']}").json()["volumes"]
    assert volume["format"] == "dicom"
    with zipfile.ZipFile(io.BytesIO(ask.get(volume["address"]).content)) as archive:
        slices = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert {file.SyntheticData for file in slices if file.Modality == "CT"} == {"YES"}
    assert len([file for file in slices if file.Modality == "CT"]) == 18


def test_a_segmentation_is_a_mask_too(ask: TestClient, service: Service, tmp_path: Path) -> None:
    labels = np.zeros((9, 12, 10), dtype=np.uint8)
    labels[2:7, 3:9, 2:6] = 1
    files = write_series(
        tmp_path / "ct", np.zeros(labels.shape, dtype=np.int16), change=complete, spacing=(20.0, 20.0, 20.0)
    )
    series = [pydicom.dcmread(file) for file in files]
    write_segmentation(tmp_path / "seg.dcm", series, labels, names=("right lung",), omit_empty_frames=False)
    seen = ask.post("/api/masks", files={"mask": ("x", (tmp_path / "seg.dcm").read_bytes())})
    (tmp_path / "seen.nii.gz").write_bytes(seen.content)
    assert (read_volume(tmp_path / "seen.nii.gz").array == 1).sum() == labels.sum()
    job = send(ask, tmp_path / "seg.dcm", name="IM0").json()
    work(service)
    assert ask.get(f"/api/jobs/{job['id']}").json()["state"] == "done"


def test_events_tell_a_job_until_it_ends(ask: TestClient, service: Service, mask: Path) -> None:
    job = send(ask, mask).json()
    worker = threading.Timer(0.5, work, [service])
    worker.start()
    told = ask.get(f"/api/jobs/{job['id']}/events")
    worker.join()
    assert told.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: ")]
    states = [json.loads(line)["state"] for line in lines]
    assert states[0] == "waiting" and states[-1] == "done"


def test_a_job_is_removed_unless_it_is_in_hand(ask: TestClient, service: Service, mask: Path) -> None:
    job = send(ask, mask).json()
    address = f"/api/jobs/{job['id']}"
    service.store.take()
    refused(ask.delete(address), 409, "must not be in hand")
    service.store.give_back()
    assert ask.delete(address).status_code == 204
    refused(ask.get(address), 404, "no such job")
    assert service.store.jobs() == [] and list((service.folder / "spool").iterdir()) == []
    send(ask, mask)
    work(service)
    assert ask.delete(address).status_code == 204 and not (service.folder / "results" / job["id"]).exists()


def test_jobs_are_there_after_a_restart(
    synthesizer: Synthesizer, tiny_bundle: Path, mask: Path, tmp_path: Path
) -> None:
    output = Output(synthesizer, tmp_path, QUICK)
    with Service(output, tmp_path / "studio") as service:
        ask = client(service, tiny_bundle)
        done, waits = send(ask, mask, seed=1).json(), None
        work(service)
        waits = send(ask, mask, seed=2).json()
        before = ask.get(f"/api/jobs/{done['id']}").json()
    with Service(output, tmp_path / "studio") as service:
        ask = client(service, tiny_bundle)
        assert [job["id"] for job in ask.get("/api/jobs").json()] == [waits["id"], done["id"]]
        assert ask.get(f"/api/jobs/{done['id']}").json() == before
        work(service)
        assert ask.get(f"/api/jobs/{waits['id']}").json()["state"] == "done"


def test_the_bundle_is_told_and_openapi_describes_all_addresses(ask: TestClient, synthesizer: Synthesizer) -> None:
    facts = ask.get("/api/bundle").json()
    assert {int(value): name for value, name in facts["labels"].items() if value != "0"} == dict(synthesizer.names)
    assert facts["sampling"]["steps"] == 1 and facts["size"] == list(synthesizer.grid.size) and facts["licence"]
    schema = ask.get("/api/openapi.json").json()
    assert schema["openapi"].startswith("3.1") and schema["components"]["securitySchemes"]
    names = [part["operationId"] for path in schema["paths"].values() for part in path.values()]
    assert len(names) == len(set(names)) == 14
    for path in schema["paths"].values():
        for part in path.values():
            assert part["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refused")
    empty = nibabel.Nifti1Image.from_bytes(gzip.decompress(ask.get("/api/masks/empty").content))
    assert empty.shape == synthesizer.grid.size and not np.asanyarray(empty.dataobj).any()


# --- who may ask


def test_without_the_token_nothing_is_told(service: Service, tiny_bundle: Path, mask: Path) -> None:
    ask = client(service, tiny_bundle, X="")
    for headers in (
        {"X": ""},
        {"Authorization": "Bearer " + "x" * 43},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": f"fibldm_studio_8080={TOKEN}"},
    ):
        ask.headers = httpx.Headers(headers)
        for path in ("bundle", "jobs", "openapi.json", f"jobs?token={TOKEN}", "nothing", "jobs/x/events"):
            refused(ask.get(f"/api/{path}"), 401, "must have the token")
        refused(send(ask, mask), 401, "must have the token")
        assert ask.get("/").status_code == 200 and ask.get("/page/studio.js").status_code == 200
    assert service.store.jobs() == []


def test_the_start_link_signs_in_once_and_the_cookie_is_for_the_page_alone(
    service: Service, tiny_bundle: Path, mask: Path
) -> None:
    access = Access(TOKEN, "127.0.0.1", 8080)
    browser = TestClient(studio_app(service, tiny_bundle, access, SMALL), base_url=HOST, follow_redirects=False)
    link = access.start_link.removeprefix(HOST)
    cookie = browser.get(link).headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "fibldm_studio_8080")) and TOKEN not in cookie
    assert browser.get("/api/bundle").status_code == 200
    assert "set-cookie" not in TestClient(browser.app, base_url=HOST, follow_redirects=False).get(link).headers
    page = {"Origin": HOST, "Sec-Fetch-Site": "same-origin"}
    for headers in (
        {},
        {"Origin": "http://127.0.0.1:3000"},
        {**page, "Sec-Fetch-Site": "same-site"},
        {"Origin": "null"},
    ):
        browser.headers.update(headers)
        refused(send(browser, mask), 403, "studio's own page")
        for name in headers:
            del browser.headers[name]
    browser.headers.update(page)
    assert send(browser, mask).status_code == 202
    other = TestClient(browser.app, base_url=HOST)
    refused(other.post("/api/session", json={"token": "x"}), 401, "not the token")
    assert other.post("/api/session", json={"token": TOKEN}).status_code == 204
    assert other.get("/api/jobs").status_code == 200


def test_another_host_is_refused(ask: TestClient) -> None:
    """As a page would have it whose name was made to lead here."""
    for host in ("evil.example", "127.0.0.1.evil.example:8080", "192.168.0.7", "", "localhost@evil"):
        refused(ask.get("/api/bundle", headers={"Host": host}), 421, "the host of a request")
        refused(ask.get("/", headers={"Host": host}), 421, "the host of a request")


def test_a_host_that_others_reach_is_known_by_its_addresses_and_names() -> None:
    local, wide = Access(TOKEN, "127.0.0.1", 1), Access(TOKEN, "0.0.0.0", 1, ["ct.clinic.example"])
    for host in ("localhost:99", "LOCALHOST", "[::1]:1", "127.0.0.1"):
        assert local.knows(host) and wide.knows(host)
    assert wide.knows("10.1.2.3:1") and wide.knows("ct.clinic.example") and not wide.knows("evil.example")
    assert local.loopback and not wide.loopback and not local.knows("10.1.2.3")


def test_a_token_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    token = new_token(tmp_path / "new")
    file = tmp_path / "new" / "token"
    assert file.stat().st_mode & 0o777 == 0o600 and kept_token(file) == token != new_token(tmp_path / "new")
    file.chmod(0o640)
    with pytest.raises(FibldmError, match="readable for its owner alone; its mode is 640"):
        kept_token(file)
    file.write_text("short")
    file.chmod(0o600)
    with pytest.raises(FibldmError, match="a token of at least 32"):
        kept_token(file)
    with pytest.raises(FibldmError, match="must hold a token; No such file"):
        kept_token(tmp_path / "none")


def test_headers_keep_the_page_to_itself(ask: TestClient) -> None:
    for path in ("/", "/api/bundle", "/nothing"):
        headers = ask.get(path, headers={"Origin": "http://evil.example"}).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert not [name for name in headers if name.startswith("access-control")]


# --- what may come in


class Scan:
    """Stands for a condition that is asked for by a scan."""

    of_scan, parts = True, ("image",)


def test_a_scan_comes_as_a_file_and_never_by_a_path(service: Service, mask: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synthesizer, "beside", {"image": Scan()})
        with pytest.raises(FibldmError, match="a request may not name it by a path"):
            service.settings({"conditions": {"image": str(mask)}})
    with mask.open("rb") as one, mask.open("rb") as other:
        form = FormData([("mask", UploadFile(one)), ("image", UploadFile(other, filename="/tmp/evil.nrrd"))])
        came = files_into(tmp_path, form, {"image": Scan()}, SMALL)  # type: ignore[dict-item]
    assert came == tmp_path / "mask.nii.gz"
    assert json.loads((tmp_path / "conditions.json").read_text()) == {"image": "scan_image.nii.gz"}
    assert (tmp_path / "scan_image.nii.gz").read_bytes() == mask.read_bytes()


def test_what_may_not_be_asked_is_refused(ask: TestClient, mask: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"template": "/etc"}, "what a request asks for must be one of"),
        ({"count": 4}, "at most 3 volumes; got 4"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10**9}, "`steps` of at most 1000"),
        ({"check": 10**9}, "`check` of at most 20"),
        ({"covariates": {"shoe": 3}}, "there is no shoe"),
        ({"conditions": {"image": "/etc/passwd"}}, "there is no image"),
        ({"conditions": "x"}, "conditions"),
        ({"steps": None}, "steps must be a whole number"),
        ({"count": 1.5}, "count"),
        ({"seed": "x"}, "seed"),
    ]
    for asked, message in wrong:
        refused(send(ask, mask, **asked), 422, message)


def test_requests_of_another_form_are_refused(ask: TestClient, service: Service, mask: Path) -> None:
    content = mask.read_bytes()
    for response, status, message in (
        (ask.post("/api/jobs", json={"mask": "x"}), 415, "multipart/form-data"),
        (ask.post("/api/jobs", files={"mask": b"x"}, data={"options": "{"}), 422, "options must be JSON"),
        (ask.post("/api/jobs", files={"mask": b"x"}, data={"options": '{"guidance": NaN}'}), 422, "NaN is no number"),
        (ask.post("/api/jobs", files={"mask": b"x"}, data={"options": "[" * 30000}), 422, "options must be JSON"),
        (ask.post("/api/jobs", files={"mask": b"x"}, data={"options": "[]"}), 422, "must be a JSON object"),
        (ask.post("/api/jobs", files={"mask": content, "image": b"x"}), 400, "Too many files"),
        (ask.post("/api/jobs", files={"image": b"x"}), 422, "other parts"),
        (ask.post("/api/jobs", files={"options": b"{}"}), 422, "one of them is the other"),
        (ask.post("/api/jobs", files={"mask": b"no mask at all"}), 422, "must be NIfTI, NRRD or DICOM"),
        (ask.post("/api/jobs", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "boundary"),
        (ask.post("/api/masks", files={"mask": b"\x1f\x8bxx"}), 422, ""),
        (ask.put("/api/jobs"), 405, "not allowed"),
        (ask.get("/api/jobs/..%2F..%2Fetc%2Fpasswd"), 404, "not found"),
        (ask.get("/api/jobs/%2e%2e"), 404, "no such job"),
        (ask.get("/api/jobs/x/results/y"), 422, "number"),
        (ask.get("/page/..%2Fapi.py"), 404, "no"),
    ):
        assert response.status_code == status and message.lower() in response.json()["message"].lower(), response.text
    assert service.store.jobs() == [] and list((service.folder / "spool").iterdir()) == []


def test_names_of_a_client_are_no_paths(ask: TestClient, service: Service, mask: Path) -> None:
    for name in ("../../../evil.nii.gz", "/tmp/evil.nii.gz", "C:\\evil.nii.gz", "a\x00b", "." * 300):
        assert send(ask, mask, name=name).status_code == 202
    files = [file.relative_to(service.folder) for file in service.folder.rglob("*") if file.is_file()]
    (spooled,) = [file for file in files if file.parts[0] == "spool"]
    assert spooled.name == "mask.nii.gz" and not [file for file in files if "evil" in file.name]


def test_a_request_that_is_too_large_is_refused_before_it_is_read(ask: TestClient) -> None:
    """By its length where that is stated, else while it comes; nothing of it is kept."""

    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="mask"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(2**16)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    for headers in (kind, kind | {"Content-Length": f"{2**32}"}):
        refused(ask.post("/api/jobs", content=body(), headers=headers), 413, "at most 262144 bytes")


def test_memory_stays_bounded(ask: TestClient, tmp_path: Path) -> None:
    """A bomb of 64 MiB in 64 KiB."""
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    refused(send(ask, bomb), 422, "once it is decompressed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def header(shape: tuple[int, ...]) -> bytes:
    """Of NIfTI."""
    made = nibabel.Nifti1Header()
    made.set_data_shape(shape)
    return made.binaryblock + bytes(4)


def nrrd(encoding: str, voxels: bytes, *fields: str, sizes: str = "9 9 9") -> bytes:
    lines = ["NRRD0004", "type: uchar", "dimension: 3", f"sizes: {sizes}", f"encoding: {encoding}", *fields]
    return "\n".join([*lines, "", ""]).encode() + voxels


def deflated(folder: Path, most: int) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PixelData = bytes(most)
    dataset["PixelData"].VR = "OB"
    dataset.save_as(folder / "bomb", enforce_file_format=True)
    return (folder / "bomb").read_bytes()


ZEROS = bytes(2**22)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(ZEROS), "once it is decompressed"),
        (gzip.compress(header((9, 9, 9)) + ZEROS), "once it is decompressed"),
        (gzip.compress(bytes(2**19)) * 4, "once it is decompressed"),
        (gzip.compress(header((3000, 3000, 3000))), "states 27000000000"),
        (header((3000, 3000, 3000)), "states 27000000000"),
        (nrrd("gzip", gzip.compress(ZEROS)), "once it is decompressed"),
        (nrrd("bzip2", bz2.compress(ZEROS)), "once it is decompressed"),
        (nrrd("raw", b"", sizes="3000 3000 3000"), "states 27000000000"),
        (nrrd("raw", b"", "data file: /etc/passwd"), "names another file"),
        (nrrd("raw", b"", "Data File: LIST"), "must lie in one file"),
        (b"NRRD0004\n" + b"#" * 2**20 + b"\n", "must end within"),
        (b"MZ" + bytes(300), "must be NIfTI, NRRD or DICOM"),
    ],
    ids=[
        "gzip of zeros",
        "gzip of a header and zeros",
        "gzip of several members",
        "gzip that states too much",
        "states too much",
        "nrrd in gzip",
        "nrrd in bzip2",
        "nrrd that states too much",
        "nrrd that names a file",
        "nrrd that names a list",
        "nrrd without an end",
        "another format",
    ],
)
def test_what_grows_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FibldmError, match=message):
        check_bounds((tmp_path / "x").rename(tmp_path / f"x{suffix_of(tmp_path / 'x')}"), SMALL)


def test_dicom_that_grows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.dcm"
    file.write_bytes(deflated(tmp_path, 2**22))
    assert suffix_of(file) == ".dcm" and file.stat().st_size < 2**14
    with pytest.raises(FibldmError, match="once it is decompressed"):
        check_bounds(file, SMALL)
    plain = pydicom.dcmread(io.BytesIO(deflated(tmp_path, 16)))
    for syntax, message in (("1.2.840.10008.1.2.4.90", "must not be compressed"), ("1.2.840.10008.1.2.1", "states")):
        plain.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        plain.Rows, plain.Columns, plain.NumberOfFrames = 60000, 60000, 60000
        with file.open("wb") as stream:
            stream.write(bytes(128) + b"DICM")
            pydicom.filewriter.write_file_meta_info(stream, plain.file_meta)
            body = pydicom.filebase.DicomBytesIO()
            body.is_implicit_VR, body.is_little_endian = False, True
            pydicom.filewriter.write_dataset(body, plain)
            stream.write(body.getvalue())
        with pytest.raises(FibldmError, match=message):
            check_bounds(file, SMALL)
    file.write_bytes(bytes(128) + b"DICM" + bytes(2**17))
    with pytest.raises(FibldmError, match="at most 131072 bytes"):
        check_bounds(file, SMALL)


def test_jobs_that_wait_are_so_many_at_most(ask: TestClient, service: Service, mask: Path) -> None:
    assert [send(ask, mask, seed=seed).status_code for seed in range(2)] == [202, 202]
    full = send(ask, mask, seed=9)
    refused(full, 429, "at most 2 jobs wait")
    assert full.headers["retry-after"]
    work(service)
    assert send(ask, mask, seed=9).status_code == 202


# --- connections


@contextmanager
def studio(service: Service, bundle: Path, limits: Limits) -> Iterator[int]:
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        with serving(studio_app(service, bundle, Access(TOKEN, "127.0.0.1", port), limits), place):
            yield port


def ends(connection: socket.socket, seconds: float = 5.0) -> bytes:
    """What comes until the other side ends it."""
    connection.settimeout(seconds)
    said = b""
    try:
        while part := connection.recv(2**16):
            said += part
    except ConnectionResetError:
        pass
    return said


def test_connections_that_say_nothing_do_not_keep_others_out(
    service: Service, tiny_bundle: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 20)
    monkeypatch.setattr(server, "_HEAD_SECONDS", 1.5)
    with studio(service, tiny_bundle, Limits(seconds=0.5)) as port, ExitStack() as opened:

        def connected() -> socket.socket:
            return opened.enter_context(socket.create_connection(("127.0.0.1", port)))

        idle, slow = [connected() for _ in range(60)], connected()
        slow.sendall(b"GET /api/bundle HTTP/1.1\r\nHost: 127")
        asked = httpx.get(f"http://127.0.0.1:{port}/api/bundle", headers=AUTHORIZED)
        assert asked.status_code == 200 and "server" not in asked.headers
        stalled = connected()
        head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        kind = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b"
        stalled.sendall((head + kind).encode())
        assert b"408" in ends(stalled)
        assert ends(slow) == b"" and all(ends(connection) == b"" for connection in idle)
        with httpx.Client(headers=AUTHORIZED) as again:  # on one connection
            for _ in range(2):
                assert again.get(f"http://127.0.0.1:{port}/api/bundle").status_code == 200
                time.sleep(0.1)


def test_connections_that_are_made_at_once_are_so_many_at_most(
    service: Service, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 20)
    with studio(service, tiny_bundle, Limits()) as port, ExitStack() as opened:
        idle = [opened.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)]
        until = time.monotonic() + 5  # before the first is closed as it says nothing for 10 s
        closed: set[socket.socket] = set()
        while len(closed) < 80 and time.monotonic() < until:
            closed |= {connection for connection in select.select(idle, [], [], 0.1)[0] if not connection.recv(1)}
            idle = [connection for connection in idle if connection not in closed]
        assert len(closed) == 80


def test_a_port_that_is_taken_is_refused() -> None:
    with listening("127.0.0.1", 0) as place, pytest.raises(FibldmError, match="free"):
        listening("127.0.0.1", place.getsockname()[1])
