"""Mask files in, marked files out; what lies there already and was made in the same way is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json
from fibldm.locks import alone
from fibldm.shards import Shard
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.synthesizer import Synthesis, Synthesizer, Wanted
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import as_labels, find_masks, keep_mask, mask_stem, read_mask
from fibldm.volumes.writer import sidecar, write_synthetic

if TYPE_CHECKING:
    from fibldm.volumes.dicom.output import DicomOutput


_SHOWN = 10  # refused masks in one error


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

    def missing(self, jobs: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
        """The jobs whose volumes do not lie there yet, after a look at all their masks, before the first is made.

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
        return missing

    def write(self, jobs: Sequence[tuple[Path, int]]) -> list[Path]:
        """Make and write some volumes together.

        Args:
            jobs: mask files (NIfTI, or DICOM segmentations whose segments have the names of the run's labels), and
                which volume of each.

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
            self._write(*job, one.mask, synthesis)
        return [self.path(*job) for job in jobs]

    def path(self, mask_file: Path, number: int) -> Path:
        """The volume's file, or the folder of its series."""
        name = f"{mask_stem(mask_file)}_{number:03d}"
        return self.folder / (f"{name}.nii.gz" if self.dicom is None else name)

    def _is_there(self, mask_file: Path, number: int) -> bool:
        path, name = self.path(mask_file, number), f"{mask_stem(mask_file)}_{number:03d}"
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
        if self.dicom is None:
            self._keep_mask(mask_file, read_mask(mask_file, self.synthesizer.names))
        else:
            self.dicom.check_whole(path)
        return True

    def _wanted(self, mask_file: Path, number: int) -> Wanted:
        mask = read_mask(mask_file, self.synthesizer.names)
        if self.dicom is not None:
            self.dicom.check(mask.grid, self.synthesizer.names, self.synthesizer.intensity)
        return Wanted(mask, mask_stem(mask_file), number, self.covariates)

    def _write(self, mask_file: Path, number: int, mask: Volume, made: Synthesis) -> None:
        path, request = self.path(mask_file, number), self._request(mask_file, number)
        if self.dicom is None:
            self._keep_mask(mask_file, mask)
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

    def _request(self, mask_file: Path, number: int) -> dict[str, Any]:
        """What tells whether a volume that lies there is the one that is wanted."""
        decisive = [self.synthesizer.source, self.settings.to_dict(), number]
        if known := self.synthesizer.covariates.read(self.covariates):
            decisive.append(known)
        request = {
            "mask": mask_file.name,
            "mask_sha256": hash_file(mask_file),
            "request": hash_value(decisive),
        }
        if self.dicom is not None:
            request["dicom_request"] = self.dicom.fingerprint(self.synthesizer.names)
        return request


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
    trust: bool = False,
    device: str | torch.device | None = None,
    dicom: "DicomOutput | None" = None,
) -> list[Path]:
    """Write ``count`` volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    All masks are looked at before the first volume is made.

    Several processes, as torchrun starts them, share the volumes.

    Args:
        run_dir: a finished run, see `Synthesizer.from_run`; None where there is a ``bundle``.
        masks: NIfTI files and DICOM segmentations, and folders of them.
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
        trust: make networks of any class that a bundle names.
        device: None takes CUDA where there is one, for each process its own.
        dicom: writes DICOM instead of NIfTI.

    Returns:
        What this process wrote.

    Raises:
        FibldmError: no mask, one that is refused, as covariates may be, a run that is not finished, or a bundle that
            is refused; none of both, or both; or another process writes to ``out``.
    """
    if batch_size < 1:
        raise FibldmError(f"batch_size must be at least 1; got {batch_size}")
    files, shard = find_masks([Path(mask) for mask in masks]), Shard.from_environment()
    chosen = device or (f"cuda:{shard.local}" if torch.cuda.is_available() else "cpu")
    if (run_dir is None) == (bundle is None):
        raise FibldmError(f"either a run or a bundle must be given; got {run_dir} and {bundle}", "give one of them")
    if run_dir is not None:
        choices: dict[str, Any] = {"checkpoint": checkpoint, "strength": strength, "others": others}
        synthesizer = Synthesizer.from_run(run_dir, **choices, device=chosen)
    elif checkpoint != "best" or strength != 1 or others or bundle is None:
        raise FibldmError("a bundle has one set of weights, without choice of checkpoint or strength", "leave it out")
    else:
        synthesizer = Synthesizer.from_bundle(bundle, trust=trust, device=chosen)
    output = Output(synthesizer, Path(out), settings, allow_extrapolation, dicom, covariates or {})
    jobs = shard.take([(file, number) for file in files for number in range(count)])
    remedy = "wait until that has ended, choose another --out, or let them share the work by RANK and WORLD_SIZE"
    with alone(Path(out) / f".synthesize{shard.suffix}.lock", str(out), remedy):
        missing = output.missing(jobs)
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        console = Console(stderr=True)
        hidden = not (console.is_terminal and shard.is_first)
        for batch in track(batches, "synthesize", console=console, disable=hidden):
            output.write(batch)
    return [output.path(*job) for job in jobs]
