"""What is taken on of the objects that come, by C-STORE or STOW-RS: the same checks, files and jobs."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fibldm.serving.dicom.objects import SEGMENTATIONS, STRUCTURE_SET, check_foreign, check_segments, header, keep
from fibldm.serving.dicom.structure_sets import FILE, StructureSets, referenced
from fibldm.serving.service import Service
from fibldm.serving.store import Job

MASK = "mask.dcm"

_logger = logging.getLogger("fibldm")


class Intake:
    """Makes jobs of masks, and keeps images for structure sets.

    Args:
        service: gets the jobs.
        structures: gets images, and makes masks of structure sets.
        owe: is told of every job that was taken on, before it is acknowledged.
    """

    def __init__(
        self, service: Service, structures: StructureSets, owe: Callable[[Job], None] = lambda job: None
    ) -> None:
        self._service, self._structures, self._owe = service, structures, owe

    def take(
        self, source: Path, sop_class: str, sop_instance: str, asked: Mapping[str, Any] | None = None
    ) -> Job | None:
        """Take on an object, which is on the disk when this returns.

        Args:
            source: in the DICOM file format, uncompressed.
            sop_class: one of `STORED`, that it was announced with, as is ``sop_instance``.
            asked: see `Service.submit`.

        Returns:
            The job of a mask; None of an image.

        Raises:
            Unwanted: it is not taken.
            FibldmError: see `Service.submit`.
        """
        found = header(source, sop_class, sop_instance)
        if sop_class in SEGMENTATIONS:
            check_segments(found, self._service.output.synthesizer.names.values())
            return self._take_on(source, MASK, asked, held=False)
        if sop_class == STRUCTURE_SET:
            check_foreign(found)
            referenced(found)
            return self._take_on(source, FILE, asked, held=True)
        self._structures.take_image(source, found)
        return None

    def _take_on(self, source: Path, name: str, asked: Mapping[str, Any] | None, *, held: bool) -> Job:
        with self._service.incoming() as folder:
            keep(source, folder / name)
            job = self._service.submit(folder, asked, held=held)
            self._owe(job)
        _logger.info("%s: acknowledged, %s", job.id, job.state)
        return job
