"""What every condition can do, whatever its kind: read, compare with training, encode, and become unknown."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fibldm.errors import FibldmError

ALL, EACH = "all", "each"  # parts of a condition together, and every one that is not named


class Case(NamedTuple):
    """What the data say of a case.

    Attributes:
        labels: its mask on the model grid, integers ``(1, X, Y, Z)``.
        known: what is known of the patient, by name; None is unknown.
        images: further images of the patient on the model grid ``(2, X, Y, Z)``, by name: normalised voxels, and 1
            where they are known, 0 elsewhere.
        name: of the case.
    """

    labels: Tensor
    known: Mapping[str, object]
    images: Mapping[str, Tensor] = {}
    name: str = ""


class Condition(ABC):
    """A kind of condition, as a configuration chooses it and a bundle keeps it: a frozen dataclass of plain values.

    Its *value* is what people ask for (an age); *encoded*, ``(B, ...)``, it is what networks are given. A condition has
    ``P`` parts (labels, covariates), each of which may be unknown. What a network makes of it is up to a module, and
    the configuration of `fibldm.models.network.ConditionedNetwork` names the route by which it is seen:

    * ``channels``: behind those of the latent, from modules that give ``(B, N, x, y, z)``
    * ``norms``: in SPADE norms, from the same
    * ``tokens``: by cross-attention, from modules that give ``(B, T, width)``; they have ``width``, the ``encoding``,
      and ``unknown`` ``(T, width)``, what is seen where nothing is given
    * ``time``: added to the embedding of the time, from modules that give ``(B, width)``, with the same; their
      ``unknown`` is ``(width,)``
    * a ControlNet, see `fibldm.models.control.Control`

    A kind that learns from the training cases has a class method ``fit`` that makes it.

    Attributes:
        what: how messages call it.
        kept_as: type of the encoded cases that are kept in memory.
        of_scan: whether it is asked for by a scan, which whoever asks opens before it is read.
        dropped_with_all: whether training shows it as unknown where all else is, as guidance asks for nothing.
    """

    what: ClassVar[str]
    kept_as: ClassVar[torch.dtype] = torch.float32
    of_scan: ClassVar[bool] = False
    dropped_with_all: ClassVar[bool] = True

    @property
    def fingerprint(self) -> str:
        """Of the files that it stands on and that a bundle must hold, see `write`; empty where it has none."""
        return ""

    def write(self, folder: Path) -> None:  # noqa: B027
        """Write the files that it stands on into a folder of a bundle."""

    def loaded(self, folder: Path) -> Self:
        """The same with what `write` wrote, which is read whole, as the folder may be gone later.

        Raises:
            FibldmError: the files are others.
        """
        return self

    def with_first_stage(self, first_stage: Any) -> Self:
        """The same, encoded by the autoencoder of the latents where a kind needs one.

        Args:
            first_stage: a `fibldm.models.autoencoder.FrozenFirstStage`, on any device.
        """
        return self

    @property
    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Names of the parts."""

    @abstractmethod
    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        """Shape of one sample, encoded, for a latent of ``cells`` ``(x, y, z)``."""

    @abstractmethod
    def read(self, asked: Any) -> Any:
        """The value that somebody asks for; None asks for nothing.

        Raises:
            FibldmError: it cannot be asked for; says all that is wrong.
        """

    def brings_grid(self, value: Any) -> Any:
        """The grid on which a volume comes that follows no mask; None where a value, as read, says nothing of it."""
        return None

    @abstractmethod
    def encode(self, values: Any) -> Tensor:
        """Values, one for each sample, as ``(B, ...)``.

        Raises:
            FibldmError: as `read`.
        """

    def own(self, known: Mapping[str, object]) -> Any:
        """What the data say of a case, as `read` takes it; None where they say nothing that training had.

        Args:
            known: what is known of the case, by name; None is unknown.

        Raises:
            FibldmError: a kind that is read from nothing of the data.
        """
        raise FibldmError(
            f"{self.what} must be said, as the data do not tell what to ask of a case", "ask for it, or for nothing"
        )

    def encode_case(self, case: Case) -> Tensor:
        """What a case of the data says, as ``(...)``; what training never had is unknown."""
        return self.encode([self.read(self.own(case.known))])[0]

    @abstractmethod
    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        """Make parts unknown, in place: the result is as if nobody had said anything of them.

        Args:
            encoded: ``(B, ...)``; is changed and given back.
            dropped: ``(B, P)`` booleans.
        """

    def drop(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        """`drop_`, of a copy."""
        return self.drop_(encoded.clone(), dropped)

    def null(self, like: Tensor) -> Tensor:
        """The condition that asks for nothing, of the shape of ``like`` ``(B, ...)``."""
        return self.drop(like, torch.ones(len(like), len(self.parts), dtype=torch.bool, device=like.device))

    def outside(self, value: Any) -> list[str]:
        """How a value, as read, lies outside of training, in words; of masks `fibldm.volumes.envelope` knows that."""
        return []

    def check(self, value: Any, *, allow: bool) -> list[str]:
        """What of a value, as read, lies outside of training, in words, where that is allowed.

        Raises:
            FibldmError: something does and ``allow`` is False.
        """
        findings = self.outside(value)
        if findings and not allow:
            raise FibldmError(
                f"{self.what} must lie within what the training data covered; {'; '.join(findings)}",
                "give --allow-extrapolation to go on anyway (the sidecar will say so)",
            )
        return findings

    def within(self, value: Any, grid: Any) -> Any:
        """A value, as read, as it is meant for the volume that people get, such as places that were relative to it.

        Args:
            value: as read.
            grid: of the mask, with axes in RAS+ order; the model grid where there is no mask.

        Raises:
            FibldmError: it does not fit that volume.
        """
        return value

    def place(self, value: Any, grid: Any) -> Any:
        """A value, as `within` gives it, on the model grid; what is encoded.

        Args:
            value: as read.
            grid: the model grid of the volume, a `fibldm.volumes.grid.Grid`.

        Raises:
            FibldmError: it cannot be placed there.
        """
        return value

    def recorded(self, value: Any) -> Any:
        """A value, as read, for a sidecar: plain values, None where something is unknown."""
        return value

    def told(self, value: Any) -> str:
        """A value, as read, in words for logs, which must not hold what may name a patient."""
        return "unknown" if value is None else str(value)

    def facts(self) -> dict[str, Any]:
        """What may be asked for, as plain values for a bundle's card."""
        return {}

    def chances(self, dropout: float | Mapping[str, float]) -> Tensor:
        """How probably training shows each part as unknown, and all together: ``(P + 1,)``.

        Args:
            dropout: one number for every part and for all together; or numbers by name, ``all`` for all together,
                ``each`` for the parts that are not named, which is 0 by default.

        Raises:
            FibldmError: a number is no probability, or a name is none of a part.
        """
        if not isinstance(dropout, Mapping):
            dropout = {EACH: dropout, ALL: dropout}
        dropout = {str(name): value for name, value in dropout.items()}  # YAML takes a label for a number
        if strange := [name for name in dropout if name not in (*self.parts, ALL, EACH)]:
            raise FibldmError(
                f"dropout of {self.what} must name some of {', '.join(self.parts) or 'none'}, {ALL} or {EACH}; "
                f"got {', '.join(map(str, strange))}",
                "change the dropout, or what the condition consists of",
            )
        if wrong := {name: value for name, value in dropout.items() if not _is_probability(value)}:
            raise FibldmError(f"dropout of {self.what} must be probabilities, 0 to 1; got {wrong}", "0.1 is usual")
        each = dropout.get(EACH, 0.0)
        return torch.tensor([float(dropout.get(name, each)) for name in self.parts] + [float(dropout.get(ALL, 0.0))])


def present(conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is there of a mapping by name, in which a configuration says None of what is not."""
    return {name: part for name, part in (conditions or {}).items() if part is not None}


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
