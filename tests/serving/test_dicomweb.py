"""DICOMweb of the studio: masks come by STOW-RS as they do by C-STORE, and results are those of `fibldm synthesize`."""

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from email import message_from_bytes
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from dicom_files import PLANTED, box_structures, complete, write_segmentation, write_series
from starlette.testclient import TestClient

from fibldm.files import hash_file
from fibldm.serving import Service, State
from fibldm.serving.dicom.objects import keep
from fibldm.serving.dicom.structure_sets import StructureSets
from fibldm.serving.studio import Access, Limits, studio_app
from fibldm.synthesis import Output, SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files

QUICK = SynthesisSettings.of(SamplingSettings(steps=1), allow_extrapolation=True)
TOKEN = "t" * 43
SHAPE = (18, 22, 20)
SLICES = SHAPE[0]
GRID = {"spacing": (10.0, 10.0, 10.0), "origin": (-95.0, -110.0, -600.0)}
LIMITS = Limits(upload=2**21, dicom=2**20, waiting=3, objects=40)
KIND = 'multipart/related; type="application/dicom"; boundary=b'
STUDIES = "/api/dicomweb/studies"


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
        assert not any(PLANTED[0].encode() in file.read_bytes() for file in made.folder.rglob("*.json"))


@pytest.fixture
def structures(service: Service) -> StructureSets:
    return StructureSets(service, wait=60, settled=0.0)


@pytest.fixture
def ask(service: Service, structures: StructureSets, tiny_bundle: Path) -> TestClient:
    return client(service, structures, tiny_bundle)


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "ct", np.zeros(SHAPE, dtype=np.int16), change=complete, **GRID)


@pytest.fixture
def mask(series: list[Path], tmp_path: Path, synthesizer: Synthesizer) -> Path:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:15, 5:17, 11:18], labels[3:14, 6:15, 2:9] = 1, 2
    names = [synthesizer.names[value] for value in sorted(synthesizer.names)[:2]]
    images = [pydicom.dcmread(file) for file in series]
    write_segmentation(tmp_path / "seg.dcm", images, labels, names=names, omit_empty_frames=False)
    return tmp_path / "seg.dcm"


def client(service: Service, structures: StructureSets, bundle: Path, limits: Limits = LIMITS) -> TestClient:
    app = studio_app(service, bundle, Access(TOKEN, "127.0.0.1", 8080), limits, dicom=structures)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(app, base_url="http://127.0.0.1:8080", headers=headers, raise_server_exceptions=False)


def body(files: Sequence[Path | bytes], kind: str = "application/dicom") -> bytes:
    contents = [file if isinstance(file, bytes) else file.read_bytes() for file in files]
    head = f"--b\r\nContent-Type: {kind}\r\n\r\n".encode()
    return b"".join(head + content + b"\r\n" for content in contents) + b"--b--\r\n"


def store(ask: TestClient, *files: Path | bytes, study: str = "", **options: Any) -> httpx.Response:
    query = {"options": json.dumps(options)} if options else {}
    path = f"{STUDIES}/{study}" if study else STUDIES
    return ask.post(path, content=body(files), headers={"Content-Type": KIND}, params=query)


def failures(response: httpx.Response) -> list[int]:
    """Why objects were not taken."""
    return [item["00081197"]["Value"][0] for item in response.json().get("00081198", {}).get("Value", [])]


def retrieved(response: httpx.Response) -> dict[str, bytes]:
    """Objects by their UIDs, as a reader of mail takes a body apart."""
    assert response.status_code == 200, response.text
    kind = response.headers["content-type"]
    message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + response.content)
    parts = response.content.split(f"--{message.get_boundary()}".encode())
    contents = [part.partition(b"\r\n\r\n")[2][:-2] for part in parts[1:-1]]
    assert parts[-1] == b"--\r\n" and len(contents) == len(message.get_payload())
    return {str(pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID): content for content in contents}


def undated(content: bytes) -> bytes:
    """Without Content Date and Content Time, which a segmentation must have: when it was written."""
    return re.sub(rb"\x08\x00(\x23\x00DA\x08\x00.{8}|\x33\x00TM\x0e\x00.{14})", b"", content, flags=re.DOTALL)


def work(service: Service) -> None:
    service.run(Never(), until_idle=True)  # type: ignore[arg-type]


def refused(response: httpx.Response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"message", "remedy"} and message in response.json()["message"]


