"""A recipe: what each step of ``fibldm pipeline`` does, as a YAML file says it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS
from fibldm.runs import STAGES, StageConflict
from fibldm.runs.config_files import read_configuration
from fibldm.runs.config_keys import both_given
from fibldm.runs.configuration import Configuration, stage_configuration
from fibldm.runs.options import as_options, in_order
from fibldm.runs.stages import DEFAULT_RECIPE, TABLE, kind_of
from fibldm.runs.values import require_minutes, require_switches
from fibldm.synthesis import SynthesisSettings
from fibldm.typed_settings import settings_of
from fibldm.verbatim import as_word


@dataclass(frozen=True)
class Recipe:
    """What each step does; as YAML, a file of ``fibldm pipeline --recipe``.

    Attributes:
        configs: paths or names of configurations of all stages; one gives spacing and size of the model grid.
        prepare: fields of `PrepareSettings`.
        of_stages: keys of the configurations of stages, by their names, which are steps of their own in the file;
            ``configs`` names more configurations of that stage alone, null leaves out one that is optional, such as the
            ControlNet where stage 2 sees the mask itself. Those of the segmenter that measures are here, too.
        synthesize: options of `fibldm.synthesis.SynthesisSettings`, by their names; ``own_conditions: true`` asks of
            each mask what the prepared data say of its case.
        measure: names of `fibldm.evaluation.measurements.MEASUREMENTS`.
        perceptual: file of weights of a ResNet of slices, for LPIPS; None leaves it out.
        minutes: for all stages of training together, in place of their epochs; None trains all epochs.
        shares: of the minutes, for each stage that is trained; empty takes the defaults, see `shares_of`.
    """

    configs: Sequence[str] = ()
    prepare: Mapping[str, Any] = field(default_factory=dict)
    of_stages: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    synthesize: Mapping[str, Any] = field(default_factory=dict)
    measure: Sequence[str] = DEFAULT_MEASUREMENTS
    perceptual: str | None = None
    minutes: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | None, *, configs: Sequence[str] = (), overrides: Mapping[str, Any]) -> "Recipe":
        """A recipe from a file, with more configurations and with changes on top.

        Args:
            file: path of a YAML file, or the name of a shipped one; None takes `DEFAULT_RECIPE`.
            configs: come after those of the file.
            overrides: ``step::key`` to value, such as ``diffusion::epochs``.

        Raises:
            FibldmError: there is no such file, a step is unknown or has another type, or there are minutes and an
                override gives epochs.
        """
        content = dict(read_configuration(file or DEFAULT_RECIPE))
        for key, value in in_order(overrides).items():
            step, *inside = key.split("::", 1)
            before = content.get(step)
            if inside and isinstance(before, Mapping | None):
                kept = {
                    name: part for name, part in (before or {}).items() if not f"{name}".startswith(f"{inside[0]}::")
                }
                content[step] = {**kept, inside[0]: value}
            elif inside:
                raise FibldmError(f"{step} of a recipe has no {inside[0]}; it is {before}", f"give all of {step}")
            else:
                content[step] = value
        recipe = cls._of(content)
        require_minutes(recipe.minutes)
        for name in STAGES:
            if recipe.minutes is not None and f"{name}::epochs" in overrides:
                raise both_given(recipe.minutes, f"{overrides[f'{name}::epochs']} of {name}")
        return replace(recipe, configs=[*recipe.configs, *configs])

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> "Recipe":
        """A recipe from the content of a file."""
        names = [part.name for part in fields(cls) if part.name != "of_stages"]
        for name, value in content.items():
            if name not in (*names, *TABLE):
                raise unknown_choice("step of a recipe", name, (*names, *TABLE))
            if name in TABLE and not _are_keys(value) and not (value is None and _may_be_left_out(name)):
                or_null = " or null" if _may_be_left_out(name) else ""
                raise FibldmError(
                    f"step of a recipe {name} must be a mapping from a text to any value{or_null}; got {value!r}"
                )
        plain = {name: value for name, value in content.items() if name not in TABLE}
        of_stages = {name: value for name, value in content.items() if name in TABLE}
        return replace(settings_of(cls, plain, "step of a recipe"), of_stages=of_stages)

    @property
    def preparation(self) -> PrepareSettings:
        """How the dataset is prepared.

        Raises:
            FibldmError: an option is unknown or has another type.
        """
        return settings_of(PrepareSettings, self.prepare, "option of prepare")

    @property
    def of_segmenter(self) -> Mapping[str, Any]:
        """Keys of the configuration of the segmenter that measures."""
        return self.of_stages.get("segmenter") or {}

    def drawing(self, work: Path) -> SynthesisSettings:
        """How volumes are drawn and written.

        Args:
            work: the work folder that the masks are of.

        Raises:
            FibldmError: an option is unknown, has another type or is out of range, or asks for files or adapters that
                are not measured.
        """
        options = {"own_conditions": False, **self.synthesize}
        require_switches(own_conditions=options["own_conditions"])
        options["own_conditions"] = work if options["own_conditions"] else None
        drawing = SynthesisSettings.of(what="option of synthesize", **options)
        if drawing.files.format != "nifti":
            raise FibldmError(
                f"a recipe measures volumes in NIfTI; its synthesize asks for format {drawing.files.format}",
                "leave format out, and draw with `fibldm synthesize --bundle` from the bundle that the recipe makes",
            )
        if drawing.adapters:
            raise FibldmError(
                "a recipe measures volumes of the networks that it trains; its synthesize asks for adapters",
                "leave adapters out, and put them on with `fibldm export --adapter` or `fibldm synthesize --adapter`",
            )
        return drawing

    def stages(self) -> list["TrainingStep"]:
        """The stages that are trained, in their order.

        Raises:
            FibldmError: ``configs`` of one is no list of names.
        """
        steps = []
        for name in STAGES:
            keys = self.of_stages.get(name, None if TABLE[name].in_pipeline == "on request" else {})
            if keys is not None:
                own = keys.get("configs", ())
                if isinstance(own, str) or not all(isinstance(config, str) for config in own or ()):
                    raise FibldmError(f"configs of {name} must be a list of names; got {own!r}", "write it in brackets")
                left_out = {"configs"} if self.minutes is None else {"configs", "epochs"}
                overrides = {key: value for key, value in keys.items() if key not in left_out}
                steps.append(TrainingStep(name, (*self.configs, *(own or ())), overrides))
        return steps


@dataclass(frozen=True)
class TrainingStep:
    """A stage with its configurations and changes.

    Attributes:
        name: one of the table of stages.
        configs: paths or names of configurations.
        overrides: ``key::sub`` to value.
    """

    name: str
    configs: Sequence[str]
    overrides: Mapping[str, Any]

    def run(self, work: Path, run: Path, *, minutes: float | None = None) -> str:
        """Train the stage, unless that is done; the command that does the same.

        Args:
            work: folder of ``fibldm prepare``.
            run: the run folder.
            minutes: for this stage; None trains all epochs.

        Raises:
            FibldmError: the stage is refused.
        """
        began, given = time.monotonic(), {} if minutes is None else {"minutes": minutes}
        try:
            replace(self, overrides={**self.overrides, **given}).configuration(work, run).run(began=began)
        except StageConflict as error:
            raise FibldmError(
                error.message,
                f"choose another --out folder, or give --set {self.name}::restart=true, once, to train this stage anew "
                "(the old one is kept beside it)",
            ) from error
        configs = "".join(f" --config {as_word(name)}" for name in self.configs)
        folders = f"--data {as_word(work)} --run {as_word(run)}"
        limited = "" if minutes is None else f" --minutes {minutes:g}"
        return f"{kind_of(self.name).command} {folders}{configs}{as_options(self.overrides)}{limited}"

    def configuration(self, work: Path, run: Path) -> Configuration:
        """The checked configuration of the stage."""
        return stage_configuration(self.name, work=work, run_dir=run, configs=self.configs, overrides=self.overrides)


def _are_keys(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _may_be_left_out(stage: str) -> bool:
    return TABLE[stage].in_pipeline in ("optional", "on request")
