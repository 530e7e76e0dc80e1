#!/usr/bin/env bash
# torch.optim.Muon (torch 2.13.0) moves weights of any type by updates that bfloat16 holds.
#
# One would guess: an optimizer computes in the type of its weights, as torch's AdamW does, so that a float64 model is
# moved by float64 updates. Muon casts the gradient to bfloat16 before it makes it orthogonal, and casts back nothing
# but the type: with lr=1 every entry of the first update of a float64 matrix is a bfloat16 number, and it lies about
# 1 % away from the same iteration in float64. Kernels of convolutions are refused: it takes matrices only.
#
# It matters: a test that compares two implementations, devices or numbers of ranks needs the tolerance of bfloat16,
# not of the weights; and on processors without bfloat16 units most of the time of a step may be these products.
#
# Seen with torch 2.13.0 on a CPU:
#   dtype torch.float64, every entry a bfloat16 number: True (AdamW: False)
#   away from the same iteration in float64: 1.4 %
#   Conv3d: ValueError
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

def first_update(optimizer, gradient, **settings):
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    optimizer([weight], lr=1.0, weight_decay=0.0, **settings).step()
    return -weight.detach()

def in_float64(gradient, coefficients=(3.4445, -4.7750, 2.0315)):
    """Newton-Schulz, five times, with torch's default coefficients."""
    a, b, c = coefficients
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x

torch.manual_seed(0)
gradient = torch.randn(64, 64, dtype=torch.float64)
muon = first_update(torch.optim.Muon, gradient, momentum=0.0, nesterov=False)
adamw = first_update(torch.optim.AdamW, gradient, eps=1e-3)
held = [bool((update == update.bfloat16().double()).all()) for update in (muon, adamw)]
expected = in_float64(gradient)
away = float((muon - expected).norm() / expected.norm())
print(f"torch {torch.__version__}")
print(f"dtype {muon.dtype}, every entry a bfloat16 number: {held[0]} (AdamW: {held[1]})")
print(f"away from the same iteration in float64: {100 * away:.2g} %")
try:
    torch.optim.Muon(torch.nn.Conv3d(1, 1, 3, bias=False).parameters())
    refused = "accepted"
except ValueError:
    refused = "ValueError"
print(f"Conv3d: {refused}")
assert muon.dtype == torch.float64 and held == [True, False], held
assert 0.001 < away < 0.02, away
assert refused == "ValueError"
PYTHON
echo "as described"
