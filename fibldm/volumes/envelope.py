"""The envelope: what the training data covered, outside which a network extrapolates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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
                findings.append(f"spacing along {axis} {step:.2f} mm (training up to {steps[1]:.2f} mm)")
            if not views[0] * (1 - _VIEW_MARGIN) <= view <= views[1] * (1 + _VIEW_MARGIN):
                findings.append(f"field of view along {axis} {view:.0f} mm (training {views[0]:.0f}-{views[1]:.0f} mm)")
        voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
        for label, (low, high) in self.label_volume.items():
            volume = float((labels.array == label).sum()) * voxel_ml
            if label and volume and not low / _VOLUME_FACTOR <= volume <= high * _VOLUME_FACTOR:
                findings.append(f"label {label} fills {volume:.1f} ml (training {low:.1f}-{high:.1f} ml)")
        if not labels.array.any():
            findings.append("no voxel has a label (all are background)")
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
                "give --allow-extrapolation to go on anyway (the sidecar will say so)",
            )
        return findings


def _per_axis(value: Mapping[str, Any]) -> tuple[Range, Range, Range]:
    x, y, z = ((float(low), float(high)) for low, high in zip(value["min"], value["max"], strict=True))
    return x, y, z
