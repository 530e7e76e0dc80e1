"""A training step never waits for its device, and still nothing that is not finite is saved.

Tensors of the ``meta`` device have no values: whatever reads one of them, as only waiting for a device can, fails.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import list_data_collate
from monai.inferers import SimpleInferer
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Condition
from fibldm.models.conditions.covariates import CovariateEncoding, CovariateTokens, Numeric
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.timesteps import GridTimes, LogitNormalTimes, ShiftedTimes, UniformTimes, min_snr_weight
from fibldm.models.transfer import to_device
from fibldm.training import finite
from fibldm.training.denoising_trainer import DenoisingTrainer
from fibldm.training.handlers import EMA, ClipGradient, Metrics
from fibldm.training.losses import DenoisingLoss
from fibldm.training.prepare_batch import LatentPrepareBatch, SegmentationPrepareBatch, VolumePrepareBatch

COVARIATES = CovariateEncoding({"age": Numeric(50.0, 10.0, 20.0, 90.0), "size": Numeric(5.0, 1.0, 3.0, 7.0)})
PROCESSES = [RectifiedFlow(), VariancePreserving(), VariancePreserving(zero_terminal_snr=True, time_input="log_snr")]
SIZE = (4, 2, 2)


def mask_encoding(**options: Any) -> MaskEncoding:
    return MaskEncoding((0, 1, 2), 4, 2, **options)


def batch(count: int, mask: MaskEncoding) -> dict[str, Tensor]:
    """Cached latents as `LoadLatent` reads them, the mask in half precision."""
    drawn = torch.Generator().manual_seed(0)
    items = [
        {
            "mean": torch.randn(2, *SIZE, generator=drawn),
            "std": torch.rand(2, *SIZE, generator=drawn),
            "valid": torch.rand(1, *SIZE, generator=drawn),
            "mask": mask.encode(torch.randint(3, (1, 1, 16, 8, 8), generator=drawn))[0].half(),
            "covariates": torch.randn(2, 2, generator=drawn),
            "seed": 10 + number,
            "view": number,
        }
        for number in range(count)
    ]
    collated: dict[str, Tensor] = list_data_collate(items)
    return collated


def conditions(**changes: Any) -> dict[str, Condition | None]:
    return {"mask": mask_encoding(**changes), "covariates": COVARIATES}


def prepare_batch(process: Process = PROCESSES[1], **options: Any) -> LatentPrepareBatch:
    given = {"target": "v", "times": UniformTimes(), "conditions": conditions(), **options}
    dropout = {"mask": 0.3, "covariates": 0.3}
    chosen = {"snr_gamma": 5.0, "label_weights": {2: 3.0}, "dropout": dropout, **given}
    return LatentPrepareBatch(process, **chosen)


def leaves(prepared: Any) -> list[Tensor]:
    """All that is on the device; the times, from which coefficients are computed, stay on the CPU."""
    z_t, asked, *others = prepared
    assert asked.t.device.type == "cpu"
    found = torch.utils._pytree.tree_leaves([z_t, asked._replace(t=None), others])
    return [part for part in found if isinstance(part, Tensor)]


# --- batches


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("feature", [None, "signed_distance", "contour"])
def test_a_batch_is_what_its_formulas_say_to_the_bit(process: Process, feature: Any) -> None:
    """Written out sample by sample on the CPU, in the order in which each generator draws."""
    mask = mask_encoding(feature=feature)
    given = batch(12, mask)
    before = copy.deepcopy(given)
    times = LogitNormalTimes()
    shown = conditions(feature=feature)
    z_t, asked, (network_time, seen), _ = prepare_batch(process, conditions=shown, times=times)(given, device="cpu")
    for number in range(12):
        generator = torch.Generator().manual_seed(10 + number)
        mean, std, encoded = (given[name][number : number + 1].float() for name in ("mean", "std", "mask"))
        z_0 = mean + std * torch.randn(mean.shape[1:], generator=generator)
        t = times.sample(generator)
        noise = torch.randn(z_0.shape[1:], generator=generator)
        chances = torch.rand(4, generator=generator)
        labels = torch.tensor([False, bool(chances[1] < 0.3), bool(chances[2] < 0.3)]) | (chances[3] < 0.3)
        chances = torch.rand(3, generator=generator)
        covariates = (chances[:2] < 0.3) | (chances[2] < 0.3) | labels.all()
        one = slice(number, number + 1)
        alpha, sigma = (value.view(1, 1, 1, 1, 1) for value in (process.alpha(t), process.sigma(t)))
        assert torch.equal(z_t[one], alpha * z_0 + sigma * noise)
        assert torch.equal(asked.value[one], alpha * noise - sigma * z_0)
        assert torch.equal(network_time[one], process.network_time(t))
        assert torch.equal(asked.factor[one].flatten(), min_snr_weight(process, "v", t, 5.0))
        shares = encoded[:, :32].unflatten(1, (4, 8)).mean(dim=2)
        weights = torch.tensor([1.0, 1.0, 3.0, 1.0])
        weight = given["valid"][one] * torch.einsum("blxyz,l->bxyz", shares, weights)[:, None]
        assert torch.equal(asked.weight[one], weight)
        assert torch.equal(seen["mask"][one], mask.drop(encoded, labels[None]))
        assert torch.equal(seen["covariates"][number], given["covariates"][number] * ~covariates[:, None])
    assert all(torch.equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("feature", [None, "signed_distance"])
@pytest.mark.parametrize("times", [GridTimes(3), ShiftedTimes(UniformTimes(), 2.0)], ids=lambda t: type(t).__name__)
def test_a_batch_is_built_without_reading_a_value_of_the_device(process: Process, feature: Any, times: Any) -> None:
    prepare = prepare_batch(process, conditions=conditions(feature=feature), times=times)
    given = batch(6, mask_encoding(feature=feature))
    on_meta, on_cpu = leaves(prepare(given, device="meta")), leaves(prepare(given, device="cpu"))
    assert {part.device.type for part in on_meta} == {"meta"}
    assert [(part.shape, part.dtype) for part in on_meta] == [(part.shape, part.dtype) for part in on_cpu]


def test_batches_of_volumes_are_built_without_reading_a_value_of_the_device() -> None:
    given = {
        "image": torch.rand(2, 1, 4, 4, 4),
        "valid": torch.ones(2, 1, 4, 4, 4),
        "label": torch.randint(3, (2, 1, 4, 4, 4)).byte(),
        "seed": torch.arange(2),
    }
    for prepare in (VolumePrepareBatch(), SegmentationPrepareBatch((0, 2))):
        image, target, *_ = prepare(given, device="meta")
        assert {part.device.type for part in (image, target.value, target.weight)} == {"meta"}
        assert prepare(given)[0] is given["image"]  # no device: everything stays where it is


def test_a_mask_in_full_precision_is_not_changed_either() -> None:
    given = {**batch(4, mask_encoding()), "mask": torch.rand(4, 32, *SIZE)}
    before = given["mask"].clone()
    seen = prepare_batch(dropout={"mask": {"all": 1.0}})(given, device="cpu")[2][1]["mask"]
    assert torch.equal(given["mask"], before)
    assert torch.equal(seen, mask_encoding().null(before))


# --- steps


def training(folder: Path, device: str, length: int = 3) -> DenoisingTrainer:
    """Stage 2 on a tiny network that sees mask and covariates, with what a stage attaches around the steps."""
    torch.manual_seed(0)
    mask = mask_encoding()
    unet = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=2 + mask.channels,
        out_channels=2,
        channels=(8, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=4,
        with_conditioning=True,
        cross_attention_dim=8,
    )
    tokens = CovariateTokens(COVARIATES, 8)
    network = ConditionedNetwork(unet, channels={"mask": nn.Identity()}, tokens={"covariates": tokens}).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    trainer = DenoisingTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=[batch(2, mask)] * length,
        network=network,
        optimizer=optimizer,
        loss_function=DenoisingLoss(),
        prepare_batch=prepare_batch(),
        inferer=SimpleInferer(),  # autocast knows no device "meta"
        decollate=False,
        optim_set_to_none=True,
    )
    ClipGradient(network, 1.0).attach(trainer)
    EMA(network, momentum=0.1).attach(trainer)
    Metrics(folder / "metrics.csv", optimizer).attach(trainer)
    return trainer


class ReachedTheLast(Exception):
    """The last iteration of an epoch has begun."""


def test_steps_of_stage_2_read_no_value_of_the_device_before_the_end_of_an_epoch(tmp_path: Path) -> None:
    trainer = training(tmp_path, "meta")

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def end(engine: Engine) -> None:
        raise ReachedTheLast

    with pytest.raises(ReachedTheLast):
        trainer.run()
    assert trainer.state.gradient_norm.device.type == "meta"
    # what looks at values, as it must in the end, could not do so here
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        training(tmp_path, "meta").run()


def test_the_same_steps_on_the_cpu_write_loss_and_norm(tmp_path: Path) -> None:
    training(tmp_path, "cpu").run()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    written = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(written["loss"]) > 0 and float(written["gradient_norm"]) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_cuda_do_not_wait(tmp_path: Path) -> None:
    """By torch's own watch over calls that wait; the numbers are those of the CPU but for rounding."""
    trainer = training(tmp_path, "cuda", length=5)
    modes = {Events.ITERATION_STARTED(once=3): "error", Events.ITERATION_COMPLETED(once=4): "default"}
    for event, mode in modes.items():
        trainer.add_event_handler(event, torch.cuda.set_sync_debug_mode, mode)
    try:
        trainer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    given = batch(6, mask_encoding())
    pairs = zip(*(leaves(prepare_batch()(given, device=device)) for device in ("cuda", "cpu")), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs)


