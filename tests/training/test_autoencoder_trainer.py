"""The engine of stage 1: alone as MONAI's, against discriminators by the formulas of the papers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_configuration
from monai.bundle import ConfigParser
from monai.data import list_data_collate
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior, Reconstruction
from fibldm.runs import StageFolder
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration
from fibldm.runs.stages import TABLE
from fibldm.training.adversarial import (
    Adversary,
    DiscriminatorOutput,
    Discriminators,
    adaptive_weight,
    discriminator_loss,
    feature_distance,
    generator_loss,
    last_layer,
    random_slices,
    take_slices,
)
from fibldm.training.autoencoder_trainer import AutoencoderTrainer
from fibldm.training.handlers import ClipGradient
from fibldm.training.inferers import AutocastInferer
from fibldm.training.losses import AutoencoderLoss, Weighted
from fibldm.training.prepare_batch import VolumePrepareBatch
from fibldm.volumes.crops import RandForegroundCropd

SIZE = (12, 10, 14)


def output_of(
    *logits: float, features: list[Tensor] | None = None, weight: tuple[float, ...] = ()
) -> DiscriminatorOutput:
    """Of a row of patches."""
    row = torch.tensor(logits).reshape(1, 1, len(logits), 1)
    return DiscriminatorOutput(row, features or [], torch.tensor(weight or (1.0,) * len(logits)).reshape(row.shape))


# --- what both sides minimise


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [
        ("hinge", -0.5, 0.5 * ((0.75 + 0) / 2 + (0 + 4) / 2)),
        (
            "bce",
            (math.log1p(math.exp(2)) + math.log1p(math.exp(-3))) / 2,
            0.5 * (math.log1p(math.exp(-0.25)) + math.log1p(math.exp(-4))) / 2
            + 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 2,
        ),
        ("least_squares", 0.5 * (9 + 4) / 2, 0.5 * ((0.5625 + 9) / 2 + (4 + 9) / 2)),
    ],
)
def test_both_sides_minimise_what_the_papers_say(kind: Any, generator: float, discriminator: float) -> None:
    real, fake = output_of(0.25, 4.0), output_of(-2.0, 3.0)
    assert float(generator_loss(fake, kind)) == pytest.approx(generator)
    assert float(discriminator_loss(real, fake, kind)) == pytest.approx(discriminator)


def test_the_hinge_of_monai_is_another_one() -> None:
    """MONAI squeezes the logits by tanh, so large ones have no gradient."""
    theirs = PatchAdversarialLoss(criterion="hinge")(torch.tensor([-2.0, 3.0]), True, for_discriminator=False)
    assert float(theirs) == pytest.approx(1 - (math.tanh(-2) + math.tanh(3)) / 2)
    assert float(generator_loss(output_of(-2.0, 3.0), "hinge")) == -0.5


def test_patches_of_padding_do_not_count() -> None:
    weight = (1.0, 0.5, 0.0)
    assert float(generator_loss(output_of(1.0, 4.0, 100.0, weight=weight), "hinge")) == pytest.approx(-(1 + 2) / 1.5)
    real = output_of(0.0, 2.0, -7.0, weight=weight)
    assert float(discriminator_loss(real, real, "hinge")) == pytest.approx(0.5 * (1 / 1.5 + (1 + 0.5 * 3) / 1.5))


def test_features_are_matched_in_every_layer() -> None:
    real = output_of(0.0, features=[torch.zeros(1, 2, 1, 1), torch.ones(1, 4, 1, 1)])
    fake = output_of(0.0, features=[torch.full((1, 2, 1, 1), -3.0), torch.ones(1, 4, 1, 1)])
    assert float(feature_distance(fake, real)) == (3 + 0) / 2


def test_the_adaptive_weight_of_a_linear_generator() -> None:
    """The volume is ``w * x``, so the gradients at ``w`` are known."""
    x, y = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 0.5, -1.0])
    w = torch.tensor([2.0], requires_grad=True)
    loss = (w * x - y).square().mean()
    adversarial = -(0.25 * w * x).mean()
    expected = abs(float((2 * x * (2 * x - y)).mean())) / (abs(float(0.25 * x.mean())) + 1e-4)
    found = adaptive_weight(loss, adversarial, w)
    assert float(found) == pytest.approx(expected)
    assert not found.requires_grad
    assert float(adaptive_weight(loss, adversarial, w, scale=1024.0)) == pytest.approx(expected)
    assert float(adaptive_weight(loss, 0 * w.sum(), w)) == 1e4


def test_a_step_that_overflows_weighs_nothing() -> None:
    w = torch.tensor([2.0], requires_grad=True)
    assert float(adaptive_weight(w.sum(), torch.inf * w.sum(), w)) == 0


# --- discriminators


def discriminators(**settings: Any) -> Discriminators:
    torch.manual_seed(1)
    networks = {
        name: PatchDiscriminator(axes, 4, 1, num_layers_d=1, norm="instance")
        for name, axes in (("volume", 3), ("slices", 2))
        if settings.get(f"{name.removesuffix('s')}_weight")
    }
    return Discriminators(**networks, **settings)


def test_slices_are_those_along_their_axis() -> None:
    volume = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    for axis in range(3):
        positions = torch.tensor([[1, 3], [2, 0]])
        taken = take_slices(volume, positions, axis)
        expected = [volume[sample].select(axis + 1, at) for sample, row in enumerate(positions) for at in row.tolist()]
        assert torch.equal(taken, torch.stack(expected))


def test_the_slices_of_a_sample_are_the_same_in_any_batch() -> None:
    both = random_slices((4, 50, 600), torch.tensor([7, 8]), 3)
    alone = random_slices((4, 50, 600), torch.tensor([8]), 3)
    assert [tuple(positions.shape) for positions in both] == [(2, 3)] * 3
    assert all(torch.equal(two[1:], one) for two, one in zip(both, alone, strict=True))
    assert not torch.equal(both[2][0], both[2][1])
    assert [int(positions.max()) < length for positions, length in zip(both, (4, 50, 600), strict=True)] == [True] * 3


def test_both_kinds_of_discriminators_share_the_loss() -> None:
    both = discriminators(volume_weight=3.0, slice_weight=1.0, slices_per_axis=2)
    volume, weight = torch.randn(2, 1, *SIZE), torch.ones(2, 1, *SIZE)
    found = both(volume, weight, random_slices(SIZE, torch.tensor([1, 2]), 2))
    assert [one.logits.shape[0] for one in found] == [2, 4, 4, 4]
    assert both.shares(3) == pytest.approx([0.75, 1 / 12, 1 / 12, 1 / 12])
    assert torch.equal(found[0].logits, both.volume(volume)[-1])  # type: ignore[misc]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0].features, both.volume(volume), strict=False))  # type: ignore[misc]


@pytest.mark.parametrize(("kept", "dropped"), [("volume", "slices"), ("slices", "volume")])
def test_a_discriminator_of_weight_0_is_none(kept: str, dropped: str) -> None:
    network = nn.Conv2d(1, 1, 1)
    found = Discriminators(network, network, **{f"{kept.removesuffix('s')}_weight": 1.0})  # type: ignore[arg-type]
    assert getattr(found, dropped) is None
    assert {name.partition(".")[0] for name in found.state_dict()} == {kept}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must be at least 0, and one above; got 0.0 .volume. and 0.0 .slices.; leave the adversarial"),
        ({"volume_weight": -1.0, "slice_weight": 2.0}, "got -1.0 .volume. and 2.0"),
        ({"slice_weight": 2.0}, "a discriminator with weight 2.0 needs its network; slices is null"),
    ],
)
def test_discriminators_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        Discriminators(**settings)  # type: ignore[arg-type]


def test_an_unknown_kind_lists_the_kinds() -> None:
    one = discriminators(volume_weight=1.0)
    with pytest.raises(FibldmError, match="kind of adversarial loss must be one of hinge, bce, least_squares; got 'w'"):
        Adversary(one, torch.optim.SGD(one.parameters(), lr=1.0), kind="w")  # type: ignore[arg-type]


# --- the last layer


class Tiny(nn.Module):
    """An autoencoder without chance: one convolution each way, and one after the decoder's in order of names."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv3d(2, 1, 3, padding=1)
        self.encoder = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, volume: Tensor, seeds: Tensor | None = None) -> Reconstruction:
        mean = self.encoder(volume)
        return Reconstruction(self.decoder(F.silu(mean)), Posterior(mean, torch.full_like(mean, 0.5)))


