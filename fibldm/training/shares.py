"""A number of minutes for all stages of a run together, shared among those that are trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import read_json, write_json
from fibldm.runs import BUDGET, STAGES, StageFolder
from fibldm.runs.stages import kind_of


def shares_of(stages: Sequence[str], given: Mapping[str, float] | None = None) -> dict[str, float]:
    """The shares of the stages that are trained, in their order.

    Args:
        stages: of the run.
        given: another share for each that is trained; only their ratios count. None takes those of the table of stages.

    Raises:
        FibldmError: they are shares of other stages, or no numbers above 0.
    """
    trained = [stage for stage in stages if kind_of(stage).is_trained]
    shares = given or _usual(trained)
    for name in shares:
        if name not in trained:
            raise unknown_choice("stage with a share of the minutes", name, trained)
    if missing := [stage for stage in trained if stage not in shares]:
        raise FibldmError(f"every stage that is trained must have a share of the minutes; {missing[0]} has none")
    if not all(0 < share < math.inf for share in shares.values()):
        raise FibldmError(f"shares of the minutes must be numbers above 0; got {dict(shares)}")
    return {stage: float(shares[stage]) for stage in trained}


def _usual(trained: Sequence[str]) -> dict[str, float]:
    """The shares that the table of stages gives."""
    shares = {stage: kind_of(stage).share for stage in trained}
    for stage in trained:
        for other, part in kind_of(stage).share_of_others.items():
            shares[stage] += part
            shares[other] -= part
    return {stage: round(share, 6) for stage, share in shares.items()}


@dataclass(frozen=True)
class TotalBudget:
    """Minutes for all stages of a run together: those that are trained, and the latents between them.

    What a stage used too little or too much changes what is left for those after it. ``budget.json`` in the run folder
    has what was expected of the latents, so that the same command shares in the same way when it goes on.

    Attributes:
        run: the run folder.
        minutes: of all stages.
        shares: of the stages that are trained, in their order; see `shares_of`.
        encoding: seconds that making the latents is expected to take.
    """

    run: Path
    minutes: float
    shares: Mapping[str, float]
    encoding: float = 0.0

    @property
    def seconds(self) -> float:
        """Used by all stages so far."""
        return sum(StageFolder(self.run, stage).seconds() for stage in STAGES)

    def minutes_of(self, stage: str) -> float:
        """The minutes of a stage: its share of what the stages before left.

        A finished stage that later ones were made from already keeps to what it has, as more of it would make those
        worthless; what there is more goes to the later ones.

        Raises:
            FibldmError: nothing is left.
        """
        folder, later = StageFolder(self.run, stage), STAGES[STAGES.index(stage) + 1 :]
        done, kept = folder.done(), math.floor(1e4 * folder.seconds() / 60) / 1e4
        if done and any((self.run / name / "inputs.json").exists() for name in later) and done.get("minutes", kept):
            return float(done.get("minutes", kept))
        used = sum(StageFolder(self.run, name).seconds() for name in STAGES[: STAGES.index(stage)])
        to_come = [share for name, share in self.shares.items() if STAGES.index(name) >= STAGES.index(stage)]
        encoding = self.encoding if "latents" in later else 0.0
        left = 60 * self.minutes - used - encoding
        if left <= 0:
            making = f", and making the latents takes about {encoding:.0f} s" if encoding else ""
            raise FibldmError(
                f"the minutes of all stages must leave time for {stage}; of {self.minutes:g} minutes the stages before "
                f"used {used / 60:.2g}{making}",
                "give more minutes; the same command goes on",
            )
        return round(left / 60 * self.shares[stage] / sum(to_come), 4)


def expected_encoding(run: Path) -> float | None:
    """The seconds that were expected of the latents when the run began; None where nothing was."""
    file = run / BUDGET
    return float(read_json(file)["encoding_seconds"]) if file.exists() else None


def note_encoding(run: Path, seconds: float) -> None:
    """Keep what is expected of the latents for the next time."""
    write_json(run / BUDGET, {"encoding_seconds": round(seconds, 1)})
