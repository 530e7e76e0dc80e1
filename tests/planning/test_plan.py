"""The memory plan: its counter against sums by hand, its answers against themselves, and its command."""

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.planning.live_bytes import LiveBytes, forget_values, held_on_cpu, held_on_cuda, without_values
from fibldm.planning.plan import by_default_recipe, device_memory, largest_batch, largest_patch, plan
from fibldm.planning.timing import count, time_stage
from fibldm.planning.traced_step import Request, StageMemory, trace_stage
from fibldm.runs import StageFolder
from fibldm.runs.stages import TABLE, usual

FLOAT = 4


def trained() -> list[str]:
    """The stages that are planned."""
    return [stage for stage in usual() if TABLE[stage].is_trained]


@pytest.fixture(scope="module")
def request_(phantom_work: Path, tiny_data: Path) -> Request:
    return Request(phantom_work, (str(tiny_data), "tiny"), {"precision": "float32"}, "cpu")


@pytest.fixture(scope="module")
def smaller(request_: Request) -> Request:
    """With a UNet of one level, as tracing takes as long as there are layers."""
    return request_.changed(unet_channels=[16], unet_attention_levels=[True])


@pytest.fixture(scope="module")
def traced(request_: Request) -> dict[str, StageMemory]:
    """Every stage as it is configured."""
    return {stage: trace_stage(stage, request_) for stage in trained()}


def test_live_bytes_are_those_of_the_tensors_that_live() -> None:
    live = LiveBytes()
    with without_values(live):
        kept = torch.zeros(1000)
        assert kept.view(10, 100).storage_offset() == 0 and live.now == 4000  # a view is no memory of its own
        gone = torch.zeros(500, dtype=torch.float64)
        del gone
        assert (live.now, live.peak) == (4000, 8000)
        live.restart()
        assert live.peak == 4000


def test_training_of_a_known_network_is_counted_to_the_byte() -> None:
    """Two linear layers: weights, average, gradients, AdamW's two moments, and what the backward pass keeps."""
    inside, batch, weights = 1000, 300, 20 * 1000 + 1000 + 1000 * 20 + 20
    live = LiveBytes()
    with without_values(live):
        network = nn.Sequential(nn.Linear(20, inside), nn.ReLU(), nn.Linear(inside, 20))
        average = copy.deepcopy(network)
        assert live.now == 2 * weights * FLOAT
        optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
        network(torch.empty(batch, 20)).sum().backward()
        optimizer.step()
        steps = 4 * FLOAT  # AdamW counts the steps of each parameter
        assert live.now == 5 * weights * FLOAT + steps
        optimizer.zero_grad()
        live.restart()
        result = network(torch.empty(batch, 20))
        # input, hidden before and after ReLU; of ReLU only what comes out is kept
        assert live.now == 4 * weights * FLOAT + steps + batch * (20 + inside + 20) * FLOAT
        assert live.peak == 4 * weights * FLOAT + steps + batch * (20 + 2 * inside) * FLOAT
        del result, average


def test_buffers_of_a_copy_can_be_computed_with() -> None:
    with without_values(LiveBytes()):
        original = nn.BatchNorm1d(3)
        forget_values(original)
        norm = copy.deepcopy(original)
        assert norm(torch.empty(5, 3)).shape == (5, 3)


