"""Networks with one tensor in and one out, as exporters and MONAI's checks of bundles want them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.models.autoencoder import Autoencoder
from fibldm.models.conditions.condition import Condition


class _OneTensor(nn.Module):
    """Takes the weights of the network inside of it under their own names, too, as MONAI's exporters load them.

    Args:
        inside: name of the attribute that is the network.
    """

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.inside = inside
        self.register_load_state_dict_pre_hook(_OneTensor._put_inside)

    def _put_inside(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        inside = f"{prefix}{self.inside}."
        for name in [name for name in state if name.startswith(prefix) and not name.startswith(inside)]:
            state[inside + name.removeprefix(prefix)] = state.pop(name)


class OneTensorNetwork(_OneTensor):
    """A denoising network whose latent, time and mask are channels of one tensor.

    Args:
        network: takes latent, time and mask, such as `fibldm.models.network.ConditionedNetwork`.
        channels: of the latent.
        conditions: how conditions are encoded, by name; nothing is asked of those beside the mask that the network sees
            in space, and which it may need.
    """

    def __init__(self, network: nn.Module, channels: int, conditions: Mapping[str, Condition] | None = None) -> None:
        super().__init__("network")
        self.network, self.channels = network, channels
        seen: frozenset[str] = getattr(network, "in_space", frozenset()) - {"mask"}
        self.beside = {name: kind for name, kind in (conditions or {}).items() if name in seen}

    def forward(self, packed: Tensor) -> Tensor:
        """The network's output ``(B, C, x, y, z)`` of ``(B, C + 1 + M, x, y, z)``: latent, time everywhere, mask.

        There is no mask where the network sees none.
        """
        if not getattr(self.network, "sees_mask", True):
            z_t, time = torch.split(packed, [self.channels, 1], dim=1)
            plain: Tensor = self.network(z_t, time.flatten(1)[:, 0], self._unknown(z_t))
            return plain
        z_t, time, mask = torch.split(packed, [self.channels, 1, packed.shape[1] - self.channels - 1], dim=1)
        output: Tensor = self.network(z_t, time.flatten(1)[:, 0], {"mask": mask, **self._unknown(z_t)})
        return output

    def _unknown(self, z_t: Tensor) -> dict[str, Tensor]:
        shapes = {name: (len(z_t), *kind.shape(z_t.shape[2:])) for name, kind in self.beside.items()}
        return {name: self.beside[name].null(z_t.new_zeros(shape)) for name, shape in shapes.items()}


class OneTensorEncoder(_OneTensor):
    """The mean of an autoencoder's posterior.

    Args:
        autoencoder: `fibldm.models.autoencoder.Autoencoder`.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__("autoencoder")
        self.autoencoder = autoencoder

    def forward(self, volume: Tensor) -> Tensor:
        """The latent ``(B, C, x, y, z)`` of a volume ``(B, C, X, Y, Z)`` in ``[-1, 1]``."""
        mean: Tensor = self.autoencoder.encode(volume).mean
        return mean


class OneTensorDecoder(_OneTensor):
    """An autoencoder's decoder.

    Args:
        autoencoder: `fibldm.models.autoencoder.Autoencoder`, one that needs no mask.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__("autoencoder")
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        """The volume ``(B, C, X, Y, Z)`` of a latent ``(B, C, x, y, z)`` in the autoencoder's own scale."""
        volume: Tensor = self.autoencoder.decode(latent)
        return volume
