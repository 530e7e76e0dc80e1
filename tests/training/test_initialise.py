"""Where training begins, and how the network is kept: foreign weights, frozen ones, memory and order of voxels."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import unet_numbers
from conftest import TinyStage
from ignite.engine import Engine, Events
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from monai.optimizers.lr_scheduler import WarmupCosineSchedule
from safetensors.torch import save_file
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.control import Control
from fibldm.models.network import ConditionedNetwork
from fibldm.runs import StageFolder
from fibldm.training.draws import take_subset
from fibldm.training.handlers import Schedule
from fibldm.training.initialise import freeze, initialise, rate_groups, read_weights
from fibldm.training.precision import gradient_scaler, store_channels_last


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1, bias=width == 3))


def state(seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in network().state_dict().items()}


# --- weights of another network


@pytest.mark.parametrize("nesting", [(), ("state_dict",), ("objects", "network")])
def test_weights_come_from_files_of_several_kinds(tmp_path: Path, nesting: tuple[str, ...]) -> None:
    """Plain, as Lightning nests them, and as a checkpoint of a run does."""
    content: Any = state()
    for name in reversed(nesting):
        content = {"epoch": 3, name: content}
    torch.save(content, tmp_path / "weights.pt")
    report = initialise(made := network(), tmp_path / "weights.pt")
    assert report.complete and len(report.loaded) == 4
    assert all(torch.equal(value, state()[name]) for name, value in made.state_dict().items())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.safetensors")
    assert torch.equal(read_weights(tmp_path / "weights.safetensors")["0.bias"], state()["0.bias"])


def test_weights_that_do_not_fit_are_refused_with_a_report(tmp_path: Path) -> None:
    torch.save({**state(), "0.bias": torch.zeros(5), "other.bias": torch.zeros(1)}, tmp_path / "weights.pt")
    expected = (
        r"weights of .*weights\.pt must fit the network; 3 loaded; 0 missing; 1 unexpected \(other\.bias\); "
        r"1 other shapes \(0\.bias \(5,\) for \(3,\)\); .*init_strict: false"
    )
    with pytest.raises(FibldmError, match=expected):
        initialise(network(), tmp_path / "weights.pt")


def test_those_that_fit_are_taken_and_the_others_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network that is not touched by an error, and a log that says what happened."""
    torch.save({name: value for name, value in state().items() if name != "1.bias"}, tmp_path / "weights.pt")
    made = network()
    bias = made[1].bias.detach().clone()
    with caplog.at_level(logging.INFO, logger="fibldm"):
        report = initialise(made, tmp_path / "weights.pt", strict=False)
    assert report.missing == ("1.bias",) and report.loaded == ("0.weight", "0.bias", "1.weight")
    assert torch.equal(made[1].bias, bias)
    assert torch.equal(made[0].weight, state()["0.weight"])
    assert "3 loaded; 1 missing (1.bias); 0 unexpected; 0 other shapes" in caplog.text


