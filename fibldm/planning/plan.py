"""``fibldm plan``: memory and minutes that each stage will need, before it is trained, and settings that fit."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError, unknown_choice
from fibldm.planning.timing import count, time_encoding, time_stage
from fibldm.planning.traced_step import Request, StageMemory, is_trained, stage_parser, trace_stage
from fibldm.progress import track
from fibldm.runs.config_files import read_configuration
from fibldm.runs.stages import DEFAULT_RECIPE, kind_of, taught, trained
from fibldm.volumes.coverage import measure_coverage
from fibldm.volumes.datalist import read_datalist

DEVICES = ("cpu", "cuda")

# The rest is for what is not traced: the CUDA context, workspaces, or on a CPU everything else that runs.
_USABLE = 0.9
_PATCH_STEP = 16
LARGEST_BATCH = 512  # larger ones are not looked for: tracing takes the longer, and nobody trains so
_TIMES = ("minutes", "seconds_per_step", "steps", "epochs", "validations", "seconds_per_validation")


def plan(request: Request, *, memory: float | None = None, controlnet: bool = False) -> dict[str, Any]:
    """The memory and the minutes of every stage, and settings that fit.

    Args:
        request: what is planned.
        memory: bytes of the device; None asks this machine.
        controlnet: plan one as well, on stage 2 as ``request`` has it; otherwise see `by_default_recipe`.

    Returns:
        ``device``, ``imitated``, ``memory_gb`` and ``stages``, each with ``configs``, which are those that `Request`
        does not name for all stages, with ``peak_gb``, what it consists of, whether it
        ``fits``, and what would: ``largest_batch`` (of at most 512, and of at most what an epoch draws: all views and
        patches of all patients), ``largest_batch_checkpointed``, for the autoencoder ``largest_patch``. Where the
        device is there, and the stage fits into its memory, a stage also has ``minutes``, and what they are made of:
        ``seconds_per_step``, ``steps`` of an epoch, ``epochs``, ``validations``, ``seconds_per_validation``; and
        ``encoding_minutes`` are those of the latents. Otherwise these are None. ``grid`` is what the model grid holds
        of the volumes and of every label.

    Raises:
        FibldmError: the device is unknown, or the configuration or the data are refused.
    """
    if request.device not in DEVICES:
        raise unknown_choice("device", request.device, DEVICES)
    available = device_memory(request.device) if memory is None else memory
    grid = measure_coverage(request.work, stage_parser("autoencoder", request).get_parsed_content("grid"))
    request, left_out = (request, set()) if controlnet else by_default_recipe(request)
    named = [stage for stage in trained() if stage not in left_out and not taught(stage)]  # a student needs its teacher
    planned = [stage for stage in named if is_trained(stage, request)]
    stages = {stage: _described(stage, request, available) for stage in track(planned, "plan")}
    fits_here = all(stage["minutes"] is not None for stage in stages.values())
    return {
        "device": request.device,
        "imitated": request.imitated,
        "memory_gb": available / 1e9,
        "grid": {**grid.to_dict(), "sentence": grid.sentence(), "lost": grid.lost},
        "encoding_minutes": time_encoding(request) / 60 if fits_here else None,
        "stages": stages,
    }


def by_default_recipe(request: Request) -> tuple[Request, set[str]]:
    """A request with the stages' own configurations of the default recipe, and the stages that this leaves out.

    Stage 2 keeps what it has where ``request`` says how it sees the mask, or where no case has one.

    Raises:
        FibldmError: the configuration or the data are refused.
    """
    recipe = read_configuration(DEFAULT_RECIPE)
    left_out = {stage for stage in trained() if stage in recipe and recipe[stage] is None}
    says = "mask_way" in request.overrides or stage_parser("diffusion", request).get("mask_way") is not None
    if says or not any("label" in case for case in read_datalist(request.work)["training"]):
        return request, left_out
    own = {**request.stage_configs}
    for stage in trained():
        own[stage] = (*own.get(stage, ()), *(recipe.get(stage) or {}).get("configs", ()))
    return replace(request, stage_configs=own), left_out


def device_memory(device: str) -> float:
    """Bytes of memory of this machine's device.

    Raises:
        FibldmError: there is no such device.
    """
    if device == "cpu":
        pages = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        return 1024 * float(pages)
    if not torch.cuda.is_available():
        raise FibldmError("the memory of a CUDA device must be known; this machine has none", "give --memory in GB")
    return float(torch.cuda.get_device_properties(0).total_memory)


def largest_batch(stage: str, request: Request, usable: float, most: int = LARGEST_BATCH) -> int:
    """How many cases, of at most ``most``, a batch may hold in ``usable`` bytes; 0: not even one.

    Found by the secant method: above some size a step needs about the same for each case.

    Raises:
        FibldmError: as `trace_stage`.
    """
    less, more = (32, 64) if most > 64 else ((most + 1) // 2, most)
    peaks = {more: trace_stage(stage, request.changed(batch_size=more)).peak}
    if less == more or (more == most and peaks[more] <= usable):
        return more if peaks[more] <= usable else 0
    peaks[less] = trace_stage(stage, request.changed(batch_size=less)).peak
    for _ in range(2):
        per_case = max(1.0, (peaks[more] - peaks[less]) / (more - less))
        size = min(most, max(0, int(more + (usable - peaks[more]) / per_case)))
        if size in (0, more):
            break
        peaks[size] = trace_stage(stage, request.changed(batch_size=size)).peak
        less, more = more, size
    return max((size for size, peak in peaks.items() if peak <= usable), default=0)


def largest_patch(traced: StageMemory, usable: float) -> list[int]:
    """The largest cube to train a traced autoencoder on, within the grid, its edge a multiple of 16; 0: none fits.

    On a grid of slices it is the largest square.
    """
    per_voxel = traced.step / math.prod(traced.size)
    axes = [length for length in traced.grid if length > 1]
    edge = max(0.0, (usable - traced.resident) / per_voxel) ** (1 / len(axes))
    largest = int(min(edge, *axes) // _PATCH_STEP * _PATCH_STEP)
    return [largest if length > 1 else 1 for length in traced.grid]


def _described(stage: str, request: Request, memory: float) -> dict[str, Any]:
    traced, usable = trace_stage(stage, request), _USABLE * memory
    checkpointed = request.changed(activation_checkpointing=True)
    most = min(LARGEST_BATCH, count(stage, request)["draws"])
    return {
        "configs": list(request.stage_configs.get(stage, ())),
        "batch_size": traced.batch_size,
        "input_size": list(traced.size),
        "parameters": traced.parameters,
        "peak_gb": traced.peak / 1e9,
        "resident_gb": traced.resident / 1e9,
        "step_gb": traced.step / 1e9,
        "validation_gb": traced.validation / 1e9,
        "fits": traced.peak <= usable,
        "largest_batch": largest_batch(stage, request, usable, most),
        "largest_batch_checkpointed": largest_batch(stage, checkpointed, usable, most),
        **({"largest_patch": largest_patch(traced, usable)} if not kind_of(stage).on_latents else {}),
        **_timed(stage, request, traced),
    }


def _timed(stage: str, request: Request, traced: StageMemory) -> dict[str, Any]:
    """The minutes of a stage and what they are made of; None where its steps cannot be tried out here."""
    if request.imitated or traced.peak > _USABLE * device_memory(request.device):
        return dict.fromkeys(_TIMES)
    found = time_stage(stage, request)
    return {name: getattr(found, name) for name in _TIMES}
