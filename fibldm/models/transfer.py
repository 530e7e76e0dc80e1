"""From the CPU to the device of a network, without waiting for what the device still has to do."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str | None) -> Tensor:
    """Values on another device; itself where they lie there already.

    A CUDA device copies them when it comes to them, and the CPU goes on at once. That takes memory which the operating
    system cannot move; torch keeps such memory until the copy is done.

    Args:
        values: any tensor; it may be changed or forgotten right afterwards.
        device: None leaves them where they are.
    """
    if device is None:
        return values
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
