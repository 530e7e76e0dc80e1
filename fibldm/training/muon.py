"""Muon: steps of the same length in every direction of a kernel, which need far fewer of them than AdamW's."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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
            if not weights:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            (self._step_kernels if group["kernels"] else self._step_others)(weights, group)
        return loss

    def _step_kernels(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight, moved in zip(weights, self._moved(weights, group["momentum"]), strict=True):
            alike[len(weight), weight[0].numel()] += [weight, moved]
        for shape, pairs in alike.items():
            kernels, moved_kernels = pairs[::2], pairs[1::2]
            updates = orthogonal(torch.stack([moved.flatten(1) for moved in moved_kernels]))
            length = group["lr"] * _RMS_OF_ADAM * max(shape) ** 0.5
            for kernel, update in zip(kernels, updates, strict=True):
                kernel.sub_(update.view(kernel.shape), alpha=length)

    def _moved(self, weights: list[Tensor], share: float) -> tuple[Tensor, ...]:
        """The gradients with Nesterov's momentum."""
        gradients, (momentum,) = _gradients(weights), self._kept(weights, "momentum")
        torch._foreach_lerp_(momentum, gradients, 1 - share)
        return torch._foreach_lerp(gradients, momentum, share)

    def _step_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
        first, second = group["betas"]
        gradients, (mean, square) = _gradients(weights), self._kept(weights, "mean", "square")
        counts = []
        for weight in weights:
            counts.append(int(self.state[weight].get("step", 0)) + 1)
            self.state[weight]["step"] = counts[-1]
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - second)
        size = torch._foreach_sqrt(torch._foreach_div(square, [1 - second**count for count in counts]))
        torch._foreach_add_(size, group["eps"])
        torch._foreach_addcdiv_(weights, mean, size, [-group["lr"] / (1 - first**count) for count in counts])

    def _kept(self, weights: list[Tensor], *names: str) -> list[list[Tensor]]:
        """The state of the weights by name, zero at first."""
        for weight in weights:
            for name in names:
                if name not in self.state[weight]:
                    self.state[weight][name] = torch.zeros_like(weight)
        return [[self.state[weight][name] for weight in weights] for name in names]


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1 (0.7 to 1.2), by a Newton-Schulz iteration.

    The polynomials are those of Jordan et al. 2024; all but the last product are of square matrices of the shorter
    side, as ``p(X X^T) X`` is iterated on ``X X^T``.

    Args:
        matrices: ``(N, R, C)``, floating point; not changed.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide.float() / wide.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    gram = torch.bmm(wide, wide.mT)
    total = polynomial = _polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
        polynomial = _polynomial(gram)
        total = torch.bmm(polynomial, total)
    made = torch.bmm(total, wide).to(matrices)
    return made if matrices.shape[1] <= matrices.shape[2] else made.mT


def _polynomial(gram: Tensor) -> Tensor:
    """``a I + b G + c G G``."""
    made = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
    made.diagonal(dim1=1, dim2=2).add_(_A)
    return made
