"""Stages chained: the demo, from phantoms to a report."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from fibldm.errors import FibldmError
from fibldm.evaluation.figures import Match, measure
from fibldm.evaluation.measurements import OF_ANY_MASKS, evaluate
from fibldm.evaluation.report import Window, write_report
from fibldm.files import read_json, write_json
from fibldm.pipeline import TrainingStep, as_options
from fibldm.runs import STAGES
from fibldm.synthesis import Output, SamplingSettings, Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.phantoms import write_phantoms
from fibldm.volumes.preparation import prepare
from fibldm.volumes.prepare_settings import PrepareSettings
from fibldm.workers import cores

_logger = logging.getLogger("fibldm")

_SEEDS_OF_FIRST_MASKS = 2
_MASKS_WITH_SEEDS = 2
_PICTURES = 4


@dataclass(frozen=True)
class DemoSettings:
    """The size of the demo.

    Attributes:
        subjects: phantom patients; about one in six is scanned twice.
        seed: decides phantoms, split, training and samples.
        configs: what the training stages use beside `data_chest_phantom`.
        epochs: by stage; the others take what their configuration says.
        sampling: but for its seed, how volumes are drawn; with guidance, half as many steps are as many network calls.
        segmenter: overrides of the segmenter that measures.
    """

    subjects: int = 50
    seed: int = 0
    configs: tuple[str, ...] = ("demo",)
    epochs: Mapping[str, int] = field(default_factory=lambda: {"autoencoder": 65, "diffusion": 45, "controlnet": 75})
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(steps=5, guidance=2.0))
    segmenter: Mapping[str, Any] = field(default_factory=lambda: {"steps": 160, "batch_size": 2})


def demo(out: Path, settings: DemoSettings, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Phantoms, prepare, three stages, synthesis from the test patients' masks, report; finished steps are kept.

    Args:
        out: gets ``phantoms``, ``work``, ``runs/demo``, ``synthetic``, ``report.html`` and ``metrics.json``.
        settings: size and seed.
        say: where the headlines go.

    Returns:
        The content of ``metrics.json``.
    """
    began = time.monotonic()
    phantoms, work, run, synthetic = out / "phantoms", out / "work", out / "runs" / "demo", out / "synthetic"
    say(f"1/6 phantoms: {settings.subjects} patients in {phantoms}")
    write_phantoms(phantoms, subjects=settings.subjects, seed=settings.seed, workers=cores())
    say(f"2/6 prepare: checked and split by patient into {work}")
    prepare(phantoms, work, PrepareSettings(seed=settings.seed), workers=cores())
    commands = [f"fibldm prepare {phantoms} --out {work} --seed {settings.seed}"]
    for stage in STAGES:
        say(f"3/6 {stage}")
        commands.append(_train(stage, work, run, settings))
    say(f"4/6 synthesize: the test patients' masks into {synthetic}")
    sampling = replace(settings.sampling, seed=settings.seed)
    matches = synthesize_test_masks(run, phantoms, work, synthetic, sampling)
    given = " ".join(f"--masks {match.mask}" for match in matches)
    commands.append(
        f"fibldm synthesize --run {run} {given} --out {synthetic} --seed {sampling.seed} --steps {sampling.steps} "
        f"--guidance {sampling.guidance:g} --allow-extrapolation"
    )
    say("5/6 evaluate")
    sections = evaluate(
        OF_ANY_MASKS, run_dir=run, work=work, synthetic=synthetic, segmenter_settings=settings.segmenter, say=say
    )
    changes = as_options(settings.segmenter)
    commands.append(f"fibldm evaluate all --data {work} --run {run} --synthetic {synthetic}{changes}")
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
    write_report(
        out / "report.html",
        figures=figures,
        matches=matches[:_PICTURES],
        sections=sections,
        evaluation=run / "evaluation",
        losses={stage: run / stage / "metrics.csv" for stage in STAGES if stage != "latents"},
        labels=read_json(work / "datalist.json")["labels"],
        window=Window(-1000, 300),
        commands=commands,
    )
    say(_summary(out, figures, commands))
    return figures


def _train(stage: str, work: Path, run: Path, settings: DemoSettings) -> str:
    epochs = {"epochs": settings.epochs[stage]} if stage in settings.epochs else {}
    configs = ("data_chest_phantom", *settings.configs)
    return TrainingStep(stage, configs, {"seed": settings.seed, **epochs}).run(work, run)


def synthesize_test_masks(run: Path, phantoms: Path, work: Path, out: Path, sampling: SamplingSettings) -> list[Match]:
    """Volumes of the masks of the test patients, of the first two masks with several seeds; what is there is kept.

    Args:
        run: a finished run.
        phantoms: folder of the phantoms.
        work: the work folder made of it.
        out: folder to write to.
        sampling: how to sample.

    Raises:
        FibldmError: there are too few test cases.
    """
    cases = load_datalist(work, "test")
    if len(cases) < _MASKS_WITH_SEEDS:
        raise FibldmError(f"the demo needs at least {_MASKS_WITH_SEEDS} test cases; got {len(cases)}", "add subjects")
    synthesizer = Synthesizer.from_run(run, device="cuda" if torch.cuda.is_available() else "cpu")
    counts = [1 + _SEEDS_OF_FIRST_MASKS * (position < _MASKS_WITH_SEEDS) for position in range(len(cases))]
    files = [phantoms / "labels" / f"{case['case']}.nii.gz" for case in cases]
    jobs = [(file, number) for file, count in zip(files, counts, strict=True) for number in range(count)]
    # a phantom's mask is never outside the phantoms it was drawn with, whatever their number
    output = Output(synthesizer, out, sampling, allow_extrapolation=True)
    console = Console(stderr=True)
    written: dict[Path, list[Path]] = {file: [] for file in files}
    for file, number in track(jobs, "synthesize", console=console, disable=not console.is_terminal):
        written[file] += output.write([(file, number)])
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
