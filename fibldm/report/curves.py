"""Lines in SVG, such as losses by epoch; a page colours them by its own style."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from fibldm.report.parts import Picture

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
_TICKS = 4

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Losses:
    """What ``metrics.csv`` of a stage says.

    Attributes:
        stage: its name.
        training: epochs and losses.
        validation: the same of the epochs that were validated.
        seconds: of all epochs together.
    """

    stage: str
    training: Points
    validation: Points
    seconds: float

    @classmethod
    def read(cls, stage: str, file: Path) -> "Losses":
        """The losses in a file; epochs without a value are left out."""
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))

        def points(column: str) -> Points:
            return [(float(row["epoch"]), float(row[column])) for row in rows if row.get(column)]

        seconds = sum(float(row["seconds"]) for row in rows if row.get("seconds"))
        return cls(stage, points("loss"), points("validation_loss"), seconds)

    @property
    def epochs(self) -> int:
        return int(max((epoch for epoch, _ in self.training), default=0))

    def picture(self) -> Picture:
        """The lines, with axes."""
        kinds = {name: line for name, line in (("training", self.training), ("validation", self.validation)) if line}
        said = [f"{name} loss from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in kinds.items()]
        alt = f"Loss of the stage {self.stage} over {self.epochs} epochs: {', '.join(said)}"
        return Picture(alt, f"{self.stage}: loss by epoch", svg=chart(kinds, "epoch"))


def chart(lines: Mapping[str, Points], across: str) -> Markup:
    """Lines with axes, as an SVG element.

    Args:
        lines: points by name, which is the line's class in the style, and stands in the key.
        across: what is said below the horizontal axis.
    """
    kinds = list(lines.items())
    drawn = "".join([_axes([line for _, line in kinds], across), *(_line(name, line, kinds) for name, line in kinds)])
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{drawn}</svg>')


def _frame(lines: Sequence[Points]) -> tuple[float, float, float, float]:
    """Epochs and losses at the edges."""
    epochs = [epoch for line in lines for epoch, _ in line]
    losses = [loss for line in lines for _, loss in line]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    first, last = min(epochs), max(epochs)
    return first, max(last, first + 1), low - margin, high + margin


def _place(point: tuple[float, float], frame: tuple[float, float, float, float]) -> tuple[float, float]:
    first, last, low, high = frame
    across = (point[0] - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
    up = (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
    return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)


def _axes(lines: Sequence[Points], across: str) -> str:
    frame = _frame(lines)
    first, last, low, high = frame
    drawn = [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>',
        f'<text class="middle" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}">{escape(across)}</text>',
    ]
    for number in range(_TICKS + 1):
        loss = low + (high - low) * number / _TICKS
        _, y = _place((first, loss), frame)
        drawn.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        drawn.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4}">{loss:.3g}</text>')
    for epoch in sorted({round(first + (last - first) * number / _TICKS) for number in range(_TICKS + 1)}):
        x, _ = _place((epoch, low), frame)
        drawn.append(f'<text class="middle" x="{x}" y="{_HEIGHT - _BOTTOM + 15}">{epoch}</text>')
    return "".join(drawn)


def _line(name: str, line: Points, kinds: Sequence[tuple[str, Points]]) -> str:
    frame = _frame([points for _, points in kinds])
    places = [_place(point, frame) for point in line]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in places)
    row = [other for other, _ in kinds].index(name)
    y = _TOP + 12 + 16 * row
    key = f'<path d="M{_WIDTH - 110} {y - 4}h18"/><text class="key" x="{_WIDTH - 86}" y="{y}">{name}</text>'
    return f'<g class="{name}"><path d="{path}"/>{dots}{key}</g>'
