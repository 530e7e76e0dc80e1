"""Marked files of volumes; what lies there already and was made in the same way is kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json
from fibldm.synthesis.asked import read
from fibldm.synthesis.checking import Check, OutsideRanges, Rejected, summary
from fibldm.synthesis.mask_source import Job, MaskSource, RecentMasks, stem_of, together
from fibldm.synthesis.request import PreparedMask, Synthesis, SynthesisRequest
from fibldm.synthesis.settings import SamplingSettings, SynthesisSettings
from fibldm.synthesis.synthesizer import Synthesizer
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import keep_mask
from fibldm.volumes.writer import sidecar, write_synthetic

if TYPE_CHECKING:
    from fibldm.volumes.dicom.output import DicomOutput

_SHOWN = 10  # refused masks in one error
_HELD = 2**28  # bytes of masks that stay in memory between the look at all of them and their turn

_logger = logging.getLogger("fibldm")


class OutputConflict(FibldmError):
    """Another volume has the name of one that is to be written."""


@dataclass(frozen=True)
class Output:
    """Where and how the volumes of a synthesizer are written.

    A mask is read, hashed and prepared once for all its volumes. Of many or large masks, only those used last stay in
    memory; the others are read a second time when their turn comes.

    Attributes:
        synthesizer: makes the volumes.
        folder: gets ``<mask stem>_<number:03d>.nii.gz`` with its sidecar, and the masks as used in ``masks/``; of DICOM
            a series ``<mask stem>_<number:03d>/`` and the mask as a segmentation.
        settings: what is asked; its adapters are put on the synthesizer here, and are part of that from then on.

    Raises:
        FibldmError: an adapter is refused, a check, as no ranges were measured, or an audit, as it is of other scans.
    """

    synthesizer: Synthesizer
    folder: Path
    settings: SynthesisSettings
    _recent: RecentMasks = field(init=False, repr=False, compare=False, default_factory=lambda: RecentMasks(_HELD))
    _prepared: dict[MaskSource | None, PreparedMask] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _kept: set[MaskSource] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.settings.adapters:
            object.__setattr__(self, "synthesizer", self.synthesizer.adapted(self.settings.adapters))
            object.__setattr__(self, "settings", replace(self.settings, adapters={}))
        _ = self.checks

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs whose volumes do not lie there yet, after a look at all their masks, before the first is made.

        What is asked beside the masks is said.

        Raises:
            FibldmError: as `write`; of several masks that are refused, all are told.
        """
        missing: set[Job] = set()
        refused: list[FibldmError] = []
        for mask, numbers in together(jobs).items():
            lacking, error = self.look([Job(mask, number) for number in numbers])
            missing |= set(lacking)
            refused += [] if error is None else [error]
        if refused:
            raise refusal(refused, len({job.mask for job in missing}))
        self.tell(jobs)
        if missing:
            tell_unmarked(self.synthesizer, self.settings.sampling)
        return [job for job in jobs if job in missing]

    def look(self, jobs: Sequence[Job]) -> tuple[list[Job], FibldmError | None]:
        """The jobs of one mask whose volumes do not lie there yet, and why the mask is refused, if it is.

        Raises:
            OutputConflict: another volume or mask of this name lies there.
        """
        lacking = [job for job in jobs if not self._is_there(job)]
        try:
            if lacking:
                self._prepare(lacking[0].mask)
        except FibldmError as error:
            return lacking, error
        return lacking, None

    def tell(self, jobs: Sequence[Job]) -> None:
        """Say what is asked beside the masks, or beside the first of them."""
        for job in jobs[:1]:
            self._tell(job.mask)

    def forget(self, mask: MaskSource) -> None:
        """Give up what is known of a mask whose turn is over."""
        self._recent.forget(mask)
        self._prepared.pop(mask, None)
        self._kept.discard(mask)

    def write(self, jobs: Sequence[Job]) -> list[Path]:
        """Make and write some volumes together.

        Returns:
            The files, or the folders of series, in the order of the jobs.

        Raises:
            FibldmError: another volume or mask of this name lies there, a mask or covariates are refused, or a mask
                cannot be told in DICOM.
            OutsideRanges: a check left volumes out; the others are written.
        """
        if rejected := self.attempt(jobs):
            raise OutsideRanges(rejected)
        return [self.path(job) for job in jobs]

    def attempt(self, jobs: Sequence[Job]) -> list[Rejected]:
        """Make and write some volumes together, but for those that the checks leave out, which are told.

        Where some of them lie there, as another process was lost while it wrote them, all are drawn again: what a
        network computes for a volume may differ in the last bit with those beside it.

        Raises:
            FibldmError: see `write`.
        """
        missing = {job for job in jobs if not self._is_there(job)}
        if not missing:
            return []
        prepared = [self._prepare(job.mask).numbered(job.number) for job in jobs]
        made = self.synthesizer.attempt(
            prepared,
            settings=self.settings.sampling,
            check=self.settings.check,
            reject_copies=self.settings.known_scans,
        )
        for job, part, attempt in zip(jobs, prepared, made, strict=True):
            if isinstance(attempt, Synthesis) and job in missing:
                self._write(job, part.request.mask, attempt)
        return [attempt for attempt in made if isinstance(attempt, Rejected)]

    def conclude(self, jobs: Sequence[Job], rejected: Sequence[Rejected]) -> None:
        """After the last of all jobs, say what the checks did, if there were some.

        Raises:
            OutsideRanges: they left volumes out.
        """
        if not self.checks:
            return
        there = [path for path in map(self.path, jobs) if path.exists()]
        passed = " and ".join(check.passed for check in self.checks)
        _logger.info("%s", summary((read_json(sidecar(path)) for path in there), rejected, passed))
        if rejected:
            raise OutsideRanges(rejected)

    def path(self, job: Job) -> Path:
        """The volume's file, or the folder of its series."""
        return self.folder / (f"{job.name}.nii.gz" if self.dicom is None else job.name)

    @property
    def checks(self) -> list[Check]:
        """Those that look at each volume."""
        return self.synthesizer.checks(self.settings.check, self.settings.known_scans)

    @property
    def dicom(self) -> "DicomOutput | None":
        """Writes DICOM; None is NIfTI."""
        return self.settings.files.dicom

    @cached_property
    def _site_mark(self) -> list[dict[str, str]]:
        mark = self.synthesizer.mark_of(self.synthesizer.as_trained(self.settings.sampling))
        return [{"site_key": mark["site_key"]}] if "site_key" in mark else []

    def _is_there(self, job: Job) -> bool:
        path = self.path(job)
        other = self.folder / (job.name if self.dicom is None else f"{job.name}.nii.gz")
        if other.exists():
            raise OutputConflict(f"{other} lies there already, in another format", "choose another `out` folder")
        if not path.exists():
            return False
        there = read_json(sidecar(path))
        if any(there.get(key) != value for key, value in self._request(job).items()):
            raise OutputConflict(
                f"{path} lies there already and was made from another mask, run or settings",
                "choose another `out` folder",
            )
        if self.dicom is not None:
            self.dicom.check_whole(path)
        elif job.mask is not None:
            self._keep(job.mask)
        return True

    def _prepare(self, mask: MaskSource | None) -> PreparedMask:
        """A mask, or none, checked for all its volumes and their files."""
        labels = None if mask is None else self._labels(mask)
        if mask not in self._prepared:
            if self.dicom is not None and labels is None:
                raise FibldmError("DICOM is a series with its segmentation; no mask was given", "write NIfTI instead")
            request = SynthesisRequest(labels, stem_of(mask), 0, self._asked(mask))
            if self.dicom is not None and labels is not None:
                self.dicom.check(labels.grid, self.synthesizer.names, self.synthesizer.intensity)
            allow = self.settings.allow_extrapolation
            self._prepared[mask] = self.synthesizer.prepare(request, allow_extrapolation=allow)
            self._tell_tiles(self._prepared[mask])
        return self._prepared[mask]

    def _tell_tiles(self, prepared: PreparedMask) -> None:
        if (tiles := self.synthesizer.tiles(prepared, self.settings.sampling)) is not None:
            size, trained = (" x ".join(map(str, shape)) for shape in (prepared.grid.shape, self.synthesizer.grid.size))
            _logger.info(
                "%s: its grid, %s voxels, is larger than that of training, %s: drawn as one from %d overlapping tiles",
                *(prepared.request.name, size, trained, len(tiles.windows)),
            )

    def _asked(self, mask: MaskSource | None) -> dict[str, Any]:
        return self.settings.asked_of(None if mask is None else mask.file, self.synthesizer.beside)

    def _tell(self, mask: MaskSource | None) -> None:
        """Say what is asked beside the masks, or beside one of them."""
        each = f"of each mask its own, of {stem_of(mask)} " if self.settings.each_its_own else ""
        values = read(self.synthesizer.beside, self._asked(mask))
        for name, kind in self.synthesizer.beside.items():
            if name in self.synthesizer.conditions:
                _logger.info("%s: %s%s", name, each, kind.told(values[name]))

    def _labels(self, mask: MaskSource) -> Volume:
        """Of a mask, which becomes the one used last."""
        labels = mask.labels
        for other in self._recent.use(mask):
            self._prepared.pop(other, None)
        return labels

    def _write(self, job: Job, labels: Volume | None, made: Synthesis) -> None:
        path, request = self.path(job), self._request(job)
        if self.dicom is None or labels is None:
            if job.mask is not None:
                self._keep(job.mask)
            write_synthetic(path, made.channels, {**request, **made.provenance})
        else:
            self.dicom.write(
                path,
                made.volume,
                labels,
                names=self.synthesizer.names,
                intensity=self.synthesizer.intensity,
                request=request,
                provenance=made.provenance,
            )

    def _keep(self, mask: MaskSource) -> None:
        """Write the mask as used, or see that it lies there; once for all its volumes."""
        if mask not in self._kept:
            keep_mask(self.folder / "masks" / f"{mask.stem}.nii.gz", self._labels(mask))
            self._kept.add(mask)

    def _request(self, job: Job) -> dict[str, Any]:
        """What tells whether a volume that lies there is the one that is wanted."""
        decisive = [self.synthesizer.source, self.settings.sampling.to_dict(), job.number]
        asked = read(self.synthesizer.beside, self._asked(job.mask))
        decisive += [known for known in [asked.pop("covariates")] if known]
        decisive += [check.decisive for check in self.checks]
        kinds = self.synthesizer.beside
        decisive += [{name: kinds[name].recorded(value)} for name, value in asked.items() if value is not None]
        decisive += self._site_mark
        request = {
            "mask": job.mask and job.mask.file.name,
            "mask_sha256": job.mask and job.mask.sha256,
            "request": hash_value(decisive),
        }
        if self.dicom is not None:
            request["dicom_request"] = self.dicom.fingerprint(self.synthesizer.names)
        return request


def tell_unmarked(synthesizer: Synthesizer, sampling: SamplingSettings) -> None:
    """Say so where volumes will have no mark in their voxels."""
    mark = synthesizer.mark_of(synthesizer.as_trained(sampling))
    if not mark["voxels"]:
        _logger.info("only header and sidecar say that these volumes are synthetic, not their voxels: %s", mark["why"])


def refusal(refused: Sequence[FibldmError], masks: int) -> FibldmError:
    """One error that tells all that are refused of so many masks."""
    told = list(dict.fromkeys(error.message for error in refused))
    if len(told) == 1:
        return refused[0]
    shown = told[:_SHOWN] + [f"and {len(told) - _SHOWN} more"] * (len(told) > _SHOWN)
    remedies = dict.fromkeys(error.remedy for error in refused if error.remedy)
    return FibldmError(
        f"{len(refused)} of {masks} masks are refused, nothing was made:" + "".join(f"\n  {line}" for line in shown),
        "; ".join(remedies),
    )
