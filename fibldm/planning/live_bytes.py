"""How much memory a training step needs, found without taking it: the step runs on tensors that have no values."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HEAP_BLOCK = 32 * 2**20
_HEAP_SHARE = 1.45
_HEAP_SHARE_CHECKPOINTED = 2.0
_CUDA_BLOCK = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations give, from there until the last reference to them is gone.

    What an operation takes and gives back inside of itself, such as the workspace of a convolution, is not seen.

    Args:
        held: bytes that an allocator holds for a tensor of so many bytes; None counts the tensor alone.

    Attributes:
        now: bytes of the tensors that live.
        peak: most that lived at once since the last `restart`.
    """

    def __init__(self, held: Callable[[int], float] | None = None) -> None:
        super().__init__()
        self.held = held or float
        self.now = self.peak = 0.0
        self._known: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()

    def restart(self) -> None:
        """Let the peak begin anew."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = self.held(storage.nbytes())
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: float) -> None:
        self.now -= size


def held_on_cpu(size: int, *, checkpointed: bool = False) -> float:
    """What the heap of the GNU C library grows by for a tensor.

    Freed blocks below 32 MiB, the highest M_MMAP_THRESHOLD of mallopt(3), stay in the heap and leave holes, and oneDNN
    turns inputs of convolutions. Measured by scripts/benchmark.py, steps of all stages took 1.2 to 1.8 times their
    tensors, with activation checkpointing, which frees and takes more often, 2 times; with
    ``MALLOC_MMAP_THRESHOLD_=65536``, which gives every block back, 1.06 to 1.24 times.

    Args:
        size: bytes of the tensor.
        checkpointed: activations are computed again on the way back.
    """
    share = _HEAP_SHARE_CHECKPOINTED if checkpointed else _HEAP_SHARE
    return size * share if size < _HEAP_BLOCK else float(size)


def held_on_cuda(size: int) -> float:
    """What PyTorch's allocator holds for a tensor: whole blocks of 512 bytes."""
    return float(-(-size // _CUDA_BLOCK) * _CUDA_BLOCK)


def forget_values(network: nn.Module) -> None:
    """Take the values of small buffers away, such as a count of steps, which the mode keeps and cannot copy."""
    for buffer in network.buffers():
        if isinstance(buffer, FakeTensor):
            buffer.constant = None


@contextmanager
def without_values(live: LiveBytes) -> Iterator[None]:
    """Tensors made inside have shape, type and device but no values and no memory; ``live`` counts them."""
    with warnings.catch_warnings():
        # copy.deepcopy of a tensor looks at its address
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with _Valueless(), live:
            yield


class _Valueless(FakeTensorMode):
    """The copy of a tensor belongs to the mode of the tensor: ``copy.deepcopy`` copies all that a buffer refers to."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Valueless":
        return self
