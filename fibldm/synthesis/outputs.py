"""Mask files in, marked files out; what lies there already and was made in the same way is kept."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json
from fibldm.locks import alone
from fibldm.progress import track
from fibldm.shards import Shard
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.synthesizer import UNCONDITIONAL, Synthesis, Synthesizer, Wanted
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import as_labels, find_masks, hash_mask, keep_mask, mask_stem, read_mask
from fibldm.volumes.writer import sidecar, write_synthetic

if TYPE_CHECKING:
    from fibldm.volumes.dicom.output import DicomOutput


_SHOWN = 10  # refused masks in one error

_logger = logging.getLogger("fibldm")

Job = tuple[Path | None, int]
"""A mask file, and which of its volumes; None is no mask, for a volume that follows none."""


class VolumeLiesThere(FibldmError):
    """Another volume has the name of one that is to be written."""


@dataclass(frozen=True)
class Output:
    """Where and how the volumes of a synthesizer are written.

    Attributes:
        synthesizer: makes the volumes.
        folder: gets ``<mask stem>_<number:03d>.nii.gz`` with its sidecar, and the masks as used in ``masks/``.
        settings: how to sample.
        allow_extrapolation: go on where a mask lies outside what the training data covered.
        dicom: writes a DICOM series ``<mask stem>_<number:03d>/`` and the mask as a segmentation; None is NIfTI.
        covariates: what is asked of the patients beside the masks, by name; all else is unknown.
    """

    synthesizer: Synthesizer
    folder: Path
    settings: SamplingSettings
    allow_extrapolation: bool = False
    dicom: "DicomOutput | None" = None
    covariates: Mapping[str, object] = field(default_factory=dict)

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs whose volumes do not lie there yet, after a look at all their masks, before the first is made.

        What is asked of covariates is said.

        Raises:
            FibldmError: as `write`; of several masks that are refused, all are told.
        """
        missing = [job for job in jobs if not self._is_there(*job)]
        refused: list[FibldmError] = []
        files = dict.fromkeys(file for file, _ in missing)
        for file in files:
            try:
                self.synthesizer.check(self._wanted(file, 0), allow_extrapolation=self.allow_extrapolation)
            except FibldmError as error:
                refused.append(error)
        told = list(dict.fromkeys(error.message for error in refused))
        if len(told) == 1:
            raise refused[0]
        if refused:
            shown = told[:_SHOWN] + [f"and {len(told) - _SHOWN} more"] * (len(told) > _SHOWN)
            remedies = dict.fromkeys(error.remedy for error in refused if error.remedy)
            raise FibldmError(
                f"{len(refused)} of {len(files)} masks are refused, nothing was made:"
                + "".join(f"\n  {line}" for line in shown),
                "; ".join(remedies),
            )
        if (encoding := self.synthesizer.covariates).kinds:
            _logger.info("covariates: %s", encoding.told(encoding.read(self.covariates)))
        return missing

    def write(self, jobs: Sequence[Job]) -> list[Path]:
        """Make and write some volumes together.

        Args:
            jobs: mask files (label maps, or segmentations whose segments have the names of the run's labels) or none,
                and which volume of each.

        Returns:
            The files, or the folders of series, in the order of the jobs.

        Raises:
            FibldmError: another volume or mask of this name lies there, a mask or covariates are refused, or a mask
                cannot be told in DICOM.
        """
        missing = [job for job in jobs if not self._is_there(*job)]
        wanted = [self._wanted(*job) for job in missing]
        made = self.synthesizer.batch(wanted, settings=self.settings, allow_extrapolation=self.allow_extrapolation)
        for job, one, synthesis in zip(missing, wanted, made, strict=True):
            self._write(job, one.mask, synthesis)
        return [self.path(*job) for job in jobs]

    def path(self, mask_file: Path | None, number: int) -> Path:
        """The volume's file, or the folder of its series."""
        name = f"{_stem(mask_file)}_{number:03d}"
        return self.folder / (f"{name}.nii.gz" if self.dicom is None else name)

    def _is_there(self, mask_file: Path | None, number: int) -> bool:
        path, name = self.path(mask_file, number), f"{_stem(mask_file)}_{number:03d}"
        other = self.folder / (name if self.dicom is None else f"{name}.nii.gz")
        if other.exists():
            raise VolumeLiesThere(f"{other} lies there already, in another format", "choose another --out folder")
        if not path.exists():
            return False
        there = read_json(sidecar(path))
        if any(there.get(key) != value for key, value in self._request(mask_file, number).items()):
            raise VolumeLiesThere(
                f"{path} lies there already and was made from another mask, run or settings",
                "choose another --out folder",
            )
        if self.dicom is not None:
            self.dicom.check_whole(path)
        elif mask_file is not None:
            self._keep_mask(mask_file, read_mask(mask_file, self.synthesizer.names))
        return True

    def _wanted(self, mask_file: Path | None, number: int) -> Wanted:
        if mask_file is None:
            if self.dicom is not None:
                raise FibldmError("DICOM is a series with its segmentation; no mask was given", "write NIfTI instead")
            return Wanted(None, UNCONDITIONAL, number, self.covariates)
        mask = read_mask(mask_file, self.synthesizer.names)
        if self.dicom is not None:
            self.dicom.check(mask.grid, self.synthesizer.names, self.synthesizer.intensity)
        return Wanted(mask, mask_stem(mask_file), number, self.covariates)

    def _write(self, job: Job, mask: Volume | None, made: Synthesis) -> None:
        path, request = self.path(*job), self._request(*job)
        if self.dicom is None or mask is None:
            if job[0] is not None and mask is not None:
                self._keep_mask(job[0], mask)
            write_synthetic(path, made.channels, {**request, **made.provenance})
        else:
            self.dicom.write(
                path,
                made.volume,
                as_labels(mask),
                names=self.synthesizer.names,
                intensity=self.synthesizer.intensity,
                request=request,
                provenance=made.provenance,
            )

    def _keep_mask(self, mask_file: Path, mask: Volume) -> None:
        keep_mask(self.folder / "masks" / f"{mask_stem(mask_file)}.nii.gz", as_labels(mask))

    def _request(self, mask_file: Path | None, number: int) -> dict[str, Any]:
        """What tells whether a volume that lies there is the one that is wanted."""
        decisive = [self.synthesizer.source, self.settings.to_dict(), number]
        if known := self.synthesizer.covariates.read(self.covariates):
            decisive.append(known)
        request = {
            "mask": mask_file and mask_file.name,
            "mask_sha256": mask_file and hash_mask(mask_file),
            "request": hash_value(decisive),
        }
        if self.dicom is not None:
            request["dicom_request"] = self.dicom.fingerprint(self.synthesizer.names)
        return request


