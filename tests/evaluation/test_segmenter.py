"""The segmenter that measurements share: what it minimises, what it gives, and when it is trained again."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.runs import StageFolder
from fibldm.training.losses import SegmentationLoss, Weighted
from fibldm.training.prepare_batch import SegmentationPrepareBatch
from fibldm.volumes.intensity import Intensity

SMALLEST = {"steps": 2, "batch_size": 2, "segmenter_channels": [4, 8, 8], "warmup_steps": 1, "precision": "float32"}

Train = Callable[..., Segmenter]


@pytest.fixture
def evaluated(tiny_run: Path, phantom_work: Path, tmp_path: Path) -> Evaluated:
    """The tiny run, with a folder of its own for what is measured."""
    return replace(Evaluated.open(tiny_run, phantom_work), run_dir=tmp_path / "run")


def train(evaluated: Evaluated, **changed: Any) -> Segmenter:
    return trained_segmenter(evaluated, overrides={**SMALLEST, **changed}, device="cpu")


def segmenters(evaluated: Evaluated) -> list[Path]:
    return sorted((evaluated.folder / "segmenter").iterdir())


# --- loss


def logits_and_channels(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 5, 6)
    return torch.randn(2, 3, *shape, generator=generator), torch.randint(3, (2, 1, *shape), generator=generator)


def test_the_loss_is_monais_where_every_voxel_counts() -> None:
    logits, channels = logits_and_channels()
    expected = DiceCELoss(to_onehot_y=True, softmax=True)(logits, channels)
    torch.testing.assert_close(SegmentationLoss()(logits, Weighted(channels, torch.ones(2, 1, 4, 5, 6))), expected)


def test_the_loss_is_monais_of_the_voxels_that_count() -> None:
    logits, channels = logits_and_channels()
    weight = torch.zeros(2, 1, 4, 5, 6)
    weight[..., :2] = 1
    expected = DiceCELoss(to_onehot_y=True, softmax=True)(logits[..., :2], channels[..., :2])
    torch.testing.assert_close(SegmentationLoss()(logits, Weighted(channels, weight)), expected)


def test_the_loss_of_indifference_has_a_closed_form() -> None:
    """Probability 1/2 everywhere, label 1 in a quarter of 64 voxels: cross entropy ln 2, Dice 48/80 and 16/48."""
    channels = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    channels[..., 3] = 1
    loss = SegmentationLoss()(torch.zeros(1, 2, 4, 4, 4), Weighted(channels, torch.ones(1, 1, 4, 4, 4)))
    dice = (1 - 2 * 24 / (32 + 48) + 1 - 2 * 8 / (32 + 16)) / 2
    assert float(loss) == pytest.approx(dice + np.log(2), abs=1e-6)


def test_unknown_voxels_have_no_gradient_and_a_batch_without_any_known_one_no_loss() -> None:
    logits, channels = logits_and_channels()
    weight = torch.ones(2, 1, 4, 5, 6)
    weight[0, :, 1:3] = 0
    SegmentationLoss()(logits.requires_grad_(), Weighted(channels, weight)).backward()
    assert logits.grad is not None
    assert bool((logits.grad[0, :, 1:3] == 0).all())
    assert bool((logits.grad[1] != 0).all())
    nothing = SegmentationLoss()(logits.detach(), Weighted(channels, torch.zeros_like(weight)))
    assert float(nothing) == 0


def test_a_label_becomes_its_channel_and_unknown_and_padding_do_not_count() -> None:
    labels = torch.tensor([0, 2, 5, 3, UNKNOWN_LABEL, 5], dtype=torch.uint8).view(1, 1, 6, 1, 1)
    valid = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.uint8).view(1, 1, 6, 1, 1)
    image = torch.linspace(-1, 1, 6).view(1, 1, 6, 1, 1)
    batch = {"image": image, "label": labels, "valid": valid}
    inputs, asked = SegmentationPrepareBatch([0, 2, 5])(batch, device="cpu")
    assert torch.equal(inputs, image)
    assert asked.weight.flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert asked.value.flatten().tolist() == [0, 1, 2, 0, 0, 2]


def test_of_a_case_that_lacks_labels_background_and_these_are_asked_for_together() -> None:
    """Sample 0 lacks label 5; sample 1 has all; its unknown voxels, and padding of both, do not count."""
    labels = torch.tensor([[2, UNKNOWN_LABEL, UNKNOWN_LABEL], [5, 0, UNKNOWN_LABEL]], dtype=torch.uint8)
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.uint8)
    batch = {name: part.view(2, 1, 3, 1, 1) for name, part in {"label": labels, "valid": valid}.items()}
    batch |= {"image": torch.zeros(2, 1, 3, 1, 1), "annotated": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    _, asked = SegmentationPrepareBatch([0, 2, 5])(batch, device="cpu")
    assert asked.value.flatten(1).tolist() == [[1, 0, 0], [2, 0, 0]]
    assert asked.weight.flatten(1).tolist() == [[1, 1, 0], [1, 1, 0]]
    assert asked.merged is not None and asked.merged.tolist() == [[True, False, True], [True, False, False]]
    batch["annotated"] = torch.ones(2, 3, dtype=torch.long)
    _, plain = SegmentationPrepareBatch([0, 2, 5])(batch, device="cpu")
    assert plain.merged is None and plain.weight.flatten(1).tolist() == [[1, 0, 0], [1, 1, 0]]


def test_the_marginal_loss_is_that_of_the_labels_that_were_told_apart() -> None:
    """Of logits with class 2 taken into the background, by the plain loss of two classes."""
    logits, channels = logits_and_channels()
    channels = channels.clamp(max=1)
    merged = torch.tensor([[True, False, True]] * 2)
    background = logits[:, [0, 2]].logsumexp(dim=1, keepdim=True)
    weight = (torch.rand(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    expected = SegmentationLoss()(torch.cat([background, logits[:, 1:2]], dim=1), Weighted(channels, weight))
    torch.testing.assert_close(SegmentationLoss()(logits, Weighted(channels, weight, merged=merged)), expected)


def test_nothing_merged_is_the_plain_loss() -> None:
    logits, channels = logits_and_channels()
    weight = torch.ones(2, 1, 4, 5, 6)
    merged = torch.tensor([[True, False, False]] * 2)
    plain = SegmentationLoss()(logits, Weighted(channels, weight))
    torch.testing.assert_close(SegmentationLoss()(logits, Weighted(channels, weight, merged=merged)), plain)


def planted(naive: bool) -> tuple[Tensor, Tensor]:
    """Labels, and what a network finds that saw each of 1 and 2 in one case only, though both are in both."""
    grey, truth = torch.tensor([-0.8, -0.8, 0.0, 0.8, -0.8, 0.8, 0.0, -0.8]), torch.tensor([0, 0, 1, 2, 0, 2, 1, 0])
    outside = 0 if naive else UNKNOWN_LABEL
    labels = torch.stack([torch.where(truth == kept, kept, outside) for kept in (1, 2)])
    batch = {
        "image": grey.expand(2, 8).reshape(2, 1, 8, 1, 1),
        "label": labels.to(torch.uint8).view(2, 1, 8, 1, 1),
        "valid": torch.ones(2, 1, 8, 1, 1),
        "annotated": torch.tensor([[1, 1, 1]] * 2 if naive else [[1, 1, 0], [1, 0, 1]]),
    }
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 16, 1), nn.Tanh(), nn.Conv3d(16, 3, 1))
    inputs, asked = SegmentationPrepareBatch([0, 1, 2])(batch, device="cpu")
    optimizer, loss = torch.optim.Adam(network.parameters(), 0.05), SegmentationLoss()
    for _ in range(150):
        optimizer.zero_grad()
        loss(network(inputs), asked).backward()
        optimizer.step()
    probabilities = network(inputs)[0].detach().softmax(dim=0).flatten(1)
    return truth, probabilities


def test_labels_that_no_case_has_all_of_are_learned_and_never_as_background() -> None:
    """Planted: each voxel is found for sure; by the naive way the background keeps a large share of both labels."""
    truth, probabilities = planted(naive=False)
    assert float(probabilities.gather(0, truth[None]).min()) > 0.9
    assert float(planted(naive=True)[1][0, truth > 0].min()) > 0.3


# --- what it gives


class Thresholds(nn.Module):
    """Channel 0, 1 or 2 by intensity: below -0.5, about 0, above 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1))

    def forward(self, volume: Tensor) -> Tensor:
        return -(volume - self.levels).abs()