def test_values_move_with_their_type() -> None:
    values = torch.arange(6).view(2, 3)
    assert to_device(values, None) is values and to_device(values, "cpu") is values
    moved = to_device(values, "meta")
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", values.dtype, values.shape)


# --- what is not finite


def broken(numbers: list[float], length: int) -> tuple[Engine, list[int], finite.Finite]:
    """An engine that looks at a number in every iteration, and the epochs that were completed."""
    seen, completed = finite.Finite("the gradient must stay finite; its norm is"), []
    engine = Engine(lambda engine, item: seen(engine, torch.tensor(numbers[engine.state.iteration - 1])))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: completed.append(engine.state.epoch))
    engine.state.epoch_length = length
    return engine, completed, seen


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_on_a_device_it_is_refused_at_the_end_of_the_epoch_before_anything_is_saved(
    monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """The first of several is named; handlers of the epoch's end, such as checkpoints, never run."""
    monkeypatch.setattr(finite, "waits", lambda value: True)
    engine, completed, _ = broken([1.0] * 5 + [2.0, wrong, math.nan, 1.0, 1.0], length=5)
    with pytest.raises(FibldmError, match=f"its norm is {wrong} in epoch 2, iteration 2 of 5") as raised:
        engine.run(range(5), max_epochs=2)
    assert "the last checkpoint is as it was" in raised.value.remedy
    assert (engine.state.iteration, completed) == (10, [1])


def test_a_long_epoch_is_looked_at_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "waits", lambda value: True)
    monkeypatch.setattr(finite, "LOOK_EVERY", 4)
    engine, completed, seen = broken([1.0] * 5 + [math.nan] + [1.0] * 14, length=20)
    with pytest.raises(FibldmError, match="epoch 1, iteration 6 of 20"):
        engine.run(range(20), max_epochs=1)
    assert (engine.state.iteration, completed, seen._kept) == (8, [], [])


