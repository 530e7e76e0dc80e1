"""Running a network in the precision that the device is good at."""

import logging
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel

from fibldm.errors import sentence, unknown_choice
from fibldm.models.precision_check import correct_layers, has_bfloat16_units, slowdown

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_REDUCED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_WORTH_SAYING = 1.5  # how much slower than float32

_logger = logging.getLogger("fibldm")


class AutocastInferer(SimpleInferer):
    """Call the network under autocast; what comes out is float32 again, so losses are computed in full precision.

    MONAI's trainers know autocast on CUDA only, with a gradient scaler that bfloat16 has no use for.

    Before a network runs in bfloat16 on volumes of a size for the first time, its layers are compared with float32, and
    those that are wrong run in float32 from then on (`fibldm.models.precision_check`). The log says so, and what
    bfloat16 costs on a CPU without units for it.

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
        self._compared: WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = WeakKeyDictionary()
        self._cost_is_told = False

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        device = inputs.device.type
        precision = "bfloat16" if self.precision == "auto" and fast_bfloat16(device) else self.precision
        if precision == "bfloat16":
            self._compare(inputs, network, *args, **kwargs)
        with torch.autocast(device, dtype=_REDUCED.get(precision), enabled=precision in _REDUCED):
            output = network(inputs, *args, **kwargs)
        return _full_precision(output)

    def _compare(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> None:
        bare = network.module if isinstance(network, DistributedDataParallel) else network
        size = tuple(inputs.shape[1:])
        if size in self._compared.get(bare, ()) or isinstance(inputs, FakeTensor):  # of which there are no values
            return
        if not self._cost_is_told and inputs.device.type == "cpu":
            _tell_cost()
        self._cost_is_told = True
        self._compared.setdefault(bare, set()).add(size)
        count, wrong = correct_layers(bare, inputs, *args, **kwargs)
        for found in wrong:
            _logger.warning("%s is wrong in bfloat16 and runs in float32 from now on: %s", found.where.name, found)
        agree = "all" if not wrong else "the others"
        _logger.info("bfloat16: compared %d layer shapes with float32; %s agree", count, agree)


def _tell_cost() -> None:
    """Warn where a CPU imitates bfloat16; the training goes on, as that is what was asked for."""
    if not has_bfloat16_units() and (times := slowdown()) > _WORTH_SAYING:
        _logger.warning(
            "%s",
            sentence(
                f"warning: this CPU has no units for bfloat16; a convolution takes {times:.0f} times as long as in "
                "float32 (measured)",
                "set precision to auto or float32",
            ),
        )


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