def test_allocators_hold_more_than_tensors() -> None:
    assert [held_on_cuda(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert held_on_cpu(40 * 2**20) == 40 * 2**20
    assert held_on_cpu(2**20) == pytest.approx(1.45 * 2**20)
    assert held_on_cpu(2**20, checkpointed=True) == pytest.approx(2 * 2**20)


@pytest.mark.parametrize("stage", trained())
def test_stage_is_traced_as_it_is_configured(traced: dict[str, StageMemory], stage: str, tiny_run: Path) -> None:
    """Sizes and weights are those of the run that was trained with the same configuration."""
    found = traced[stage]
    weights = torch.load(tiny_run / stage / "checkpoints" / "best.pt", weights_only=True)["model"]
    assert found.parameters == sum(value.numel() for value in weights.values())
    assert found.resident >= 2 * found.parameters * FLOAT
    assert found.step > 3 * found.parameters * FLOAT * (stage != "controlnet")  # most of its weights are frozen
    assert (found.batch_size, found.size) == (2, (16,) * 3 if stage == "autoencoder" else (8,) * 3)
    assert found.grid == (32, 32, 32)


@pytest.mark.slow
def test_checkpointing_and_bfloat16_and_smaller_batches_save_memory(request_: Request) -> None:
    larger = request_.changed(batch_size=32)
    plain = trace_stage("diffusion", larger)
    assert trace_stage("diffusion", larger.changed(activation_checkpointing=True)).step < 0.7 * plain.step
    assert trace_stage("diffusion", larger.changed(precision="bfloat16")).step < 0.85 * plain.step
    assert trace_stage("diffusion", larger.changed(batch_size=16)).step < 0.6 * plain.step


def test_updates_of_low_rank_are_planned(request_: Request) -> None:
    """Gradients and the optimizer's state are those of the updates; rates by layer see the names of the network."""
    small = request_.changed(batch_size=1)  # of which gradients and state are the larger part
    plain = trace_stage("diffusion", small)
    adapted = trace_stage("diffusion", small.changed(lora_rank=1, layer_rates={"*down_blocks*": 0.5}))
    assert adapted.step < plain.step and adapted.parameters > plain.parameters


def test_settings_go_to_the_stages_that_have_them(smaller: Request) -> None:
    """A patch is none of stage 2; what changes the autoencoder changes the size of the latents."""
    coarser = replace(smaller.changed(patch=[16, 16, 8]), stage_configs={"autoencoder": ("autoencoder_anisotropic",)})
    assert trace_stage("autoencoder", coarser).size == (16, 16, 8)
    assert trace_stage("diffusion", coarser).size == (8, 8, 16)


def test_accumulation_costs_little(request_: Request, traced: dict[str, StageMemory]) -> None:
    accumulated = trace_stage("autoencoder", request_.changed(accumulation_steps=4))
    assert accumulated.step < 1.3 * traced["autoencoder"].step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to ask")
@pytest.mark.slow
def test_cuda_is_imitated(smaller: Request) -> None:
    """On a machine without one: auto means bfloat16 with norms in float32, and blocks are not those of a heap."""
    cuda = replace(smaller, device="cuda")
    assert cuda.imitated and not smaller.imitated
    half, full = (trace_stage("diffusion", cuda.changed(precision=name, batch_size=16)) for name in ("auto", "float32"))
    assert half.step < full.step < trace_stage("diffusion", smaller.changed(batch_size=16)).step
    with pytest.raises(FibldmError, match="this machine has none; give --memory in GB"):
        device_memory("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plan_is_within_20_percent_of_the_allocator(request_: Request, tiny_run: Path) -> None:
    """A step of the autoencoder's network on the device."""
    request = Request(request_.work, request_.configs, {"batch_size": 64, "precision": "float32"}, "cuda")
    network = StageFolder(tiny_run, "autoencoder").component("network_def", device="cuda").cuda()
    average, optimizer = copy.deepcopy(network), torch.optim.AdamW(network.parameters())
    volume = torch.zeros(64, 1, 16, 16, 16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.zero_grad()
        (network(volume).volume - volume).abs().mean().backward()
        optimizer.step()
    assert trace_stage("autoencoder", request).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
    del average


@pytest.mark.slow
def test_largest_batch_fits_and_a_much_larger_one_does_not(request_: Request) -> None:
    usable = 6e7
    size = largest_batch("autoencoder", request_, usable)
    assert size > 2
    peaks = [trace_stage("autoencoder", request_.changed(batch_size=n)).peak for n in (size, int(1.15 * size) + 1)]
    assert peaks[0] <= usable < peaks[1]


def test_the_largest_batch_is_no_larger_than_what_an_epoch_draws(
    request_: Request, traced: dict[str, StageMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by one trace where all of it fits; four training cases of one patch, and of two views."""
    tried: list[int] = []

    def trace(stage: str, request: Request) -> StageMemory:
        tried.append(int(request.overrides["batch_size"]))
        return replace(traced[stage], resident=0, validation=0, step=1000 * tried[-1])

    monkeypatch.setattr("fibldm.planning.plan.trace_stage", trace)
    draws = [count("autoencoder", request_)["draws"], count("diffusion", request_.changed(views=2))["draws"]]
    assert draws == [4, 8]
    assert largest_batch("autoencoder", request_, 1e9, draws[0]) == 4 and tried == [4]
    assert largest_batch("autoencoder", request_, 2500.0, 3) == 2
    assert (
        largest_batch("autoencoder", request_, 1500.0, 1) == 1 and largest_batch("diffusion", request_, 500.0, 1) == 0
    )
    assert largest_batch("diffusion", request_, 1e9) == 512
    assert largest_batch("diffusion", request_, 100_500.0) == 100


def test_nothing_fits_into_nothing(request_: Request, traced: dict[str, StageMemory]) -> None:
    assert largest_batch("autoencoder", request_, 1e4) == 0
    assert largest_patch(traced["autoencoder"], 1e4) == [0, 0, 0]


def test_largest_patch_fits_and_stays_within_the_grid(request_: Request, traced: dict[str, StageMemory]) -> None:
    assert largest_patch(traced["autoencoder"], 1e12) == [32, 32, 32]
    edge = largest_patch(trace_stage("autoencoder", request_.changed(batch_size=8)), 3e7)[0]
    assert edge == 16
    assert trace_stage("autoencoder", request_.changed(batch_size=8, patch=[edge] * 3)).peak <= 3e7


def test_largest_patch_of_slices_is_a_square(traced: dict[str, StageMemory]) -> None:
    slices = replace(traced["autoencoder"], size=(32, 32, 1), grid=(256, 200, 1), resident=0, step=2**20)
    assert largest_patch(slices, 4 * 2**20) == [64, 64, 1]
    assert largest_patch(slices, 1e12) == [192, 192, 1]


def test_what_is_not_trained_is_not_planned(smaller: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes that are their own latents."""
    monkeypatch.setattr("fibldm.planning.plan.trained", lambda: ("autoencoder", "diffusion"))
    monkeypatch.setattr("fibldm.planning.plan.largest_batch", lambda *_: 1)
    monkeypatch.setattr("fibldm.planning.plan.device_memory", lambda _: 1e5)  # too little to try a step
    pixels = replace(smaller, stage_configs={"autoencoder": ("autoencoder_identity",)})
    made = plan(pixels, memory=1e12)
    assert list(made["stages"]) == ["diffusion"] and made["stages"]["diffusion"]["input_size"] == [32, 32, 32]


def test_the_road_of_the_default_recipe_is_planned(request_: Request) -> None:
    """The mask as input channels and no ControlNet, as the pipeline goes without a recipe and README step by step."""
    planned, left_out = by_default_recipe(request_)
    assert left_out == {"controlnet"} and planned.stage_configs["diffusion"] == ("mask_concat",)
    said = Request(request_.work, (*request_.configs, "mask_concat"), request_.overrides, "cpu")
    assert trace_stage("diffusion", planned) == trace_stage("diffusion", said)
    assert by_default_recipe(said) == (said, {"controlnet"})
    unmasked = request_.changed(mask_way=None)
    assert by_default_recipe(unmasked) == (unmasked, {"controlnet"})


def test_stage_2_of_cases_without_masks_is_planned_without(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.planning.plan.read_datalist", lambda _: {"training": [{"case": "a", "image": "a.nii"}]})
    assert by_default_recipe(request_) == (request_, {"controlnet"})


@pytest.mark.parametrize(("asked", "stages"), [(False, ["autoencoder", "diffusion"]), (True, list(trained()))])
def test_a_controlnet_is_planned_on_request(
    request_: Request,
    traced: dict[str, StageMemory],
    monkeypatch: pytest.MonkeyPatch,
    asked: bool,
    stages: list[str],
) -> None:
    """Then on stage 2 as it is configured."""
    monkeypatch.setattr("fibldm.planning.plan.trace_stage", lambda stage, _: traced[stage])
    monkeypatch.setattr("fibldm.planning.plan.largest_batch", lambda *_: 1)
    monkeypatch.setattr("fibldm.planning.plan.device_memory", lambda _: 1e5)  # too little to try a step
    made = plan(request_, memory=1e12, controlnet=asked)
    assert list(made["stages"]) == stages
    assert made["stages"]["diffusion"]["configs"] == ([] if asked else ["mask_concat"])


@pytest.mark.slow
def test_command_says_what_fits(
    request_: Request,
    traced: dict[str, StageMemory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One JSON object, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fibldm.planning.plan.trained", lambda: ("autoencoder",))
    configs = [part for name in request_.configs for part in ("--config", name)]
    given = ["plan", "--data", str(request_.work), *configs, "--device", "cpu", "--memory", "0.05", "--json"]
    assert run([*given, "--set", "precision=float32", "--set", "patches_per_case=200"]) == 0
    said = capsys.readouterr()
    made = json.loads(said.out.splitlines()[-1])
    assert made["ok"] and made["memory_gb"] == 0.05 and list(made["stages"]) == ["autoencoder"]
    found = made["stages"]["autoencoder"]
    assert found["fits"] and found["peak_gb"] == pytest.approx(traced["autoencoder"].peak / 1e9)
    assert found["largest_batch"] < found["largest_batch_checkpointed"]
    assert "autoencoder" in said.err and "largest batch" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", trained())
def test_minutes_are_those_of_the_steps_that_training_does(request_: Request, stage: str, tiny_run: Path) -> None:
    """Steps, cases and validations are counted as the run has them that was trained with the same configuration."""
    found = time_stage(stage, request_.changed(epochs=7, val_interval=3))
    rows = list(csv.DictReader((tiny_run / stage / "metrics.csv").read_text().splitlines()))
    assert (found.steps, found.epochs, found.validations) == (int(rows[0]["iteration"]), 7, 3)
    assert min(found.seconds_per_step, found.seconds_per_validation, found.loading, found.checkpoint) > 0
    expected = (
        7 * (found.steps * found.seconds_per_step + found.checkpoint) + 3 * found.seconds_per_validation + found.loading
    )
    assert found.seconds == pytest.approx(expected)


def test_views_and_accumulation_count_in_the_steps(smaller: Request) -> None:
    one = time_stage("diffusion", smaller.changed(val_interval=1))
    four = time_stage("diffusion", smaller.changed(views=4, accumulation_steps=2))
    assert four.steps == pytest.approx(2 * one.steps, abs=1)
    assert one.validations == one.epochs == 1


def test_the_plan_has_minutes_where_the_device_is_there(
    request_: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fibldm.planning.plan.trained", lambda: ("diffusion",))
    monkeypatch.setattr("fibldm.planning.plan.largest_batch", lambda *_: 1)
    configs = [part for name in request_.configs for part in ("--config", name)]
    given = ["plan", "--data", str(request_.work), *configs, "--set", "precision=float32", "--json"]
    given += ["--set", "unet_channels=[16]", "--set", "unet_attention_levels=[true]"]
    assert run([*given, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    made = json.loads(said.out.splitlines()[-1])
    found = made["stages"]["diffusion"]
    assert found["minutes"] > 0 and found["seconds_per_step"] > 0 and made["encoding_minutes"] > 0
    assert (found["epochs"], found["validations"]) == (1, 1) and found["steps"] >= 1
    assert found["configs"] == ["mask_concat"] and "8 with mask_concat (resident" in said.err
    assert "minutes: 1 epoch of" in said.err and " MB at batch" in said.err and "latents" in said.err
    if not torch.cuda.is_available():
        assert run([*given, "--device", "cuda", "--memory", "80"]) == 0
        said = capsys.readouterr()
        made = json.loads(said.out.splitlines()[-1])
        assert made["stages"]["diffusion"]["minutes"] is None is made["encoding_minutes"]
        assert "not timed" in said.err


def test_what_does_not_fit_is_not_tried(smaller: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.planning.plan.trained", lambda: ("diffusion",))
    monkeypatch.setattr("fibldm.planning.plan.largest_batch", lambda *_: 1)
    monkeypatch.setattr("fibldm.planning.plan.device_memory", lambda _: 1e5)
    monkeypatch.setattr("fibldm.planning.plan.time_stage", lambda *_: pytest.fail("the machine would swap"))
    made = plan(smaller, memory=1e12)
    assert made["stages"]["diffusion"]["fits"] and made["stages"]["diffusion"]["minutes"] is None


def test_what_a_configuration_refuses_is_one_error(request_: Request) -> None:
    with pytest.raises(FibldmError, match="precision"):
        trace_stage("autoencoder", request_.changed(precision="float8"))
    with pytest.raises(FibldmError, match="batch_sice"):
        trace_stage("autoencoder", request_.changed(batch_sice=3))


def test_unknown_device_is_refused(request_: Request) -> None:
    with pytest.raises(FibldmError, match="one of cpu, cuda; got 'tpu'"):
        plan(Request(request_.work, request_.configs, {}, "tpu"))
