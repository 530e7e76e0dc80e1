"""RT structure sets, which are contours: they wait for the series that they were drawn on, and become masks with it.

``FOLDER/series/SERIES/IMAGE.dcm`` holds images, by hashes of their UIDs, until nothing more of their series has come
for as long as a structure set would wait for it.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fibldm.errors import FibldmError
from fibldm.files import hash_value
from fibldm.serving.dicom.objects import Unwanted, keep
from fibldm.serving.folders import to_disk
from fibldm.serving.items import DIGITS
from fibldm.serving.making import unexpected
from fibldm.serving.service import Service
from fibldm.serving.store import Job, State
from fibldm.volumes.dicom.frames import read_dataset
from fibldm.volumes.dicom.masks import read_structures, segment_names
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FILE = "structures.dcm"
_MASK = "mask.nii"
_SETTLED = 5.0  # seconds without another image of the series
_AGAIN = "send the structure set again, and its series"

_logger = logging.getLogger("fibldm")


class StructureSets:
    """Jobs that are held until a series is there.

    Args:
        service: has the jobs.
        wait: seconds for which they are held, and images kept.
        settled: seconds after the last image of a series, after which it is read.
    """

    def __init__(self, service: Service, *, wait: float, settled: float = _SETTLED) -> None:
        self._service, self._wait, self._settled = service, wait, settled
        self._series = service.folder / "series"

    def take_image(self, source: Path, header: "Dataset") -> None:
        """Keep an image; it is on the disk when this returns.

        Raises:
            Unwanted: it names no series.
        """
        if not (series := str(header.get("SeriesInstanceUID") or "")):
            raise Unwanted(0xA900, "an image must name its series")
        folder = self._folder(series)
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{_name(str(header.SOPInstanceUID))}.dcm"
        with self._service.incoming() as temporary:
            keep(source, temporary / place.name)
            (temporary / place.name).replace(place)
        for path in (folder, self._series):
            to_disk(path)

    def look(self) -> None:
        """Make masks of the structure sets whose series are there, refuse those that waited too long, and tidy up."""
        needed = set()
        for job in self._service.store.jobs(State.HELD):
            try:
                needed |= self._try(job)
            except FibldmError as error:
                self._service.refuse(job, error)
            except Exception as error:  # one bad structure set never stops the others
                self._service.refuse(job, unexpected(error, _AGAIN))
        for folder in self._series.glob("*"):
            if folder not in needed and time.time() - _last_change(folder) > self._wait:
                shutil.rmtree(folder, ignore_errors=True)

    def _try(self, job: Job) -> set[Path]:
        """Release a job whose series is there; gives the folder of its series otherwise."""
        place = self._service.spool(job)
        if not (place / _MASK).exists():
            series, images = referenced(place / FILE)
            folder = self._folder(series)
            there = {file.name for file in folder.glob("*.dcm")}
            missing = sum(f"{_name(image)}.dcm" not in there for image in images)
            if missing or time.time() - _last_change(folder) < self._settled:
                self._check_time(job, missing, len(images))
                return {folder}
            self._rasterise(place, folder)
            _logger.info("%s: its series is there, %d images", job.id, len(there))
        (place / FILE).unlink(missing_ok=True)
        self._service.release(job)
        return set()

    def _check_time(self, job: Job, missing: int, all_of_it: int) -> None:
        if missing and time.time() - job.changed > self._wait:
            raise FibldmError(
                f"a structure set must be followed by its series within {self._wait / 60:g} minutes; "
                f"{missing} of {all_of_it} images did not come",
                _AGAIN,
            )

    def _rasterise(self, place: Path, folder: Path) -> None:
        image = read_series(sorted(folder.glob("*.dcm")))
        names: Mapping[str, int] = {name: value for value, name in self._service.output.synthesizer.names.items()}
        file, frame = place / FILE, image.frame_of_reference
        if strange := sorted(set(segment_names(file, frame)) - set(names)):
            raise FibldmError(
                f"every structure must have the name of a label of the run ({', '.join(names)}); got also "
                f"{', '.join(strange)}",
                "rename or delete these structures",
            )
        mask = read_structures(file, names, image, frame_of_reference=frame or None)
        for level, remark in mask.findings:
            if level == "error":
                raise FibldmError(f"structures are refused: {remark}", "export them again")
            _logger.warning("%s: %s", place.name, remark)
        write_labels(place / _MASK, Volume(mask.array, mask.affine))
        to_disk(place)

    def _folder(self, series: str) -> Path:
        return self._series / _name(series)


def referenced(source: "Path | Dataset") -> tuple[str, list[str]]:
    """The series that a structure set was drawn on, and its images.

    Raises:
        Unwanted: it refers to none or to several, or does not list its images.
    """
    dataset = read_dataset(source, ["ReferencedFrameOfReferenceSequence"]) if isinstance(source, Path) else source
    try:
        items = [
            series
            for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for series in study.get("RTReferencedSeriesSequence") or ()
        ]
        uids = {str(series.SeriesInstanceUID) for series in items}
        images = {str(image.ReferencedSOPInstanceUID) for item in items for image in item.ContourImageSequence}
    except Exception:
        uids, images = set(), set()
    if len(uids) != 1 or not images:
        raise Unwanted(0xA900, "a structure set must name one series, and its images")
    return uids.pop(), sorted(images)


def _name(uid: str) -> str:
    return hash_value(uid)[: 2 * DIGITS]


def _last_change(folder: Path) -> float:
    """When a file last came into a folder; 0 where there is none."""
    try:
        return os.stat(folder).st_mtime
    except FileNotFoundError:
        return 0.0