def test_on_the_cpu_it_is_refused_at_once() -> None:
    engine, _, _ = broken([1.0, math.nan, 1.0], length=3)
    with pytest.raises(FibldmError, match="epoch 1, iteration 2 of 3"):
        engine.run(range(3), max_epochs=1)
    assert engine.state.iteration == 2


def test_a_training_that_looks_late_leaves_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the second of five iterations is not finite; nothing of the epoch is written."""
    monkeypatch.setattr(finite, "waits", lambda value: True)
    trainer = training(tmp_path, "cpu", length=5)
    weight = next(iter(trainer.network.parameters()))

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * (math.nan if trainer.state.iteration == 2 else 1.0)

    weight.register_hook(spoil)
    with pytest.raises(FibldmError, match="gradient must stay finite; its norm is nan in epoch 1, iteration 2 of 5"):
        trainer.run()
    assert not (tmp_path / "metrics.csv").exists()


def test_norms_of_steps_that_a_scaler_left_out_do_not_count(tmp_path: Path) -> None:
    norms = iter([3.0, math.inf, 5.0])
    engine = Engine(lambda engine, item: [{"loss": torch.tensor(1.0)}])

    @engine.on(Events.ITERATION_STARTED)
    def clip(engine: Any) -> None:
        engine.state.gradient_norm = torch.tensor(next(norms))

    Metrics(tmp_path / "metrics.csv", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)).attach(engine)
    engine.run(range(3), max_epochs=1)
    assert ",4," in (tmp_path / "metrics.csv").read_text().splitlines()[1]
