"""Whether layers compute in bfloat16 what they compute in float32; those that do not are run in float32.

Libraries of kernels err for some shapes and nobody sees it: oneDNN in strided 3-D convolutions whose innermost output
size is 1, on CPUs with AMX (PyTorch issue 169688), cuDNN in large ones (issue 163539). Attention itself, which is no
layer with weights, is not looked at.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from fibldm.models.low_rank import plain_name

ROUNDING = torch.finfo(torch.bfloat16).eps / 2  # largest relative error of one rounding
_TIMES_THE_SPREAD = 4  # of normal numbers one in 16 000 lies further out

_RUNS, _SECONDS = 20, 0.4  # of either precision, to measure what bfloat16 costs; the fastest one counts

# Operations of one pass through a layer; longer axes than that takes are shortened.
_OPERATIONS = {"cuda": 1e11, "cpu": 2e8}
_OPERATIONS_WITHOUT_UNITS = 5e6


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer and the shape of an input that it meets.

    Attributes:
        name: in its network.
        layer: with float32 weights.
        shape: of its input, ``(N, C, ...)`` for convolutions, ``(..., C)`` for linear layers.
        memory_format: of its input.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for all that run the same kernels on the same shapes."""
        kind = parametrize.type_before_parametrizations(self.layer)
        is_torchs = kind.__module__.startswith("torch.nn.") and "forward" not in vars(self.layer)
        own = None if is_torchs else id(self.layer)
        weight: Any = self.layer.weight
        return kind, self.layer.extra_repr(), own, _memory_format(weight), self.shape, self.memory_format

    def __str__(self) -> str:
        kind = parametrize.type_before_parametrizations(self.layer).__name__
        return f"{kind}({self.layer.extra_repr()}) on {' x '.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Disagreement:
    """A layer that bfloat16 changes by more than rounding can.

    Attributes:
        where: the layer and the shape.
        part: what of it is wrong, such as "output".
        error: the largest one, as a share of the size of the right value.
        allowed: the largest that rounding explains.
    """

    where: LayerShape
    part: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.where}: its {self.part} is off by {self.error:.0%} in bfloat16, where rounding explains "
            f"{self.allowed:.0%}"
        )


