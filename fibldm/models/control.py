"""A ControlNet with what it sees of conditions."""

from collections.abc import Iterable, Mapping

import torch
from monai.networks.nets import ControlNet
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import present
from fibldm.models.conditions.mask import MaskEncoding

Residuals = tuple[tuple[Tensor, ...], Tensor]
Parts = Mapping[str, nn.Module | None]


class Control(nn.Module):
    """A ControlNet and what it sees of one condition, or of several at once.

    Args:
        controlnet: steered by this.
        sees: name of the condition.
        encoder: from the encoded condition to its input, see `mask_encoders`; None shows it as it is encoded.
        mask: how masks are encoded; needed with ``labels`` only.
        labels: values of the labels that it sees, the others are unknown to it; None: all.
        beside: modules like ``encoder`` for further conditions, by name, whose channels come behind; None of one leaves
            it out.

    Attributes:
        names: of all conditions that it sees.

    Raises:
        FibldmError: the dataset has no such label, or there are labels of what is no mask.
    """

    dropped: Tensor | None

    def __init__(
        self,
        controlnet: ControlNet,
        *,
        sees: str = "mask",
        encoder: nn.Module | None = None,
        mask: MaskEncoding | None = None,
        labels: Iterable[int] | None = None,
        beside: Parts | None = None,
    ) -> None:
        super().__init__()
        if labels is not None and sees != "mask":
            raise FibldmError(
                f"a ControlNet sees labels of the mask; this one sees the {sees}", "leave control_labels out"
            )
        self.controlnet, self.sees, self.encoder, self.mask = controlnet, sees, encoder, mask
        self.beside = nn.ModuleDict(present(beside))
        self.names = (sees, *self.beside)
        dropped = mask.all_but(labels) if mask is not None and labels is not None else None
        self.register_buffer("dropped", dropped, persistent=False)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        given: Mapping[str, Tensor],
        context: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Residuals:
        """Residuals of the down path, and of the middle, for the base network's own input ``(B, N, x, y, z)``.

        Tokens and vectors are those that the base network sees.
        """
        first = given[self.sees]
        if self.mask is not None and self.dropped is not None:
            first = self.mask.drop(first, self.dropped.expand(len(first), -1))
        hints = [as_input(self.encoder, first, like=x)]
        hints += [as_input(part, given[name], like=x) for name, part in self.beside.items()]
        hint = torch.cat(hints, dim=1) if len(hints) > 1 else hints[0]
        seen = {"context": context, **({} if vectors is None else {"class_labels": vectors})}
        down, middle = self.controlnet(x, timesteps, controlnet_cond=hint, **seen)
        return tuple(down), middle

    def is_off(self, given: Iterable[str]) -> bool:
        """Whether nothing that it sees is given, which leaves it out.

        Raises:
            FibldmError: a part of what it sees is given.
        """
        missing = [name for name in self.names if name not in given]
        if missing and len(missing) < len(self.names):
            raise FibldmError(
                f"a ControlNet that sees {', '.join(self.names)} needs all of them or none; there is no "
                f"{', '.join(missing)}",
                "give Condition.null to ask for nothing",
            )
        return bool(missing)


def as_input(encoder: nn.Module | None, given: Tensor, *, like: Tensor) -> Tensor:
    """What an encoder makes of a condition, with as many axes as ``like``."""
    shown: Tensor = given if encoder is None else encoder(given)
    return shown.squeeze(-1) if shown.ndim > like.ndim else shown
