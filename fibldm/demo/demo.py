"""Stages chained: the demo, from phantoms to a report."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.demo.chest_metrics import Match, measure
from fibldm.demo.demo_parts import demo_parts
from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS, evaluate
from fibldm.files import read_json, write_json
from fibldm.phantoms.phantoms import write_phantoms
from fibldm.pipeline import train_steps
from fibldm.progress import track
from fibldm.recipe import TrainingStep
from fibldm.report.report import ReportSettings, write_report
from fibldm.runs import BUDGET
from fibldm.runs.options import as_options
from fibldm.runs.stages import TABLE
from fibldm.synthesis import Output, SamplingSettings, SynthesisSettings, Synthesizer, jobs_of
from fibldm.training.inferers import fast_bfloat16
from fibldm.verbatim import as_word
from fibldm.volumes.datalist import load_datalist
from fibldm.workers import cores

_logger = logging.getLogger("fibldm")

_SEEDS_OF_FIRST_MASKS = 2
_MASKS_WITH_SEEDS = 2
_SHOWN = 4  # volumes in the report
_MINUTES = {True: 5.0, False: 13.0}  # where the device is fast, and where it is not
_OF_SEGMENTER = 0.15
_DRAWING = 6.0  # seconds of starting, drawing and measuring for one of making and preparing the phantoms
_LEAST = 5.0  # of training for one of making the phantoms: as much as the first steps of every stage take
_SHARES = {"autoencoder": 0.27, "diffusion": 0.6, "controlnet": 0.13}


@dataclass(frozen=True)
class DemoSettings:
    """The size of the demo.

    Attributes:
        subjects: phantom patients; about one in six is scanned twice.
        seed: decides phantoms, split, training and samples.
        configs: what the training stages use beside `data_chest_phantom`.
        diffusion: what stages 2 and 3 use beside them.
        minutes: for all of it, what an interrupted run used included; None trains the epochs of the configurations.
        sampling: but for its seed, how volumes are drawn; with guidance, half as many steps are as many network calls.
        segmenter: overrides of the segmenter that measures.
    """

    subjects: int = 50
    seed: int = 0
    configs: tuple[str, ...] = ("demo",)
    diffusion: tuple[str, ...] = ("mask_concat",)
    minutes: float | None = None
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(steps=5, guidance=2.0))
    segmenter: Mapping[str, Any] = field(default_factory=lambda: {"steps": 160, "batch_size": 2})

    def steps(self) -> list[TrainingStep]:
        """The stages that are trained."""
        return [
            TrainingStep(
                kind.name,
                ("data_chest_phantom", *self.configs, *(self.diffusion if kind.on_latents else ())),
                {"seed": self.seed},
            )
            for kind in TABLE.values()
            if kind.in_pipeline in ("always", "optional")
        ]


def usual_minutes() -> float:
    """How long the demo takes by default: less where the device has units for matrices."""
    return _MINUTES[torch.cuda.is_available() or fast_bfloat16("cpu")]


def demo(out: Path, settings: DemoSettings, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Phantoms, prepare, three stages, synthesis from the test patients' masks, report; finished steps are kept.

    Args:
        out: gets ``phantoms``, ``work``, ``runs/demo``, ``synthetic``, ``report.html`` and ``metrics.json``.
        settings: size, seed and time.
        say: where the headlines go.

    Returns:
        The content of ``metrics.json``.

    Raises:
        FibldmError: the minutes do not leave time to train, or a step is refused.
    """
    began = time.monotonic()
    phantoms, work, run, synthetic = out / "phantoms", out / "work", out / "runs" / "demo", out / "synthetic"
    say(f"1/6 phantoms: {settings.subjects} patients in {phantoms}")
    write_phantoms(phantoms, subjects=settings.subjects, seed=settings.seed, workers=cores())
    say(f"2/6 prepare: checked and split by patient into {work}")
    prepare(phantoms, work, PrepareSettings(seed=settings.seed), workers=cores())
    commands = [f"fibldm prepare {as_word(phantoms)} --out {as_word(work)} --seed {settings.seed}"]
    minutes = _training_minutes(out, settings, time.monotonic() - began)
    commands += train_steps(
        settings.steps(), work, run, minutes=minutes, shares=_SHARES, say=lambda line: say(f"3/6 {line}")
    )
    say(f"4/6 synthesize: the test patients' masks into {synthetic}")
    sampling = replace(settings.sampling, seed=settings.seed)
    matches = synthesize_test_masks(run, phantoms, work, synthetic, sampling)
    given = " ".join(f"--masks {as_word(match.mask)}" for match in matches)
    commands.append(
        f"fibldm synthesize --run {as_word(run)} {given} --out {as_word(synthetic)} --seed {sampling.seed} "
        f"--steps {sampling.steps} --guidance {sampling.guidance:g} --allow-extrapolation"
    )
    say("5/6 evaluate")
    segmenter = dict(settings.segmenter)
    if settings.minutes is not None:
        segmenter["minutes"] = round(_OF_SEGMENTER * settings.minutes, 3)
    evaluate(DEFAULT_MEASUREMENTS, run_dir=run, work=work, synthetic=synthetic, segmenter_settings=segmenter, say=say)
    changes = as_options(segmenter)
    folders = f"--data {as_word(work)} --run {as_word(run)} --synthetic {as_word(synthetic)}"
    commands.append(f"fibldm evaluate all {folders}{changes}")
    say("6/6 report")
    figures = {
        "run": str(run),
        "masks": [str(match.mask) for match in matches],
        "outputs": [str(path) for match in matches for path in match.synthetic],
        **measure(matches),
        "network_calls": sampling.network_calls,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(out / "metrics.json", figures)
    shown = ReportSettings(
        synthetic=synthetic,
        data=work,
        with_real=True,  # phantoms are nobody's
        patients=False,
        cases=_SHOWN,
        title="demo on phantoms",
        more=demo_parts(figures, commands),
    )
    write_report(run, out / "report.html", shown)
    say(_summary(out, figures, commands))
    return figures


def _training_minutes(out: Path, settings: DemoSettings, seconds: float) -> float | None:
    """What the minutes of the demo leave for training, as it was decided when it began.

    Args:
        out: of the demo, gets ``budget.json``.
        settings: whose minutes they are.
        seconds: that phantoms and their preparation took, from which follows what comes after training.
    """
    if settings.minutes is None:
        return None
    file = out / BUDGET
    noted = read_json(file) if file.exists() else {}
    if noted.get("minutes") != settings.minutes:
        before = noted.get("making_seconds", seconds)  # of what is kept, only the first time tells how long it takes
        left = (1 - _OF_SEGMENTER) * settings.minutes - (1 + _DRAWING) * before / 60
        if left < _LEAST * before / 60:
            write_json(file, {"making_seconds": round(before, 1)})
            needed = (1 + _DRAWING + _LEAST) * before / 60 / (1 - _OF_SEGMENTER)
            raise FibldmError(
                f"the demo needs at least {math.ceil(10 * needed) / 10:g} minutes here, to train, draw and measure; "
                f"got {settings.minutes:g}",
                "give more --minutes; phantoms are kept",
            )
        noted = {"minutes": settings.minutes, "making_seconds": round(before, 1), "training_minutes": round(left, 3)}
        write_json(file, noted)
    return float(noted["training_minutes"])


def synthesize_test_masks(run: Path, phantoms: Path, work: Path, out: Path, sampling: SamplingSettings) -> list[Match]:
    """Volumes of the masks of the test patients, of the first two masks with several seeds; what is there is kept.

    Raises:
        FibldmError: there are too few test cases.
    """
    cases = load_datalist(work, "test")
    if len(cases) < _MASKS_WITH_SEEDS:
        raise FibldmError(f"the demo needs at least {_MASKS_WITH_SEEDS} test cases; got {len(cases)}", "add subjects")
    synthesizer = Synthesizer.from_run(run, device="cuda" if torch.cuda.is_available() else "cpu")
    counts = [1 + _SEEDS_OF_FIRST_MASKS * (position < _MASKS_WITH_SEEDS) for position in range(len(cases))]
    files = [phantoms / "labels" / f"{case['case']}.nii.gz" for case in cases]
    # a phantom's mask is never outside the phantoms it was drawn with, whatever their number
    output = Output(synthesizer, out, SynthesisSettings(sampling, allow_extrapolation=True))
    jobs = [job for file, count in zip(files, counts, strict=True) for job in jobs_of([file], synthesizer.names, count)]
    for job in track(jobs, "synthesize"):
        output.write([job])
    written = {file: [output.path(job) for job in jobs if job.mask and job.mask.file == file] for file in files}
    return [
        Match(case["case"], case["subject"], file, phantoms / "images" / file.name, written[file])
        for case, file in zip(cases, files, strict=True)
    ]


def _summary(out: Path, figures: Mapping[str, Any], commands: list[str]) -> str:
    return "\n".join(
        [
            "",
            f"lung Dice {figures['lung_dice']:.3f} (real {figures['lung_dice_real']:.3f}, "
            f"shuffled {figures['lung_dice_shuffled']:.3f}), "
            f"fibrosis contrast {figures['fibrosis_contrast_ratio']:.2f} of real, "
            f"texture {figures['texture_ratio']:.2f} of real, between seeds {figures['seed_ratio']:.2f}",
            f"{len(figures['outputs'])} synthetic volumes: {out / 'synthetic'}",
            f"report: {out / 'report.html'}, figures: {out / 'metrics.json'}, run: {figures['run']}",
            "",
            "The same, step by step:",
            *(f"  {command}" for command in commands),
        ]
    )