@pytest.mark.parametrize("window", [(12, 6, 4), (4, 4, 4), (8, 6, 2)])
def test_segmenting_a_ramp_gives_label_values_on_its_own_axes(window: tuple[int, ...]) -> None:
    """Whole or in windows, along the one axis that rises."""
    ramp = np.broadcast_to(np.linspace(-1, 1, 12, dtype=np.float32)[:, None, None], (12, 6, 4))
    found = Segmenter(Thresholds(), (0, 2, 5), "", window).segment(ramp)
    assert found.dtype == np.uint8
    expected = np.array([0, 0, 0, 2, 2, 2, 2, 2, 2, 5, 5, 5])
    assert np.array_equal(found, np.broadcast_to(expected[:, None, None], (12, 6, 4)))


def test_features_are_the_means_of_the_deepest_layer() -> None:
    torch.manual_seed(0)
    network = UNet(3, 1, 3, channels=(4, 6, 10), strides=(2, 2)).eval()
    image = np.random.default_rng(0).uniform(-1, 1, (16, 8, 12)).astype(np.float32)
    features = Segmenter(network, (0, 1, 2), "", (16, 8, 12)).features(image)
    first, second = network.model[0], network.model[1].submodule
    with torch.inference_mode():
        deepest = second[1].submodule(second[0](first(torch.from_numpy(image)[None, None])))
    assert (features.shape, features.dtype) == ((10,), np.float32)
    np.testing.assert_allclose(features, deepest.mean(dim=(0, 2, 3, 4)).numpy(), rtol=1e-5, atol=1e-6)


