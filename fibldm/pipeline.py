"""All stages of one generator by one command: from a folder of volumes with masks to a bundle that was verified.

A recipe says what each step does. What was prepared, trained and drawn is kept, so that the same command goes on where
it stopped; figures, bundle and its verification are made anew.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fibldm.delivery.card import Words
from fibldm.delivery.export import WORDS, ExportSettings, export
from fibldm.delivery.licences import licence_notice
from fibldm.delivery.verify import verify
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.measurements import MEASUREMENTS, OF_ANY_MASKS, evaluate
from fibldm.plain_values import settings_of
from fibldm.runs import STAGES, MadeOtherwise
from fibldm.synthesis import SamplingSettings, VolumeLiesThere, synthesize_files
from fibldm.training.configuration import Configuration, check_grid, read_configuration, stage_configuration
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.preparation import prepare
from fibldm.volumes.prepare_settings import PrepareSettings


@dataclass(frozen=True)
class Drawing(SamplingSettings):
    """How volumes are drawn and written.

    Attributes:
        batch_size: volumes that are sampled together.
        allow_extrapolation: go on where masks of the dataset lie outside of what its training cases cover.
    """

    batch_size: int = 1
    allow_extrapolation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise FibldmError(f"batch_size must be at least 1; got {self.batch_size}")

    @property
    def sampling(self) -> SamplingSettings:
        """Without what is about files."""
        return SamplingSettings(**{part.name: getattr(self, part.name) for part in fields(SamplingSettings)})


@dataclass(frozen=True)
class Recipe:
    """What each step does; as YAML, a file of ``fibldm pipeline --recipe``.

    Attributes:
        configs: paths or names of configurations of all stages; one gives spacing and size of the model grid.
        prepare: fields of `PrepareSettings`.
        autoencoder: keys of the stage's configuration; ``configs`` names more configurations of this stage alone.
        latents: the same of the latents.
        diffusion: the same of stage 2.
        controlnet: the same of stage 3; None leaves it out, where stage 2 sees the mask itself.
        synthesize: fields of `Drawing`.
        measure: names of `fibldm.evaluation.measurements.MEASUREMENTS`.
        segmenter: keys of the configuration of the segmenter that measures.
    """

    configs: Sequence[str] = ()
    prepare: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: Mapping[str, Any] = field(default_factory=dict)
    latents: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    controlnet: Mapping[str, Any] | None = field(default_factory=dict)
    synthesize: Mapping[str, Any] = field(default_factory=dict)
    measure: Sequence[str] = OF_ANY_MASKS
    segmenter: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | None, *, configs: Sequence[str] = (), overrides: Mapping[str, Any]) -> "Recipe":
        """A recipe from a file, with more configurations and with changes on top.

        Args:
            file: path of a YAML file, or the name of a shipped one; None begins with the defaults.
            configs: come after those of the file.
            overrides: ``step::key`` to value, such as ``diffusion::epochs``.

        Raises:
            FibldmError: there is no such file, or a step is unknown or has another type.
        """
        content = dict(read_configuration(file)) if file is not None else {}
        for key, value in overrides.items():
            step, *inside = key.split("::", 1)
            before = content.get(step)
            if inside and isinstance(before, Mapping | None):
                content[step] = {**(before or {}), inside[0]: value}
            elif inside:
                raise FibldmError(f"{step} of a recipe has no {inside[0]}; it is {before}", f"give all of {step}")
            else:
                content[step] = value
        recipe = settings_of(cls, content, "step of a recipe")
        return cls(**{**content, "configs": [*recipe.configs, *configs]})

    @property
    def preparation(self) -> PrepareSettings:
        """How the dataset is prepared.

        Raises:
            FibldmError: an option is unknown or has another type.
        """
        return settings_of(PrepareSettings, self.prepare, "option of prepare")

    @property
    def drawing(self) -> Drawing:
        """How volumes are drawn.

        Raises:
            FibldmError: an option is unknown, has another type or is out of range.
        """
        return settings_of(Drawing, self.synthesize, "option of synthesize")

    def stages(self) -> list["TrainingStep"]:
        """The stages that are trained, in their order.

        Raises:
            FibldmError: ``configs`` of one is no list of names.
        """
        steps = []
        for name in STAGES:
            keys = getattr(self, name)
            if keys is not None:
                own = keys.get("configs", ())
                if isinstance(own, str) or not all(isinstance(config, str) for config in own or ()):
                    raise FibldmError(f"configs of {name} must be a list of names; got {own!r}", "write it in brackets")
                overrides = {key: value for key, value in keys.items() if key != "configs"}
                steps.append(TrainingStep(name, (*self.configs, *(own or ())), overrides))
        return steps


@dataclass(frozen=True)
class TrainingStep:
    """A stage with its configurations and changes.

    Attributes:
        name: one of `fibldm.runs.STAGES`.
        configs: paths or names of configurations.
        overrides: ``key::sub`` to value.
    """

    name: str
    configs: Sequence[str]
    overrides: Mapping[str, Any]

    def run(self, work: Path, run: Path) -> str:
        """Train the stage, unless that is done; the command that does the same.

        Raises:
            FibldmError: the stage is refused.
        """
        try:
            self.configuration(work, run).run()
        except MadeOtherwise as error:
            raise FibldmError(
                error.message,
                f"choose another --out folder, or give --set {self.name}::restart=true, once, to train this stage anew "
                "(the old one is kept beside it)",
            ) from error
        verb = "encode" if self.name == "latents" else f"train {self.name}"
        given = "".join(f" --config {shlex.quote(str(name))}" for name in self.configs)
        folders = f"--data {shlex.quote(str(work))} --run {shlex.quote(str(run))}"
        return f"fibldm {verb} {folders}{given}{as_options(self.overrides)}"

    def configuration(self, work: Path, run: Path) -> Configuration:
        """The checked configuration of the stage."""
        return stage_configuration(self.name, work=work, run_dir=run, configs=self.configs, overrides=self.overrides)


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
        source: the dataset, as `fibldm.volumes.preparation.prepare` takes it.
        out: gets ``work``, ``run``, ``synthetic``, ``bundle`` and, to measure utility, ``synthetic_training``; words of
            ``out/bundle/export.yaml`` go into the bundle.
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
    steps, preparation, drawing = recipe.stages(), recipe.preparation, recipe.drawing
    _check(recipe, steps, settings, out)
    say(f"1/6 prepare: {source} into {work}")
    report = prepare(source, work, preparation, workers=workers)
    for line in (*map(str, report.findings), *(f"note: {note}" for note in report.notes)):
        say(line)
    configurations = {step.name: step.configuration(work, run) for step in steps}
    check_grid(configurations["autoencoder"], configurations["diffusion"])
    commands = []
    for step in steps:
        say(f"2/6 {step.name}")
        commands.append(step.run(work, run))
    say(f"3/6 synthesize: the test patients' masks into {out / 'synthetic'}")
    _synthesize(run, work, "test", out / "synthetic", drawing)
    say("4/6 evaluate")
    _measure(run, work, out, recipe, drawing, say)
    say(f"5/6 export: {bundle}")
    export(run, bundle, settings)
    say("6/6 verify, in a fresh process")
    checks = list(verify(bundle))
    if failed := [check for check in checks if not check.ok]:
        raise FibldmError(
            f"a bundle must do all it promises; {bundle} fails {failed[0].name}: {failed[0].saw}",
            f"run `fibldm verify {bundle}` to see all checks",
        )
    say(f"all {len(checks)} checks are ok")
    say("\n".join(["", f"bundle: {bundle}", "", "The training, step by step:", *(f"  {line}" for line in commands)]))
    return {
        "outputs": [str(bundle), str(run), str(out / "synthetic")],
        "checks": {check.name: check.saw for check in checks},
    }


def as_options(overrides: Mapping[str, Any]) -> str:
    """Changes of a configuration as options of a command line; read again, they are the same."""

    def text(value: Any) -> str:
        plain = isinstance(value, str) and yaml.safe_load(value) == value
        return str(value) if plain else json.dumps(value)

    return "".join(f" --set {shlex.quote(f'{key}={text(value)}')}" for key, value in overrides.items())


def _check(recipe: Recipe, steps: Sequence[TrainingStep], settings: ExportSettings, out: Path) -> None:
    """Refuse what would be refused hours later."""
    work, run = out / "work", out / "run"
    for name in recipe.measure:
        if name not in MEASUREMENTS:
            raise unknown_choice("measure", name, MEASUREMENTS)
    configurations = {step.name: step.configuration(work, run) for step in steps}
    TrainingStep("segmenter", recipe.configs, recipe.segmenter).configuration(work, run)
    words = Words.read(out / "bundle" / WORDS)
    licence_notice(settings.licence, settings.licence_file, words.attribution)
    if recipe.controlnet is not None:
        return
    if (run / "controlnet").exists():
        raise FibldmError(
            f"the recipe has no ControlNet, and {run} has one, which would be used", "choose another --out folder"
        )
    if configurations["diffusion"].parser()["mask_way"] is None:
        raise FibldmError(
            "without a ControlNet, stage 2 must see the mask; its mask_way is null",
            "put mask_concat or mask_spade into its configs",
        )


def _synthesize(run: Path, work: Path, split: str, out: Path, drawing: Drawing) -> None:
    masks = [str(entry["label"]) for entry in load_datalist(work, split, masks=True)]
    try:
        synthesize_files(
            run,
            masks,
            out,
            count=1,
            settings=drawing.sampling,
            batch_size=drawing.batch_size,
            allow_extrapolation=drawing.allow_extrapolation,
        )
    except VolumeLiesThere as error:
        raise FibldmError(error.message, f"move {out} away and run the same command again; training is kept") from error


def _measure(run: Path, work: Path, out: Path, recipe: Recipe, drawing: Drawing, say: Callable[[str], None]) -> None:
    given: dict[str, Any] = {"run_dir": run, "work": work, "segmenter_settings": recipe.segmenter, "say": say}
    evaluate([name for name in recipe.measure if name in OF_ANY_MASKS], synthetic=out / "synthetic", **given)
    if "utility" in recipe.measure:
        _synthesize(run, work, "training", out / "synthetic_training", drawing)
        evaluate(["utility"], synthetic=out / "synthetic_training", **given)
