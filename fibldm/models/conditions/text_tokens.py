"""What a network sees of a text: a few tokens for cross-attention."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.text import TextEncoding
from fibldm.models.conditions.text_encoders import encoding_part, last_states, module_of


class TextTokens(nn.Module):
    """A few tokens that sum a text up, which a UNet with cross-attention sees as its context.

    Each is a mean of the text's tokens, weighted by how well they answer a learned query (as in Jaegle et al. 2021,
    Perceiver); what is behind the end of the text has no weight, so that its length changes nothing. An unknown text
    has learned tokens of its own.

    Args:
        encoding: of the text.
        width: of the tokens, the ``cross_attention_dim`` of the UNet.
        count: how many.
    """

    mean: Tensor
    std: Tensor
    fingerprint: Tensor

    def __init__(self, encoding: TextEncoding, width: int, count: int = 8) -> None:
        super().__init__()
        self.encoding, self.width = replace(encoding), width  # without the texts that it was fitted to
        mean, std = encoding.statistics
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        # weights fit the tokens of one encoder only
        self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(encoding.encoder)), dtype=torch.uint8))
        self.encoder = None if encoding.trained is None else _trainable(encoding)
        self.keys, self.values = nn.Linear(encoding.width, width), nn.Linear(encoding.width, width)
        self.queries, self.places, self.unknown = (nn.Parameter(torch.randn(count, width)) for _ in range(3))

    def forward(self, encoded: Tensor) -> Tensor:
        """``(B, count, width)``."""
        there = encoded[..., -1] > 0
        states = (self._states(encoded, there) - self.mean) / self.std
        fit = torch.einsum("nw,btw->bnt", self.queries, self.keys(states)) / self.width**0.5
        weights = fit.masked_fill(~there[:, None], torch.finfo(fit.dtype).min).softmax(dim=-1)
        summed = self.places + weights @ self.values(states)
        return torch.where(there.any(dim=1)[:, None, None], summed, self.unknown.to(summed.dtype))

    def train(self, mode: bool = True) -> "TextTokens":
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()  # its dropout would draw from nobody's generator
        return self

    def _states(self, encoded: Tensor, there: Tensor) -> Tensor:
        if self.encoder is None:
            return encoded[..., :-1]
        seen = there.clone()
        seen[:, 0] = True  # a text of no token has no states at all
        return last_states(self.encoder, encoded[..., 0].round().long(), seen.long())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        given = state_dict.get(f"{prefix}fingerprint")
        if given is not None and not torch.equal(given.cpu(), self.fingerprint.cpu()):
            raise FibldmError(
                f"the text encoder must be the one that these weights were trained with "
                f"({bytes(given.tolist()).hex()[:12]}); {self.encoding.name} is another one, or was changed "
                f"({self.encoding.encoder[:12]})",
                "put that encoder back where text_encoder says",
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


def _trainable(encoding: TextEncoding) -> nn.Module:
    """The encoder as it begins; of a bundle its weights come with those of the network."""
    module = module_of(encoding.trained or {})
    if (weights := encoding.beginning) is not None:
        module.load_state_dict(weights)
    return encoding_part(module, encoding.name).requires_grad_(True)
