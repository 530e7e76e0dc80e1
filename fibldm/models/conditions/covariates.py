"""What is known of a patient beside the mask (age, sex, ...) as a condition: one token each, for cross-attention."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError, shown
from fibldm.models.conditions.condition import Condition

Value = str | float


@dataclass(frozen=True)
class Numeric:
    """A number, such as an age, as the training split had it.

    Attributes:
        mean: over the training cases, in the unit of the data, as are all of these.
        std: standard deviation, above 0.
        low: smallest value.
        high: largest value.
    """

    mean: float
    std: float
    low: float
    high: float

    wanted = "a number"

    def read(self, value: object) -> float | None:
        """The number that a number or a text says; None where it says none."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None

    def outside(self, value: Value) -> str:
        """How a value lies outside of training, in words; empty where it does not."""
        inside = self.low <= float(value) <= self.high
        return "" if inside else f"{float(value):g} (training {self.low:g} to {self.high:g})"

    def facts(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}

    def encode(self, value: Value) -> float:
        """In standard deviations from the mean."""
        return (float(value) - self.mean) / self.std

    def token(self, width: int) -> nn.Module:
        """From encoded values ``(B,)`` to tokens ``(B, width)``."""
        return _NumberToken(width)


@dataclass(frozen=True)
class Categorical:
    """One of some texts, such as a sex.

    Attributes:
        values: those of the training split, sorted.
    """

    values: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.values)}"

    def read(self, value: object) -> str | None:
        """The value as text; None where training had no such value."""
        text = _text(value)
        return text if text in self.values else None

    def outside(self, value: Value) -> str:
        """Empty: what can be read was in training."""
        return ""

    def facts(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def encode(self, value: Value) -> float:
        """The place among `values`."""
        return float(self.values.index(str(value)))

    def token(self, width: int) -> nn.Module:
        """From encoded values ``(B,)`` to tokens ``(B, width)``."""
        return _CategoryToken(len(self.values), width)


@dataclass(frozen=True)
class CovariateEncoding(Condition):
    """Named covariates as numbers for a network, each with a flag that says whether it is known.

    A value is a mapping by name, such as ``{"age": 63, "sex": "F"}``; what it leaves out is unknown.

    Attributes:
        kinds: by name, in the order of the tokens.
    """

    kinds: Mapping[str, Numeric | Categorical]

    what = "covariates"

    @classmethod
    def fit(
        cls, names: Sequence[str], cases: Sequence[Mapping[str, object]], categories: Collection[str] = ()
    ) -> "CovariateEncoding":
        """As the training cases have them: numeric where all values are numbers, else categorical.

        Args:
            names: of the covariates.
            cases: values by name, one mapping a training case; None, or no such name, is unknown.
            categories: names whose numbers are names, such as those of centres.

        Raises:
            FibldmError: a covariate does not differ between the cases, or a category is no covariate; lists all.
        """
        if strange := sorted(set(categories) - set(names)):
            raise FibldmError(
                f"categories must be some of the covariates {', '.join(names)}; got also {', '.join(strange)}"
            )
        known = {name: [case[name] for case in cases if case.get(name) is not None] for name in names}
        if same := [f"{name} has {len(set(known[name])) or 'no'} value" for name in names if len(set(known[name])) < 2]:
            there = sorted({name for case in cases for name, value in case.items() if value is not None})
            raise FibldmError(
                f"covariates must differ between the training cases, which have {', '.join(there) or 'none'}; "
                f"{', '.join(same)}",
                "prepare the data with these columns and encode them (fibldm encode --restart), or name others",
            )
        return cls({name: _kind(values, name in categories) for name, values in known.items()})

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (len(self.kinds), 2)

    def read(self, asked: Mapping[str, object] | None) -> dict[str, Value]:
        """What is known, in the order of `kinds`: texts of numbers as numbers, None and absent ones left out.

        Raises:
            FibldmError: there is no such covariate, a value is no number, or a category that training did not have;
                lists all.
        """
        given = asked or {}
        wrong = [f"there is no {name}" for name in given if name not in self.kinds]
        values: dict[str, Value] = {}
        for name, kind in self.kinds.items():
            value = given.get(name)
            read = None if value is None else kind.read(value)
            if read is not None:
                values[name] = read
            elif value is not None:
                wrong.append(f"{name} must be {kind.wanted}, not {shown(value)}")
        if wrong:
            raise FibldmError(
                f"covariates must be those of training ({', '.join(self.kinds) or 'none'}); {'; '.join(wrong)}"
            )
        return values

    def outside(self, value: Mapping[str, Value]) -> list[str]:
        outside = {name: self.kinds[name].outside(part) for name, part in value.items()}
        return [f"{name} {text}" for name, text in outside.items() if text]

    def recorded(self, value: Mapping[str, Value]) -> dict[str, Value | None]:
        return {name: value.get(name) for name in self.kinds}

    def told(self, value: Mapping[str, Value]) -> str:
        """A value, as read, such as "age 63, sex unknown"."""
        return ", ".join(f"{name} {value.get(name, 'unknown')}" for name in self.kinds)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What may be asked, by name: ``low`` and ``high`` of a number, or the ``values`` of a text."""
        return {name: kind.facts() for name, kind in self.kinds.items()}

    def encode(self, values: Sequence[Mapping[str, object] | None]) -> Tensor:
        """``(B, T, 2)``, float32: of each covariate its encoded value, and 1; 0 and 0 where it is unknown.

        Raises:
            FibldmError: as `read`.
        """
        return torch.tensor([self._rows(self.read(value)) for value in values])

    def own(self, known: Mapping[str, object]) -> dict[str, Value | None]:
        """The covariates of a case; others that it has are passed over, and unseen categories are unknown."""
        return {name: kind.read(known.get(name)) for name, kind in self.kinds.items()}

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        return encoded.masked_fill_(dropped[..., None], 0.0)

    def places(self, names: Sequence[str] | None) -> list[int]:
        """Where some covariates are among all; None are all.

        Raises:
            FibldmError: there is no such covariate.
        """
        if strange := [name for name in names or () if name not in self.kinds]:
            raise FibldmError(f"a network can see {', '.join(self.kinds)}; there is no {', '.join(strange)}")
        return [place for place, name in enumerate(self.kinds) if names is None or name in names]

    def at(self, places: Sequence[int]) -> list[Numeric | Categorical]:
        """The kinds at some places."""
        kinds = list(self.kinds.values())
        return [kinds[place] for place in places]

    def _rows(self, values: Mapping[str, Value]) -> list[tuple[float, float]]:
        return [(kind.encode(values[name]), 1.0) if name in values else (0.0, 0.0) for name, kind in self.kinds.items()]


class CovariateTokens(nn.Module):
    """A token for each covariate, which a UNet with cross-attention sees as its context (Rombach et al. 2022).

    Numbers are on a learned line, categories in a learned table (Gorishniy et al. 2021, section 3.3). An unknown
    covariate has a learned token of its own: the same where it is missing, dropped, or not asked for.

    Args:
        encoding: of the covariates.
        width: of the tokens, the ``cross_attention_dim`` of the UNet.
        names: of those that have a token; None: all.

    Raises:
        FibldmError: there is no such covariate.
    """

    def __init__(self, encoding: CovariateEncoding, width: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.encoding, self.width, self.places = encoding, width, encoding.places(names)
        self.tokens = nn.ModuleList(kind.token(width) for kind in encoding.at(self.places))
        self.unknown = nn.Parameter(torch.randn(len(self.tokens), width))

    def forward(self, encoded: Tensor) -> Tensor:
        """Tokens ``(B, T, width)`` of encoded covariates ``(B, P, 2)``."""
        values, known = encoded[:, self.places].unbind(dim=-1)
        tokens = torch.stack([token(values[:, place]) for place, token in enumerate(self.tokens)], dim=1)
        return torch.where(known[..., None] > 0, tokens, self.unknown)


class _NumberToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # as large as the tokens of categories; those of a small network of numbers begin small and are learned late
        self.offset, self.slope = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, values: Tensor) -> Tensor:
        return self.offset + values[:, None] * self.slope


class _CategoryToken(nn.Embedding):
    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.long())


def _kind(values: Sequence[object], category: bool) -> Numeric | Categorical:
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if category or len(numbers) < len(values):
        return Categorical(tuple(sorted({_text(value) for value in values})))
    return Numeric(fmean(numbers), pstdev(numbers), min(numbers), max(numbers))


def _text(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.15g}" if is_number else str(value)