def test_results_are_those_of_synthesize(
    ask: TestClient, service: Service, mask: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    stored = store(ask, mask, seed=3)
    assert stored.status_code == 200 and stored.headers["content-type"] == "application/dicom+json"
    (item,) = stored.json()["00081199"]["Value"]
    assert item["00081155"]["Value"] == [pydicom.dcmread(mask).SOPInstanceUID]
    (job,) = service.store.jobs()
    assert stored.headers["link"] == f'</api/jobs/{job.id}>; rel="related"'
    assert ask.get(STUDIES).json() == []
    work(service)
    (study,) = ask.get(STUDIES).json()
    uid = study["0020000D"]["Value"][0]
    assert study["00080061"]["Value"] == ["CT", "SEG"] and study["00201208"]["Value"] == [SLICES + 1]
    came = retrieved(ask.get(f"{STUDIES}/{uid}"))
    keep(mask, tmp_path / "kept.dcm")
    renamed = Path(shutil.move(tmp_path / "kept.dcm", tmp_path / f"{hash_file(tmp_path / 'kept.dcm')[:16]}.dcm"))
    synthesize_files(
        *(None, [renamed], tmp_path / "out"),
        **{"settings": SamplingSettings(steps=1, seed=3), "allow_extrapolation": True, "device": "cpu"},
        **{"bundle": tiny_bundle, "format": "dicom"},
    )
    wanted = {str(pydicom.dcmread(file).SOPInstanceUID): file for file in (tmp_path / "out").rglob("*.dcm")}
    assert came.keys() == wanted.keys() and len(came) == SLICES + 1
    images = {uid for uid, file in wanted.items() if pydicom.dcmread(file).Modality == "CT"}
    assert all(came[uid] == wanted[uid].read_bytes() for uid in images)
    assert all(undated(came[uid]) == undated(wanted[uid].read_bytes()) for uid in wanted)
    assert store(ask, mask, seed=3).headers["link"] == stored.headers["link"] and len(service.store.jobs()) == 1


def test_parts_of_a_study_are_found_and_retrieved(ask: TestClient, service: Service, mask: Path) -> None:
    store(ask, mask, count=2)
    work(service)
    assert {one["0020000D"]["Value"][0] for one in ask.get(STUDIES).json()} == {
        one["0020000D"]["Value"][0] for one in ask.get("/api/dicomweb/series", params={"Modality": "CT"}).json()
    }
    series = ask.get("/api/dicomweb/series", params={"00080060": "CT"}).json()
    assert [one["00201209"]["Value"] for one in series] == [[SLICES]] * 2
    study, uid = (series[0][tag]["Value"][0] for tag in ("0020000D", "0020000E"))
    place = f"{STUDIES}/{study}/series/{uid}"
    instances = ask.get(f"{place}/instances", params={"limit": 3, "offset": 1}).json()
    every = ask.get(f"{place}/instances").json()
    assert instances == every[1:4] and len(every) == SLICES
    one = every[0]["00080018"]["Value"][0]
    assert len(retrieved(ask.get(place))) == SLICES
    (content,) = retrieved(ask.get(f"{place}/instances/{one}")).values()
    (facts,) = ask.get(f"{place}/instances/{one}/metadata", headers={"Accept": "application/dicom+json"}).json()
    dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    assert pydicom.Dataset.from_json(facts) == dataset and dataset.SyntheticData == "YES"
    assert len(ask.get(f"{place}/metadata").json()) == SLICES
    assert len(ask.get("/api/dicomweb/instances", params={"SOPInstanceUID": one}).json()) == 1
    for job in service.store.jobs():
        service.remove(job)
    refused(ask.get(place), 404, "no such object")


def test_a_structure_set_waits_for_its_series(
    ask: TestClient, service: Service, structures: StructureSets, series: list[Path], tmp_path: Path
) -> None:
    box_structures(tmp_path / "rt.dcm", series)
    assert store(ask, tmp_path / "rt.dcm", *series[4:]).status_code == 200
    structures.look()
    assert [job.state for job in service.store.jobs()] == [State.HELD]
    assert store(ask, *series[:4]).status_code == 200
    structures.look()
    work(service)
    (job,) = service.store.jobs()
    assert job.state is State.DONE, job.outcome
    assert len(ask.get("/api/dicomweb/instances", params={"Modality": "CT"}).json()) == SLICES


def test_what_is_not_taken_fails_by_itself(
    ask: TestClient, service: Service, mask: Path, series: list[Path], tmp_path: Path
) -> None:
    strange = pydicom.dcmread(mask)
    strange.SegmentSequence[0].SegmentLabel = "unheard of"
    strange.save_as(tmp_path / "strange.dcm")
    other = pydicom.dcmread(series[0])
    other.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    other.save_as(tmp_path / "other.dcm")
    lies = pydicom.dcmread(series[0])
    lies.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    lies.save_as(tmp_path / "lies.dcm")
    packed = pydicom.dcmread(series[0])
    packed.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    content = io.BytesIO()
    content.write(bytes(128) + b"DICM")
    pydicom.filewriter.write_file_meta_info(content, packed.file_meta)
    made = [tmp_path / f"{name}.dcm" for name in ("strange", "other", "lies")]
    response = store(ask, mask, *made, content.getvalue(), b"no DICOM")
    assert response.status_code == 202 and failures(response) == [0xA900, 0x0122, 0xA900, 0xC122, 0xC000]
    assert "labelled as the generator's labels" in response.headers["warning"] and len(service.store.jobs()) == 1
    none = store(ask, b"x" * 500, b"")
    assert none.status_code == 409 and failures(none) == [0xC000, 0xC000]
    elsewhere = store(ask, mask, study="1.2.3")
    assert elsewhere.status_code == 409 and failures(elsewhere) == [0xA900]
    assert store(ask, mask, study=str(strange.StudyInstanceUID)).status_code == 200
    (spooled,) = (service.folder / "spool").iterdir()
    assert [file.name for file in spooled.iterdir()] == ["mask.dcm"]


def test_results_are_no_masks_and_jobs_that_wait_have_a_limit(ask: TestClient, service: Service, mask: Path) -> None:
    store(ask, mask)
    work(service)
    (job,) = service.store.jobs()
    (result,) = (service.results(job) / "masks").glob("*.dcm")
    assert failures(store(ask, result)) == [0xA900]
    assert [store(ask, mask, seed=seed).status_code for seed in (1, 2, 3)] == [200] * 3
    assert failures(store(ask, mask, seed=4)) == [0xA700] and len(service.store.jobs()) == 4


def test_requests_of_another_form_are_refused(ask: TestClient, service: Service, mask: Path) -> None:
    right, headers = body([mask]), {"Content-Type": KIND}
    large = body([bytes(2**20 + 1)])
    for response, status, message in (
        (ask.post(STUDIES, files={"mask": b"x"}), 415, "multipart/related"),
        (ask.post(STUDIES, content=right, headers={"Content-Type": KIND.rpartition(";")[0]}), 415, "boundary"),
        (ask.post(STUDIES, content=body([mask], "text/plain"), headers=headers), 415, "every part"),
        (ask.post(STUDIES, content=right[:-20], headers=headers), 400, "ends before"),
        (ask.post(STUDIES, content=b"--b--\r\n", headers=headers), 400, ""),
        (ask.post(STUDIES, content=b"nothing", headers=headers), 400, "malformed"),
        (ask.post(STUDIES, content=b"", headers=headers), 400, "ends before"),
        (ask.post(STUDIES, content=b"--b\r\n" + b"a" * 99999, headers=headers), 400, "malformed"),
        (ask.post(STUDIES, content=large, headers=headers), 413, "at most 1048576 bytes"),
        (ask.post(STUDIES, content=body([b"x"] * 41), headers=headers), 413, "at most 40 objects"),
        (ask.post(STUDIES, content=bytes(2**21 + 1), headers=headers), 413, "at most 2097152 bytes"),
        (ask.post(STUDIES, content=right, headers=headers, params={"options": "{"}), 422, "options must be JSON"),
        (store(ask, mask, steps=10**9), 422, "at most 1000"),
        (ask.get(f"{STUDIES}/1.2.3"), 404, "no such object"),
        (ask.get(f"{STUDIES}/..%2F..%2Fetc"), 404, "not found"),
        (ask.get(STUDIES, params={"limit": "-1"}), 400, "whole number"),
        (ask.get(STUDIES, params={"Rows": "1"}), 400, "a query here may be of"),
        (ask.get(STUDIES, headers={"Accept": "text/html"}), 406, "application/dicom+json"),
        (ask.get(f"{STUDIES}/1", headers={"Accept": "application/dicom+json"}), 406, "multipart/related"),
        (ask.get(STUDIES, headers={"Authorization": "Bearer x"}), 401, "must have the token"),
        (ask.post(STUDIES, content=right, headers=headers | {"Authorization": ""}), 401, "must have the token"),
    ):
        assert status == response.status_code, (status, response.status_code, response.text)
        refused(response, status, message)
    assert service.store.jobs() == [] and list((service.folder / "spool").iterdir()) == []
