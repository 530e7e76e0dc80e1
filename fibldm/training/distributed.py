"""Several processes that train one network: the ranks that torchrun starts, by Ignite's distributed layer.

A configuration means the same whatever the number of ranks: `batch_size` is that of all ranks together, each takes its
share of the draws, gradients are averaged. Only the first rank writes files.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import ignite.distributed as idist
import torch
from torch import Tensor, nn
from torch.distributed import broadcast_object_list
from torch.nn.parallel import DistributedDataParallel

from fibldm.errors import FibldmError

Result = TypeVar("Result")


def local_device() -> torch.device:
    """This process's device: the CUDA device of its local rank, or the CPU where there is no CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_ranks(device: torch.device | str) -> None:
    """Join the other processes that torchrun started, by NCCL on CUDA and by gloo on the CPU; once in a process.

    Raises:
        FibldmError: torchrun did not start this process.
    """
    if idist.get_world_size() > 1:
        return
    if "RANK" not in os.environ:
        raise FibldmError(
            "configuration multi_gpu needs the ranks that torchrun starts; RANK is not set",
            "give --devices N to `fibldm train`, or start it by torchrun, or leave multi_gpu out",
        )
    idist.initialize("nccl" if torch.device(device).type == "cuda" else "gloo")


def leave_ranks() -> None:
    """Wait until all ranks are done, and part: a rank that ends while another still talks to it may abort."""
    if idist.get_world_size() > 1:
        idist.barrier()
        idist.finalize()


def require_joined() -> None:
    """Refuse to be one of several processes that know nothing of each other and would write the same files.

    Raises:
        FibldmError: torchrun started several processes, and they were not joined.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != idist.get_world_size():
        raise FibldmError(
            f"the {started} processes that torchrun started must train together; this one trains alone",
            "add --config multi_gpu",
        )


def is_first_rank() -> bool:
    """Whether this process is the one that writes files; also where there is only one."""
    return bool(idist.get_rank() == 0)


def batch_of_rank(batch_size: int) -> int:
    """This rank's part of a batch.

    Raises:
        FibldmError: the batch cannot be shared evenly.
    """
    ranks = idist.get_world_size()
    if batch_size % ranks:
        raise FibldmError(
            f"batch_size is that of all ranks together and must be divisible by their number; "
            f"got {batch_size} for {ranks} ranks",
            f"choose a batch_size such as {-(-batch_size // ranks) * ranks}",
        )
    return batch_size // ranks


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor that every rank has one of."""
    if idist.get_world_size() == 1:
        return value
    total = idist.all_reduce(value.detach().clone())  # it adds in place
    assert isinstance(total, Tensor)
    return total / idist.get_world_size()


def rows_of_ranks(rows: Tensor) -> Tensor:
    """The rows ``(N, ...)`` of all ranks, as many of each, in the order of the draws of one process."""
    ranks = idist.get_world_size()
    if ranks == 1:
        return rows
    gathered = idist.all_gather(rows)
    assert isinstance(gathered, Tensor)
    return gathered.unflatten(0, (ranks, len(rows))).transpose(0, 1).flatten(0, 1)


def part_of_mean(mean: Tensor, weight: Tensor) -> Tensor:
    """A rank's mean over its places as its part of the mean over those of all ranks, which is the mean of the parts.

    The mean of the ranks' own means is another one, as the samples of each have other weights.

    Args:
        mean: over this rank's places, each weighing as its weight says; a scalar.
        weight: of this rank's places.
    """
    if idist.get_world_size() == 1:
        return mean
    own = weight.sum()
    return mean * own / mean_over_ranks(own).clamp(min=1e-6)


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Call a function on the first rank only; every rank gets its result (which is pickled), or its refusal.

    Raises:
        FibldmError: the function raised it.
    """
    if idist.get_world_size() == 1:
        return function()
    outcome: list[tuple[Result | None, tuple[str, str] | None]] = [(None, None)]
    if is_first_rank():
        try:
            outcome = [(function(), None)]
        except FibldmError as error:
            outcome = [(None, (error.message, error.remedy))]
    broadcast_object_list(outcome)
    result, refusal = outcome[0]
    if refusal is not None:
        raise FibldmError(*refusal)
    return result  # type: ignore[return-value]  # the first rank's function decides


def parallel(network: nn.Module) -> nn.Module:
    """The network as every rank trains it: with gradients averaged over the ranks; itself where there is one rank."""
    if idist.get_world_size() == 1:
        return network
    return DistributedDataParallel(network)