def test_the_last_layer_is_that_of_the_decoder_unless_the_network_names_it() -> None:
    network: Any = Tiny()
    assert last_layer(network) is network.decoder.weight
    network.last_layer = network.encoder.bias
    assert last_layer(network) is network.encoder.bias
    assert last_layer(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1), nn.Linear(1, 1))).shape == (2, 1, 1, 1)
    with pytest.raises(FibldmError, match=r"needs a convolution that writes the volume; Linear has none; give"):
        last_layer(nn.Linear(2, 2))


def test_the_last_layer_of_the_shipped_autoencoder_writes_its_volume() -> None:
    files = [str(shipped(name)) for name in ("common", *TABLE["autoencoder"].files)]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser["image_channels"], parser["spatial_dims"] = 1, 3
    network = parser.get_parsed_content("network_def")
    assert last_layer(network) is list(network.network.decoder.parameters())[-2]


# --- the engine


def batches(count: int = 4, size: int = 1) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    items = [
        {"image": torch.randn(1, *SIZE, generator=drawn), "valid": torch.ones(1, *SIZE), "seed": seed}
        for seed in range(count * size)
    ]
    collated: list[dict[str, Tensor]] = [
        list_data_collate(items[at : at + size]) for at in range(0, count * size, size)
    ]
    return collated


