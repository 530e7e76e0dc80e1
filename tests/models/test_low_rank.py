"""Low-rank adaptation: the network begins as it was, few numbers move it, what is kept is a network as any other."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from builders import awake, with_latents_of
from conftest import TinyStage
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.low_rank import add_low_rank, merged_state, plain_name
from fibldm.runs import StageFolder
from fibldm.training.initialise import rate_groups


def unet() -> nn.Module:
    """With all weights at work, as in a trained one; nothing would be learned behind zeros."""
    torch.manual_seed(0)
    sizes = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 8}
    made = DiffusionModelUNet(spatial_dims=3, in_channels=2, out_channels=2, num_head_channels=8, **sizes)
    return awake(made, std=0.1).train()


def apply(network: nn.Module) -> torch.Tensor:
    given = torch.rand(2, 2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = network(given, torch.tensor([3.0, 500.0]))
    return result


def test_a_network_begins_as_it_was_and_few_numbers_are_trained() -> None:
    plain, adapted = unet(), unet()
    count = add_low_rank(adapted, 2, ["*"])
    assert torch.equal(apply(adapted), apply(plain))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and all(name.endswith((".lora_a", ".lora_b")) for name in trained)
    assert 0 < count < 0.25 * sum(weight.numel() for weight in plain.parameters())


def test_what_is_kept_is_a_plain_network_with_updates_of_that_rank() -> None:
    """Names and shapes of before; every layer has moved by a matrix of rank 2, everything else not at all."""
    plain, adapted = unet(), unet()
    add_low_rank(adapted, 2, ["*"])
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        apply(adapted).square().mean().backward()
        optimizer.step()
    kept, before = merged_state(deepcopy(adapted)), plain.state_dict()
    assert kept.keys() == before.keys()
    moved = {name: kept[name] - before[name] for name in before if not torch.equal(kept[name], before[name])}
    assert len(moved) > 20 and all(name.endswith(".weight") for name in moved)
    for name, move in moved.items():
        # sums and differences of float32 are off by eps of what is summed: the error is a matrix of that norm at most
        rounding = 2 * torch.finfo(torch.float32).eps * (kept[name].norm() + move.norm())
        assert torch.linalg.matrix_rank(move.flatten(1), atol=rounding, rtol=0.0) <= 2
    plain.load_state_dict(kept)
    torch.testing.assert_close(apply(plain), apply(adapted))


def test_some_weights_get_updates_some_are_trained_as_they_are() -> None:
    """What was frozen before stays so."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    network[2].weight.requires_grad_(False)
    add_low_rank(network, 1, ["0.*"], full=["1.*"])
    trained = [name for name, weight in network.named_parameters() if weight.requires_grad]
    assert trained == ["0.parametrizations.weight.0.lora_a", "0.parametrizations.weight.0.lora_b", "1.weight", "1.bias"]


def test_the_sum_is_one_of_float32_under_autocast() -> None:
    """What is trained under autocast is what is kept."""
    network = nn.Sequential(nn.Linear(64, 64))
    add_low_rank(network, 4, ["*"])
    nn.init.normal_(network[0].parametrizations.weight[0].lora_b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network[0].weight, merged_state(network)["0.weight"])


@pytest.mark.parametrize(
    ("rank", "patterns", "full", "message"),
    [
        (-1, ["*"], [], "lora_rank must be a whole number of at least 1, or 0 for none; got -1"),
        (1.5, ["*"], [], "lora_rank must be a whole number of at least 1, or 0 for none; got 1.5"),
        (1, ["*", "attention*"], [], r"'attention\*' fits none; they have names such as conv_in\.conv\.weight"),
        (1, "conv_in*", [], r"lora_weights must be a list of names; got 'conv_in\*'"),
        (1, ["*"], ["nothing.*"], r"lora_full must name weights .*'nothing\.\*' fits none"),
    ],
)
def test_what_cannot_be_adapted_is_refused(rank: int, patterns: list[str], full: list[str], message: str) -> None:
    """Before anything is changed."""
    network = unet()
    with pytest.raises(FibldmError, match=message):
        add_low_rank(network, rank, patterns, full)
    assert network.state_dict().keys() == unet().state_dict().keys()


def test_updates_and_activation_checkpointing_go_together() -> None:
    """The names of what is kept, and those that patterns see, are of the network itself."""
    plain, adapted = unet(), unet()
    add_low_rank(adapted, 2, ["*"])
    checkpoint_activations(adapted)
    plain.load_state_dict(merged_state(adapted))
    names = {plain_name(name) for name, _ in adapted.named_parameters()}
    assert names == dict(unet().named_parameters()).keys()
    groups = rate_groups(adapted, 0.1, {"down_blocks.0.resnets.0.conv1.*": 0.5})
    assert [(group["share"], len(group["params"])) for group in groups][1:] == [(0.5, 2)]


def test_a_stage_is_adapted_goes_on_and_ends_with_plain_weights(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path
) -> None:
    """From the weights of another run, with fewer numbers than they have."""
    settings = {"init_from": str(tiny_run), "lora_rank": 1, "learning_rate": 0.1}
    tiny_stage("autoencoder", tmp_path / "run", **settings).run()
    tiny_stage("autoencoder", tmp_path / "run", **settings, epochs=2).run()
    made, given = (StageFolder(run, "autoencoder") for run in (tmp_path / "run", tiny_run))
    assert "numbers are trained in updates of rank 1" in (made.path / "log.txt").read_text()
    assert "going on after epoch 1 of 2" in (made.path / "log.txt").read_text()
    after, before = (part.trained(device="cpu").state_dict() for part in (made, given))
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert moved and all(torch.linalg.matrix_rank(move.flatten(1), rtol=1e-2) <= 1 for move in moved.values())


def test_weights_that_are_not_given_are_trained_in_full(tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path) -> None:
    """New inputs, which nothing was learned for, do not stay as they were drawn."""
    settings = {"init_from": str(tiny_run), "init_strict": False, "lora_rank": 1}
    with pytest.raises(
        FibldmError, match=r"does not have must be trained in full; .*unet\.conv_in\.conv\.weight would stay"
    ):
        tiny_stage("diffusion", with_latents_of(tiny_run, tmp_path / "run"), "mask_concat", **settings).run()
    # what was refused has begun nothing
    settings["lora_full"] = ["unet.conv_in.*", "mask_encoder.*"]
    tiny_stage("diffusion", tmp_path / "run", "mask_concat", **settings).run()
    stage = StageFolder(tmp_path / "run", "diffusion")
    after, before = stage.trained(device="cpu").state_dict(), StageFolder(tiny_run, "diffusion").trained(device="cpu")
    assert after["unet.conv_in.conv.weight"].shape != before.state_dict()["unet.conv_in.conv.weight"].shape


def test_without_weights_to_begin_with_there_is_nothing_to_adapt(tiny_stage: TinyStage, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="lora_rank adapts weights that are there; init_from names none"):
        tiny_stage("autoencoder", tmp_path / "run", lora_rank=4).run()