def test_weights_of_something_else_are_refused_in_any_case(tmp_path: Path) -> None:
    torch.save({"elsewhere": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(FibldmError, match="0 loaded; 4 missing .*same kind of network"):
        initialise(network(), tmp_path / "weights.pt", strict=False)


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="init_from must be a file of weights, a run folder whose stage 'diffusion'"):
        read_weights(tmp_path, "diffusion")
    with pytest.raises(FibldmError, match="init_from must be a file"):
        read_weights(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(FibldmError, match=r"text\.pt must hold weights as safetensors or by torch\.save"):
        read_weights(tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(FibldmError, match=r"none\.pt must hold a state dict; found no tensors"):
        read_weights(tmp_path / "none.pt")


def test_a_stage_begins_with_the_weights_of_another_run(tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path) -> None:
    """With a rate of 0 it ends with them, and the frozen ones are said to be so."""
    settings = {"init_from": str(tiny_run), "freeze": ["*encoder*"], "learning_rate": 0.0}
    tiny_stage("autoencoder", tmp_path / "run", **settings).run()
    made, given = (StageFolder(run, "autoencoder") for run in (tmp_path / "run", tiny_run))
    assert made.require()["weights"] == given.require()["weights"]
    assert "weights are frozen" in (made.path / "log.txt").read_text()


# --- frozen weights


def test_weights_are_frozen_by_name() -> None:
    made = network()
    assert freeze(made, ["0.*", "*.bias"]) == 3
    assert [name for name, weight in made.named_parameters() if weight.requires_grad] == ["1.weight"]


def test_a_pattern_that_fits_nothing_or_everything_is_refused() -> None:
    with pytest.raises(FibldmError, match=r"'2\.\*' fits none; they have names such as 0\.weight, 0\.bias"):
        freeze(network(), ["0.*", "2.*"])
    with pytest.raises(FibldmError, match="something must be left to train"):
        freeze(network(), ["*"])


# --- rates


def test_layers_have_rates_of_their_own() -> None:
    """Shares of all patterns that fit are multiplied, in any order; what is not trained is in no group."""
    made = network()
    made[0].bias.requires_grad_(False)
    for shares in ({"1.*": 0.5, "*.weight": 0.1}, {"*.weight": 0.1, "1.*": 0.5}):
        groups = rate_groups(made, 0.1, shares, beside=nn.Linear(1, 1))
        assert [group["share"] for group in groups] == pytest.approx([1, 0.5, 0.1, 0.05])
        assert [len(group["params"]) for group in groups] == [2, 1, 1, 1]
        assert groups[2]["params"][0] is made[0].weight


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"2.*": 0.5}, r"layer_rates must name weights .*'2\.\*' fits none"),
        ({"*.bias": 0.0}, "a share of the learning rate, a number above 0"),
        ({"*.bias": "1e-3"}, "write 0.001 rather than 1e-3"),
        (["*.bias"], "layer_rates must give names"),
    ],
)
def test_rates_of_nothing_are_refused(shares: Any, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        rate_groups(network(), 0.1, shares)


def test_shares_hold_from_the_first_step_to_the_last() -> None:
    """In warm-up, in the middle, and where the schedule ends at a floor."""
    made = network()
    optimizer = torch.optim.SGD(rate_groups(made, 0.1, {"1.*": 0.01}))
    schedule = Schedule(
        WarmupCosineSchedule(optimizer, warmup_steps=4, t_total=20, end_lr=0.001, warmup_multiplier=0.1)
    )
    engine, rates = Engine(lambda engine, batch: None), []
    schedule.attach(engine)
    engine.add_event_handler(
        Events.ITERATION_STARTED, lambda: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    engine.run([0] * 10, max_epochs=2)
    assert [rate for rate, _ in rates][:5] == pytest.approx([0.01, 0.0325, 0.055, 0.0775, 0.1])
    assert rates[-1][0] == pytest.approx(0.001, rel=0.2)
    assert [slow / fast for fast, slow in rates] == pytest.approx([0.01] * 20)


# --- a share of the patients


def test_a_subset_is_by_patient_and_holds_the_smaller_ones() -> None:
    """Both scans of a patient, in their order, whatever the share."""
    items = [{"subject": f"s{n}", "case": f"{n}-{scan}"} for n in range(20) for scan in range(2)]
    kept = {share: take_subset(items, share) for share in (0.05, 0.1, 0.3, 0.31, 1.0)}
    assert [len(part) // 2 for part in kept.values()] == [1, 2, 6, 7, 20]
    assert kept[1.0] == items
    assert all(item in kept[0.3] for item in kept[0.1])
    assert kept[0.3] == [item for item in items if item in kept[0.3]]
    assert {item["subject"] for item in kept[0.1]} != {"s0", "s1"}


def test_another_preparation_has_the_same_subset() -> None:
    """Patients have other pseudonyms then, and cases perhaps another order; the cases' names stay."""
    cases = [{"subject": f"{n:02d}", "case": f"scan{40 - 2 * n - scan}"} for n in range(20) for scan in range(2)]
    renamed = [{**case, "subject": f"sub-{(7 * int(case['subject'])) % 20}"} for case in reversed(cases)]
    one, other = ({case["case"] for case in take_subset(items, 0.4)} for items in (cases, renamed))
    assert one == other and len(one) == 16


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_of_nothing_is_refused(share: float) -> None:
    with pytest.raises(FibldmError, match="subset must be a share above 0 and at most 1"):
        take_subset([{"subject": "a", "case": "1"}], share)


# --- memory and numbers

UNET = unet_numbers(in_channels=2, norm_num_groups=8)


def controlled() -> ConditionedNetwork:
    torch.manual_seed(0)
    control = ControlNet(**UNET, conditioning_embedding_in_channels=3, conditioning_embedding_num_channels=(8,))
    return ConditionedNetwork(DiffusionModelUNet(out_channels=2, **UNET), [Control(control)])


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    sizes = {"channels": (8, 16), "num_res_blocks": (1, 1), "attention_levels": (False, True), "latent_channels": 2}
    return AutoencoderKL(spatial_dims=3, in_channels=1, out_channels=1, norm_num_groups=8, **sizes)


def gradients(made: nn.Module, *inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)
    output = made(*inputs)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return [weight.grad for weight in made.parameters() if weight.grad is not None]


CASES = [
    (controlled, (torch.rand(2, 2, 8, 4, 4), torch.tensor([3.0, 500.0]), {"mask": torch.rand(2, 3, 8, 4, 4)}), 8),
    (autoencoder, (torch.rand(1, 1, 8, 8, 4),), 6),
]


@pytest.mark.parametrize(("make", "inputs", "least"), CASES, ids=["controlnet", "autoencoder"])
def test_activation_checkpointing_changes_neither_gradients_nor_names(
    make: Callable[[], nn.Module], inputs: tuple[Any, ...], least: int
) -> None:
    plain, checkpointed = make(), make()
    assert checkpoint_activations(checkpointed) >= least
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    checkpointed.load_state_dict(plain.state_dict())
    expected, found = gradients(plain, *inputs), gradients(checkpointed, *inputs)
    assert len(found) == len(expected) > 40
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def kept_for_the_backward_pass(made: nn.Module, *inputs: Any) -> int:
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = made(*inputs)
    assert output is not None
    return sum(sizes.values())


def test_activation_checkpointing_keeps_less() -> None:
    """Less than half of a UNet's."""
    checkpointed = controlled()
    checkpoint_activations(checkpointed)
    inputs = CASES[0][1]
    assert kept_for_the_backward_pass(checkpointed, *inputs) < 0.5 * kept_for_the_backward_pass(controlled(), *inputs)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(FibldmError, match=r"needs blocks of a class named \*ResBlock, .*; Sequential has none"):
        checkpoint_activations(network())


def test_channels_last_is_an_order_of_memory_and_no_other_network() -> None:
    """2-D and 3-D kernels in one network."""
    made = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Flatten(2, 3), nn.Conv2d(3, 4, 3))
    volume = torch.rand(1, 2, 6, 5, 7)
    before = made(volume)
    store_channels_last(made)
    assert made[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert made[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made(volume), before)


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(FibldmError, match="float16 trains on CUDA only; the device is 'cpu'.*bfloat16"):
        gradient_scaler("float16", "cpu")
    assert not gradient_scaler("auto", "cpu").is_enabled()


# the noise is drawn outside of the graph, after which torch.compile looks at the gradient of what came before
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_a_stage_trains_the_same_with_less_memory_and_compiled(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path
) -> None:
    """Equal to the bit; a compiled network has the same names and nearly the same weights."""
    for name, settings in {
        "less": {"activation_checkpointing": True},
        "compiled": {"compile": "aot_eager", "channels_last": True, "tf32": False},
    }.items():
        tiny_stage("autoencoder", tmp_path / name, **settings).run()
    expected = StageFolder(tiny_run, "autoencoder").weights()["model"]
    less, compiled = (StageFolder(tmp_path / name, "autoencoder").weights()["model"] for name in ("less", "compiled"))
    assert all(torch.equal(less[name], value) for name, value in expected.items())
    assert compiled.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-4)
