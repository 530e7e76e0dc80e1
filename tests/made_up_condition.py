"""A kind of condition that FibLDM does not have: the field strength of a scanner, in tesla, as a token.

With ``made_up_condition.yaml``, this file is all that a new kind takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Condition


@dataclass(frozen=True)
class FieldStrength(Condition):
    """Encoded as ``(B, 2)``: the octaves above the weakest scanner of training, and whether it is known."""

    low: float
    high: float

    what = "the field strength"

    @classmethod
    def fit(cls, cases: Sequence[Mapping[str, Any]]) -> "FieldStrength":
        known = [case["tesla"] for case in cases if case.get("tesla") is not None]
        return cls(min(known), max(known))

    @property
    def parts(self) -> tuple[str, ...]:
        return ("tesla",)

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (2,)

    def read(self, asked: Any) -> float | None:
        try:
            return None if asked is None else float(asked)
        except (TypeError, ValueError) as error:
            raise FibldmError(f"{self.what} must be a number (T); got {asked!r}") from error

    def outside(self, value: float | None) -> list[str]:
        inside = value is None or self.low <= value <= self.high
        return [] if inside else [f"{value:g} T (training {self.low:g} to {self.high:g})"]

    def encode(self, values: Sequence[float | None]) -> Tensor:
        return torch.tensor([(0.0, 0.0) if value is None else (math.log2(value / self.low), 1.0) for value in values])

    def own(self, known: Mapping[str, object]) -> Any:
        return known.get("tesla")

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        return encoded.masked_fill_(dropped, 0.0)

    def facts(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}


class FieldToken(nn.Module):
    """One token ``(B, 1, width)``."""

    def __init__(self, encoding: FieldStrength, width: int) -> None:
        super().__init__()
        self.encoding, self.width = encoding, width
        self.line = nn.Linear(1, width)
        self.unknown = nn.Parameter(torch.randn(1, width))

    def forward(self, encoded: Tensor) -> Tensor:
        octaves, known = encoded[:, None, :1], encoded[:, None, 1:]
        return torch.where(known > 0, self.line(octaves), self.unknown)
