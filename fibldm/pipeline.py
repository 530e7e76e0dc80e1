"""All stages of one generator by one command: from a folder of volumes with masks to a bundle that was verified.

A recipe says what each step does. What was prepared, trained and drawn is kept, so that the same command goes on where
it stopped; figures, bundle and its verification are made anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fibldm.datasets.preparation import prepare
from fibldm.delivery.export import WORDS, ExportSettings, export
from fibldm.delivery.model_card import CardText
from fibldm.delivery.verify import verify
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.measurements import MEASUREMENTS, evaluate
from fibldm.evaluation.perceptual import PlaneDistance
from fibldm.licences import licence_notice
from fibldm.models.conditions.condition import present
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.planning.timing import encoding_seconds
from fibldm.planning.traced_step import imagined_latents
from fibldm.recipe import Recipe, TrainingStep
from fibldm.report.report import ReportSettings, bundle_report, write_report
from fibldm.runs import StageFolder
from fibldm.runs.causes import unwrapped
from fibldm.runs.configuration import Configuration, check_grid
from fibldm.runs.stages import begun, kind_of, taught
from fibldm.synthesis import OutputConflict, SamplingSettings, SynthesisSettings, synthesize_files
from fibldm.synthesis.asked import COVARIATES, MASK, check, check_names, read
from fibldm.synthesis.loading import sees_mask
from fibldm.synthesis.student import Student
from fibldm.training.budget import in_minutes
from fibldm.training.shares import TotalBudget, expected_encoding, note_encoding, shares_of
from fibldm.verbatim import as_word
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.masks import mask_stem


def train_steps(
    steps: Sequence[TrainingStep],
    work: Path,
    run: Path,
    *,
    minutes: float | None = None,
    shares: Mapping[str, float] | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Train stages one after the other, unless that is done; the commands that do the same.

    Args:
        steps: in their order.
        work: folder of ``fibldm prepare``.
        run: the run folder.
        minutes: for all of them together, the latents included, and what was used before an interruption; None trains
            all epochs.
        shares: of the minutes, see `shares_of`.
        say: where the headlines go.

    Raises:
        FibldmError: a stage is refused, or no time is left for it.
    """
    if minutes is None:
        return [_told(step, say, step.name).run(work, run) for step in steps]
    encoding = _encoding({step.name: step for step in steps}, work, run)
    total = TotalBudget(run, minutes, shares_of([step.name for step in steps], shares), encoding)
    commands = []
    for step in steps:
        own = total.minutes_of(step.name) if kind_of(step.name).is_trained else None
        headline = step.name if own is None else f"{step.name}: {own:.3g} of {in_minutes(minutes)}"
        commands.append(_told(step, say, headline).run(work, run, minutes=own))
    say(f"training took {total.seconds / 60:.1f} of {in_minutes(minutes)}")
    return commands