def test_slabs_lie_across_their_axis() -> None:
    """Of a volume that differs along X alone, slabs across the others are alike; the first row is the features."""
    torch.manual_seed(0)
    network = UNet(3, 1, 3, (4, 8, 8), strides=(1, 2), num_res_units=0).eval()
    image = np.repeat(np.linspace(-1, 1, 16, dtype=np.float32) ** 3, 24 * 28).reshape(16, 24, 28)
    segmenter = Segmenter(network, (0, 1, 2), "", (16, 24, 28))
    described = segmenter.described(image)
    np.testing.assert_array_equal(described[0], [-1, *segmenter.features(image)])
    for axis, thick in enumerate((8, 12, 14)):
        slabs = described[described[:, 0] == axis, 1:]
        assert slabs.shape == (thick, 8)
        np.testing.assert_allclose(slabs.mean(axis=0), described[0, 1:], rtol=1e-5, atol=1e-6)
        inner = slabs[3:-3]  # at the edges convolutions see zeros
        assert (np.ptp(inner, axis=0).max() > 1e-4) == (axis == 0)
    halves = Segmenter(network, (0, 1, 2), "", (8, 24, 28)).described(image)
    assert np.bincount(halves[:, 0].astype(int) + 1).tolist() == [1, 12, 36, 42]  # three windows


def test_features_of_windows_are_averaged_and_leave_no_hook() -> None:
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(4, 6, 10), strides=(2, 2)).eval()
    block = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8)).astype(np.float32)
    image = np.concatenate([block, block[::-1]])
    pieces = [image[start : start + 8] for start in (0, 4, 8)]
    segmenter = Segmenter(network, (0, 1), "", (8, 8, 8))
    expected = np.mean([segmenter.features(piece) for piece in pieces], axis=0)
    np.testing.assert_allclose(segmenter.features(image), expected, rtol=1e-5, atol=1e-6)
    assert not any(part._forward_hooks for part in network.modules())


# --- training


def test_it_is_trained_once_and_the_same_data_and_settings_get_the_same(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(evaluated)
    (folder,) = segmenters(evaluated)
    stage = StageFolder(evaluated.folder, f"segmenter/{folder.name}")
    assert stage.require()["epochs"] == 1  # 2 steps: 2 batches of the 4 training cases
    assert first.fingerprint == stage.require()["weights"]
    assert first.labels == tuple(sorted(evaluated.labels))
    sample = evaluated.read(evaluated.real("test")[0])
    found = first.segment(sample.image)
    assert found.shape == sample.labels.shape
    assert set(np.unique(found)) <= set(evaluated.labels)
    assert first.features(sample.image).shape == (8,)

    monkeypatch.setattr(SegmentationPrepareBatch, "__call__", None)  # nothing is trained
    again = train(evaluated)
    assert segmenters(evaluated) == [folder]
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.segment(sample.image), found)
    train(evaluated, keep_every=1, num_workers=2)  # which decide nothing
    assert segmenters(evaluated) == [folder]


