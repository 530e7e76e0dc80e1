"""Mask files in, marked files out: the whole of ``fibldm synthesize``, on whatever engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError
from fibldm.locks import alone
from fibldm.runs.stages import begun
from fibldm.runs.values import require_switches
from fibldm.shards import Shard
from fibldm.synthesis.loading import brings_mask
from fibldm.synthesis.mask_source import jobs_of
from fibldm.synthesis.outputs import Output
from fibldm.synthesis.settings import OF_SAMPLING, SamplingSettings, SynthesisSettings
from fibldm.synthesis.shared_work import Desk, DeskKit, Generator, draw, missing, own_device
from fibldm.volumes.masks import find_masks
from fibldm.workers import engine_of


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
    workers: int | None = None,
    cluster: str | None = None,
    **options: Any,
) -> list[Path]:
    """Write volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    Without masks they follow none, and lie on the model grid: of a generator that was trained so, or of any other where
    that is asked for.

    All masks are looked at before the first volume is made.

    Several processes, as torchrun starts them, share the volumes; each may have workers of its own.

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
        workers: processes that draw at the same time; None is this one alone. More than one needs a main module that
            can be imported (``if __name__ == "__main__"``).
        cluster: address of a scheduler of Dask, whose workers draw instead; they must see the weights, ``masks`` and
            ``out``.
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
    engine, shard = engine_of(workers, cluster), Shard.from_environment()
    if (run_dir is None) == (bundle is None):
        raise FibldmError(f"either a run or a bundle must be given; got {run_dir} and {bundle}", "give one of them")
    if not masks and (strength != 1 or others) and not (run_dir is not None and _steers_without_masks(Path(run_dir))):
        raise FibldmError("without masks no ControlNet counts; got a strength", "leave it out, or give `masks`")
    may_draw = bool(masks) or unconditional
    if run_dir is not None and not may_draw and any(brings_mask(Path(run_dir), kind) for kind in begun(run_dir)):
        raise _needs_masks()
    if run_dir is None and (checkpoint != "best" or strength != 1 or others):
        raise FibldmError("a bundle has one set of weights, without choice of checkpoint or strength", "leave it out")
    generator = Generator(run_dir, bundle, not masks, trust, checkpoint, strength, others)
    synthesizer = generator.loaded((device or own_device()) if engine.here else "cpu")
    if not may_draw and synthesizer.network.sees_mask:
        raise _needs_masks()
    asked = SynthesisSettings.of(settings or synthesizer.sampling, **options)
    output, folder = Output(synthesizer, Path(out), asked), Path(out)
    jobs = shard.take(jobs_of(files, synthesizer.names, asked.count))
    sources = {job.mask.file: job.mask for job in jobs if job.mask is not None}
    kit = DeskKit(generator, folder, asked, device, Desk(output, sources))
    remedy = "wait until that has ended, choose another `out`, or let them share the work by RANK and WORLD_SIZE"
    with alone(folder / f".synthesize{shard.suffix}.lock", str(out), remedy):
        lacking = missing(engine, kit, jobs, shown=shard.is_first)
        rejected = draw(engine, kit, lacking, shown=shard.is_first)
        output.conclude(jobs, rejected)
    return [output.path(job) for job in jobs]


def _needs_masks() -> FibldmError:
    return FibldmError(
        "masks must be given to this generator, as its volumes follow them; got none",
        "give `masks` or `data`, or `unconditional` for volumes that follow no mask",
    )


def _steers_without_masks(run_dir: Path) -> bool:
    """Whether the ControlNet of a run follows something else than masks."""
    return any(kind.brings_mask and not brings_mask(run_dir, kind) for kind in begun(run_dir))
