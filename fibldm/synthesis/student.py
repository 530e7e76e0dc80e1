"""Students: networks that were distilled from a teacher, and draw in one or two calls what it draws in many."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.runs import StageFolder
from fibldm.runs.stages import TABLE, kind_of, taught
from fibldm.synthesis.settings import SamplingSettings
from fibldm.typed_settings import counted

_ALIKE = ("ddim", "dpmpp_2m")  # the same in one step or two, without noise of their own
_SHORT = 12  # of a fingerprint, in messages


@dataclass(frozen=True)
class Student:
    """What a student was trained for.

    Attributes:
        calls: of the network that it was trained for at most; from noise alone, 1 does as well.
        teacher: fingerprint of the teacher's weights.
        sampling: how the teacher drew, guidance included.
    """

    calls: int
    teacher: str
    sampling: SamplingSettings

    @classmethod
    def of_stage(cls, stage: StageFolder) -> "Student | None":
        """Of a finished stage; None where it is no student."""
        if not taught(stage.name):
            return None
        teacher = str(read_json(stage.path / "inputs.json")["inputs"]["teacher"])
        return cls(int(stage.component("student_calls")), teacher, stage.component("teacher_sampling"))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any] | None) -> "Student | None":
        """Of what `to_dict` told; None where there is nothing.

        Raises:
            FibldmError: a setting of the sampling is unknown or out of range.
        """
        if facts is None:
            return None
        return cls(int(facts["calls"]), str(facts["teacher"]), SamplingSettings.from_dict(facts["sampling"]))

    def to_dict(self) -> dict[str, Any]:
        """As sidecars and bundles tell it."""
        sampling = {name: value for name, value in self.sampling.to_dict().items() if name != "seed"}
        return {"calls": self.calls, "teacher": self.teacher, "sampling": sampling}

    @property
    def own(self) -> SamplingSettings:
        """How it draws: with as many calls as it was trained for, without guidance, which its weights hold."""
        return SamplingSettings(sampler=_ALIKE[0], steps=self.calls)

    @property
    def described(self) -> str:
        """In words."""
        usual = f"distilled to {counted(self.calls, 'network call')}"
        return f"{usual} from {self.teacher[:_SHORT]}, which drew by {self.sampling.described}"

    def check(self, settings: SamplingSettings, shift: float | None) -> None:
        """Refuse what it was not trained for.

        Args:
            settings: how it is to draw.
            shift: of its times in training; None where that is not known yet.

        Raises:
            FibldmError: says all that does not fit.
        """
        steps, with_eta = sorted({1, self.calls}), f" with eta {settings.eta:g}" if settings.eta else ""
        wrong = {
            f"steps {' or '.join(map(str, steps))}; got {settings.steps}": settings.steps not in steps,
            f"guidance 1, as its weights hold that of its teacher; got {settings.guidance:g}": settings.guidance != 1,
            f"sampler {' or '.join(_ALIKE)} without eta; got {settings.sampler}{with_eta}": settings.sampler
            not in _ALIKE
            or bool(settings.eta),
            f"shift {shift}; got {settings.shift}": shift is not None and settings.shift not in (None, shift),
        }
        if told := [text for text, is_wrong in wrong.items() if is_wrong]:
            raise FibldmError(
                f"a distilled network draws as it was trained to: {'; '.join(told)}",
                "leave it out; for more steps or another guidance draw with its teacher, or distil again",
            )


def teacher_of(run_dir: str | Path, stage: str = "distillation") -> str:
    """The stage of a run that a student learns from: the last that was begun of those that the table names.

    Raises:
        FibldmError: none was begun.
    """
    names = [name for name in kind_of(stage).stands_on if (Path(run_dir) / name).exists()]
    if not names:
        commands = " or ".join(f"`{TABLE[name].command}`" for name in kind_of(stage).stands_on)
        raise FibldmError(f"a student needs a teacher in its run; {run_dir} has none", f"run {commands}")
    return names[-1]
