"""Numbers and memory of training: gradient scaling for float16, TF32, the order of voxels in memory."""

from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from torch import nn
from torch.amp import GradScaler

from fibldm.errors import FibldmError
from fibldm.training.handlers import is_step

# In this order of memory convolutions need not turn their input, by the number of axes of their kernel.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class ScaledTrainer(SupervisedTrainer):
    """MONAI's trainer with a gradient scaler that outlives a resume (Micikevicius et al. 2018, section 3.2).

    MONAI makes a new scaler at every start, whose scale then differs from that of a training that never stopped.

    Args:
        scaler: of the gradient; one that is not enabled changes nothing.
        settings: of `monai.engines.SupervisedTrainer`.
    """

    def __init__(self, *, scaler: GradScaler | None = None, **settings: Any) -> None:
        # the inferer runs the network under autocast; the loss stays in float32
        enabled = scaler is not None and scaler.is_enabled()
        super().__init__(**settings, amp=enabled, amp_kwargs={"enabled": False})
        self.scaler = scaler if enabled else None  # type: ignore[assignment]  # MONAI names the deprecated class
        # the first handler of the event: those that come later, such as clipping, see the gradient itself
        self.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._unscale)

    def run(self) -> None:  # type: ignore[override]  # as MONAI's
        """Train from where the state is."""
        Workflow.run(self)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        """A list with the output of the batch: what MONAI's handlers expect, as its engines part a batch into items."""
        return [super()._iteration(engine, batchdata)]

    def _unscale(self) -> None:
        if self.scaler is not None and is_step(self):
            self.scaler.unscale_(self.optimizer)


def gradient_scaler(precision: str, device: torch.device | str) -> GradScaler:
    """The scaler of the gradient, enabled for float16 only, whose range is too small for most gradients.

    Raises:
        FibldmError: float16 is asked for on another device than CUDA.
    """
    kind = torch.device(device).type
    if precision == "float16" and kind != "cuda":
        raise FibldmError(
            f"precision float16 trains on CUDA only; the device is {kind!r}, which gains nothing by it",
            "choose precision bfloat16, float32 or auto",
        )
    return GradScaler(kind, enabled=precision == "float16")


def allow_tf32(allowed: bool) -> None:
    """Let CUDA round float32 inputs of products and convolutions to 10 bits (TF32), which is faster, or forbid it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def store_channels_last(network: nn.Module) -> None:
    """Keep the kernels of 2-D and 3-D convolutions with the channels innermost in memory; changes them in place."""
    for weight in network.parameters():
        if weight.ndim in _CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=_CHANNELS_LAST[weight.ndim])
