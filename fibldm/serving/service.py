"""A service: masks are taken on by any door, and their volumes are made one job after the other.

``FOLDER/jobs.sqlite`` knows the jobs, ``FOLDER/spool/ID`` holds what came until its job is done, and
``FOLDER/results/ID`` the volumes. A job that was acknowledged is done once, though the service be killed at any moment:
what came lies in the spool before the job is written, and volumes appear all at once before the job is done.
"""

import errno
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from fibldm.errors import FibldmError, sentence, unknown_choice
from fibldm.files import hash_value
from fibldm.locks import alone
from fibldm.serving.ending import Ending
from fibldm.serving.folders import to_disk
from fibldm.serving.items import DIGITS, hashes_of, name_of, opened_item
from fibldm.serving.making import make, told, unexpected
from fibldm.serving.opening import facts_of
from fibldm.serving.store import Job, JobStore, State
from fibldm.synthesis import Output, SynthesisSettings
from fibldm.synthesis.asked import check, read
from fibldm.typed_settings import counted

ASKABLE = (
    *("count", "seed", "steps", "guidance", "format", "mask_format", "covariates", "conditions", "check"),
    "allow_extrapolation",
)
"""What a request may ask for, by the names of `SynthesisSettings`."""

MOST = {"steps": 1000, "check": 20}
"""Of numbers that cost time, what a request may ask for; how many volumes is up to the service."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_AGAIN = "correct it, and send it again"

_logger = logging.getLogger("fibldm")


class Service:
    """Jobs of one generator; within ``with`` it has the folder for itself, and doors may open.

    Args:
        output: how volumes are made; its folder does not matter.
        folder: of the service.
        most: volumes that a request may ask for.
        keep: seconds after which results and what is known of their job are deleted; None keeps them.
        tries: a job that was in hand when so many services were killed is refused, as it may be what ended them.
    """

    def __init__(
        self, output: Output, folder: Path, *, most: int = 16, keep: float | None = None, tries: int = 3
    ) -> None:
        self.output, self.folder, self.most, self.keep, self.tries = output, Path(folder), most, keep, tries
        self.store = JobStore(self.folder / "jobs.sqlite")
        self._came, self._moving, self._held = threading.Event(), threading.Lock(), ExitStack()

    def __enter__(self) -> Self:
        remedy = "end the other one, or choose another folder"
        self._held.enter_context(alone(self.folder / ".service.lock", str(self.folder), remedy))
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self.store.close()

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A folder for what comes, which is gone after the block, unless `submit` took it on."""
        place = self.folder / "spool" / f".{secrets.token_hex(8)}"
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def submit(self, came: Path, asked: Mapping[str, Any] | None = None, *, held: bool = False) -> Job:
        """Take on what came; when this returns, it is on the disk.

        Args:
            came: folder of `incoming`: one mask or more, by names that tell no patient, and what `opened_item` knows
                beside.
            asked: by the names of `ASKABLE`, over what the service asks of all.
            held: it is not made before `release`, as what it refers to is not there yet.

        Returns:
            Its job, or that of the same content.

        Raises:
            FibldmError: what is asked is refused, or a file cannot be read.
        """
        asked = dict(asked or {})
        self.settings(asked)
        hashes = hashes_of(came)
        id = hash_value([name_of(came, hashes), asked, facts_of(self.output)])[:DIGITS]
        for path in [*hashes, *{file.parent for file in hashes}]:
            to_disk(path)
        with self._moving:
            known = self.store.get(id)
            if known is not None and known.state is not State.REFUSED:
                return known
            place = self.folder / "spool" / id
            shutil.rmtree(place, ignore_errors=True)  # of a service that was killed before it wrote the job
            came.rename(place)
            to_disk(place.parent)
            job = self.store.submit(id, asked, held=held)
        self._came.set()
        return job

    def spool(self, job: Job) -> Path:
        """Folder of what came of a job, until it is done or refused."""
        return self.folder / "spool" / job.id

    def release(self, job: Job) -> None:
        """A job that was held waits for its turn."""
        self.store.release(job.id)
        self._came.set()

    def settings(self, asked: Mapping[str, Any]) -> SynthesisSettings:
        """What is asked of all, and what a request asks over it.

        Raises:
            FibldmError: it asks for what no request may, for too much, or for what is no value of its kind.
        """
        if strange := sorted(set(asked) - set(ASKABLE)):
            raise unknown_choice("what a request asks for", strange[0], ASKABLE)
        settings = SynthesisSettings.of(self.output.settings, **asked)
        for name, most in MOST.items():
            if asked.get(name) is not None and asked[name] > most:
                raise FibldmError(
                    f"a request may ask for `{name}` of at most {most}; got {asked[name]}", "ask for less"
                )
        if settings.count > self.most:
            raise FibldmError(
                f"a request may ask for at most {self.most} volumes; got {settings.count}", "ask for fewer"
            )
        beside = self.output.synthesizer.beside
        for name, value in (asked.get("conditions") or {}).items():
            if value is not None and name in beside and beside[name].of_scan:  # a path here is one of this machine
                raise FibldmError(f"{name} must come with the request; a request may not name it by a path", "send it")
        check(beside, read(beside, settings.asked), allow=settings.allow_extrapolation)
        return settings

    def run(self, ending: Ending, *, until_idle: bool = False) -> None:
        """Work until asked to end, or with ``until_idle`` until no job waits.

        Raises:
            FibldmError: the folder is full; the job in hand waits again.
        """
        while ending.asked is None:
            self._came.clear()
            if (job := self.store.take()) is not None:
                self._work(job)
            elif until_idle:
                return
            else:
                self._came.wait(0.2)
            if not until_idle:
                self._clear()

    def remove(self, job: Job) -> None:
        """Forget a job with what came and its volumes.

        Raises:
            FibldmError: it is in hand.
        """
        with self._moving:
            if not self.store.discard(job.id) and self.store.get(job.id) is not None:
                raise FibldmError("a job must not be in hand to be removed; this one is", "wait until it ends")
            for place in (self.folder / "spool" / job.id, self.results(job)):
                shutil.rmtree(place, ignore_errors=True)

    def results(self, job: Job) -> Path:
        """Folder of the volumes of a job that is done."""
        return self.folder / "results" / job.id

    def _begin(self) -> None:
        """What a service before had in hand waits again; what it had begun to write goes."""
        shutil.rmtree(self.folder / ".working", ignore_errors=True)
        for job in self.store.give_back():
            if job.tries >= self.tries:
                self.refuse(
                    job,
                    FibldmError(
                        f"a request must not end its service; {job.tries} ended with this one in hand",
                        "is the memory enough for it? send it again where it is",
                    ),
                )
        for place in (self.folder / "spool").glob("*"):
            known = self.store.get(place.name)
            if known is None or known.state in (State.DONE, State.REFUSED):
                shutil.rmtree(place, ignore_errors=True)

    def _work(self, job: Job) -> None:
        began, place = time.monotonic(), self.spool(job)
        try:
            with opened_item(
                place, hashes_of(place), self.settings(job.request), self.output.synthesizer.beside
            ) as item:
                staging = self.folder / ".working" / job.id
                report = partial(self.store.tell, job.id)
                outputs = make(self.output, item, staging, self.results(job), report)
                said = told(self.output, item)
        except FibldmError as error:
            if getattr(error.__cause__, "errno", None) in _NO_ROOM:  # no fault of the request
                self.store.give_back(job.id)
                raise
            return self.refuse(job, error)
        except Exception as error:  # one bad request never stops the others
            return self.refuse(job, unexpected(error, _AGAIN))
        root = self.results(job)
        outcome = {"outputs": [path.relative_to(root).as_posix() for path in outputs], "left_out": item.left_out}
        with self._moving:
            self.store.finish(job.id, outcome)
            shutil.rmtree(place, ignore_errors=True)
        took, said = time.monotonic() - began, said and f" ({said})"
        _logger.info("%s: %s, %.1f s%s", job.id, counted(len(outputs), "volume"), took, said)

    def refuse(self, job: Job, error: FibldmError) -> None:
        """A job is refused, and what came of it is deleted."""
        with self._moving:
            self.store.refuse(job.id, error)
            shutil.rmtree(self.spool(job), ignore_errors=True)
        _logger.warning("%s: refused; %s", job.id, sentence(error.message, error.remedy))

    def _clear(self) -> None:
        """Delete what has been kept long enough."""
        if self.keep is None:
            return
        for job in self.store.jobs(State.DONE, State.REFUSED):
            if time.time() - job.changed > self.keep:
                for delivery in self.store.deliveries(job.id):
                    if job.state is State.DONE and not delivery.ended:
                        _logger.warning("%s: kept long enough; %s did not get all of it", job.id, delivery.peer)
                shutil.rmtree(self.results(job), ignore_errors=True)
                self.store.forget(job.id)
