"""Less memory for more time: activations of the large blocks are computed again in the backward pass."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

from fibldm.errors import FibldmError

# How the networks of MONAI, MAISI and MONAI Generative name the blocks that hold most activations.
BLOCKS = ("ResBlock", "ResnetBlock", "ResidualUnit", "AttentionBlock", "SpatialTransformer")


def checkpoint_activations(network: nn.Module) -> int:
    """Keep only the inputs of the residual and attention blocks for the backward pass (Chen et al. 2016).

    Gradients and the names of the state dict stay as they are. Random numbers inside a block are drawn alike twice.

    Args:
        network: changed in place; the outermost block of those in `BLOCKS` is what is computed again.

    Returns:
        The number of blocks.

    Raises:
        FibldmError: the network has no such block.
    """
    count = _wrap(network)
    if not count:
        raise FibldmError(
            f"activation checkpointing needs blocks of a class named {', '.join(f'*{name}' for name in BLOCKS)}; "
            f"{type(network).__name__} has none",
            "set activation_checkpointing: false",
        )
    return count


def _wrap(module: nn.Module) -> int:
    count = 0
    for name, child in module.named_children():
        if isinstance(child, CheckpointWrapper):
            count += 1
        elif type(child).__name__.endswith(BLOCKS):
            setattr(module, name, checkpoint_wrapper(child))
            count += 1
        else:
            count += _wrap(child)
    return count
