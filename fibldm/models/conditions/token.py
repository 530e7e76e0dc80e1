"""Tokens: names of what few scans have in common (a texture, a disease, a site), each with a vector that is learned.

Gal et al. 2022, "An image is worth one word", learn an embedding of a new word by which a frozen network draws what few
images show; Ruiz et al. 2023, "DreamBooth", train the network, too, see `fibldm.training.prior`. The vectors are added
to the embedding of the time, which every network has. A further token for cross-attention would take attention from the
others, so that a network that is not asked for it would no longer be the one that it was.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.conditions.condition import Case, Condition

TOKEN = "token"
"""The name of the condition."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class TokenNames(Condition):
    """Which tokens are asked for, encoded as ``(B, N)``: 1 where one is, 0 where it is not, as if it had never been.

    A value is the names that are asked for, in the order of ``names``.

    Attributes:
        names: of all tokens.

    Raises:
        FibldmError: there are none, a name comes twice, or holds more than letters, digits, ``_`` and ``-``.
    """

    names: tuple[str, ...]

    what = "the token"
    dropped_with_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        names = tuple(map(str, self.names))
        object.__setattr__(self, "names", names)
        if not names or len(set(names)) < len(names) or not all(_NAME.fullmatch(name) for name in names):
            raise FibldmError(
                f"tokens must have names of letters, digits, _ and -, each its own; got {list(names)}",
                "give one, such as token_name=fibrosis_b",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        return self.names

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (len(self.names),)

    def read(self, asked: Any) -> tuple[str, ...]:
        """One name, or several as a list or with commas between them.

        Raises:
            FibldmError: there is no such token.
        """
        if asked is None:
            return ()
        given = asked.split(",") if isinstance(asked, str) else asked if isinstance(asked, list | tuple) else [asked]
        named = [name for name in (str(part).strip() for part in given) if name]
        if strange := [name for name in named if name not in self.names]:
            raise unknown_choice(self.what, strange[0], self.names)
        return tuple(name for name in self.names if name in named)

    def encode(self, values: Sequence[Any]) -> Tensor:
        asked = [self.read(value) for value in values]
        return torch.tensor([[float(name in part) for name in self.names] for part in asked])

    def own(self, known: Mapping[str, object]) -> None:
        """Nothing, as data do not say of themselves that they have what a token is of."""

    def encode_case(self, case: Case) -> Tensor:
        """All tokens: every case of a training that learns some shows what they are of."""
        return torch.ones(len(self.names))

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        return encoded.masked_fill_(dropped, 0.0)

    def recorded(self, value: tuple[str, ...]) -> list[str] | None:
        return list(value) or None

    def told(self, value: tuple[str, ...]) -> str:
        return ", ".join(value) or "none"

    def facts(self) -> dict[str, Any]:
        return {"names": ", ".join(self.names)}


class TokenVectors(nn.Module):
    """The sum of the vectors of the tokens that are asked for, which is added to the time embedding.

    They begin with zeros, and where none is asked for nothing is added, so that the network is as without them.

    Args:
        encoding: of the tokens.
        width: of the time embedding.
    """

    def __init__(self, encoding: TokenNames, width: int) -> None:
        super().__init__()
        self.encoding, self.width = encoding, width
        self.vectors = nn.Parameter(torch.zeros(len(encoding.names), width))

    @property
    def unknown(self) -> Tensor:
        """What is added where nothing is asked for, ``(width,)``."""
        return self.vectors.new_zeros(self.width)

    def forward(self, encoded: Tensor) -> Tensor:
        """Vectors ``(B, width)`` of encoded tokens ``(B, N)``."""
        return encoded @ self.vectors
