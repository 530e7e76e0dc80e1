"""Speed and memory of FibLDM on this machine, measured side by side in one run: one JSON, one table.

    python scripts/benchmark.py [--device cuda] [--quick] [--options] [--out benchmark.json]

A training step is FibLDM's own: an epoch of `fibldm.training.stage.Stage`, without the validation and the checkpoint
that end it, divided by its steps. It alternates with a bare PyTorch loop (forward, loss, backward, clip, optimiser
step) over the same batches, which that loop finds prepared in memory. Beside the peak memory of a step stands what
`fibldm plan` says of it; what `torch.compile` needs to compile is in neither. Phantoms and weights, which
decide nothing about speed, are made in a temporary folder.
"""

import argparse
import copy
import ctypes
import gc
import logging
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import monai
import numpy as np
import torch
from ignite.engine import Events
from monai.transforms import Compose
from torch import Tensor

import fibldm
from fibldm.cli.output import emit_error
from fibldm.datasets.preparation import prepare
from fibldm.errors import FibldmError
from fibldm.files import write_json
from fibldm.models.denoiser import Denoiser
from fibldm.models.samplers import sampler
from fibldm.models.tiling import tiled_decode
from fibldm.models.timesteps import sampling_times
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.planning.traced_step import Request, trace_stage
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.stages import TABLE, usual
from fibldm.runs.workflow import StageWorkflow
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.training.inferers import Precision, fast_bfloat16
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.transforms import AsPlainTensorsd

OURS, BARE = "fibldm", "bare"
SIZE = {"autoencoder": {"epochs": 1}, "latents": {"views": 8}, "diffusion": {"epochs": 1}, "controlnet": {"epochs": 1}}

Meter = Callable[[str, int], AbstractContextManager[None]]
"""``with meter(name, steps):`` measures a block of that many steps."""


@dataclass(frozen=True)
class Bench:
    """Where and how it is measured.

    Attributes:
        folder: gets the phantoms, the work folder and the runs.
        device: "cpu" or "cuda".
        precision: of training.
        configs: names or paths, as of ``fibldm train --config``.
        repeats: measured blocks of every row.
        warm_up: blocks before them.
        options: measure every training step with each of `OPTIONS` as well.
    """

    folder: Path
    device: str = "cpu"
    precision: Precision = "auto"
    configs: tuple[str, ...] = ("data_chest_phantom", "demo")
    repeats: int = 15
    warm_up: int = 2
    options: bool = False

    @property
    def bfloat16(self) -> bool:
        """What the precision of training comes to on the device."""
        return self.precision == "bfloat16" or (self.precision == "auto" and fast_bfloat16(self.device))

    def set_up(self) -> None:
        """Phantoms, and a run with an epoch of each stage."""
        write_phantoms(self.folder / "source", subjects=6, seed=0, progress=iter)
        prepare(self.folder / "source", self.folder / "work", progress=False)
        for stage in usual():
            self.workflow(stage, self.folder / "run", **SIZE[stage]).run()

    def workflow(self, stage: str, run: Path, **overrides: Any) -> StageWorkflow:
        """A training stage as its configuration describes it, ready to run and to take parts of."""
        settings = {"device": self.device, "precision": self.precision, **overrides}
        work = self.folder / "work"
        chosen = stage_configuration(stage, work=work, run_dir=run, configs=self.configs, overrides=settings)
        files = [str(file) for file in chosen.files]
        logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # it warns of logging_file=False
        workflow = StageWorkflow(files, logging_file=False, workflow_type="train", **chosen.overrides)
        workflow.initialize()
        return workflow

    @torch.no_grad()
    def repeat(self, meter: Meter, act: Callable[[], Any]) -> None:
        """Measure ``act`` as often as the bench says."""
        for _ in range(self.warm_up + self.repeats):
            with meter(OURS, 1):
                act()


