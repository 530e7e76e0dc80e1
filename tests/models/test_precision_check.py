"""Layers that bfloat16 gets wrong are found before training, named, and run in float32."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyStage
from torch import Tensor, nn

import fibldm.doctor
from fibldm.models import precision_check
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.low_rank import add_low_rank
from fibldm.models.precision_check import LayerShape, compare, correct_layers, layer_shapes, run_in_float32, slowdown
from fibldm.runs import StageFolder
from fibldm.training import inferers
from fibldm.training.inferers import AutocastInferer

SHAPES = [
    (nn.Conv3d(4, 8, 3, padding=1), (1, 4, 4, 3, 5)),
    (nn.Conv3d(4, 8, 3, stride=2, padding=1), (1, 4, 4, 4, 2)),
    (nn.Conv3d(4, 8, 3, stride=2, padding=1), (1, 4, 4, 4, 1)),
    (nn.Conv3d(8, 8, 3, padding=1, groups=4, bias=False), (1, 8, 3, 3, 3)),
    (nn.Conv3d(64, 32, 3, padding=1), (1, 64, 3, 3, 3)),
    (nn.Conv3d(8, 4, 1), (1, 8, 4, 4, 4)),
    (nn.Conv3d(4, 4, 3, padding="same", padding_mode="circular"), (1, 4, 4, 4, 4)),
    (nn.Conv2d(4, 8, 7, padding=3), (1, 4, 8, 8)),
    (nn.Conv1d(4, 8, 3), (1, 4, 8)),
    (nn.ConvTranspose3d(8, 4, 2, stride=2), (1, 8, 2, 2, 2)),
    (nn.Linear(256, 64), (1, 16, 256)),
    (nn.Linear(16, 64), (1, 16)),
]


def reduced() -> bool:
    return bool(torch.is_autocast_enabled("cpu"))


class WrongAtOneCell(nn.Conv3d):
    """Errs as PyTorch issue 169688 has it: under autocast, where a strided convolution gives one cell along z."""

    def forward(self, values: Tensor) -> Tensor:
        output = super().forward(values)
        return output.roll(1, dims=1) if reduced() and output.shape[-1] == 1 else output


class OtherWay(torch.autograd.Function):
    """The identity, with a gradient of the wrong sign in the first channel."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        gradient[:, 0] *= -1
        return gradient


class WrongOnTheWayBack(nn.Conv3d):
    def forward(self, values: Tensor) -> Tensor:
        output = super().forward(values)
        return OtherWay.apply(output) if reduced() else output  # type: ignore[no-any-return, no-untyped-call]


class Halving(nn.Module):
    """Two halvings of every axis, each by the same kind of layer, and something that draws and something that moves."""

    def __init__(self, kind: type[nn.Conv3d]) -> None:
        super().__init__()
        self.first, self.second = (kind(4, 4, 3, stride=2, padding=1) for _ in range(2))
        self.norm, self.dropout, self.out = nn.BatchNorm3d(4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, volume: Tensor, scale: Tensor) -> Tensor:
        middle = self.dropout(self.norm(self.first(volume))) * scale.view(-1, 1, 1, 1, 1)
        result: Tensor = self.out(self.second(middle).movedim(1, -1))
        return result


def halving(kind: type[nn.Conv3d] = nn.Conv3d) -> tuple[Halving, Tensor, Tensor]:
    """A network, volumes whose z is 1 after two halvings, and what else it takes."""
    torch.manual_seed(0)
    return Halving(kind), torch.randn(3, 4, 8, 8, 4), torch.rand(3)


# --- comparing


