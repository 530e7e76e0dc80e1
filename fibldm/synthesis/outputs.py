"""Mask files in, marked files out; what lies there already and was made in the same way is kept."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json
from fibldm.locks import alone
from fibldm.progress import track
from fibldm.runs.stages import begun
from fibldm.runs.values import require_switches
from fibldm.shards import Shard
from fibldm.synthesis.asked import read
from fibldm.synthesis.checking import Check, OutsideRanges, Rejected, summary
from fibldm.synthesis.loading import brings_mask
from fibldm.synthesis.mask_source import Job, MaskSource, RecentMasks, jobs_of, stem_of
from fibldm.synthesis.request import PreparedMask, Synthesis, SynthesisRequest
from fibldm.synthesis.settings import OF_SAMPLING, SamplingSettings, SynthesisSettings
from fibldm.synthesis.synthesizer import Synthesizer
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import find_masks, keep_mask
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
        numbers: dict[MaskSource | None, list[int]] = {}
        for mask, number in jobs:
            numbers.setdefault(mask, []).append(number)
        missing: set[Job] = set()
        refused: list[FibldmError] = []
        for mask, asked in numbers.items():
            own = {job for job in (Job(mask, number) for number in asked) if not self._is_there(job)}
            missing |= own
            try:
                if own:
                    self._prepare(mask)
            except FibldmError as error:
                refused.append(error)
        if refused:
            raise _together(refused, len({job.mask for job in missing}))
        for mask in list(numbers)[:1]:
            self._tell(mask)
        if missing:
            tell_unmarked(self.synthesizer, self.settings.sampling)
        return [job for job in jobs if job in missing]

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

        Raises:
            FibldmError: see `write`.
        """
        missing = [job for job in jobs if not self._is_there(job)]
        prepared = [self._prepare(job.mask).numbered(job.number) for job in missing]
        made = self.synthesizer.attempt(
            prepared,
            settings=self.settings.sampling,
            check=self.settings.check,
            reject_copies=self.settings.known_scans,
        )
        for job, part, attempt in zip(missing, prepared, made, strict=True):
            if isinstance(attempt, Synthesis):
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


def _together(refused: Sequence[FibldmError], masks: int) -> FibldmError:
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


def _needs_masks() -> FibldmError:
    return FibldmError(
        "masks must be given to this generator, as its volumes follow them; got none",
        "give `masks` or `data`, or `unconditional` for volumes that follow no mask",
    )


def _steers_without_masks(run_dir: Path) -> bool:
    """Whether the ControlNet of a run follows something else than masks."""
    return any(kind.brings_mask and not brings_mask(run_dir, kind) for kind in begun(run_dir))


def synthesize_files(
    run_dir: str | Path | None,
    masks: Sequence[str | Path],
    out: str | Path,
    *,
    settings: SynthesisSettings | SamplingSettings | None = None,
    bundle: str | Path | None = None,
    unconditional: bool = False,
    trust: bool = False,
    checkpoint: str = "best",
    strength: float = 1.0,
    others: Mapping[str | Path, float] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> list[Path]:
    """Write volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    Without masks they follow none, and lie on the model grid: of a generator that was trained so, or of any other where
    that is asked for.

    All masks are looked at before the first volume is made.

    Several processes, as torchrun starts them, share the volumes.

    Args:
        run_dir: a finished run, see `Synthesizer.from_run`; None where there is a ``bundle``.
        masks: files and folders of them, see `find_masks`.
        out: folder to write to; see `Output`.
        settings: what is asked, or of that only how to sample; None as the bundle does by default, or for a run as
            `SamplingSettings` are.
        bundle: see `Synthesizer.from_bundle`.
        unconditional: draw without masks from a generator that knows masks: by stage 2 where that knows none, else with
            a mask of which all is unknown.
        trust: see `Synthesizer.from_bundle`.
        checkpoint: which weights, see `Synthesizer.from_run`.
        strength: of the ControlNet, as are ``others``: see `Synthesizer.from_run`.
        others: runs with further ControlNets, and their strengths.
        device: None takes CUDA where there is one, for each process its own.
        **options: of `SynthesisSettings` by their names, over ``settings``: ``count=4, covariates={"age": 63}``.

    Returns:
        What this process wrote.

    Raises:
        FibldmError: no mask, or one that is refused, as covariates and adapters may be, masks for a generator without
            any, a run that is not finished, or a bundle that is refused; none of both, or both; an option is unknown or
            has another type; or another process writes to ``out``.
        OutsideRanges: a check left volumes out; the others are written.
    """
    require_switches(unconditional=unconditional, trust=trust)
    certain = {name: value for name, value in options.items() if bundle is None or name not in OF_SAMPLING}
    early = SynthesisSettings.of(settings, **certain)
    _ = early.files.dicom  # refused before the generator is loaded
    if masks and unconditional:
        raise FibldmError("volumes follow masks, or they are unconditional; got masks and `unconditional`", "give one")
    files: list[Path | None] = [*find_masks([Path(mask) for mask in masks])] if masks else [None]
    early.check_masks([file for file in files if file is not None])
    shard = Shard.from_environment()
    on = device or (f"cuda:{shard.local}" if torch.cuda.is_available() else "cpu")
    if (run_dir is None) == (bundle is None):
        raise FibldmError(f"either a run or a bundle must be given; got {run_dir} and {bundle}", "give one of them")
    if not masks and (strength != 1 or others) and not (run_dir is not None and _steers_without_masks(Path(run_dir))):
        raise FibldmError("without masks no ControlNet counts; got a strength", "leave it out, or give `masks`")
    may_draw = bool(masks) or unconditional
    if run_dir is not None and not may_draw and any(brings_mask(Path(run_dir), kind) for kind in begun(run_dir)):
        raise _needs_masks()
    if run_dir is not None:
        choices: dict[str, Any] = {"checkpoint": checkpoint, "strength": strength, "others": others}
        synthesizer = Synthesizer.from_run(run_dir, unconditional=not masks, **choices, device=on)
    elif checkpoint != "best" or strength != 1 or others or bundle is None:
        raise FibldmError("a bundle has one set of weights, without choice of checkpoint or strength", "leave it out")
    else:
        synthesizer = Synthesizer.from_bundle(bundle, trust=trust, device=on)
    if not may_draw and synthesizer.network.sees_mask:
        raise _needs_masks()
    asked = SynthesisSettings.of(settings or synthesizer.sampling, **options)
    output = Output(synthesizer, Path(out), asked)
    jobs = shard.take(jobs_of(files, synthesizer.names, asked.count))
    remedy = "wait until that has ended, choose another `out`, or let them share the work by RANK and WORLD_SIZE"
    with alone(Path(out) / f".synthesize{shard.suffix}.lock", str(out), remedy):
        missing, rejected = output.missing(jobs), list[Rejected]()
        batches = [missing[start : start + asked.batch_size] for start in range(0, len(missing), asked.batch_size)]
        for batch in track(batches, "synthesize", shown=shard.is_first):
            rejected += output.attempt(batch)
        output.conclude(jobs, rejected)
    return [output.path(job) for job in jobs]
