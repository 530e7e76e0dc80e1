"""Which DICOM objects the results of jobs are: studies, series and instances."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.serving.dicom.objects import results_of
from fibldm.serving.service import Service
from fibldm.serving.store import Job, State
from fibldm.volumes.dicom.frames import read_dataset

OF_STUDY = (
    "StudyDate StudyTime AccessionNumber ReferringPhysicianName PatientName PatientID PatientBirthDate PatientSex "
    "StudyInstanceUID StudyID StudyDescription"
).split()
OF_SERIES = "Modality SeriesInstanceUID SeriesNumber SeriesDescription".split()
OF_INSTANCE = "SOPClassUID SOPInstanceUID InstanceNumber Rows Columns NumberOfFrames".split()
_KEYS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Instance:
    """An object.

    Attributes:
        file: of it.
        study: UID, as are ``series`` and ``uid`` of the object itself.
        of_study: attributes in DICOM JSON by tag, as are ``of_series`` and ``of_instance``.
    """

    file: Path
    study: str
    series: str
    uid: str
    of_study: Facts
    of_series: Facts
    of_instance: Facts


class Results:
    """The DICOM objects of all jobs that are done; an object that several jobs have, byte by byte, is one.

    Args:
        service: has the jobs.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._known: dict[str, list[Instance]] = {}

    def find(self, study: str | None = None, series: str | None = None, uid: str | None = None) -> list[Instance]:
        """The objects of a study, of a series, or one; in the order of jobs, series and slices."""
        with self._lock:
            done = self._service.store.jobs(State.DONE)
            self._known = {job.id: self._known.get(job.id) or self._read(job) for job in done}
            every = {one.uid: one for job in reversed(done) for one in reversed(self._known[job.id])}
        wanted = ((study, "study"), (series, "series"), (uid, "uid"))
        return [
            one
            for one in reversed(every.values())
            if all(value is None or getattr(one, name) == value for value, name in wanted)
        ]

    def _read(self, job: Job) -> list[Instance]:
        outputs = (job.outcome or {}).get("outputs", [])
        shared: dict[str, Facts] = {}
        try:
            return [_instance(file, shared) for file in results_of(self._service.results(job), outputs)]
        except FileNotFoundError:  # it is being deleted
            return []


def _instance(file: Path, shared: dict[str, Facts]) -> Instance:
    dataset = read_dataset(file, [*OF_STUDY, *OF_SERIES, *OF_INSTANCE])
    study, series, uid = (str(dataset[key].value) for key in _KEYS)

    def facts(keywords: list[str]) -> Facts:
        return {f"{dataset[key].tag:08X}": dataset[key].to_json_dict(None, 0) for key in keywords if key in dataset}

    for key, keywords in ((study, OF_STUDY), (series, OF_SERIES)):
        if key not in shared:
            shared[key] = facts(keywords)
    return Instance(file, study, series, uid, shared[study], shared[series], facts(OF_INSTANCE))