@pytest.mark.parametrize(("layer", "shape"), SHAPES, ids=lambda value: str(value))
def test_right_layers_agree(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert compare(LayerShape("layer", layer, shape)) is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_layers_agree_in_any_order_of_memory(memory_format: torch.memory_format) -> None:
    layer = nn.Conv3d(4, 8, 3, padding=1).to(memory_format=memory_format)
    volume = torch.zeros(2, 4, 3, 3, 3).contiguous(memory_format=memory_format)
    (met,) = layer_shapes(layer, volume)
    assert (met.shape, met.memory_format) == ((2, 4, 3, 3, 3), memory_format)
    assert compare(met) is None


def test_an_error_at_one_place_is_found_with_what_it_is() -> None:
    found = compare(LayerShape("down", WrongAtOneCell(4, 4, 3, stride=2, padding=1), (1, 4, 4, 4, 2)))
    assert found is not None and found.part == "output"
    assert found.error > 0.5 > 4 * found.allowed
    assert str(found).startswith("WrongAtOneCell(4, 4, kernel_size=(3, 3, 3), stride=(2, 2, 2)")
    assert "on 1 x 4 x 4 x 4 x 2: its output is off by" in str(found) and "rounding explains 8%" in str(found)
    assert compare(LayerShape("down", WrongAtOneCell(4, 4, 3, stride=2, padding=1), (1, 4, 4, 4, 4))) is None


def test_wrong_gradients_are_found_too() -> None:
    found = compare(LayerShape("up", WrongOnTheWayBack(4, 4, 3, padding=1), (1, 4, 4, 4, 4)))
    assert found is not None and found.part.startswith("gradient of the")


def test_what_is_not_a_number_is_wrong() -> None:
    class Broken(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values) * (math.nan if reduced() else 1.0)

    found = compare(LayerShape("layer", Broken(4, 4), (1, 4)))
    assert found is not None and math.isinf(found.error)


def test_weights_that_are_zero_hide_nothing() -> None:
    """As the last convolutions of a ControlNet begin."""
    layer = WrongAtOneCell(4, 4, 3, stride=2, padding=1)
    nn.init.zeros_(layer.weight)
    assert compare(LayerShape("zero", layer, (1, 4, 4, 4, 2))) is not None
    assert not layer.weight.any()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv3d(96, 96, 3, padding=1), (4, 96, 64, 64, 48)),
        (nn.Conv3d(96, 96, 3, stride=2), (4, 96, 64, 64, 3)),
        (nn.Conv3d(32, 32, 5, padding=4, padding_mode="reflect"), (2, 32, 40, 40, 40)),
        (nn.Linear(512, 512), (8, 4096, 512)),
    ],
    ids=str,
)
def test_large_shapes_are_shortened_but_for_channels_and_the_innermost_axis(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    shortened = precision_check._shortened(LayerShape("layer", layer, shape))
    assert math.prod(shortened) < math.prod(shape)
    assert shortened[-1] == shape[-1]
    assert shortened[1] == shape[1] or isinstance(layer, nn.Linear)
    assert layer(torch.zeros(shortened)).numel() > 0


# --- correcting


def test_only_layers_that_meet_the_shape_run_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    """The second halving of a latent of z = 4 gives one cell; the first, of the same kind, stays in bfloat16."""
    network, volume, scale = halving(WrongAtOneCell)
    network.eval()
    expected = network(volume, scale)
    types: dict[str, torch.dtype] = {}
    for name in ("first", "second"):
        layer = getattr(network, name)
        layer.register_forward_hook(lambda _, __, output, name=name: types.update({name: output.dtype}))
    inferer = AutocastInferer("bfloat16")
    with caplog.at_level(logging.INFO, "fibldm"):
        for _ in range(3):
            output = inferer(volume, network, scale)
    assert types == {"first": torch.bfloat16, "second": torch.float32}
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    said = [record.getMessage() for record in caplog.records if "second" in record.getMessage()]
    assert len(said) == 1
    assert "second is wrong in bfloat16 and runs in float32 from now on: WrongAtOneCell(4, 4" in said[0]
    assert sum("compared 3 layer shapes with float32; the others agree" in line for line in caplog.messages) == 1
    output.sum().backward()
    assert network.second.weight.grad is not None


def test_a_patched_forward_is_found_by_its_layer(caplog: pytest.LogCaptureFixture) -> None:
    """Two layers of one kind and shape, one of them patched."""
    network = nn.Sequential(*(nn.Conv3d(4, 4, 3, padding=1) for _ in range(2)))
    plain = network[1].forward
    network[1].forward = lambda values: plain(values) * (1.5 if reduced() else 1.0)  # type: ignore[method-assign]
    volume = torch.randn(2, 4, 4, 4, 4)
    expected = network(volume)
    count, (found,) = correct_layers(network, volume)
    assert (count, found.where.name) == (2, "1")
    assert "forward" not in vars(network[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(volume)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    assert correct_layers(network, volume)[1] == []


def test_comparing_leaves_a_network_and_random_numbers_as_they_were() -> None:
    network, volume, scale = halving()
    network.norm.eval()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    count, wrong = correct_layers(network, volume, scale)
    assert (count, wrong) == (3, [])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training and network.dropout.training and not network.norm.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_copy_of_a_corrected_layer_has_weights_of_its_own() -> None:
    """As the average of the weights is a copy of the network."""
    layer = nn.Linear(2, 2)
    run_in_float32(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.fill_(3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin(torch.ones(1, 2)), torch.full((1, 2), 3.0))
        assert not torch.equal(layer(torch.ones(1, 2)), twin(torch.ones(1, 2)))


def test_layers_are_found_within_what_wraps_them() -> None:
    """Low-rank updates, activation checkpointing."""

    class ResBlock(nn.Sequential):
        pass

    network = nn.Sequential(ResBlock(nn.Conv3d(4, 4, 3, padding=1), WrongAtOneCell(4, 4, 3, stride=2, padding=1)))
    add_low_rank(network, 2, ["*"])
    checkpoint_activations(network)
    volume = torch.randn(2, 4, 4, 4, 2)
    count, (found,) = correct_layers(network, volume)
    assert (count, found.where.name) == (2, "0.1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(volume)
    assert output.dtype == torch.float32
    output.sum().backward()
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert len(trained) == 4 and all(weight.grad is not None for weight in trained)


def test_only_the_first_sample_is_run() -> None:
    network, volume, scale = halving()
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    shapes: list[tuple[int, ...]] = []
    network.first.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    correct_layers(network, volume, scale)
    assert seen == [1] and set(shapes) == {(1, 4, 8, 8, 4)}


# --- when


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_nothing_is_compared_in_float32(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr(inferers, "fast_bfloat16", lambda device: False)
    for name in ("correct_layers", "slowdown", "has_bfloat16_units"):
        monkeypatch.setattr(inferers, name, fail)
    network, volume, scale = halving()
    assert AutocastInferer(precision)(volume, network, scale).dtype == torch.float32


def test_sizes_are_compared_once_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, ...]] = []

    def note(network: nn.Module, inputs: Tensor, *_: Any) -> tuple[int, list[Any]]:
        compared.append(tuple(inputs.shape))
        return 0, []

    monkeypatch.setattr(inferers, "correct_layers", note)
    monkeypatch.setattr(inferers, "has_bfloat16_units", lambda: True)
    inferer, networks = AutocastInferer("bfloat16"), [nn.Conv3d(1, 1, 1) for _ in range(2)]
    for network in networks:
        for shape in ((2, 1, 4, 4, 4), (2, 1, 4, 4, 4), (1, 1, 4, 4, 4), (2, 1, 4, 4, 2)):
            inferer(torch.zeros(shape), network)
    assert compared == [(2, 1, 4, 4, 4), (2, 1, 4, 4, 2)] * 2


@pytest.mark.parametrize(("units", "times", "is_said"), [(False, 87.0, True), (False, 1.2, False), (True, 87.0, False)])
def test_what_bfloat16_costs_without_units_is_said_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, units: bool, times: float, is_said: bool
) -> None:
    monkeypatch.setattr(inferers, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(inferers, "slowdown", lambda: times)
    inferer = AutocastInferer("bfloat16")
    with caplog.at_level(logging.WARNING, "fibldm"):
        for size in (2, 3):
            inferer(torch.zeros(1, 1, size, size, size), nn.Conv3d(1, 1, 1))
    expected = (
        "warning: this CPU has no units for bfloat16; a convolution takes 87 times as long as in float32 (measured); "
        "set precision to auto or float32"
    )
    assert caplog.messages == [expected] * is_said


def test_the_cost_is_measured() -> None:
    random = torch.get_rng_state()
    assert 0 < slowdown() < 10_000
    assert torch.equal(torch.get_rng_state(), random)


def test_a_stage_compares_its_layers(tiny_stage: TinyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that trains in bfloat16, with the first convolution of the network gone wrong."""
    plain = nn.Conv3d.forward

    def forward(self: nn.Conv3d, values: Tensor) -> Tensor:
        output = plain(self, values)
        return output * 2 if reduced() and self.in_channels == 8 and self.kernel_size[0] == 3 else output

    monkeypatch.setattr(nn.Conv3d, "forward", forward)
    run = tmp_path / "run"
    tiny_stage("autoencoder", run, precision="bfloat16", epochs=1, patches_per_case=1).run()
    log = (StageFolder(run, "autoencoder").path / "log.txt").read_text()
    assert "is wrong in bfloat16 and runs in float32 from now on: Conv3d(8, " in log
    assert "layer shapes with float32; the others agree" in log


# --- doctor


def test_the_doctor_compares_a_few_shapes() -> None:
    (finding,) = [finding for finding in fibldm.doctor.diagnose() if finding.name == "bfloat16"]
    # whatever this machine gets wrong, it is said
    if finding.level == "ok":
        assert finding.value.startswith("7 layer shapes agree with float32")
    else:
        assert "of 7 layer shapes differ from float32: " in finding.value


def test_the_doctor_names_shapes_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Conv3d.forward

    def forward(self: nn.Conv3d, values: Tensor) -> Tensor:
        output = plain(self, values)
        return -output if reduced() and self.stride[2] > 1 and output.shape[-1] == 1 else output

    monkeypatch.setattr(nn.Conv3d, "forward", forward)
    (finding,) = [finding for finding in fibldm.doctor.diagnose() if finding.name == "bfloat16"]
    assert finding.level == "note" and finding.remedy == "training finds such layers and runs them in float32"
    assert finding.value.startswith("2 of 7 layer shapes differ from float32: Conv3d(32, 32, kernel_size=(3, 3, 3), ")
    assert "on 1 x 32 x 4 x 4 x 2: its output is off by" in finding.value
