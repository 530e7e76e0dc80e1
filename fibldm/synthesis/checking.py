"""Volumes that are refused are drawn again: those outside of the ranges of training, and copies of training scans."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_value
from fibldm.synthesis.request import PreparedMask, Synthesis
from fibldm.synthesis.settings import SamplingSettings
from fibldm.typed_settings import counted
from fibldm.volumes.detail import Constant
from fibldm.volumes.gate import Gate, measure
from fibldm.volumes.grid import resample
from fibldm.volumes.known_scans import KnownScans

if TYPE_CHECKING:
    from fibldm.synthesis.synthesizer import Synthesizer

CHECKED = "check"
"""What the sidecar of a volume calls this."""

DRAWS_AGAIN = 10
"""How often a copy is drawn again, where a check of ranges does not say how often."""

_SHOWN = 10  # volumes in one error, and kinds of findings in a summary


@dataclass(frozen=True)
class Looked:
    """What a check says of a volume.

    Attributes:
        findings: why it is refused, in words; none where it is not.
        told: what the sidecar says of one that is not refused.
    """

    findings: Sequence[str] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


class Check(Protocol):
    """Looks at volumes that were drawn."""

    @property
    def must(self) -> str:
        """What must hold of a volume."""

    @property
    def passed(self) -> str:
        """The same, of those of which it holds."""

    @property
    def remedy(self) -> str:
        """What may be wrong where it does not hold."""

    @property
    def decisive(self) -> dict[str, str]:
        """What a volume that passed depends on: however often one is drawn again, one that passes is the same."""

    def look(
        self, synthesizer: "Synthesizer", prepared: PreparedMask, decoded: NDArray[np.float32], made: Synthesis
    ) -> Looked:
        """What is to be said of a volume, finite ``(C, X, Y, Z)`` as decoded on the model grid, and as made of that."""


@dataclass(frozen=True)
class RangeCheck:
    """Intensities must lie in the ranges of the training data."""

    gate: Gate
    must = "intensities must lie in the ranges of the training data"
    passed = "in the ranges of training"
    remedy = (
        "if most volumes are left out, the network is not trained well enough, or the masks are too unlike those of "
    )
    remedy += "training"

    @property
    def decisive(self) -> dict[str, str]:
        return {"check": self.gate.fingerprint}

    def look(
        self, synthesizer: "Synthesizer", prepared: PreparedMask, decoded: NDArray[np.float32], made: Synthesis
    ) -> Looked:
        labels, inside = labels_and_field(prepared)
        values = measure(synthesizer.channels, synthesizer.intensity.restore(decoded), labels, inside)
        return Looked(self.gate.outside(values), {"patients": self.gate.patients, "measured": self.gate.told(values)})


@dataclass(frozen=True)
class CopyCheck:
    """Volumes must be no copies of training scans, by the measure and the threshold of an audit.

    Neither findings nor sidecar name the scan: a volume that is given away would tell who was in training.
    """

    scans: KnownScans
    must = "volumes must be no copies of training scans at the threshold of the audit"
    passed = "no copy of a training scan at the threshold of the audit"
    remedy = (
        "if most volumes are left out, the network knows its training scans by heart: train it on more patients, or "
    )
    remedy += "for fewer epochs"

    @property
    def decisive(self) -> dict[str, str]:
        return {"reject_copies": self.scans.fingerprint}

    def look(
        self, synthesizer: "Synthesizer", prepared: PreparedMask, decoded: NDArray[np.float32], made: Synthesis
    ) -> Looked:
        threshold = self.scans.threshold
        try:
            similarity = self.scans.similarity(made.channels[0])
        except Constant:
            return Looked(["constant in nearly all voxels, so that it cannot be compared with training scans"])
        if similarity > threshold:
            said = f"a copy of a training scan in its detail (similarity {similarity:.3f}, threshold {threshold:.3f})"
            return Looked([said])
        scans = len(self.scans.matcher.training)
        return Looked(told={"copies": {"similarity": similarity, "threshold": threshold, "training_scans": scans}})


@dataclass(frozen=True)
class Rejected:
    """A volume of which every draw was refused.

    Attributes:
        name: of the volume: of its mask, and its number.
        findings: of each draw, why it was refused, in words.
        checks: that refused it.
    """

    name: str
    findings: Sequence[Sequence[str]]
    checks: Sequence[Check] = ()


class OutsideRanges(FibldmError):
    """Volumes that were not made, as every draw of them was refused.

    Attributes:
        rejected: those volumes.
    """

    def __init__(self, rejected: Sequence[Rejected]) -> None:
        self.rejected = list(rejected)
        shown = [f"\n  {volume.name}: {'; '.join(volume.findings[-1])}" for volume in self.rejected[:_SHOWN]]
        more = f"\n  and {len(self.rejected) - _SHOWN} more" if len(self.rejected) > _SHOWN else ""
        draws = max(len(volume.findings) for volume in self.rejected)
        checks = self.rejected[0].checks
        super().__init__(
            f"{', and '.join(check.must for check in checks)}; left out as no draw did, of "
            f"{counted(draws, 'draw')} each: {counted(len(self.rejected), 'volume')} (why the last one was refused)"
            f"{''.join(shown)}{more}",
            "; ".join(
                ["give the same command again with a higher --check, which keeps the others"]
                + [check.remedy for check in checks]
            ),
        )


def seed_of_draw(seed: int, draw: int) -> int:
    """The seed that a volume is drawn with for the ``draw``-th time; the first, 0, is as asked.

    A volume that is asked for with that seed, and without check, is the same.
    """
    return int(hash_value([seed, draw])[:8], 16) if draw else seed


def checked(
    synthesizer: "Synthesizer",
    prepared: Sequence[PreparedMask],
    settings: SamplingSettings,
    checks: Sequence[Check],
    most: int,
) -> list[Synthesis | Rejected]:
    """Volumes that no check refuses; the sidecar tells draws, and what was measured.

    Args:
        synthesizer: draws them.
        prepared: masks.
        settings: as they are followed.
        checks: all of them look at each volume.
        most: how often one is drawn again.
    """
    made: dict[int, Synthesis] = {}
    findings: list[list[list[str]]] = [[] for _ in prepared]
    for draw in range(most + 1):
        left = [place for place in range(len(prepared)) if place not in made]
        seed = seed_of_draw(settings.seed, draw)
        decoded = synthesizer.decoded([prepared[place] for place in left], replace(settings, seed=seed))
        for place, volume in zip(left, decoded, strict=True):
            part = prepared[place]
            if strange := int((~np.isfinite(volume)).sum()):
                findings[place].append([f"not finite in {counted(strange, 'voxel')}"])
                continue
            synthesis = synthesizer.finished(part, volume, settings)
            looked = [check.look(synthesizer, part, volume, synthesis) for check in checks]
            if wrong := [finding for one in looked for finding in one.findings]:
                findings[place].append(wrong)
                continue
            told: dict[str, Any] = {"most": most, "draws": draw + 1, "seed": seed, "outside": findings[place]}
            for one in looked:
                told |= one.told
            made[place] = replace(synthesis, provenance={**synthesis.provenance, CHECKED: told})
    rejected = {place: Rejected(_name(part), findings[place], checks) for place, part in enumerate(prepared)}
    return [made.get(place) or rejected[place] for place in range(len(prepared))]


def labels_and_field(prepared: PreparedMask) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A mask on its model grid, unknown outside of its field of view, and what lies in that."""
    source = prepared.source
    labels = resample(source, prepared.grid, kind="label", fill=UNKNOWN_LABEL).array.astype(np.uint8)
    field = replace(source, array=np.ones(source.array.shape, dtype=np.uint8))
    return labels, resample(field, prepared.grid, kind="label", fill=0).array.astype(bool)