def pipeline(
    source: Path,
    out: Path,
    recipe: Recipe,
    settings: ExportSettings,
    *,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prepare, train, synthesize from the masks of the test patients, measure, export and verify.

    Args:
        source: the dataset, as `fibldm.datasets.preparation.prepare` takes it.
        out: gets ``work``, ``run``, ``synthetic``, ``bundle``, ``report.html`` and, to measure utility,
            ``synthetic_training``; words of ``out/bundle/export.yaml`` go into the bundle.
        recipe: what each step does; all of it is checked before the first one.
        settings: of the export.
        workers: processes that prepare at the same time.
        say: where the headlines go.

    Returns:
        ``outputs``, the bundle's folder among them, and what each of the ``checks`` saw, by name.

    Raises:
        FibldmError: the recipe, the data or a step was refused, or the bundle is not what it promises.
    """
    work, run, bundle = out / "work", out / "run", out / "bundle"
    steps, preparation, drawing = recipe.stages(), recipe.preparation, recipe.drawing(work)
    _check(recipe, steps, drawing, settings, out)
    say(f"1/6 prepare: {source} into {work}")
    report = prepare(source, work, preparation, workers=workers)
    for line in (*map(str, report.findings), *(f"note: {note}" for note in report.notes)):
        say(line)
    configurations = {step.name: step.configuration(work, run) for step in steps}
    check_grid(configurations["autoencoder"], configurations["diffusion"])
    masks = {split: _masks(work, split) for split in ("test", *(["training"] if "utility" in recipe.measure else []))}
    check_asked(configurations, work, drawing, [mask for split in masks.values() for mask in split])
    commands = train_steps(
        steps, work, run, minutes=recipe.minutes, shares=recipe.shares, say=lambda line: say(f"2/6 {line}")
    )
    say(f"3/6 synthesize: the test patients' masks into {out / 'synthetic'}")
    synthesize_masks(run, masks["test"], out / "synthetic", drawing)
    say("4/6 evaluate")
    names = [name for name in recipe.measure if name != "utility"]
    given: dict[str, Any] = {"run_dir": run, "work": work, "segmenter_settings": recipe.of_segmenter, "say": say}
    evaluate(names, synthetic=out / "synthetic", perceptual=recipe.perceptual, **given)
    if "training" in masks:
        synthesize_masks(run, masks["training"], out / "synthetic_training", drawing)
        evaluate(["utility"], synthetic=out / "synthetic_training", **given)
    say(f"5/6 export: {bundle}")
    sampling = {**asdict(drawing.sampling), **settings.sampling}
    for note in export(run, bundle, replace(settings, sampling=sampling), also=bundle_report(run))["notes"]:
        say(f"note: {note}")
    write_report(run, out / "report.html", ReportSettings(out / "synthetic", work, title=settings.name or ""))
    say("6/6 verify, in a fresh process")
    checks = list(verify(bundle))
    if failed := [check for check in checks if not check.ok]:
        raise FibldmError(
            f"a bundle must do all it promises; {bundle} fails {failed[0].name}: {failed[0].saw}",
            f"run `fibldm verify {as_word(bundle)}` to see all checks",
        )
    say(f"all {len(checks)} checks are ok")
    report_file = f"report: {out / 'report.html'}"
    say(
        "\n".join(
            [
                "",
                f"bundle: {bundle}",
                report_file,
                "",
                "The training, step by step:",
                *(f"  {line}" for line in commands),
            ]
        )
    )
    return {
        "outputs": [str(bundle), str(run), str(out / "synthetic"), str(out / "report.html")],
        "checks": {check.name: check.saw for check in checks},
    }


def _check(
    recipe: Recipe, steps: Sequence[TrainingStep], drawing: SynthesisSettings, settings: ExportSettings, out: Path
) -> None:
    """Refuse what would be refused hours later."""
    work, run = out / "work", out / "run"
    for name in recipe.measure:
        if name not in MEASUREMENTS:
            raise unknown_choice("measure", name, MEASUREMENTS)
    configurations = {step.name: step.configuration(work, run) for step in steps}
    _check_begun(run, configurations)
    parser = _generating(configurations).parser()
    listed = [parser["covariates"], parser.get("covariates_in_time", [])]
    known = [name for names in listed if isinstance(names, list) for name in names]
    if isinstance(listed[0], list) and (strange := [name for name in drawing.covariates if name not in known]):
        raise FibldmError(
            f"covariates of synthesize must be those of training ({', '.join(known) or 'none'}); "
            f"there is no {', '.join(strange)}",
            "name them in covariates or covariates_in_time of diffusion, and of controlnet where there is one",
        )
    check_names([name for name in parser["conditions"] if name not in (MASK, COVARIATES)], drawing.asked)
    _ = drawing.table, drawing.known_scans
    for made in (made for name, made in configurations.items() if taught(name)):
        Student(int(made.parser()["student_calls"]), "", SamplingSettings()).check(drawing.sampling, None)
    shares_of(list(configurations), recipe.shares)
    TrainingStep("segmenter", recipe.configs, recipe.of_segmenter).configuration(work, run)
    if recipe.perceptual is not None:
        PlaneDistance(recipe.perceptual)
    words = CardText.read(out / "bundle" / WORDS)
    licence_notice(settings.licence, settings.licence_file, words.attribution)
    if any(kind_of(name).brings_mask and sees_mask(made.parser()) for name, made in configurations.items()):
        return
    if configurations["diffusion"].parser()["mask_way"] is None:
        raise FibldmError(
            "without a ControlNet that sees the mask, stage 2 must see it; its mask_way is null",
            "put mask_concat or mask_spade into its configs, or have a ControlNet by --set controlnet={}",
        )


def check_asked(
    configurations: Mapping[str, Configuration], work: Path, drawing: SynthesisSettings, masks: Sequence[Path]
) -> None:
    """Refuse, before hours of training, conditions that could not be fitted in it, or not be asked after it.

    Args:
        configurations: of the stages by name.
        work: the work folder.
        drawing: says what is asked.
        masks: that volumes will be drawn from.

    Raises:
        FibldmError: the training cases do not tell a condition, or something of it is asked that cannot be.
    """
    drawing.check_masks(masks)
    if drawing.known_scans is not None:
        drawing.known_scans.require(data=read_datalist(work)["content"], weights="")
    parser = _generating(configurations).parser()
    autoencoder, encoding = (configurations[name].parser() for name in ("autoencoder", "latents"))
    parser["latents"] = imagined_latents(autoencoder, encoding, work)
    with unwrapped():
        fitted = {name: parser.get_parsed_content(f"conditions::{name}") for name in parser["conditions"]}
    kinds = {COVARIATES: CovariateEncoding({}), **present(fitted)}
    kinds.pop(MASK, None)
    for mask in masks if drawing.each_its_own else [None]:
        try:
            check(kinds, read(kinds, drawing.asked_of(mask, kinds)), allow=drawing.allow_extrapolation)
        except FibldmError as error:
            raise FibldmError(f"{mask_stem(mask)}: {error.message}" if mask else error.message, error.remedy) from error


def _generating(configurations: Mapping[str, Configuration]) -> Configuration:
    """The stage that says what volumes will be drawn from: the last that generates, or the teacher of that."""
    made = [part for name, part in configurations.items() if kind_of(name).generates and not taught(name)]
    return made[-1]


def _check_begun(run: Path, configurations: Mapping[str, Configuration]) -> None:
    """Refuse to go on with a run whose stages see the mask in another way, as they did by default before.

    Raises:
        FibldmError: says how to go on with it.
    """
    now, folder = configurations["diffusion"].parser(), StageFolder(run, "diffusion")
    more = [kind.name for kind in begun(run) if kind.generates and kind.name not in configurations]
    before = folder.parser() if (folder.path / "config.yaml").exists() and not now["restart"] else now
    if more:
        told = f"the recipe has no {', '.join(more)}, and {run} has one, which would be used"
    elif before["mask_way"] is None and now["mask_way"] is not None:
        told = f"{folder.path} was begun as a network that sees no mask, and the recipe shows it the mask"
    else:
        return
    as_begun = ["--set controlnet={}"] + ["--set diffusion::configs=[]"] * (now["mask_way"] is not None)
    raise FibldmError(told, f"choose another --out folder; {' '.join(as_begun)} goes on with a ControlNet")


def _told(step: TrainingStep, say: Callable[[str], None], headline: str) -> TrainingStep:
    say(headline)
    return step


def _encoding(steps: Mapping[str, TrainingStep], work: Path, run: Path) -> float:
    """The seconds that making the latents is expected to take: as before, or by the first case."""
    expected = expected_encoding(run)
    if expected is None and not StageFolder(run, "autoencoder").done():
        parsers = (steps[name].configuration(work, run).parser() for name in ("autoencoder", "latents"))
        expected = encoding_seconds(*parsers)
        note_encoding(run, expected)
    return expected or 0.0


def _masks(work: Path, split: str) -> list[Path]:
    return [Path(entry["label"]) for entry in load_datalist(work, split, masks=True)]


def synthesize_masks(run: Path, masks: Sequence[Path], out: Path, drawing: SynthesisSettings) -> None:
    """Write volumes of some masks of the work folder, of a table with the rows of these masks.

    Raises:
        FibldmError: something else lies in ``out``, or a mask is refused.
    """
    own = drawing if drawing.table is None else replace(drawing, conditions_table=drawing.table.only(masks).rows)
    try:
        synthesize_files(run, masks, out, settings=own)
    except OutputConflict as error:
        raise FibldmError(error.message, f"move {out} away and run the same command again; training is kept") from error
