"""The addresses of a studio."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.responses import FileResponse, StreamingResponse

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.serving.dicom.structure_sets import StructureSets
from fibldm.serving.service import Service
from fibldm.serving.store import Job, State
from fibldm.serving.studio.access import Access
from fibldm.serving.studio.archive import zipped
from fibldm.serving.studio.bundle_facts import bundle_view
from fibldm.serving.studio.described import answer, body
from fibldm.serving.studio.dicomweb import DicomWeb
from fibldm.serving.studio.guard import Guard, Refusal
from fibldm.serving.studio.limits import Limits
from fibldm.serving.studio.masks import as_nifti, empty_mask
from fibldm.serving.studio.page import add_page
from fibldm.serving.studio.refusals import REFUSALS, describe_token, tell_refusals
from fibldm.serving.studio.room import Room, busy
from fibldm.serving.studio.uploads import files_into, form_of, options_of
from fibldm.serving.studio.views import BundleView, JobView
from fibldm.volumes.writer import sidecar

_LOOK = 0.3  # seconds between two looks at a job whose events are listened to
_SIGN = 15.0  # seconds after which a stream without news gives a sign of life
T = TypeVar("T")
_GZIP, _ZIP = "application/gzip", "application/zip"


def studio_app(
    service: Service,
    bundle: Path,
    access: Access,
    limits: Limits | None = None,
    masks: Sequence[Path] = (),
    dicom: StructureSets | None = None,
) -> Guard:
    """The application of a studio, behind its guard.

    Args:
        service: makes the volumes.
        bundle: its generator.
        access: who may ask.
        limits: how much may be sent.
        masks: files that people may begin with.
        dicom: gets what comes by DICOMweb; None is without DICOMweb.

    Raises:
        FibldmError: the bundle is refused.
    """
    limits = limits or Limits()
    app = FastAPI(
        title="FibLDM studio",
        version=__version__,
        description="Synthetic volumes that follow masks. Every refusal has `message` and `remedy`.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=REFUSALS,
    )
    tell_refusals(app)
    add_page(app, access)
    facts = bundle_view(bundle, service, limits, masks)
    room = Room(service, limits)
    Jobs(service, limits, room, facts, masks).add_to(app)
    if dicom is not None:
        DicomWeb(service, limits, room, dicom).add_to(app)
    describe_token(app)
    return Guard(app, access, limits)


class Jobs:
    """Masks in, volumes out.

    Args:
        service: makes the volumes.
        limits: how much may be sent.
        room: for requests.
        facts: of the generator.
        masks: files that people may begin with.
    """

    def __init__(self, service: Service, limits: Limits, room: Room, facts: BundleView, masks: Sequence[Path]) -> None:
        self._service, self._limits, self._facts, self._masks = service, limits, facts, masks
        self._room, self._listening = room, 0

    def add_to(self, app: FastAPI) -> None:
        """Give the addresses to an application."""
        one, plain = "/api/jobs/{id}", Response
        volume, nifti = answer("NIfTI, or a DICOM series as a zip", _GZIP, _ZIP), answer("NIfTI", _GZIP)
        app.get("/api/bundle", response_model=BundleView)(self.bundle)
        app.post("/api/jobs", response_model=JobView, status_code=202, openapi_extra=body(self._parts()))(self.submit)
        app.get("/api/jobs", response_model=list[JobView])(self.jobs)
        app.get(one, response_model=JobView)(self.job)
        app.delete(one, status_code=204, response_class=plain)(self.remove)
        events = answer("a job whenever it changed", "text/event-stream")
        app.get(f"{one}/events", responses=events, response_class=plain)(self.events)
        app.get(f"{one}/mask", responses=nifti, response_class=plain)(self.mask)
        archive = answer("all files of a job", _ZIP)
        app.get(f"{one}/results", responses=archive, response_class=plain)(self.results)
        app.get(f"{one}/results/{{number}}", responses=volume, response_class=plain)(self.result)
        app.get(f"{one}/results/{{number}}/sidecar", response_model=dict[str, Any])(self.sidecar)
        read = body(self._mask())
        app.post("/api/masks", responses=nifti, response_class=plain, openapi_extra=read)(self.read)
        app.get("/api/masks/empty", responses=nifti, response_class=plain)(self.empty)
        app.get("/api/masks/{number}", responses=nifti, response_class=plain)(self.example)

    def bundle(self) -> BundleView:
        """The generator: labels, grid, conditions, sampling, card, licence; and the limits of the studio."""
        return self._facts

    async def submit(self, request: Request) -> JobView:
        """Ask for volumes of a mask; the same mask and options again are the same job."""
        self._room.check()
        return await self._taken_in(request, self._submitted)

    async def read(self, request: Request) -> Response:
        """A mask as the generator sees it: a label map in NIfTI, on the grid of the file."""
        return _nifti(await self._taken_in(request, self._read))

    def empty(self) -> Response:
        """A mask of background on the model grid, to draw on."""
        return _nifti(empty_mask(self._service.output.synthesizer.grid))

    def example(self, number: int) -> Response:
        """One of the masks that the studio was given, counted from 1, as the generator sees it."""
        if not 1 <= number <= len(self._masks):
            raise Refusal(404, f"there are {len(self._masks)} masks; got {number}", "see examples of /api/bundle")
        return _nifti(as_nifti(self._masks[number - 1], self._service.output.synthesizer.names))

    def jobs(self) -> list[JobView]:
        """All jobs, the newest first."""
        jobs = self._service.store.jobs()
        before, views = 0, []
        for job in jobs:
            views.append(self._view(job, before))
            before += job.state in (State.WAITING, State.RUNNING)
        return views[::-1]

    def job(self, id: str) -> JobView:
        """A job."""
        return self._seen(id)

    def remove(self, id: str) -> Response:
        """Forget a job with its volumes, or take one back that waits; one in hand ends first."""
        try:
            self._service.remove(self._found(id))
        except FibldmError as error:
            raise Refusal.of(error, 409) from None
        return Response(status_code=204)

    async def events(self, id: str) -> Response:
        """The job whenever it changed (server-sent events `job`), until it is done or refused."""
        await run_in_threadpool(self._found, id)
        if self._listening >= self._limits.listeners:
            raise busy(f"at most {self._limits.listeners} streams of events are open at a time")
        return StreamingResponse(self._events(id), media_type="text/event-stream")

    def mask(self, id: str) -> Response:
        """The mask as used, of a job of NIfTI."""
        masks = sorted((self._service.results(self._done(id)) / "masks").glob("*.nii.gz"))
        if not masks:
            raise Refusal(404, "a job of DICOM has its mask as a segmentation", "it lies among its results")
        return FileResponse(masks[0], media_type=_GZIP, filename=f"mask_{masks[0].name}")

    def results(self, id: str) -> Response:
        """All files of a job, as a zip."""
        job = self._done(id)
        root = self._service.results(job)
        return _archive(root, [file for file in sorted(root.rglob("*")) if file.is_file()], f"{job.id}.zip")

    def result(self, id: str, number: int) -> Response:
        """A volume: NIfTI, or the zip of a DICOM series."""
        path = self._volume(id, number)
        if path.is_dir():
            return _archive(path.parent, sorted(path.rglob("*")), f"{path.name}.zip")
        return FileResponse(path, media_type=_GZIP, filename=path.name)

    def sidecar(self, id: str, number: int) -> Response:
        """Where a volume comes from."""
        return FileResponse(sidecar(self._volume(id, number)), media_type="application/json")

    async def _taken_in(self, request: Request, use: Callable[[FormData], T]) -> T:
        """What becomes of the parts of a request."""
        with self._room.reader():
            form = await form_of(request, self._service.output.synthesizer.beside, self._limits)
            try:
                return await run_in_threadpool(use, form)
            finally:
                await form.close()

    def _submitted(self, form: FormData) -> JobView:
        asked = options_of(form)
        self._service.settings(asked)
        with self._service.incoming() as folder:
            files_into(folder, form, self._service.output.synthesizer.beside, self._limits)
            with self._room.submitting:
                self._room.check()
                job = self._service.submit(folder, asked)
        return self._seen(job.id)

    def _read(self, form: FormData) -> bytes:
        with TemporaryDirectory() as folder:
            mask = files_into(Path(folder), form, self._service.output.synthesizer.beside, self._limits)
            return as_nifti(mask, self._service.output.synthesizer.names)

    async def _events(self, id: str) -> AsyncIterator[str]:
        self._listening += 1
        try:
            told, silent, ended = "", 0.0, False
            while not ended:
                try:
                    view = await run_in_threadpool(self._seen, id)
                except Refusal:  # it was removed
                    yield "event: removed\ndata: {}\n\n"
                    return
                ended = view.state in (State.DONE, State.REFUSED)
                if (text := view.model_dump_json()) != told:
                    told, silent = text, 0.0
                    yield f"event: job\ndata: {text}\n\n"
                elif silent > _SIGN:
                    silent = 0.0
                    yield ": still here\n\n"
                if not ended:
                    silent += _LOOK
                    await asyncio.sleep(_LOOK)
        finally:
            self._listening -= 1

    def _view(self, job: Job, before: int) -> JobView:
        count = job.request.get("count", self._service.output.settings.count)
        return JobView.of(job, count=count, before=before if job.state is State.WAITING else 0)

    def _seen(self, id: str) -> JobView:
        job, under_way = self._found(id), self._service.store.jobs(State.WAITING, State.RUNNING)
        places = {other.id: place for place, other in enumerate(under_way)}
        return self._view(job, places.get(id, 0))

    def _found(self, id: str) -> Job:
        job = self._service.store.get(id)
        if job is None:
            raise Refusal(404, "there is no such job", "see /api/jobs")
        return job

    def _done(self, id: str) -> Job:
        job = self._found(id)
        if job.state is not State.DONE:
            raise Refusal(409, f"a job must be done; this one is {job.state}", "wait for its events")
        return job

    def _volume(self, id: str, number: int) -> Path:
        job = self._done(id)
        outputs = (job.outcome or {}).get("outputs", [])
        if not 0 <= number < len(outputs):
            raise Refusal(404, f"volumes of this job are 0 to {len(outputs) - 1}; got {number}", "see /api/jobs")
        return self._service.results(job) / outputs[number]

    def _mask(self) -> dict[str, Any]:
        return {
            "type": "object",
            "required": ["mask"],
            "properties": {"mask": _file("NIfTI, NRRD or DICOM segmentation")},
        }

    def _parts(self) -> dict[str, Any]:
        schema = self._mask()
        told = f"JSON object of {', '.join(self._facts.options)}, as fibldm synthesize has them"
        schema["properties"]["options"] = {"type": "string", "description": told, "maxLength": self._limits.options}
        for name, kind in self._facts.conditions.items():
            if kind["by_file"]:
                schema["properties"][name] = _file(f"the scan of the condition {name}")
        return schema


def _nifti(content: bytes) -> Response:
    return Response(content, media_type=_GZIP)


def _archive(root: Path, members: list[Path], name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(zipped(root, members), media_type=_ZIP, headers=headers)


def _file(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}
