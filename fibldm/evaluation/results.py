"""What was measured of a run: ``RUN/evaluation/metrics.json``, one section per measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fibldm import __version__
from fibldm.evaluation.statistics import Estimate
from fibldm.files import read_json, write_json
from fibldm.locks import alone

SHUFFLED = "/shuffled"

_PATIENCE = 60.0  # seconds; writing takes less than one


class Row(NamedTuple):
    """A figure in words: value, 95 % interval, of real scans, of shuffled masks, patients, note; empty where none."""

    name: str
    value: str
    interval: str
    real: str
    shuffled: str
    patients: str
    note: str

    @classmethod
    def of(cls, name: str, figure: Estimate, shuffled: Estimate | None) -> "Row":
        return cls(
            name,
            "-" if figure.value is None else f"{figure.value:.4g}",
            "" if figure.low is None else f"[{figure.low:.4g}, {figure.high:.4g}]",
            "" if figure.real_vs_real is None else f"{figure.real_vs_real:.4g}",
            "" if shuffled is None or shuffled.value is None else f"{shuffled.value:.4g}",
            str(figure.n),
            figure.note,
        )


@dataclass(frozen=True)
class Section:
    """The result of one measurement.

    Attributes:
        figures: by name, such as ``dice/left lung``.
        facts: what it was measured with: extractor hashes, scales, units, pictures.
        cases: the values of each volume.
        notes: sentences a reader must not miss.
    """

    figures: Mapping[str, Estimate]
    facts: Mapping[str, Any] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as it lies in ``metrics.json``."""
        figures = {name: figure.to_dict() for name, figure in self.figures.items()}
        return {
            "figures": figures,
            **self.facts,
            "notes": list(self.notes),
            "cases": [dict(case) for case in self.cases],
        }

    def rows(self) -> list[Row]:
        """The figures for people; that of shuffled masks (``<name>/shuffled``) stands beside that of the right ones."""
        beside = {f"{name}{SHUFFLED}" for name in self.figures}
        return [
            Row.of(name, figure, self.figures.get(f"{name}{SHUFFLED}"))
            for name, figure in self.figures.items()
            if name not in beside
        ]

    def text(self, title: str) -> str:
        """The figures and notes under a title, one line each."""
        rows = self.rows()
        width = max((len(row.name) for row in rows), default=0)
        lines = [
            f"  {row.name:<{width}}  {row.value:>8} {row.interval:<20} {row.real and f'real {row.real}':<14} "
            f"{row.shuffled and f'shuffled {row.shuffled}':<16} n={row.patients} {row.note}".rstrip()
            for row in rows
        ]
        return "\n".join([title, *lines, *(f"  note: {note}" for note in self.notes)])


def record(folder: Path, name: str, section: Section) -> Path:
    """Put a section into ``metrics.json`` of an evaluation folder, in place of what was measured before.

    Raises:
        FibldmError: the file there is no JSON, or cannot be written.
    """
    path = folder / "metrics.json"
    with alone(folder / ".metrics.lock", str(path), "measure again", patience=_PATIENCE):
        content: dict[str, Any] = read_json(path) if path.exists() else {}
        write_json(path, content | {"fibldm": __version__, name: section.to_dict()})
    return path
