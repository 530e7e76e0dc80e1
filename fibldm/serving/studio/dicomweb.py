"""DICOMweb (PS3.18): masks come by STOW-RS, and results are found by QIDO-RS and retrieved by WADO-RS."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from fibldm.errors import FibldmError, sentence
from fibldm.serving.dicom.intake import Intake
from fibldm.serving.dicom.objects import IMAGES, STORED, SYNTAXES, Unwanted, split
from fibldm.serving.dicom.structure_sets import StructureSets
from fibldm.serving.service import Service
from fibldm.serving.store import Job
from fibldm.serving.studio.bounds import check_bounds
from fibldm.serving.studio.described import answer, body
from fibldm.serving.studio.dicom_results import OF_INSTANCE, OF_SERIES, OF_STUDY, Facts, Instance, Results
from fibldm.serving.studio.guard import Refusal
from fibldm.serving.studio.limits import Limits
from fibldm.serving.studio.related import DICOM, Parts, new_boundary, related
from fibldm.serving.studio.room import Room
from fibldm.serving.studio.uploads import options_of
from fibldm.volumes.dicom.files import read_file
from fibldm.volumes.dicom.frames import read_dataset

ROOT = "/api/dicomweb"
JSON, _RELATED = "application/dicom+json", "multipart/related"
_EXPLICIT = SYNTAXES[0]
_CANNOT_UNDERSTAND, _NO_SUCH_CLASS, _NO_SUCH_SYNTAX, _OUT_OF_RESOURCES = 0xC000, 0x0122, 0xC122, 0xA700
_LOOK = 0.5  # seconds between two looks at structure sets

_logger = logging.getLogger("fibldm")


class DicomWeb:
    """Objects in, objects out.

    Args:
        service: makes the volumes.
        limits: how much may be sent.
        room: for requests.
        structures: gets images, and makes masks of structure sets.
    """

    def __init__(self, service: Service, limits: Limits, room: Room, structures: StructureSets) -> None:
        self._service, self._limits, self._room = service, limits, room
        self._intake, self._results = Intake(service, structures), Results(service)

    def add_to(self, app: FastAPI) -> None:
        """Give the addresses to an application."""
        plain = Response
        study, series = f"{ROOT}/studies/{{study}}", f"{ROOT}/studies/{{study}}/series/{{series}}"
        instance = f"{series}/instances/{{instance}}"
        objects, facts = answer("DICOM objects", _RELATED), answer("DICOM JSON", JSON)
        parts = body({"type": "string", "format": "binary"}, f'{_RELATED}; type="{DICOM}"')
        stored: dict[int | str, dict[str, Any]] = {status: answer(text, JSON)[200] for status, text in _STORED.items()}
        for path, store in ((f"{ROOT}/studies", self.store), (study, self.store_in)):
            app.post(path, responses=stored, response_class=plain, openapi_extra=parts)(store)
        for path, retrieve, tell in (
            (study, self.study, self.study_metadata),
            (series, self.series, self.series_metadata),
            (instance, self.instance, self.instance_metadata),
        ):
            app.get(path, responses=objects, response_class=plain)(retrieve)
            app.get(f"{path}/metadata", responses=facts, response_class=plain)(tell)
        for path, find in (
            (f"{ROOT}/studies", self.find_studies),
            (f"{study}/series", self.find_series_of),
            (f"{series}/instances", self.find_instances_of),
            (f"{ROOT}/series", self.find_series),
            (f"{ROOT}/instances", self.find_instances),
        ):
            app.get(path, responses=facts, response_class=plain)(find)

    # --- STOW-RS

    async def store(self, request: Request, options: Annotated[str, Query()] = "{}") -> Response:
        """Store masks (segmentations, RT structure sets and the series that these were drawn on); each mask is a job.

        `options` are those of `POST /api/jobs`. An answer names the jobs in its `Link` headers.
        """
        return await self._store(request, options, None)

    async def store_in(self, request: Request, study: str, options: Annotated[str, Query()] = "{}") -> Response:
        """Store masks of one study; objects of another one fail."""
        return await self._store(request, options, study)

    async def _store(self, request: Request, options: str, study: str | None) -> Response:
        asked = options_of({"options": options}) | {"format": "dicom"}
        self._service.settings(asked)
        with self._room.reader(), self._service.incoming() as folder:
            parts = Parts(request.headers.get("content-type", ""), folder, self._limits)
            try:
                async for chunk in request.stream():
                    await run_in_threadpool(parts.feed, chunk)
                parts.finish()
            finally:
                parts.close()
            return await run_in_threadpool(self._taken, parts.files, asked, study)

    def _taken(self, files: Sequence[Path], asked: Mapping[str, Any], study: str | None) -> Response:
        done, failed, reasons, jobs = list[Facts](), list[Facts](), set[str](), dict[str, Job]()
        for file in files:
            sop_class = sop_instance = ""
            try:
                meta = _meta(file)
                sop_class = str(meta.get("MediaStorageSOPClassUID", ""))
                sop_instance = str(meta.get("MediaStorageSOPInstanceUID", ""))
                job = self._take(file, sop_class, sop_instance, str(meta.get("TransferSyntaxUID", "")), asked, study)
                done.append(_reference(sop_class, sop_instance))
                if job is not None:
                    jobs[job.id] = job
            except (Unwanted, FibldmError, Refusal) as error:
                status, told = _told(error)
                failed.append(_reference(sop_class, sop_instance, status))
                reasons.add(told)
            finally:
                file.unlink(missing_ok=True)
        for told in sorted(reasons):
            _logger.warning("an object of DICOMweb was not taken: %s", told)
        content: dict[str, Any] = {"00081190": {"vr": "UR"}}  # what was stored is not kept to be retrieved
        for tag, part in (("00081199", done), ("00081198", failed)):
            if part:
                content[tag] = {"vr": "SQ", "Value": part}
        response = JSONResponse(content, 200 if not failed else 202 if done else 409, media_type=JSON)
        for id in jobs:
            response.headers.append("Link", f'</api/jobs/{id}>; rel="related"')
        for told in sorted(reasons):
            response.headers.append("Warning", f'299 fibldm "{told}"')
        return response

    def _take(
        self, file: Path, sop_class: str, sop_instance: str, syntax: str, asked: Mapping[str, Any], study: str | None
    ) -> Job | None:
        if sop_class not in STORED:
            raise Unwanted(_NO_SUCH_CLASS, "segmentations, RT structure sets, CT and MR images are taken")
        if syntax not in SYNTAXES:
            raise Unwanted(_NO_SUCH_SYNTAX, "objects must be uncompressed, in little endian")
        check_bounds(file, self._limits)
        if study is not None and _study(file) != study:
            raise Unwanted(0xA900, "the object is of another study")
        if sop_class in IMAGES:
            if _size(self._service.folder / "series") + file.stat().st_size > self._limits.series:
                raise Unwanted(_OUT_OF_RESOURCES, "more images wait for a structure set than are kept")
            return self._intake.take(file, sop_class, sop_instance)
        with self._room.submitting:
            self._room.check()
            return self._intake.take(file, sop_class, sop_instance, asked)

    # --- WADO-RS

    def study(self, request: Request, study: str) -> Response:
        """All objects of a study."""
        return self._retrieve(request, study)

    def series(self, request: Request, study: str, series: str) -> Response:
        """All objects of a series."""
        return self._retrieve(request, study, series)

    def instance(self, request: Request, study: str, series: str, instance: str) -> Response:
        """An object."""
        return self._retrieve(request, study, series, instance)

    def study_metadata(self, request: Request, study: str) -> Response:
        """Attributes of all objects of a study, without voxels."""
        return self._metadata(request, study)

    def series_metadata(self, request: Request, study: str, series: str) -> Response:
        """Attributes of all objects of a series, without voxels."""
        return self._metadata(request, study, series)

    def instance_metadata(self, request: Request, study: str, series: str, instance: str) -> Response:
        """Attributes of an object, without voxels."""
        return self._metadata(request, study, series, instance)

    def _retrieve(self, request: Request, *uids: str) -> Response:
        _check_accept(request, _is_related, f'{_RELATED}; type="{DICOM}", uncompressed as the objects are')
        files, boundary = [one.file for one in self._found(*uids)], new_boundary()
        kind = f'{_RELATED}; type="{DICOM}"; boundary={boundary}'
        return StreamingResponse(related(files, boundary), headers={"Content-Type": kind})

    def _metadata(self, request: Request, *uids: str) -> Response:
        _check_accept(request, _is_json, JSON)
        return JSONResponse([_attributes(one.file) for one in self._found(*uids)], media_type=JSON)

    def _found(self, *uids: str) -> list[Instance]:
        if not (found := self._results.find(*uids)):
            raise Refusal(404, "there is no such object among the results", f"see {ROOT}/studies")
        return found

    # --- QIDO-RS

    def find_studies(self, request: Request) -> Response:
        """Studies whose attributes are as the query says; wildcards and ranges are not understood."""
        return self._find(request, lambda one: one.study, lambda one: one.of_study, OF_STUDY)

    def find_series(self, request: Request) -> Response:
        """Series of all studies."""
        return self._find(request, *_SERIES)

    def find_series_of(self, request: Request, study: str) -> Response:
        """Series of a study."""
        return self._find(request, *_SERIES, study)

    def find_instances(self, request: Request) -> Response:
        """Objects of all series."""
        return self._find(request, *_INSTANCES)

    def find_instances_of(self, request: Request, study: str, series: str) -> Response:
        """Objects of a series."""
        return self._find(request, *_INSTANCES, study, series)

    def _find(
        self,
        request: Request,
        key: Callable[[Instance], str],
        facts: Callable[[Instance], Facts],
        keywords: Sequence[str],
        *uids: str,
    ) -> Response:
        _check_accept(request, _is_json, JSON)
        wanted, first, most = _query(request, keywords)
        groups: dict[str, list[Instance]] = {}
        for one in self._results.find(*uids):
            groups.setdefault(key(one), []).append(one)
        told = []
        for ones in groups.values():
            content = {**facts(ones[0]), **_counts(ones, keywords)}
            if all(_matches(content.get(tag), value) for tag, value in wanted.items()):
                told.append(content)
        return JSONResponse(told[first:][:most], media_type=JSON)


@contextmanager
def structure_sets(service: Service, *, wait: float, settled: float = 5.0) -> Iterator[StructureSets]:
    """Structure sets that are looked after while the block runs; see `StructureSets`."""
    import pydicom

    structures, ended = StructureSets(service, wait=wait, settled=settled), threading.Event()

    def tend() -> None:
        while not ended.wait(_LOOK):
            try:
                structures.look()
            except Exception as error:  # of any kind, as this must go on; its text would name files
                _logger.error("cannot tidy up: %s", getattr(error, "strerror", None) or type(error).__name__)

    logger, settings = logging.getLogger("pydicom"), pydicom.config.settings  # what it says quotes values
    level, validation = logger.level, settings.reading_validation_mode
    thread = threading.Thread(target=tend, daemon=True)
    logger.setLevel(logging.CRITICAL + 1)
    settings.reading_validation_mode = pydicom.config.IGNORE
    thread.start()
    try:
        yield structures
    finally:
        ended.set()
        thread.join()
        logger.setLevel(level)
        settings.reading_validation_mode = validation


_STORED = {200: "all are taken", 202: "some are taken", 409: "none is taken"}
_SERIES = (lambda one: one.series, lambda one: {**one.of_study, **one.of_series}, [*OF_STUDY, *OF_SERIES])
_INSTANCES = (
    lambda one: one.uid,
    lambda one: {**one.of_study, **one.of_series, **one.of_instance},
    [*OF_STUDY, *OF_SERIES, *OF_INSTANCE],
)


def _meta(file: Path) -> Any:
    try:
        return split(file)[0]
    except Exception:  # of any kind, as anything may come
        raise Unwanted(_CANNOT_UNDERSTAND, "the object cannot be read") from None


def _study(file: Path) -> str:
    try:
        return str(read_dataset(file, ["StudyInstanceUID"]).get("StudyInstanceUID"))
    except Exception:  # see `_meta`
        raise Unwanted(_CANNOT_UNDERSTAND, "the object cannot be read") from None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.dcm"))


def _told(error: Exception) -> tuple[int, str]:
    """A failure reason (PS3.18, table I.2-2), and why in words of ASCII."""
    if isinstance(error, Unwanted):
        return error.status, error.comment
    if isinstance(error, Refusal):
        return _OUT_OF_RESOURCES, error.message
    assert isinstance(error, FibldmError)
    told = sentence(error.message, error.remedy).encode("ascii", "replace").decode()
    return _CANNOT_UNDERSTAND, " ".join(told.replace('"', "'").replace("\\", "/").split())[:200]


def _reference(sop_class: str, sop_instance: str, failure: int | None = None) -> Facts:
    uids = {"00081150": sop_class, "00081155": sop_instance}
    told: dict[str, Any] = {tag: {"vr": "UI", "Value": [uid]} if uid else {"vr": "UI"} for tag, uid in uids.items()}
    return told if failure is None else told | {"00081197": {"vr": "US", "Value": [failure]}}


def _attributes(file: Path) -> dict[str, Any]:
    return read_file(file, stop_before_pixels=True).to_json_dict()


def _check_accept(request: Request, is_right: Callable[[str, Mapping[str, str]], bool], what: str) -> None:
    """See that one of the types that are asked for is given.

    Raises:
        Refusal: none is.
    """
    from python_multipart.multipart import parse_options_header

    accepted = ",".join(request.headers.getlist("accept")) or "*/*"
    for part in accepted.split(","):
        kind, options = parse_options_header(part.strip())
        named = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in options.items()}
        if kind == b"*/*" or is_right(kind.decode("latin-1").lower(), named):
            return
    raise Refusal(406, f"what is asked for here must be {what}; Accept has none of it", "change Accept")


def _is_related(kind: str, options: Mapping[str, str]) -> bool:
    of_dicom = options.get("type", DICOM).lower() == DICOM
    return kind in ("multipart/*", _RELATED) and of_dicom and options.get("transfer-syntax", "*") in ("*", _EXPLICIT)


def _is_json(kind: str, options: Mapping[str, str]) -> bool:
    return kind in ("application/*", "application/json", JSON)


def _query(request: Request, keywords: Sequence[str]) -> tuple[dict[str, str], int, int | None]:
    """What attributes must be, by tag; which is the first to tell of, and of how many at most.

    Raises:
        Refusal: it asks for what is not there.
    """
    from pydicom.datadict import tag_for_keyword

    tags = {f"{tag_for_keyword(name):08X}": name for name in keywords}
    wanted: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for name, value in request.query_params.multi_items():
        tag = f"{tag_for_keyword(name) or 0:08X}" if not _is_tag(name) else name.upper()
        if name in ("limit", "offset"):
            if not (value.isascii() and value.isdigit() and len(value) < 10):
                raise Refusal(400, f"{name} must be a whole number; it is none", "change it")
            numbers[name] = int(value)
        elif name in ("includefield", "fuzzymatching"):
            continue  # all that is known is told, and nothing is fuzzy
        elif tag in tags:
            wanted[tag] = value
        else:
            raise Refusal(400, f"a query here may be of {', '.join(keywords)}; it has others", "leave them out")
    return wanted, numbers.get("offset", 0), numbers.get("limit")


def _is_tag(name: str) -> bool:
    return len(name) == 8 and all(letter in "0123456789abcdefABCDEF" for letter in name)


def _matches(element: Any, wanted: str) -> bool:
    values = (element or {}).get("Value", [])
    texts = [str(value.get("Alphabetic", "")) if isinstance(value, Mapping) else str(value) for value in values]
    return not wanted or wanted in texts


def _counts(ones: Sequence[Instance], keywords: Sequence[str]) -> Facts:
    """Of a study or a series: how much it has."""
    if "SOPInstanceUID" in keywords:
        return {}
    number = {"vr": "IS", "Value": [len(ones)]}
    if "SeriesInstanceUID" in keywords:
        return {"00201209": number}
    modalities = sorted({str(one.of_series["00080060"]["Value"][0]) for one in ones})
    series = {"vr": "IS", "Value": [len({one.series for one in ones})]}
    return {"00080061": {"vr": "CS", "Value": modalities}, "00201206": series, "00201208": number}