class Stopwatch:
    """Seconds per step of blocks, by name; a CUDA device is waited for at both ends."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[name].append((time.perf_counter() - began) / steps)


class PeakMemory:
    """Peak bytes in the first block of every name.

    On CUDA all that the allocator holds, weights included; on a CPU (of Linux) what the process grew by in the block,
    but for the code that was paged in.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[None]:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self.bytes.setdefault(name, torch.cuda.max_memory_allocated())
        else:
            ctypes.CDLL(None).malloc_trim(0)  # else the block is served by what was freed before, and grows by nothing
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew, at VmRSS
            before = _process_memory()
            yield
            after = _process_memory()
            code = after["RssFile"] - before["RssFile"]
            self.bytes.setdefault(name, max(0, after["VmHWM"] - before["VmRSS"] - code))


def _process_memory() -> dict[str, int]:
    """Bytes by the names of proc_pid_status(5)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def training_step(bench: Bench, meter: Meter, *, stage: str, options: Mapping[str, Any] | None = None) -> None:
    """Epochs of a stage, with other settings if asked for, each followed by the bare loop over the same batches."""
    run = Path(tempfile.mkdtemp(dir=bench.folder))
    for earlier in usual()[: usual().index(stage)]:
        (run / earlier).symlink_to(bench.folder / "run" / earlier)
    epochs = bench.warm_up + bench.repeats
    length = {"epochs": epochs, "val_interval": epochs, "checkpoint_every": epochs}
    workflow = bench.workflow(stage, run, **length, **(options or {}))
    trainer = workflow.parser.get_parsed_content("train::trainer")
    bare, steps, epoch = bare_loop(trainer, bench), trainer.state.epoch_length, ExitStack()

    # attached before those of the stage, these come first: what ends an epoch is outside of the block
    @trainer.on(Events.STARTED)
    def prepare() -> None:
        if (options or {}).get("compile"):
            compile_now(trainer, bench)

    @trainer.on(Events.EPOCH_STARTED)
    def begin() -> None:
        epoch.enter_context(meter(OURS, steps))

    @trainer.on(Events.EPOCH_COMPLETED)
    def compare() -> None:
        epoch.close()
        with meter(BARE, steps):
            bare()

    workflow.run()


def compile_now(trainer: Any, bench: Bench) -> None:
    """Compile the network of a trainer before anything is measured, and give back what the compiler needed."""
    inputs, target, *more = next(prepared_batches(trainer, bench))
    with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=bench.bfloat16):
        loss = trainer.loss_function(trainer.network(inputs, *(more[0] if more else ())), target)
    loss.backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def prepared_batches(trainer: Any, bench: Bench) -> Iterator[Any]:
    """An epoch of a trainer's batches, as its network gets them."""
    plain = (AsPlainTensorsd(tuple(batch))(batch) for batch in trainer.data_loader)
    return (trainer.prepare_batch(batch, bench.device) for batch in plain)


