"""Running a network in the precision that the device is good at."""

from typing import Any, Literal, get_args

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from fibldm.errors import unknown_choice

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_REDUCED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AutocastInferer(SimpleInferer):
    """Call the network under autocast; what comes out is float32 again, so losses are computed in full precision.

    MONAI's trainers know autocast on CUDA only, with a gradient scaler that bfloat16 has no use for.

    Args:
        precision: "bfloat16", "float16" (which needs `fibldm.training.precision.gradient_scaler`), "float32", or
            "auto": bfloat16 where the device computes in it faster, else float32.

    Raises:
        FibldmError: the precision is unknown.
    """

    def __init__(self, precision: Precision = "auto") -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise unknown_choice("precision", precision, get_args(Precision))
        self.precision = precision

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        device = inputs.device.type
        precision = "bfloat16" if self.precision == "auto" and fast_bfloat16(device) else self.precision
        with torch.autocast(device, dtype=_REDUCED.get(precision), enabled=precision in _REDUCED):
            output = network(inputs, *args, **kwargs)
        return _full_precision(output)


def fast_bfloat16(device: str) -> bool:
    """Whether a device type ("cpu", "cuda") computes in bfloat16 faster than in float32.

    On a CPU only matrix units (AMX) do; without them autocast is slower than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def _full_precision(output: Any) -> Any:
    if output is None or isinstance(output, Tensor):
        return None if output is None else output.float()
    parts = [_full_precision(part) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
