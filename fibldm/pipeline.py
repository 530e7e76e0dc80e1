"""All stages of one generator by one command: from a folder of volumes with masks to a bundle that was verified.

A recipe says what each step does. What is finished is skipped, so that the same command goes on where it stopped.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.verify import verify
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.measurements import MEASUREMENTS, OF_ANY_MASKS, evaluate
from fibldm.runs import STAGES
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.training.configuration import Configuration, read_configuration, stage_configuration
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.preparation import prepare
from fibldm.volumes.prepare_settings import PrepareSettings

_OF_SYNTHESIS = ("batch_size", "allow_extrapolation")  # beside how volumes are drawn


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
        synthesize: fields of `SamplingSettings`; ``batch_size`` and ``allow_extrapolation``.
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
            FibldmError: there is no such file, or a step is unknown or no mapping.
        """
        content = dict(read_configuration(file)) if file is not None else {}
        for key, value in overrides.items():
            step, *inside = key.split("::", 1)
            content[step] = {**(content.get(step) or {}), inside[0]: value} if inside else value
        known = {part.name for part in fields(cls)}
        for step, value in content.items():
            if step not in known:
                raise unknown_choice("step of a recipe", step, sorted(known))
            wanted = list if step in ("configs", "measure") else dict
            if not isinstance(value, wanted) and not (step == "controlnet" and value is None):
                raise FibldmError(f"{step} of a recipe must be a {wanted.__name__}; got {value!r}")
        return cls(**{**content, "configs": [*content.get("configs", ()), *configs]})

    @property
    def prepare_settings(self) -> PrepareSettings:
        """How the dataset is prepared.

        Raises:
            FibldmError: an option is unknown.
        """
        known = [part.name for part in fields(PrepareSettings)]
        _refuse_unknown("prepare", self.prepare, known)
        return PrepareSettings(**{key: _as_tuple(value) for key, value in self.prepare.items()})

    @property
    def sampling(self) -> SamplingSettings:
        """How volumes are drawn.

        Raises:
            FibldmError: an option is unknown or out of range.
        """
        known = [part.name for part in fields(SamplingSettings)]
        _refuse_unknown("synthesize", self.synthesize, [*known, *_OF_SYNTHESIS])
        return SamplingSettings(**{key: value for key, value in self.synthesize.items() if key in known})

    def stages(self) -> list["TrainingStep"]:
        """The stages that are trained, in their order."""
        steps = []
        for name in STAGES:
            keys = getattr(self, name)
            if keys is not None:
                overrides = {key: value for key, value in keys.items() if key != "configs"}
                steps.append(TrainingStep(name, (*self.configs, *keys.get("configs", ())), overrides))
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
        """Train the stage, unless that is done; the command that does the same."""
        self.configuration(work, run).run()
        verb = "encode" if self.name == "latents" else f"train {self.name}"
        given = "".join(f" --config {shlex.quote(str(name))}" for name in self.configs)
        return f"fibldm {verb} --data {work} --run {run}{given}{as_options(self.overrides)}"

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
        out: gets ``work``, ``run``, ``synthetic``, ``bundle`` and, to measure utility, ``synthetic_training``.
        recipe: what each step does; all of it is checked before the first one.
        settings: of the export.
        workers: processes that prepare at the same time.
        say: where the headlines go.

    Returns:
        ``outputs``, the bundle's folder among them, and ``checks`` by name.

    Raises:
        FibldmError: the recipe, the data or a step was refused, or the bundle is not what it promises.
    """
    work, run, bundle = out / "work", out / "run", out / "bundle"
    steps, prepared, sampling = recipe.stages(), recipe.prepare_settings, recipe.sampling
    for name in recipe.measure:
        if name not in MEASUREMENTS:
            raise unknown_choice("measure", name, MEASUREMENTS)
    for step in steps:
        step.configuration(work, run)
    say(f"1/6 prepare: {source} into {work}")
    report = prepare(source, work, prepared, workers=workers)
    for line in (*map(str, report.findings), *(f"note: {note}" for note in report.notes)):
        say(line)
    commands = []
    for step in steps:
        say(f"2/6 {step.name}")
        commands.append(step.run(work, run))
    say(f"3/6 synthesize: the test patients' masks into {out / 'synthetic'}")
    _synthesize(run, work, "test", out / "synthetic", recipe, sampling)
    say("4/6 evaluate")
    _measure(run, work, out, recipe, sampling, say)
    say(f"5/6 export: {bundle}")
    export(run, bundle, settings)
    say("6/6 verify, in a fresh process")
    checks = list(verify(bundle))
    if failed := [check for check in checks if not check.ok]:
        raise FibldmError(
            f"a bundle must do all it promises; {bundle} fails {failed[0].name}: {failed[0].saw}",
            f"run `fibldm verify {bundle}` to see all checks",
        )
    say("\n".join(["", f"bundle: {bundle}", "", "The training, step by step:", *(f"  {line}" for line in commands)]))
    return {
        "outputs": [str(bundle), str(run), str(out / "synthetic")],
        "checks": {check.name: True for check in checks},
    }


def as_options(overrides: Mapping[str, Any]) -> str:
    """Changes of a configuration as options of a command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    return "".join(f" --set {shlex.quote(f'{key}={text}')}" for key, text in texts.items())


def _synthesize(run: Path, work: Path, split: str, out: Path, recipe: Recipe, sampling: SamplingSettings) -> None:
    masks = [str(entry["label"]) for entry in load_datalist(work, split, masks=True)]
    others = {key: recipe.synthesize[key] for key in _OF_SYNTHESIS if key in recipe.synthesize}
    synthesize_files(run, masks, out, count=1, settings=sampling, **others)


def _measure(
    run: Path, work: Path, out: Path, recipe: Recipe, sampling: SamplingSettings, say: Callable[[str], None]
) -> None:
    given: dict[str, Any] = {"run_dir": run, "work": work, "segmenter_settings": recipe.segmenter, "say": say}
    evaluate([name for name in recipe.measure if name in OF_ANY_MASKS], synthetic=out / "synthetic", **given)
    if "utility" in recipe.measure:
        _synthesize(run, work, "training", out / "synthetic_training", recipe, sampling)
        evaluate(["utility"], synthetic=out / "synthetic_training", **given)


def _refuse_unknown(step: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise unknown_choice(f"{step} option", key, known)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