def has_bfloat16_units() -> bool:
    """Whether this CPU has instructions for products in bfloat16: AMX or AVX-512 BF16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def slowdown() -> float:
    """How many times as long as in float32 a convolution takes in bfloat16 on this CPU; measured in under a second."""
    volume, weight = torch.ones(1, 32, 8, 8, 8), torch.ones(32, 32, 3, 3, 3)
    fastest = []
    for values in ((volume, weight), (volume.bfloat16(), weight.bfloat16())):
        runs: list[float] = []
        while len(runs) < _RUNS and sum(runs) < _SECONDS:
            start = time.perf_counter()
            F.conv3d(*values, padding=1)
            runs.append(time.perf_counter() - start)
        fastest.append(min(runs))
    return fastest[1] / fastest[0]


def correct_layers(network: nn.Module, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[int, list[Disagreement]]:
    """Compare every layer of a network, and let those that bfloat16 gets wrong run in float32 from now on.

    The network runs once, on the first sample of the batch, and stays as it was, its random numbers included.

    Args:
        network: changed in place where a layer is wrong.
        inputs: of the network, ``(B, ...)``.
        args: more of it; tensors of length B are parted into samples as well.
        kwargs: likewise.

    Returns:
        The number of different layers and shapes, and what was found, one for each wrong layer, named.
    """
    given = tree_map_only(Tensor, lambda part: _first_sample(part, len(inputs)), ((inputs, *args), kwargs))
    wrong: dict[str, Disagreement] = {}
    with _left_as_it_was(network):
        met = layer_shapes(network, *given[0], **given[1])
        results = {key: compare(same) for key, same in {one.key: one for one in met}.items()}
        for one in met:
            found = results[one.key]
            if found is not None and one.name not in wrong:
                wrong[one.name] = Disagreement(one, found.part, found.error, found.allowed)
    for disagreement in wrong.values():
        run_in_float32(disagreement.where.layer)
    return len(results), list(wrong.values())


def layer_shapes(network: nn.Module, *args: Any, **kwargs: Any) -> list[LayerShape]:
    """Run a network and tell which layers meet which shapes; on the CPU in float32, as bfloat16 may be slow there."""
    met: dict[tuple[Any, ...], LayerShape] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            one = LayerShape(plain_name(name), layer, tuple(inputs[0].shape), _memory_format(inputs[0]))
            met.setdefault((name, one.shape, one.memory_format), one)

    layers = {name: layer for name, layer in network.named_modules() if _is_looked_at(layer)}
    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    device = next((layer.weight.device.type for layer in layers.values()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            network._call_impl(*args, **kwargs)  # the network as it is, even where it is to be compiled
    finally:
        for handle in handles:
            handle.remove()
    return list(met.values())


def compare(found: LayerShape) -> Disagreement | None:
    """Run a layer in both precisions on random numbers, there and back; None where they agree.

    Inputs, weights and the gradient of the output are random and bfloat16 can write them exactly. Products of them are
    exact in float32, and so are sums but for 2^-24, so what differs are roundings of sums to bfloat16, each by at most
    ``u`` = 2^-8 of the sum. Every kernel rounds once, at the end. None is known to round more often than that and once
    for each of the ``n`` places of its kernel, as PyTorch's own convolutions without oneDNN do on the way back. A sum
    of random numbers has the size ``r``, the root mean square of all of them, and so, at most, have its parts.
    Roundings are independent, which makes their sum spread by less than ``u sqrt(1 + n) (|y| + r)`` at a value ``y``;
    allowed are four times that. A wrong value errs by about ``r``: forty times what is allowed for a kernel of one
    place, twelve times that for one of 27.
    """
    layer = _plain(found.layer)
    device = next(layer.parameters()).device
    with torch.inference_mode(False):
        values = _draw(_shortened(found), device, seed=0).contiguous(memory_format=found.memory_format)
        weights = {
            name: torch.empty_like(weight, requires_grad=False).copy_(_draw(weight.shape, device, seed=seed))
            for seed, (name, weight) in enumerate(layer.named_parameters(), start=1)
        }
        exact, rounded = (_there_and_back(layer, values, weights, bfloat16=on) for on in (False, True))
    allowed = _TIMES_THE_SPREAD * ROUNDING * math.sqrt(1 + _places(layer))
    errors = {part: _error(rounded[part], exact[part]) for part in exact}
    wrong = (Disagreement(found, part, error, allowed) for part, error in errors.items() if error > allowed)
    return next(wrong, None)


def run_in_float32(layer: nn.Module) -> None:
    """Take a layer out of autocast from now on; its input is turned to float32, and so is what comes back."""
    # a partial of a bound method, as a copy of the layer gets one of its own
    layer.forward = partial(_forward_in_float32, layer.forward)  # type: ignore[method-assign]


def _forward_in_float32(forward: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
    devices = {part.device.type for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        return forward(*args, **kwargs)


def _is_looked_at(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd | nn.Linear) and layer.weight.dtype == torch.float32


def _first_sample(part: Tensor, samples: int) -> Tensor:
    return part[:1] if part.ndim and len(part) == samples else part


@contextmanager
def _left_as_it_was(network: nn.Module) -> Iterator[None]:
    """In evaluation mode nothing of a network moves: no running mean, no codebook; nor do the random numbers."""
    modes = {module: module.training for module in network.modules()}
    devices = {weight.device for weight in network.parameters() if weight.is_cuda}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _memory_format(values: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
    if last is None or values.is_contiguous() or not values.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _plain(layer: nn.Module) -> nn.Module:
    """The layer, or one whose weights are its own where those of the layer are computed of others."""
    if not parametrize.is_parametrized(layer):
        return layer
    # torch could take that from a copy, but would take it from the layer as well, whose class the copy shares
    kind: Any = parametrize.type_before_parametrizations(layer)
    plain: nn.Module = kind.__new__(kind)
    names = [name for name in ("weight", "bias") if parametrize.is_parametrized(layer, name)]
    computed = {name: nn.Parameter(getattr(layer, name).detach()) for name in names}
    vars(plain).update({**vars(layer), "_parameters": {**layer._parameters, **computed}, "_modules": {}})
    return plain


def _places(layer: nn.Module) -> int:
    return math.prod(layer.kernel_size) if isinstance(layer, _ConvNd) else 1


def _shortened(found: LayerShape) -> tuple[int, ...]:
    """The shape with outer axes shortened until a pass is cheap; the innermost one, which kernels begin with, is kept.

    Kernels walk along the outer axes and through the batch.
    """
    layer, shape = found.layer, list(found.shape)
    weight: Any = layer.weight
    limit = _OPERATIONS.get(weight.device.type, _OPERATIONS["cpu"])
    if weight.device.type == "cpu" and not has_bfloat16_units():
        limit = _OPERATIONS_WITHOUT_UNITS
    least, step = _least(layer, len(shape))
    for axis in range(len(shape) - 1):
        if axis not in least:
            continue
        operations = 2 * weight.numel() * math.prod(shape[other] / step[other] for other in step)
        if operations <= limit:
            break
        shape[axis] = min(shape[axis], max(least[axis], int(shape[axis] * limit / operations)))
    return tuple(shape)


def _least(layer: nn.Module, axes: int) -> tuple[dict[int, int], dict[int, int]]:
    """How short each axis but that of channels may be, and how many of its places one output stands for, by axis."""
    if not isinstance(layer, _ConvNd):
        return dict.fromkeys(range(axes - 1), 1), dict.fromkeys(range(axes - 1), 1)
    first = axes - len(layer.kernel_size)
    batch = dict.fromkeys(range(first - 1), 1)
    least, step = dict(batch), dict(batch)
    padding = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    for place, (size, pad) in enumerate(zip(layer.kernel_size, padding, strict=True)):
        span = layer.dilation[place] * (size - 1) + 1
        if isinstance(layer, _ConvTransposeNd):
            least[first + place], step[first + place] = 1, 1
        else:
            reflected = pad + 1 if layer.padding_mode != "zeros" else 1
            least[first + place], step[first + place] = max(1, span - 2 * pad, reflected), layer.stride[place]
    return least, step


def _there_and_back(
    layer: nn.Module, values: Tensor, weights: dict[str, Tensor], *, bfloat16: bool
) -> dict[str, Tensor]:
    """Output and gradients by name, float32."""
    inputs = [part.detach().requires_grad_() for part in (values, *weights.values())]
    with torch.enable_grad(), torch.autocast(values.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        output = functional_call(layer, dict(zip(weights, inputs[1:], strict=True)), (inputs[0],))
        # the gradient of the output, by way of a scalar: torch imports much to take it as a tensor
        scalar = (output.float() * _draw(output.shape, values.device, seed=len(inputs))).sum()
    gradients = torch.autograd.grad(scalar, inputs)
    names = ("output", "gradient of the input", *(f"gradient of the {name}" for name in weights))
    return {name: part.detach().float() for name, part in zip(names, (output, *gradients), strict=True)}


def _draw(size: Sequence[int], device: torch.device, *, seed: int) -> Tensor:
    """Standard normal numbers that bfloat16 can write exactly, in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(size), generator=generator, device=device).bfloat16().float()


def _error(rounded: Tensor, exact: Tensor) -> float:
    """The largest error as a share of value and root mean square together; not a number counts as infinite."""
    size = exact.abs() + exact.square().mean().sqrt()
    share = (rounded - exact).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(share.nan_to_num(nan=math.inf).max())
