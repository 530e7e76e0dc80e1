"""How much of each label a mask has, in millilitres, as covariates of networks that draw masks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.covariates import Categorical, CovariateEncoding, Numeric, Value

_BACKGROUND = 0


def volume_of(name: str) -> str:
    """What the covariate is called that is the volume of a label."""
    return f"volume of {name}"


@dataclass(frozen=True)
class Millilitres(Numeric):
    """A volume, encoded by the edge of a cube that is as large: lesions of 1 and 2 ml differ more than 101 and 102 ml.

    Attributes:
        mean: of these edges, in cm, as is ``std``; ``low`` and ``high`` are ml.
    """

    wanted = "a number of ml"

    def outside(self, value: Value) -> str:
        inside = self.low <= float(value) <= self.high
        return "" if inside else f"{float(value):.4g} ml (training {self.low:.4g} to {self.high:.4g} ml)"

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "unit": "ml"}

    def encode(self, value: Value) -> float:
        return (_edge(float(value)) - self.mean) / self.std


@dataclass(frozen=True)
class LabelVolumeEncoding(CovariateEncoding):
    """Covariates, among them the volume of each label that differs between the training cases.

    What training sees of a mask is measured on that very mask, as augmentation changes it.

    Attributes:
        labels: values of the labels whose volumes these are, by name.
        voxel_ml: volume of a voxel of the model grid.
        always: names of the labels that every training case has.
    """

    labels: Mapping[str, int]
    voxel_ml: float
    always: Sequence[str] = ()

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        masks: Iterable[Tensor],
        *,
        names: Mapping[Any, str],
        spacing: Sequence[float],
        covariates: Sequence[str] = (),
        cases: Sequence[Mapping[str, object]] = (),
        categories: Collection[str] = (),
    ) -> "LabelVolumeEncoding":
        """As the training cases have them.

        Args:
            masks: of the training cases on the model grid, ``(1, X, Y, Z)``; one with something unknown says nothing.
            names: of the labels by value.
            spacing: of the model grid, mm.
            covariates: names of further covariates, see `CovariateEncoding.fit`, as are ``cases`` and ``categories``.

        Raises:
            FibldmError: no volume differs between the cases, or a covariate is refused.
        """
        voxel_ml = float(torch.tensor(spacing, dtype=torch.float64).prod()) / 1000
        labels = {str(name): int(value) for value, name in names.items() if int(value) != _BACKGROUND}
        found = [volumes for mask in masks if (volumes := _volumes(mask, labels, voxel_ml))]
        measured = {name: [volumes[name] for volumes in found] for name in labels}
        differing = {name: own for name, own in measured.items() if len(set(own)) > 1}
        if not differing:
            raise FibldmError(
                f"volumes of labels must differ between the training cases; of {', '.join(labels) or 'no label'} none "
                f"does in {len(found)} masks without unknown voxels",
                "give more cases",
            )
        kinds: dict[str, Numeric | Categorical] = {volume_of(name): _kind(own) for name, own in differing.items()}
        if covariates:
            kinds |= CovariateEncoding.fit(covariates, cases, categories).kinds
        always = [name for name, own in measured.items() if min(own) > 0]
        return cls(kinds, {name: labels[name] for name in differing}, voxel_ml, tuple(always))

    def volumes(self, mask: Tensor) -> dict[str, float]:
        """Of a mask on the model grid, ml by name of the label; nothing where a part of it is unknown."""
        return _volumes(mask, self.labels, self.voxel_ml)

    def encode_case(self, case: Case) -> Tensor:
        measured = {volume_of(name): volume for name, volume in self.volumes(case.labels).items()}
        return self.encode([self.read(self.own({**case.known, **measured}))])[0]


def _volumes(mask: Tensor, labels: Mapping[str, int], voxel_ml: float) -> dict[str, float]:
    counts = torch.bincount(mask.flatten().long(), minlength=UNKNOWN_LABEL + 1)
    if counts[UNKNOWN_LABEL]:
        return {}
    return {name: int(counts[value]) * voxel_ml for name, value in labels.items()}


def _edge(millilitres: float) -> float:
    return float(max(millilitres, 0.0) ** (1 / 3))


def _kind(measured: Sequence[float]) -> Millilitres:
    edges = [_edge(volume) for volume in measured]
    return Millilitres(fmean(edges), pstdev(edges), min(measured), max(measured))