def _stem(mask_file: Path | None) -> str:
    return UNCONDITIONAL if mask_file is None else mask_stem(mask_file)


def _needs_masks() -> FibldmError:
    return FibldmError(
        "masks must be given to this generator, as its volumes follow them; got none",
        "give --masks or --data, or --unconditional for volumes that follow no mask",
    )


def synthesize_files(
    run_dir: str | Path | None,
    masks: Sequence[str | Path],
    out: str | Path,
    *,
    count: int,
    settings: SamplingSettings,
    batch_size: int = 1,
    allow_extrapolation: bool = False,
    covariates: Mapping[str, object] | None = None,
    checkpoint: str = "best",
    strength: float = 1.0,
    others: Mapping[str | Path, float] | None = None,
    bundle: str | Path | None = None,
    unconditional: bool = False,
    trust: bool = False,
    device: str | torch.device | None = None,
    dicom: "DicomOutput | None" = None,
) -> list[Path]:
    """Write ``count`` volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    Without masks they follow none, and lie on the model grid: of a generator that was trained so, or of any other where
    that is asked for.

    All masks are looked at before the first volume is made.

    Several processes, as torchrun starts them, share the volumes.

    Args:
        run_dir: a finished run, see `Synthesizer.from_run`; None where there is a ``bundle``.
        masks: files and folders of them, see `find_masks`.
        out: folder to write to; see `Output`.
        count: volumes per mask.
        settings: how to sample.
        batch_size: volumes that are sampled together.
        allow_extrapolation: go on where a mask lies outside what the training data covered.
        covariates: what is asked of the patients beside the masks, such as ``{"age": 63, "sex": "F"}``; all else is
            unknown.
        checkpoint: which weights, see `Synthesizer.from_run`.
        strength: of the ControlNet, as are ``others``: see `Synthesizer.from_run`.
        others: runs with further ControlNets, and their strengths.
        bundle: see `Synthesizer.from_bundle`.
        unconditional: draw without masks from a generator that knows masks: by stage 2 where that knows none, else with
            a mask of which all is unknown.
        trust: see `Synthesizer.from_bundle`.
        device: None takes CUDA where there is one, for each process its own.
        dicom: writes DICOM instead of NIfTI.

    Returns:
        What this process wrote.

    Raises:
        FibldmError: no mask, or one that is refused, as covariates may be, masks for a generator without any, a run
            that is not finished, or a bundle that is refused; none of both, or both; or another process writes to
            ``out``.
    """
    if batch_size < 1:
        raise FibldmError(f"batch_size must be at least 1; got {batch_size}")
    if masks and unconditional:
        raise FibldmError("volumes follow masks, or they are unconditional; got masks and --unconditional", "give one")
    files: list[Path | None] = [*find_masks([Path(mask) for mask in masks])] if masks else [None]
    shard = Shard.from_environment()
    chosen = device or (f"cuda:{shard.local}" if torch.cuda.is_available() else "cpu")
    if (run_dir is None) == (bundle is None):
        raise FibldmError(f"either a run or a bundle must be given; got {run_dir} and {bundle}", "give one of them")
    if not masks and (strength != 1 or others):
        raise FibldmError("without masks no ControlNet counts; got a strength", "leave it out, or give --masks")
    asked = bool(masks) or unconditional
    if run_dir is not None and not asked and (Path(run_dir) / "controlnet").exists():
        raise _needs_masks()
    if run_dir is not None:
        choices: dict[str, Any] = {"checkpoint": checkpoint, "strength": strength, "others": others}
        synthesizer = Synthesizer.from_run(run_dir, unconditional=not masks, **choices, device=chosen)
    elif checkpoint != "best" or strength != 1 or others or bundle is None:
        raise FibldmError("a bundle has one set of weights, without choice of checkpoint or strength", "leave it out")
    else:
        synthesizer = Synthesizer.from_bundle(bundle, trust=trust, device=chosen)
    if not asked and synthesizer.network.sees_mask:
        raise _needs_masks()
    output = Output(synthesizer, Path(out), settings, allow_extrapolation, dicom, covariates or {})
    jobs = shard.take([(file, number) for file in files for number in range(count)])
    remedy = "wait until that has ended, choose another --out, or let them share the work by RANK and WORLD_SIZE"
    with alone(Path(out) / f".synthesize{shard.suffix}.lock", str(out), remedy):
        missing = output.missing(jobs)
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        for batch in track(batches, "synthesize", shown=shard.is_first):
            output.write(batch)
    return [output.path(*job) for job in jobs]