def test_other_settings_data_grids_and_intensities_get_another_one(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        evaluated,
        replace(evaluated, grid=replace(evaluated.grid, size=(32, 32, 16))),
        replace(evaluated, intensity=Intensity("window", low=-900, high=300)),
        replace(evaluated, labels={**evaluated.labels, 9: "another"}),
    ]
    made = [train(other) for other in others]
    made.append(train(evaluated, learning_rate=1e-3))
    import fibldm.evaluation.segmenter as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_datalist", lambda work: {"content": "other data"})
        made.append(train(evaluated))
    assert len(segmenters(evaluated)) == len(made)
    assert len({segmenter.fingerprint for segmenter in made[:-1]}) == len(made) - 1
    assert len(made[3].labels) == len(evaluated.labels) + 1
    assert made[1].window == (32, 32, 16)
    assert train(evaluated).fingerprint == made[0].fingerprint


def test_one_that_was_interrupted_goes_on_to_the_same_weights(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(evaluated, steps=6, val_interval=1)
    broken = replace(evaluated, run_dir=tmp_path / "broken")
    prepare, calls = SegmentationPrepareBatch.__call__, 0

    def break_off(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return prepare(self, *arguments, **options)

    monkeypatch.setattr(SegmentationPrepareBatch, "__call__", break_off)
    with pytest.raises(BaseException):  # noqa: B017
        train(broken, steps=6, val_interval=1)
    (folder,) = segmenters(broken)
    assert not (folder / "done.json").exists()
    torch.manual_seed(12345)
    assert train(broken, steps=6, val_interval=1).fingerprint == whole.fingerprint
    assert "going on after epoch" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_it_learns_what_is_there_to_see(evaluated: Evaluated) -> None:
    """Some thirty steps find the lungs of phantoms, which chance does not."""
    segmenter = train(evaluated, steps=60, batch_size=1, segmenter_channels=[8, 16, 16], learning_rate=1e-2)
    sample = evaluated.read(evaluated.real("test")[0])
    found = segmenter.segment(sample.image)
    lungs, wanted = np.isin(found, (1, 2)), np.isin(sample.labels, (1, 2))
    assert 2 * (lungs & wanted).sum() / (lungs.sum() + wanted.sum()) > 0.8


def test_a_mistyped_setting_names_the_nearest(evaluated: Evaluated) -> None:
    with pytest.raises(FibldmError, match=re.escape("key 'stebs' is not known; did you mean 'steps'?")):
        train(evaluated, stebs=3)
    assert not evaluated.folder.exists()


def test_weights_that_were_replaced_are_refused(evaluated: Evaluated) -> None:
    train(evaluated)
    best = segmenters(evaluated)[0] / "checkpoints" / "best.pt"
    content = torch.load(best, weights_only=True)
    next(iter(content["model"].values())).add_(1)
    torch.save(content, best)
    with pytest.raises(
        FibldmError,
        match=r"best\.pt must be the one that the stage ended with.*delete .* and run `fibldm evaluate` again",
    ):
        train(evaluated)


def test_it_can_be_trained_on_other_cases_and_is_then_another_one(evaluated: Evaluated) -> None:
    """Known by the content of the cases: the same ones again train nothing."""
    half = evaluated.real("training")[:2]
    other = trained_segmenter(evaluated, cases=half, overrides=SMALLEST, device="cpu")
    assert other.fingerprint != train(evaluated).fingerprint
    assert len(segmenters(evaluated)) == 2
    again = trained_segmenter(evaluated, cases=list(half), overrides=SMALLEST, device="cpu")
    assert again.fingerprint == other.fingerprint and len(segmenters(evaluated)) == 2
    assert trained_segmenter(evaluated, cases=half[:1], overrides=SMALLEST, device="cpu").fingerprint not in (
        other.fingerprint,
        train(evaluated).fingerprint,
    )
