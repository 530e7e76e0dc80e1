"""Numbers of training that must stay finite, looked at without making every step wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from fibldm.errors import FibldmError

LOOK_EVERY = 100

_REMEDY = "lower learning_rate or clip_norm; the last checkpoint is as it was"


class Finite:
    """Refuses a training in which a number is not finite, and says in which iteration that was so first.

    On the CPU it looks at once. On other devices a look waits for all that they still have to do, so numbers are kept
    there, and `LOOK_EVERY` of them are looked at together. So are those of an epoch in its last iteration, before any
    weights that came of them are validated or saved.

    Args:
        what: must stay finite, up to the number: "the training loss must stay finite; it is".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._kept: list[tuple[str, Tensor]] = []

    def __call__(self, engine: Any, value: Tensor) -> None:
        """Look at a scalar of this iteration, or keep it for later.

        Raises:
            FibldmError: it, or one that was kept, is not finite.
        """
        within, length = _within(engine), engine.state.epoch_length
        self._kept.append((f"epoch {engine.state.epoch}, iteration {within} of {length}", value.detach()))
        if not waits(value) or len(self._kept) == LOOK_EVERY or within == length:
            self._look()

    def _look(self) -> None:
        kept, self._kept = self._kept, []
        numbers = torch.stack([value for _, value in kept]).tolist()
        for (place, _), number in zip(kept, numbers, strict=True):
            if not math.isfinite(number):
                raise FibldmError(f"{self.what} {number} in {place}", _REMEDY)


def waits(value: Tensor) -> bool:
    """Whether reading a tensor's number waits for a device."""
    return value.device.type != "cpu"


def _within(engine: Any) -> int:
    """The number of this iteration in its epoch, from 1 on."""
    return int((engine.state.iteration - 1) % engine.state.epoch_length + 1)