def bare_loop(trainer: Any, bench: Bench) -> Callable[[], None]:
    """An epoch in plain PyTorch: a copy of the network, on the batches of the trainer, prepared and on the device."""
    network = copy.deepcopy(trainer.network).train()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    batches = list(prepared_batches(trainer, bench))

    def epoch() -> None:
        for inputs, target, *more in batches:
            optimizer.zero_grad()
            with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=bench.bfloat16):
                loss = trainer.loss_function(network(inputs, *(more[0] if more else ())), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

    return epoch


def load(bench: Bench, meter: Meter) -> None:
    """A case from its files to the model grid."""
    parser = bench.workflow("autoencoder", bench.folder / "run").parser
    preprocessing = Compose(parser.get_parsed_content("preprocessing"))
    case = load_datalist(bench.folder / "work", "training")[0]
    bench.repeat(meter, lambda: preprocessing(case))


def encode(bench: Bench, meter: Meter) -> None:
    """A volume of the model grid to its latent."""
    made, _, _ = generator(bench)
    volume = torch.rand(1, 1, *made.grid.size, device=bench.device) * 2 - 1
    bench.repeat(meter, lambda: made.first_stage.encode(volume))


def network_call(bench: Bench, meter: Meter) -> None:
    """The UNet with its ControlNet, on one latent."""
    made, z, mask = generator(bench)
    time_input = made.process.network_time(torch.full((1,), 0.5, device=bench.device))
    bench.repeat(meter, lambda: made.network(z, time_input, {"mask": mask}))


def sample(bench: Bench, meter: Meter) -> None:
    """A latent from noise, with the default sampler."""
    made, z, mask = generator(bench)
    settings, denoise = SamplingSettings(steps=10), Denoiser(made.network, made.process, made.target, {"mask": mask})
    times = sampling_times(settings.steps, spacing=made.process.sampling_spacing)
    draw = sampler(settings.sampler)
    bench.repeat(meter, lambda: draw(denoise, z, times, process=made.process, generators=[]))


def decode(bench: Bench, meter: Meter) -> None:
    """A latent to its volume of the model grid."""
    made, z, _ = generator(bench)
    bench.repeat(meter, lambda: made.first_stage.decode(z))


def decode_tiled(bench: Bench, meter: Meter) -> None:
    """A latent of twice the model grid along each axis, in tiles of at most half of it."""
    made, z, _ = generator(bench)
    larger = z.repeat(1, 1, 2, 2, 2)
    max_voxels = 8 * int(np.prod(made.grid.size)) // 2
    bench.repeat(meter, lambda: tiled_decode(made.first_stage, larger, max_voxels=max_voxels))


def generator(bench: Bench) -> tuple[Synthesizer, Tensor, Tensor]:
    """The run's, with noise ``(1, C, x, y, z)`` and an encoded mask ``(1, M, x, y, z)`` of the size of its grid."""
    made = Synthesizer.from_run(bench.folder / "run", device=bench.device)
    size = [axis // step for axis, step in zip(made.grid.size, made.first_stage.compression, strict=True)]
    mask = made.mask.null(torch.empty(1, made.mask.channels, *size))
    return made, torch.randn(1, len(made.space.mean), *size).to(bench.device), mask.to(bench.device)


ROWS: dict[str, Callable[[Bench, Meter], None]] = {
    "autoencoder step": partial(training_step, stage="autoencoder"),
    "diffusion step": partial(training_step, stage="diffusion"),
    "controlnet step": partial(training_step, stage="controlnet"),
    "load": load,
    "encode": encode,
    "network call": network_call,
    "sample, 10 steps": sample,
    "decode": decode,
    "decode, tiled": decode_tiled,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "checkpointing": {"activation_checkpointing": True},
    "channels last": {"channels_last": True},
    "compile": {"compile": True},
}
"""Settings of speed and memory, each by itself on top of the bench's."""

_TRAINED = tuple(stage for stage in usual() if TABLE[stage].is_trained)
_OF_STEP = {f"{stage} step": (stage, {}) for stage in _TRAINED} | {
    f"{stage}, {name}": (stage, options) for stage in _TRAINED for name, options in OPTIONS.items()
}
OPTION_ROWS = {
    row: partial(training_step, stage=stage, options=options)
    for row, (stage, options) in _OF_STEP.items()
    if row not in ROWS
}


def benchmark(bench: Bench) -> dict[str, Any]:
    """All rows, with what they belong to."""
    bench.set_up()
    rows = {}
    for row in chosen_rows(bench):
        print(f"measuring: {row}", file=sys.stderr)
        rows[row] = {**speed(bench, row), "peak_mb": in_fresh_process(memory, bench, row), **planned(bench, row)}
    settings = {key: value for key, value in asdict(bench).items() if key != "folder"}
    return {"machine": machine(bench.device), "settings": {**settings, "bfloat16": bench.bfloat16}, "rows": rows}


def chosen_rows(bench: Bench) -> dict[str, Callable[[Bench, Meter], None]]:
    """What is measured, by name."""
    return ROWS | OPTION_ROWS if bench.options else ROWS


def planned(bench: Bench, row: str) -> dict[str, float]:
    """The peak megabytes that ``fibldm plan`` says of a training step, of the same kind as those measured."""
    if row not in _OF_STEP:
        return {}
    stage, options = _OF_STEP[row]
    overrides = {"precision": bench.precision, **options}
    traced = trace_stage(stage, Request(bench.folder / "work", bench.configs, overrides, bench.device))
    return {"planned_mb": round((traced.step + traced.resident * (bench.device == "cuda")) / 1e6, 1)}


def speed(bench: Bench, row: str) -> dict[str, Any]:
    """Median and interquartile range of the seconds of a row; the ratio to the bare loop is taken pair by pair."""
    stopwatch = Stopwatch(bench.device)
    (ROWS | OPTION_ROWS)[row](bench, stopwatch)
    measured = {name: np.array(seconds[bench.warm_up :]) for name, seconds in stopwatch.seconds.items()}
    if BARE in measured:
        measured["ratio"] = measured[OURS] / measured[BARE]
    quartiles = {name: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for name, values in measured.items()}
    return {name: {"median": median, "iqr": high - low} for name, (low, median, high) in quartiles.items()}


def memory(bench: Bench, row: str) -> float:
    """Peak megabytes of the first block of a row; to be called in a fresh process."""
    peak = PeakMemory(bench.device)
    (ROWS | OPTION_ROWS)[row](replace(bench, repeats=1, warm_up=0), peak)
    return round(peak.bytes[OURS] / 1e6, 1)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process that has imported FibLDM and done nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fibldm.synthesis", "fibldm.training.stage", "monai.engines", "monai.inferers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "fibldm": fibldm.__version__,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows for people: milliseconds and ratios with their interquartile ranges; megabytes, measured and planned."""
    lines = [f"{'':27}{'ms':>18}{'bare ms':>18}{'ratio':>16}{'peak MB':>10}{'planned':>10}"]
    for name, row in rows.items():
        cells = [_cell(row.get(OURS), 1000, 1), _cell(row.get(BARE), 1000, 1), _cell(row.get("ratio"), 1, 3)]
        plan = f"{row['planned_mb']:10.0f}" if "planned_mb" in row else ""
        lines.append(f"{name:27}{cells[0]:>18}{cells[1]:>18}{cells[2]:>16}{row['peak_mb']:10.0f}{plan}")
    return "\n".join(lines)


def _cell(spread: dict[str, float] | None, scale: float, digits: int) -> str:
    return f"{scale * spread['median']:.{digits}f} ± {scale * spread['iqr'] / 2:.{digits}f}" if spread else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of FibLDM on this machine.")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="the JSON to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="of training")
    parser.add_argument("--config", action="append", help="as of fibldm train; decides the sizes")
    parser.add_argument("--options", action="store_true", help="each setting of speed and memory as well")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    given = parser.parse_args(arguments)
    repeats, warm_up = (3, 1) if given.quick else (Bench.repeats, Bench.warm_up)
    configs = tuple(given.config or Bench.configs)
    try:
        if given.device == "cuda" and not torch.cuda.is_available():
            raise FibldmError("--device cuda needs a CUDA device; there is none", "leave it out to measure the CPU")
        with tempfile.TemporaryDirectory() as folder:
            result = benchmark(
                Bench(Path(folder), given.device, given.precision, configs, repeats, warm_up, given.options)
            )
        write_json(given.out, result)
    except FibldmError as error:
        parser.exit(2, f"{error}\n")
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None))
    print(table(result["rows"]))


if __name__ == "__main__":
    try:
        main()
    except FibldmError as error:
        emit_error(error.message, error.remedy, as_json=False)
        sys.exit(2)
