"""The envelope: what the training data covered, outside which a network extrapolates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume

_SPACING_MARGIN = 0.25
_VIEW_MARGIN = 0.25
_VOLUME_FACTOR = 2.0

Range = tuple[float, float]


@dataclass(frozen=True)
class Envelope:
    """Ranges over the training split.

    Attributes:
        spacing: mm, one range per axis R, A, S.
        field_of_view: mm, one range per axis R, A, S.
        label_volume: ml, by label value; 0 where a case lacks the label.
    """

    spacing: tuple[Range, Range, Range]
    field_of_view: tuple[Range, Range, Range]
    label_volume: Mapping[int, Range]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Envelope":
        """From the ``envelope`` of ``datalist.json``."""
        volumes = {int(label): (part["min"], part["max"]) for label, part in value["label_volume_ml"].items()}
        return cls(_per_axis(value["spacing_mm"]), _per_axis(value["field_of_view_mm"]), volumes)

    def outside(self, labels: Volume) -> list[str]:
        """What of a label volume (canonical) lies outside, in words; a margin of a quarter, of a factor 2 for volumes.

        Finer spacing than in training is no finding: the mask is resampled. Neither is a label that is absent, unless
        all are: a mask of nothing but background asks for a body without organs.
        """
        grid = labels.grid
        findings = []
        for axis, step, view, steps, views in zip(
            "RAS", grid.spacing, grid.field_of_view, self.spacing, self.field_of_view, strict=True
        ):
            if step > steps[1] * (1 + _SPACING_MARGIN):
                findings.append(f"spacing along {axis} {_shown(step, 2)} mm (training up to {_shown(steps[1], 2)} mm)")
            if not views[0] * (1 - _VIEW_MARGIN) <= view <= views[1] * (1 + _VIEW_MARGIN):
                trained = f"{_shown(views[0], 0)}-{_shown(views[1], 0)}"
                findings.append(f"field of view along {axis} {_shown(view, 0)} mm (training {trained} mm)")
        voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
        for label, (low, high) in self.label_volume.items():
            volume = float((labels.array == label).sum()) * voxel_ml
            if label and volume and not low / _VOLUME_FACTOR <= volume <= high * _VOLUME_FACTOR:
                trained = f"{_shown(low, 1)}-{_shown(high, 1)}"
                findings.append(f"label {label} fills {_shown(volume, 1)} ml (training {trained} ml)")
        values = set(np.unique(labels.array).tolist())
        if values == {0}:
            findings.append("no voxel has a label (all are background)")
        elif values == {0, UNKNOWN_LABEL}:
            findings.append(
                f"no voxel has a label, only background and {UNKNOWN_LABEL}, which is unknown (a binary mask holds 0 "
                "and the value of its label)"
            )
        return findings

    def check(self, labels: Volume, *, allow: bool) -> list[str]:
        """The findings of `outside`, where that is allowed.

        Raises:
            FibldmError: there are findings and ``allow`` is False.
        """
        findings = self.outside(labels)
        if findings and not allow:
            raise FibldmError(
                f"a mask must lie within what the training data covered; {'; '.join(findings)}",
                "give `allow_extrapolation` to go on anyway (the sidecar will say so)",
            )
        return findings


def _shown(value: float, decimals: int) -> str:
    """A number with so many decimals, or three digits where these would say little, as of micrometres."""
    small = 0 < value < (10 if decimals == 0 else 0.1)
    return f"{value:.3g}" if small else f"{value:.{decimals}f}"


def _per_axis(value: Mapping[str, Any]) -> tuple[Range, Range, Range]:
    x, y, z = ((float(low), float(high)) for low, high in zip(value["min"], value["max"], strict=True))
    return x, y, z