def trainer(
    data: list[dict[str, Tensor]],
    *,
    engine: Any = AutoencoderTrainer,
    optimizer: Any = torch.optim.AdamW,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    network = settings.pop("network", None) or Tiny()
    loss = settings.pop("loss", None) or AutoencoderLoss(kl_weight=0.1, spectral_weight=0.5)
    made = engine(
        device="cpu",
        max_epochs=settings.pop("epochs", 2),
        train_data_loader=data,
        network=network,
        optimizer=optimizer([*network.parameters(), *loss.parameters()], lr=1e-2),
        loss_function=loss,
        prepare_batch=VolumePrepareBatch(),
        optim_set_to_none=True,
        decollate=False,
        **settings,
    )
    made.logger.setLevel("ERROR")
    return made


def adversary(**settings: Any) -> Adversary:
    weights = {"volume_weight": 0.5, "slice_weight": 0.0, "slices_per_axis": 1}
    both = discriminators(**{name: settings.pop(name, value) for name, value in weights.items()})
    return Adversary(both, torch.optim.SGD(both.parameters(), lr=1e-2), **settings)


def weights(engine: Any) -> list[Tensor]:
    return [weight.detach().clone() for weight in engine.network.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_plain_training_is_that_of_monai_to_the_bit() -> None:
    data = batches(5)
    ours, theirs = (trainer(data, engine=engine) for engine in (AutoencoderTrainer, SupervisedTrainer))
    start = weights(ours)
    assert equal(start, weights(theirs))
    for engine in (ours, theirs):
        ClipGradient(engine.network, 0.1).attach(engine)
        engine.run()
    assert equal(weights(ours), weights(theirs))
    assert not equal(weights(ours), start)
    assert torch.equal(ours.state.output[0]["loss"], theirs.state.output["loss"])


def test_the_output_tells_every_term() -> None:
    engine = trainer(batches(1), epochs=1)
    engine.run()
    output = engine.state.output[0]
    assert list(output["losses"]) == ["reconstruction", "kl", "spectral"]
    parts = output["losses"]
    whole = parts["reconstruction"] + 0.1 * parts["kl"] + 0.5 * parts["spectral"]
    assert float(output["loss"].detach()) == pytest.approx(float(whole))
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("rivals", [False, True])
def test_two_batches_of_one_are_one_of_two(rivals: bool) -> None:
    """Clipped, or against discriminators."""
    pairs = batches(3, size=2)
    singles = [{name: value[[at]] for name, value in pair.items()} for pair in pairs for at in range(2)]
    found = []
    for data, count in ((pairs, 1), (singles, 2)):
        rival = adversary(slice_weight=0.3, adaptive=False, feature_weight=0.2) if rivals else None
        engine = trainer(data, adversary=rival, optimizer=torch.optim.SGD, accumulation_steps=count)
        if rival is None:
            ClipGradient(engine.network, 0.05).attach(engine)
        engine.run()
        found.append([*weights(engine), *(() if rival is None else rival.discriminators.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_is_left_at_the_end_of_an_epoch_is_a_step_of_its_own() -> None:
    data = batches(5)
    engine = trainer(data, accumulation_steps=3, epochs=1)
    norms: list[float] = []

    @engine.on(IterationEvents.BACKWARD_COMPLETED)
    def look(engine: Any) -> None:
        norms.append(float(engine.network.decoder.weight.grad.norm()))

    engine.run()
    assert engine.state.iteration == 5
    assert len(norms) == 2
    network = Tiny()
    torch.manual_seed(0)
    alone = trainer(data[:3], accumulation_steps=3, epochs=1)
    alone.run()  # the same first step
    network = alone.network
    network.zero_grad()
    for batch in data[3:]:
        volume = batch["image"]
        loss = alone.loss_function(network(volume), Weighted(volume, batch["valid"]))
        (loss / 2).backward()
    assert norms[1] == pytest.approx(float(network.decoder.weight.grad.norm()), rel=1e-5)


def test_fewer_than_one_accumulated_step_is_refused() -> None:
    with pytest.raises(FibldmError, match="accumulation_steps must be at least 1; got 0"):
        trainer(batches(1), accumulation_steps=0)


class PowerScaler(torch.amp.GradScaler):
    """Scales as a scaler for float16 does; the real one refuses to on a CPU."""

    def __init__(self, factor: float) -> None:
        super().__init__("cpu", init_scale=factor, growth_interval=10**6)


def test_gradients_are_clipped_without_the_factor_of_the_scaler() -> None:
    data, rivals = batches(4), [adversary(slice_weight=0.3), adversary(slice_weight=0.3)]
    plain = trainer(data, adversary=rivals[0], optimizer=torch.optim.SGD)
    scaled = trainer(data, adversary=rivals[1], optimizer=torch.optim.SGD, scaler=PowerScaler(1024.0))
    for engine in (plain, scaled):
        ClipGradient(engine.network, 0.05).attach(engine)
        engine.run()
    for ours, theirs in zip(weights(plain), weights(scaled), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert float(scaled.gradient_scaler.get_scale()) == 1024.0


def test_discriminators_run_in_the_precision_of_the_training() -> None:
    told = []
    for precision in ("float32", "bfloat16"):
        rival = adversary(slice_weight=0.3, feature_weight=0.2)
        engine = trainer(batches(2), epochs=1, adversary=rival, inferer=AutocastInferer(precision))  # type: ignore[arg-type]
        kinds: set[torch.dtype] = set()

        def note(layer: nn.Module, _: Any, output: Tensor, kinds: set[torch.dtype] = kinds) -> None:
            if layer.training:  # which it is not where precisions are compared
                kinds.add(output.dtype)

        rival.discriminators.volume[0].register_forward_hook(note)  # type: ignore[index, union-attr]
        engine.run()
        assert kinds == {getattr(torch, precision)}
        assert {loss.dtype for loss in engine.state.output[0]["losses"].values()} == {torch.float32}
        told.append({name: float(loss) for name, loss in engine.state.output[0]["losses"].items()})
    assert told[1] == pytest.approx(told[0], rel=0.05, abs=0.01)


def test_the_adversary_begins_at_its_step() -> None:
    data = batches(4)
    rival = adversary(start=3, slice_weight=0.3, feature_weight=1.0)
    engine, plain = trainer(data, epochs=1, adversary=rival), trainer(data, epochs=1)
    before = [weight.detach().clone() for weight in rival.discriminators.parameters()]
    told: list[dict[str, float]] = []
    agree: list[bool] = []

    def compare(_: Any) -> None:
        told.append({name: float(value) for name, value in engine.state.output["losses"].items()})

    engine.add_event_handler(IterationEvents.MODEL_COMPLETED, compare)

    @engine.on(IterationEvents.MODEL_COMPLETED)
    def untouched(_: Any) -> None:
        agree.append(equal(before, list(rival.discriminators.parameters())))

    plain_weights: list[list[Tensor]] = []
    our_weights: list[list[Tensor]] = []
    engine.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda _: our_weights.append(weights(engine)))
    plain.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda _: plain_weights.append(weights(plain)))
    engine.run()
    plain.run()
    assert agree == [True, True, True, False]
    assert [equal(*pair) for pair in zip(our_weights, plain_weights, strict=True)] == [True, True, True, False]
    names = {"reconstruction", "kl", "spectral", "generator", "feature_matching", "adversarial_weight", "discriminator"}
    assert all(set(row) == names for row in told)
    assert [row["discriminator"] > 0 for row in told] == [False, False, False, True]
    assert told[-1]["feature_matching"] > 0


def test_the_adversary_begins_with_a_step_of_the_optimizer() -> None:
    rival = adversary(start=1)
    engine = trainer(batches(4), epochs=1, adversary=rival, accumulation_steps=2)
    told: list[float] = []
    engine.add_event_handler(
        IterationEvents.MODEL_COMPLETED, lambda _: told.append(float(engine.state.output["losses"]["discriminator"]))
    )
    engine.run()
    assert [value > 0 for value in told] == [False, False, True, True]


def test_each_side_learns_its_own_part_only() -> None:
    """The autoencoder's loss moves no discriminator, and the discriminators' no autoencoder."""
    volume = torch.randn(2, 1, *SIZE, requires_grad=True)
    target = Weighted(torch.randn(2, 1, *SIZE), torch.ones(2, 1, *SIZE))
    rival = adversary(feature_weight=1.0)
    inferer: Callable[..., Any] = lambda seen, network, *rest: network(seen, *rest)  # noqa: E731
    sum(rival.generator_terms(volume, target, [], inferer).values()).backward()  # type: ignore[union-attr]
    assert volume.grad is not None
    assert volume.grad.abs().sum() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in rival.discriminators.parameters())
    volume.grad = None
    rival.discriminator_loss(volume, target, [], inferer).backward()
    assert volume.grad is None
    assert all(weight.grad is not None for weight in rival.discriminators.parameters())


def test_what_is_in_the_padding_is_nobodys_business() -> None:
    volume, value, weight = torch.randn(1, 1, *SIZE), torch.randn(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    weight[..., 9:] = 0
    rival = adversary(slice_weight=0.5, feature_weight=1.0)
    positions = random_slices(SIZE, torch.tensor([1]), 1)
    inferer: Callable[..., Any] = lambda seen, network, *rest: network(seen, *rest)  # noqa: E731
    found = []
    for seen in (volume, torch.where(weight > 0, volume, 9.0), 0.5 * volume):
        target = Weighted(value, weight)
        terms = rival.generator_terms(seen, target, positions, inferer)
        found.append([float(term.detach()) for term in terms.values()])
        found[-1].append(float(rival.discriminator_loss(seen, target, positions, inferer).detach()))
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


def test_the_adversary_pulls_as_hard_as_the_rest() -> None:
    """With an adaptive weight the gradients at the last layer have norms in the ratio of the weight."""
    engine = trainer(batches(1), epochs=1, adversary=adversary(volume_weight=0.5))
    start = [weight.detach().clone() for weight in engine.network.parameters()]
    engine.run()
    told = engine.state.output[0]["losses"]
    torch.manual_seed(0)
    network, batch = Tiny(), batches(1)[0]
    assert equal(start, list(network.parameters()))
    target = Weighted(batch["image"], batch["valid"])
    found, rival = network(batch["image"]), adversary(volume_weight=0.5)
    logits = rival.discriminators.volume(found.volume)[-1]  # type: ignore[misc]
    parts = (AutoencoderLoss(kl_weight=0.1, spectral_weight=0.5)(found, target), -logits.mean())
    norms = [torch.autograd.grad(part, network.decoder.weight, retain_graph=True)[0].norm() for part in parts]
    assert float(told["adversarial_weight"]) == pytest.approx(float(0.5 * norms[0] / (norms[1] + 1e-4)), rel=1e-4)
    whole = parts[0] + told["adversarial_weight"] * parts[1]
    assert float(engine.state.output[0]["loss"].detach()) == pytest.approx(float(whole.detach()), rel=1e-4)


def test_the_learned_log_variance_is_trained_with_the_network() -> None:
    engine = trainer(batches(4), loss=AutoencoderLoss(log_variance=True))
    engine.run()
    told = engine.state.output[0]["losses"]
    assert float(told["log_variance"]) != 0
    assert float(engine.loss_function.log_variance.detach()) != float(
        told["log_variance"]
    )  # it is told before the step


# --- patches


def case(label: bool = True) -> dict[str, Tensor]:
    image = torch.arange(20.0 * 24 * 28).reshape(1, 20, 24, 28)
    mask = torch.zeros(1, 20, 24, 28, dtype=torch.uint8)
    mask[0, 3, 20, 9] = 2
    mask[0, :, :, 27] = 255
    return {"image": image} | ({"label": mask} if label else {})


def test_a_patch_has_a_labelled_voxel_in_its_middle() -> None:
    crop = RandForegroundCropd(["image", "label"], (8, 8, 10), foreground=1.0)
    for seed in range(5):
        cut = crop.set_random_state(seed)(case())
        assert cut["image"].shape == (1, 8, 8, 10)
        # as near to the middle (4, 4, 5) as the border of the volume lets it be
        assert np.argwhere(cut["label"][0].numpy() == 2).tolist() == [[3, 4, 5]]
        assert torch.equal(cut["image"], case()["image"][:, 0:8, 16:24, 4:14])


@pytest.mark.parametrize("label", [True, False])
def test_the_other_patches_are_anywhere(label: bool) -> None:
    crop = RandForegroundCropd(["image", "label"], (8, 24, 40), foreground=0.0 if label else 1.0)
    starts = {float(crop.set_random_state(seed)(case(label))["image"][0, 0, 0, 0]) / (24 * 28) for seed in range(200)}
    assert starts == set(range(13))
    assert crop(case(label))["image"].shape == (1, 8, 24, 28)


def test_a_third_of_the_patches_is_about_a_label() -> None:
    crop = RandForegroundCropd(["label"], (1, 1, 1)).set_random_state(0)
    hits = sum(int(crop(case())["label"]) == 2 for _ in range(600))
    assert hits / 600 == pytest.approx(1 / 3, abs=0.06)


def test_a_mask_that_is_background_or_unknown_has_no_label_to_look_for() -> None:
    mask = torch.zeros(1, 20, 24, 28, dtype=torch.uint8)
    mask[..., 5:] = 255
    crop = RandForegroundCropd(["label"], (1, 1, 1), foreground=1.0).set_random_state(0)
    assert {int(crop({"label": mask})["label"]) for _ in range(50)} == {0, 255}


def test_a_probability_outside_0_and_1_is_refused() -> None:
    with pytest.raises(FibldmError, match="foreground must be a probability from 0 to 1; got 1.5; change foreground"):
        RandForegroundCropd(["image"], (1, 1, 1), foreground=1.5)


# --- a whole stage


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def against(work: Path, data: Path, run: Path, **overrides: Any) -> Configuration:
    settings = {
        "epochs": 3,
        "batch_size": 1,
        "discriminator_channels": 4,
        "slice_adversarial_weight": 0.1,
        "discriminator_start": 4,
        "log_variance": True,
        **overrides,
    }
    return tiny_configuration("autoencoder", work, run, data, "tiny", "autoencoder_adversarial", **settings)


def test_training_against_discriminators_goes_on_to_the_bit(
    phantom_work: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    against(phantom_work, tiny_data, tmp_path / "whole").run()
    original, calls = VolumePrepareBatch.__call__, 0

    def break_off(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:  # 2 epochs of 3 or more steps and a validation are over
            raise Interrupted
        return original(self, *arguments, **options)

    monkeypatch.setattr(VolumePrepareBatch, "__call__", break_off)
    with pytest.raises(Interrupted):
        against(phantom_work, tiny_data, tmp_path / "broken").run()
    assert 0 < StageFolder(tmp_path / "broken", "autoencoder").weights("last")["epoch"] < 3
    torch.manual_seed(12345)
    against(phantom_work, tiny_data, tmp_path / "broken").run()
    whole, broken = (
        StageFolder(tmp_path / name, "autoencoder").weights("last")["objects"] for name in ("whole", "broken")
    )
    assert {"discriminator", "discriminator_optimizer", "loss"} <= whole.keys()
    assert whole["discriminator_optimizer"]["state"]
    assert float(whole["loss"]["log_variance"]) != 0
    for name in ("network", "ema", "discriminator", "loss"):
        assert whole[name].keys() == broken[name].keys()
        assert all(torch.equal(whole[name][key], broken[name][key]) for key in whole[name]), name
    header = (tmp_path / "whole" / "autoencoder" / "metrics.csv").read_text().splitlines()[0]
    assert {"loss/reconstruction", "loss/generator", "loss/discriminator"} <= set(header.split(","))


@pytest.mark.parametrize(
    ("overrides", "built"),
    [
        ({"slice_adversarial_weight": 0.0}, ["volume"]),
        ({"volume_adversarial_weight": 0.0}, ["slices"]),
        ({}, ["slices", "volume"]),
    ],
)
def test_a_weight_of_0_builds_no_network(tmp_path: Path, overrides: dict[str, Any], built: list[str]) -> None:
    settings = against(tmp_path, shipped("data_chest_phantom"), tmp_path, **overrides)
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in settings.files]))
    for key, value in {**settings.overrides, "image_channels": 1}.items():
        parser[key] = value
    made: list[Any] = []
    original = PatchDiscriminator.__init__

    def count(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(self)
        original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchDiscriminator, "__init__", count)
        found = parser.get_parsed_content("discriminator")
    assert sorted({name.partition(".")[0] for name in found.state_dict()}) == built
    assert len(made) == len(built)


@pytest.mark.parametrize(("patches", "validation"), [(0, (1, 1, 32, 32, 32)), (1, (2, 1, 16, 16, 16))])
def test_validation_sees_whole_volumes_one_by_one_or_patches(
    phantom_work: Path, tiny_data: Path, tmp_path: Path, patches: int, validation: tuple[int, ...]
) -> None:
    overrides = {"batch_size": 2, "validation_patches_per_case": patches}
    parser = ConfigParser(
        ConfigParser.load_config_files(
            [str(file) for file in against(phantom_work, tiny_data, tmp_path, **overrides).files]
        )
    )
    for key, value in {
        **overrides,
        "work": str(phantom_work),
        "device": "cpu",
        "validate::dataset::data": None,
    }.items():
        parser[key] = value
    parser["validate::dataset::data"] = "$2 * load_datalist(@work, 'validation')"
    batch = next(iter(parser.get_parsed_content("validate::dataloader")))
    assert batch["image"].shape == batch["valid"].shape == validation
    assert "label" not in batch
    assert next(iter(parser.get_parsed_content("train::dataloader")))["image"].shape == (2, 1, 16, 16, 16)