def summary(
    sidecars: Iterable[Mapping[str, Any]], rejected: Sequence[Rejected], passed: str = RangeCheck.passed
) -> str:
    """What the checks did, in a line: how many volumes were drawn again, and why.

    Args:
        sidecars: of the volumes that lie there.
        rejected: those that were left out.
        passed: what the others are.
    """
    facts = [told for told in (content.get(CHECKED) for content in sidecars) if told]
    again = [told["outside"] for told in facts if told["outside"]]
    draws = [*again, *(volume.findings for volume in rejected)]
    why = Counter(_kind(finding) for part in draws for one in part for finding in one)
    listed = ", ".join(f"{what} {count}" for what, count in why.most_common(_SHOWN))
    total = len(facts) + len(rejected)
    said = f"check: {len(facts)} of {counted(total, 'volume')} {passed}, {len(again)} of them drawn again"
    return said + (f"; {len(rejected)} left out" if rejected else "") + (f"; refused were: {listed}" if listed else "")


def _kind(finding: str) -> str:
    """A finding without its numbers."""
    what, compared, _ = finding.partition(" (training ")
    return what.rpartition(" ")[0] if compared else finding.partition(" in ")[0]


def _name(prepared: PreparedMask) -> str:
    return f"{prepared.request.name}_{prepared.request.number:03d}"
