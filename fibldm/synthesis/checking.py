"""The quality gate of a synthesizer: volumes are measured, and drawn again where they lie outside of training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_value
from fibldm.synthesis.request import PreparedMask, Synthesis
from fibldm.synthesis.settings import SamplingSettings
from fibldm.typed_settings import counted
from fibldm.volumes.gate import Gate, Values, measure
from fibldm.volumes.grid import resample

if TYPE_CHECKING:
    from fibldm.synthesis.synthesizer import Synthesizer

CHECKED = "check"
"""What the sidecar of a volume calls this."""

_SHOWN = 10  # volumes in one error, and kinds of findings in a summary


@dataclass(frozen=True)
class Rejected:
    """A volume of which every draw lay outside.

    Attributes:
        name: of the volume: of its mask, and its number.
        findings: of each draw, what lay outside, in words.
    """

    name: str
    findings: Sequence[Sequence[str]]


class OutsideRanges(FibldmError):
    """Volumes that were not made, as every draw of them lay outside of what the training data have.

    Attributes:
        rejected: those volumes.
    """

    def __init__(self, rejected: Sequence[Rejected]) -> None:
        self.rejected = list(rejected)
        shown = [f"\n  {volume.name}: {'; '.join(volume.findings[-1])}" for volume in self.rejected[:_SHOWN]]
        more = f"\n  and {len(self.rejected) - _SHOWN} more" if len(self.rejected) > _SHOWN else ""
        draws = max(len(volume.findings) for volume in self.rejected)
        super().__init__(
            "intensities must lie in the ranges of the training data; left out as no draw did, of "
            f"{counted(draws, 'draw')} each: {counted(len(self.rejected), 'volume')} (what lay outside in the last one)"
            f"{''.join(shown)}{more}",
            "give the same command again with a higher --check, which keeps the others; if most volumes are left out, "
            "the network is not trained well enough, or the masks are too unlike those of training",
        )


def seed_of_draw(seed: int, draw: int) -> int:
    """The seed that a volume is drawn with for the ``draw``-th time; the first, 0, is as asked.

    A volume that is asked for with that seed, and without check, is the same.
    """
    return int(hash_value([seed, draw])[:8], 16) if draw else seed


def checked(
    synthesizer: "Synthesizer", prepared: Sequence[PreparedMask], settings: SamplingSettings, most: int
) -> list[Synthesis | Rejected]:
    """Volumes whose intensities lie in the ranges of training; the sidecar tells draws, values and ranges.

    Args:
        synthesizer: draws them.
        prepared: masks.
        settings: as they are followed.
        most: how often one is drawn again.

    Raises:
        FibldmError: the generator knows no ranges.
    """
    gate = synthesizer.require_gate()
    made: dict[int, Synthesis] = {}
    findings: list[list[list[str]]] = [[] for _ in prepared]
    for draw in range(most + 1):
        left = [place for place in range(len(prepared)) if place not in made]
        seed = seed_of_draw(settings.seed, draw)
        decoded = synthesizer.decoded([prepared[place] for place in left], replace(settings, seed=seed))
        for place, volume in zip(left, decoded, strict=True):
            part = prepared[place]
            values, outside = _look(synthesizer, gate, part, volume)
            if outside:
                findings[place].append(outside)
                continue
            told = {"most": most, "draws": draw + 1, "seed": seed, "outside": findings[place]}
            told |= {"patients": gate.patients, "measured": gate.told(values)}
            synthesis = synthesizer.finished(part, volume, settings)
            made[place] = replace(synthesis, provenance={**synthesis.provenance, CHECKED: told})
    rejected = {place: Rejected(_name(part), findings[place]) for place, part in enumerate(prepared)}
    return [made.get(place) or rejected[place] for place in range(len(prepared))]


def _look(
    synthesizer: "Synthesizer", gate: Gate, prepared: PreparedMask, decoded: NDArray[np.float32]
) -> tuple[Mapping[str, Values], list[str]]:
    """What is measured of a decoded volume ``(C, X, Y, Z)``, and what of it lies outside."""
    if strange := int((~np.isfinite(decoded)).sum()):
        return {}, [f"not finite in {counted(strange, 'voxel')}"]
    labels, inside = labels_and_field(prepared)
    values = measure(synthesizer.channels, synthesizer.intensity.restore(decoded), labels, inside)
    return values, gate.outside(values)


def labels_and_field(prepared: PreparedMask) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A mask on its model grid, unknown outside of its field of view, and what lies in that."""
    source = prepared.source
    labels = resample(source, prepared.grid, kind="label", fill=UNKNOWN_LABEL).array.astype(np.uint8)
    field = replace(source, array=np.ones(source.array.shape, dtype=np.uint8))
    return labels, resample(field, prepared.grid, kind="label", fill=0).array.astype(bool)


def summary(sidecars: Iterable[Mapping[str, Any]], rejected: Sequence[Rejected]) -> str:
    """What the check did, in a line: how many volumes were drawn again, and why.

    Args:
        sidecars: of the volumes that lie there.
        rejected: those that were left out.
    """
    facts = [told for told in (content.get(CHECKED) for content in sidecars) if told]
    again = [told["outside"] for told in facts if told["outside"]]
    draws = [*again, *(volume.findings for volume in rejected)]
    why = Counter(_kind(finding) for part in draws for one in part for finding in one)
    listed = ", ".join(f"{what} {count}" for what, count in why.most_common(_SHOWN))
    total = len(facts) + len(rejected)
    said = (
        f"check: {len(facts)} of {counted(total, 'volume')} in the ranges of training, {len(again)} of them drawn again"
    )
    return said + (f"; {len(rejected)} left out" if rejected else "") + (f"; outside were: {listed}" if listed else "")


def _kind(finding: str) -> str:
    """A finding without its numbers."""
    what, compared, _ = finding.partition(" (training ")
    return what.rpartition(" ")[0] if compared else finding.partition(" in ")[0]


def _name(prepared: PreparedMask) -> str:
    return f"{prepared.request.name}_{prepared.request.number:03d}"
