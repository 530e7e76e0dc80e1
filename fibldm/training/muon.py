"""Muon: steps of the same length in every direction of a kernel, which need far fewer of them than AdamW's."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Jordan et al. 2024: of a x + b x^3 + c x^5, which five times over brings any x in (0, 1] to about 1
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_RMS_OF_ADAM = 0.2  # Liu et al. 2025, section 2.2: what an entry moves by in a step of AdamW, as a share of the rate


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the kernels of convolutions and linear layers; AdamW for everything else.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with the step length of Liu et al.
    2025, "Muon is scalable for LLM training", equation 4, so that one rate is right for both kinds of weights. A kernel
    is taken as the matrix of its output channels and everything that one of them sees.

    `torch.optim.Muon` takes matrices only, one after the other, and computes in bfloat16, which a CPU without matrix
    units does a hundred times more slowly than float32. Here kernels of one shape are taken together.

    Args:
        params: weights, or groups of them; those of a group with ``kernels: True`` are made orthogonal.
        lr: learning rate.
        momentum: of kernels.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, of all weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "kernels": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights and group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            (self._step_kernels if group["kernels"] else self._step_others)(weights, group)
        return loss

    def _step_kernels(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in weights:
            alike[len(weight), weight[0].numel()].append(weight)
        for shape, kernels in alike.items():
            updates = orthogonal(torch.stack([self._moved(kernel, group["momentum"]).flatten(1) for kernel in kernels]))
            length = group["lr"] * _RMS_OF_ADAM * max(shape) ** 0.5
            for kernel, update in zip(kernels, updates, strict=True):
                kernel.sub_(update.view(kernel.shape), alpha=length)

    def _moved(self, weight: nn.Parameter | Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None  # those without one were left out
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)

    def _step_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
        first, second = group["betas"]
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None
            if not state:
                state |= {"step": torch.zeros((), device="cpu"), "mean": torch.zeros_like(gradient)}
                state["square"] = torch.zeros_like(gradient)
            state["step"] += 1
            state["mean"].lerp_(gradient, 1 - first)
            state["square"].lerp_(gradient.square(), 1 - second)
            count = state["step"].to(weight.device)
            size = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
            weight.sub_(state["mean"] / (1 - first**count) / size * group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1 (0.7 to 1.2), by a Newton-Schulz iteration.

    The polynomials are those of Jordan et al. 2024; all but the last product are of square matrices of the shorter
    side, as ``p(X X^T) X`` is iterated on ``X X^T``.

    Args:
        matrices: ``(N, R, C)``, floating point; not changed.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide.float() / wide.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    gram = wide @ wide.mT
    one = torch.eye(wide.shape[1], device=wide.device).expand_as(gram)
    total = one
    for _ in range(_ITERATIONS):
        polynomial = _A * one + _B * gram + _C * gram @ gram
        total = polynomial @ total
        gram = polynomial @ gram @ polynomial
    made = (total @ wide).to(matrices)
    return made if matrices.shape[1] <= matrices.shape[2] else made.mT
