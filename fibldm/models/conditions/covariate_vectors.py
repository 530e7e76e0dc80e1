"""Classes and numbers in the time embedding: covariates as vectors that are added to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.covariates import Categorical, CovariateEncoding


class CovariateVectors(nn.Module):
    """The sum of a vector for each covariate, which is added to the time embedding (Dhariwal & Nichol 2021).

    A class has a vector of its own; a number has a learned line and, for what is no line, waves of learned height
    (Tancik et al. 2020, section 3, here of fixed and low frequencies). An unknown covariate has a learned vector: the
    same where it is missing, dropped, or not asked for. All begin with zeros, so that a network begins as without them.

    Args:
        encoding: of the covariates.
        width: of the time embedding.
        names: of those that are seen here; None: all.
        frequencies: of the waves of a number, whose periods are 8 standard deviations of the training cases, 8/2, 8/3
            and so on; 0: lines only.

    Raises:
        FibldmError: there is no such covariate, or frequencies are no whole number of at least 0.
    """

    def __init__(
        self, encoding: CovariateEncoding, width: int, names: Sequence[str] | None = None, *, frequencies: int = 2
    ) -> None:
        super().__init__()
        if not isinstance(frequencies, int) or frequencies < 0:
            raise FibldmError(f"frequencies must be a whole number of at least 0; got {frequencies!r}")
        self.encoding, self.width, self.places = encoding, width, encoding.places(names)
        self.vectors = nn.ModuleList(
            _ClassVector(len(kind.values), width)
            if isinstance(kind, Categorical)
            else _NumberVector(width, frequencies)
            for kind in encoding.at(self.places)
        )
        self.unknown_each = nn.Parameter(torch.zeros(len(self.places), width))

    @property
    def unknown(self) -> Tensor:
        """What is added where nothing is known, ``(width,)``."""
        return self.unknown_each.sum(dim=0)

    def forward(self, encoded: Tensor) -> Tensor:
        """Vectors ``(B, width)`` of encoded covariates ``(B, P, 2)``."""
        values, known = encoded[:, self.places].unbind(dim=-1)
        vectors = torch.stack([vector(values[:, place]) for place, vector in enumerate(self.vectors)], dim=1)
        return torch.where(known[..., None] > 0, vectors, self.unknown_each).sum(dim=1)


class _NumberVector(nn.Module):
    rates: Tensor

    def __init__(self, width: int, frequencies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 + 2 * frequencies, width))
        rates = torch.arange(1, frequencies + 1) * (2 * math.pi / 8)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        line = torch.stack([torch.ones_like(values), values], dim=1)
        waves = values[:, None] * self.rates
        return torch.cat([line, waves.sin(), waves.cos()], dim=1) @ self.weight


class _ClassVector(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.long())
