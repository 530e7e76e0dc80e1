"""Muon: orthogonal steps of kernels, AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from fibldm.models.low_rank import add_low_rank
from fibldm.training.initialise import rate_groups
from fibldm.training.muon import Muon, orthogonal


def with_singular_values(rows: int, columns: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix ``U diag(values) V^T`` and its nearest orthogonal one, ``U V^T``."""
    u, _ = torch.linalg.qr(torch.randn(rows, len(values)))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values)))
    return u @ values.diag() @ v.T, u @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(6, 40), (40, 6), (12, 12)])
def test_the_nearest_orthogonal_matrix(rows: int, columns: int) -> None:
    """Singular vectors stay, singular values come to about 1 (0.7 to 1.2, Jordan et al. 2024), whatever they were."""
    torch.manual_seed(0)
    given, nearest = with_singular_values(rows, columns, torch.logspace(0, -1.5, min(rows, columns)))
    before = given.clone()
    made = orthogonal(given[None])[0]
    assert torch.equal(given, before)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.65 and values.max() < 1.25
    # with the singular vectors of U V^T, what is between the two is symmetric
    turned = made @ nearest.T if rows <= columns else nearest.T @ made
    torch.testing.assert_close(turned, turned.T, rtol=0, atol=1e-4)


def test_matrices_together_are_as_each_by_itself_and_their_size_does_not_matter() -> None:
    torch.manual_seed(0)
    given = torch.randn(3, 5, 20)
    together = orthogonal(given)
    for one, made in zip(given, together, strict=True):
        torch.testing.assert_close(orthogonal(one[None])[0], made, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonal(1e-4 * given), together, rtol=1e-3, atol=1e-4)


def test_the_first_step_of_a_kernel_is_the_orthogonal_gradient() -> None:
    """Of length rate x 0.2 x sqrt(longer side) (Liu et al. 2025, equation 4); a convolution is a matrix of its rows."""
    torch.manual_seed(0)
    layer = nn.Conv3d(3, 8, 3)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(layer.weight)
    Muon([{"params": [layer.weight], "kernels": True}], lr=0.01).step()
    moved = (before - layer.weight.detach()).flatten(1)
    expected = 0.01 * 0.2 * 81**0.5 * orthogonal(layer.weight.grad.flatten(1)[None])[0]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_everything_else_is_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 4))]
    theirs = copy.deepcopy(ours)
    muon = Muon(ours, lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        muon.step()
        adamw.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [weight], "kernels": True}], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_a_resumed_optimizer_goes_on_exactly() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv3d(4, 2, 1))

    def trained(steps: int, begun: tuple[nn.Module, Muon] | None = None) -> tuple[nn.Module, Muon]:
        net, optimizer = begun or (network(), None)
        optimizer = optimizer or Muon(rate_groups(net, 0.01, {}, kernels=True), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(len(optimizer.state) and step)
            net(torch.randn(1, 2, 4, 4, 4, generator=generator)).square().mean().backward()
            optimizer.step()
        return net, optimizer

    first, optimizer = trained(3)
    second = copy.deepcopy(first)
    fresh = Muon(rate_groups(second, 0.01, {}, kernels=True), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(3, (first, optimizer))
    trained(3, (second, fresh))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_kernels_are_weights_of_convolutions_and_linear_layers() -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.Embedding(3, 4), nn.Linear(4, 2))
    groups = {group["kernels"]: group["params"] for group in rate_groups(network, 0.1, {}, kernels=True)}
    assert [tuple(weight.shape) for weight in groups[True]] == [(4, 2, 3, 3, 3), (2, 4)]
    assert sum(weight.numel() for part in groups.values() for weight in part) == sum(
        weight.numel() for weight in network.parameters()
    )
    assert all("kernels" not in group for group in rate_groups(network, 0.1, {}))


def test_updates_of_low_rank_are_no_kernels() -> None:
    """Two factors made orthogonal each by itself do not make an orthogonal product."""
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    add_low_rank(network, 2, ["0.weight"], ["1.weight"])
    groups = {group["kernels"]: group["params"] for group in rate_groups(network, 0.1, {}, kernels=True)}
    assert [tuple(weight.shape) for weight in groups[True]] == [(4, 8)]
    assert sorted(tuple(weight.shape) for weight in groups[False]) == [(2, 8), (8, 2)]
