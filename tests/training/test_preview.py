"""Pictures while a stage trains: what is where, when they come, and that training does not notice them."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyStage
from ignite.engine import Engine
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.evaluation.ms_ssim import channel_similarity
from fibldm.evaluation.preview_figures import PreviewFigures
from fibldm.evaluation.reconstruction import image_quality
from fibldm.models.autoencoder import FrozenFirstStage, Posterior
from fibldm.models.process import RectifiedFlow
from fibldm.models.samplers import ddim
from fibldm.models.timesteps import GridTimes
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.training.draws import EpochSampler, KeyedDataset
from fibldm.training.latents import Latents
from fibldm.training.prepare_batch import LatentPrepareBatch, VolumePrepareBatch
from fibldm.training.preview import Preview, ReconstructionRows, SampleRows, _panels
from fibldm.volumes.pictures import Panel, compared, middle, render, slice_of, write_picture

# --- slices


def corner(x: int, y: int, z: int) -> np.ndarray:
    """A volume of 6 x 4 x 5 voxels, dark but for one."""
    volume = np.zeros((6, 4, 5))
    volume[x, y, z] = 1
    return volume


@pytest.mark.parametrize(
    ("plane", "voxel", "row_and_column", "shape", "aspect"),
    [
        # first row at the bottom; x grows to the patient's right, which is on the left
        (0, (5, 3, 2), (3, 0), (4, 6), 3.0 / 2.0),
        (0, (0, 0, 2), (0, 5), (4, 6), 3.0 / 2.0),
        (1, (5, 2, 4), (4, 0), (5, 6), 5.0 / 2.0),
        (2, (4, 3, 4), (4, 0), (5, 4), 5.0 / 3.0),
        (2, (4, 0, 0), (0, 3), (5, 4), 5.0 / 3.0),
    ],
)
def test_slices_lie_as_radiologists_see_them(
    plane: int, voxel: tuple[int, int, int], row_and_column: tuple[int, int], shape: tuple[int, int], aspect: float
) -> None:
    volume = corner(*voxel)
    picture, ratio = slice_of(volume, (2.0, 3.0, 5.0), plane, middle(volume))
    assert picture.shape == shape
    assert tuple(np.argwhere(picture)[0]) == row_and_column
    assert picture.sum() == 1
    assert ratio == pytest.approx(aspect)


def test_two_images_are_compared_by_channel() -> None:
    one, other = torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4)
    rows = compared("case 1", one, other, ("input", "reconstruction"))
    assert [len(row) for row in rows] == [9, 9]
    assert [panel.title for panel in rows[1][::3]] == [
        "case 1, channel 1\ninput",
        "case 1, channel 1\nreconstruction",
        "case 1, channel 1\ndifference",
    ]
    assert [panel.plane for panel in rows[0]] == [0, 1, 2] * 3
    assert [float(panel.volume.mean()) for panel in rows[0][::3]] == [0, 1, 1]
    assert rows[0][-1].difference
    assert compared("case 1", one[:1], other[:1], ("a", "b"))[0][0].title == "case 1\na"


def test_a_picture_shows_its_panels_from_left_to_right(tmp_path: Path) -> None:
    values = (-1.0, 0.0, 1.0)
    row = [Panel(str(value), torch.full((8, 8, 8), value), 0) for value in values]
    write_picture(tmp_path / "a.png", render([row], (1.0, 1.0, 1.0)))
    with Image.open(tmp_path / "a.png") as picture:
        shown = np.asarray(picture)
    height, width = shown.shape[:2]
    middle = shown[2 * height // 3, [width // 6, width // 2, 5 * width // 6]]
    np.testing.assert_allclose(middle, [[0] * 3, [128] * 3, [255] * 3], atol=1)


def test_a_difference_has_colours() -> None:
    picture = render([[Panel("", torch.full((8, 8, 8), sign * 0.5), 0, True) for sign in (-1, 1)]], (1.0, 1.0, 1.0))
    height, width = picture.shape[:2]
    blue, red = (picture[2 * height // 3, column].astype(int) for column in (width // 4, 3 * width // 4))
    assert blue[2] > blue[0] + 50
    assert red[0] > red[2] + 50


def test_what_is_no_picture_is_refused() -> None:
    panel = Panel("", torch.zeros(2, 2, 2), 0)
    with pytest.raises(FibldmError, match=r"rows of as many panels each; got \[\]"):
        render([], (1.0, 1.0, 1.0))
    with pytest.raises(FibldmError, match=r"rows of as many panels each; got \[1, 2\]"):
        render([[panel], [panel, panel]], (1.0, 1.0, 1.0))
    with pytest.raises(FibldmError, match=r"3-D volumes \(X, Y, Z\); got the shape \(1, 2, 2, 2\)"):
        Panel("", torch.zeros(1, 2, 2, 2), 0)


# --- when


def drawn(
    folder: Path, *, epochs: int, every: int, interval: int = 1, after: int = 0, early: bool = False
) -> list[str]:
    rows = [[Panel("", torch.zeros(4, 4, 4), 0)]]
    engine = Engine(lambda engine, batch: None)
    preview = Preview(folder, "stage", lambda: rows, spacing=[1.0, 1.0, 1.0], every=every, interval=interval)
    preview.early = early
    preview.attach(engine)
    engine.state.epoch = engine.state.iteration = after
    engine.run([0], max_epochs=epochs)
    return sorted(path.name for path in (folder / "stage").rglob("*.png"))


@pytest.mark.parametrize(
    ("epochs", "every", "interval", "expected"),
    [(5, 2, 1, [2, 4, 5]), (5, 1, 3, [3, 5]), (12, 2, 3, [6, 12]), (3, 0, 1, [])],
)
def test_pictures_come_with_every_so_many_validations(
    tmp_path: Path, epochs: int, every: int, interval: int, expected: list[int]
) -> None:
    files = [f"epoch_{epoch:04d}.png" for epoch in expected]
    assert drawn(tmp_path, epochs=epochs, every=every, interval=interval) == files


def test_the_first_validation_can_be_drawn_too(tmp_path: Path) -> None:
    """By which a time budget knows what pictures take."""
    files = [f"epoch_{epoch:04d}.png" for epoch in (2, 6, 7)]
    assert drawn(tmp_path, epochs=7, every=3, interval=2, early=True) == files


def test_tensorboard_shows_them_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # files of one second are read in the order of a count that sorts as text, in which the tenth comes before the ninth
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    drawn(tmp_path, epochs=3, every=1)
    drawn(tmp_path, epochs=4, every=1, after=1)
    events = EventAccumulator(str(tmp_path / "stage" / "previews")).Reload()
    assert [event.step for event in events.Images("preview")] == [1, 2, 3, 4]
    assert events.Images("preview")[0].width > 50


def test_figures_of_samples_go_beside_their_pictures(tmp_path: Path) -> None:
    """In a table of their own and in TensorBoard; a resume takes the place of what it does again."""

    def run(values: list[float], after: int) -> None:
        left = iter(values)
        engine = Engine(lambda engine, batch: None)
        rows = [[Panel("", torch.zeros(4, 4, 4), 0)]]
        preview = Preview(
            tmp_path,
            "stage",
            lambda: rows,
            spacing=[1.0, 1.0, 1.0],
            every=1,
            measure=lambda: {"cases": 2, "ssim": next(left)},
        )
        preview.attach(engine)
        engine.load_state_dict({"epoch": after, "max_epochs": after + len(values), "epoch_length": 1})
        engine.run([0])

    run([0.125, 0.25, 0.5], after=0)
    run([0.75, 1.0], after=1)
    table = (tmp_path / "stage" / "previews" / "metrics.csv").read_text()
    assert table.split() == ["epoch,cases,ssim", "1,2,0.125", "2,2,0.75", "3,2,1"]
    events = EventAccumulator(str(tmp_path / "stage" / "previews")).Reload()
    assert events.Scalars("ssim")[-1].value == 1.0


def test_pictures_cannot_come_backwards() -> None:
    with pytest.raises(FibldmError, match="preview_every must be at least 0 .* got -1"):
        Preview(Path(), "stage", list, spacing=[1.0, 1.0, 1.0], every=-1)


def test_drawing_leaves_the_random_numbers_of_training_as_they_are(tmp_path: Path) -> None:
    def rows() -> list[list[Panel]]:
        return [[Panel("", torch.rand(4, 4, 4), 0)]]

    engine = Engine(lambda engine, batch: None)
    Preview(tmp_path, "stage", rows, spacing=[1.0, 1.0, 1.0], every=1).attach(engine)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.run([0], max_epochs=1)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


PREVIEW = """
preview:
  _target_: fibldm.training.preview.Preview
  run_dir: "@run_dir"
  stage: "@stage::name"
  rows:
    _target_: fibldm.training.preview.ReconstructionRows
    network: "$@ema.ema_model"
    dataset: "@validate::dataset"
    prepare_batch: "@prepare_batch"
    seed: "@seed"
    device: "@device"
  spacing: "@spacing"
  every: 1
  interval: "@val_interval"
+trackers: ["@preview"]
"""


def test_a_stage_with_pictures_ends_with_the_weights_of_one_without(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "preview.yaml").write_text(PREVIEW)
    configuration = tiny_stage("autoencoder", tmp_path / "run")
    Configuration((*configuration.files, tmp_path / "preview.yaml"), configuration.overrides).run()
    stages = [StageFolder(run, "autoencoder") for run in (tmp_path / "run", tiny_run)]
    assert stages[0].require()["weights"] == stages[1].require()["weights"]
    with Image.open(stages[0].path / "previews" / "epoch_0001.png") as picture:
        assert picture.size[0] > picture.size[1] > 100


# --- what stage 1 draws


class Halving(nn.Module):
    """Stands for an autoencoder: halves the volume, the more so in training, and adds the mask."""

    def encode(self, volume: Tensor) -> Posterior:
        return Posterior(volume / (20 if self.training else 2), torch.ones_like(volume))

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        return latent if mask is None else latent + mask


class MaskedPrepareBatch(VolumePrepareBatch):
    def __call__(self, batchdata: dict[str, Tensor], device: Any = None, *args: Any, **kwargs: Any) -> Any:
        image, target, _, options = super().__call__(batchdata, device)
        return image, target, (batchdata["mask"],), options


def reconstruction_rows(count: int, **settings: Any) -> tuple[ReconstructionRows, Halving]:
    cases = [{"image": torch.full((1, 4, 4, 4), (index + 1) / 4)} for index in range(count)]
    for case in cases:
        case |= {"valid": torch.ones(1, 4, 4, 4), "mask": torch.full((1, 4, 4, 4), 0.25)}
    network: Any = Halving()
    dataset = KeyedDataset(cases, transform=[], progress=False)
    settings = {"prepare_batch": VolumePrepareBatch(), "seed": 3, "device": "cpu", **settings}
    return ReconstructionRows(network, dataset, **settings), network


def shown(rows: list[list[Panel]]) -> list[list[float]]:
    return [[round(float(panel.volume.mean()), 6) for panel in row[::3]] for row in rows]


def test_the_first_cases_are_drawn_beside_their_reconstruction() -> None:
    rows, network = reconstruction_rows(3)
    assert shown(rows()) == [[0.25, 0.125, -0.125], [0.5, 0.25, -0.25]]
    assert network.training  # as it was
    assert shown(reconstruction_rows(1)[0]()) == [[0.25, 0.125, -0.125]]


def test_a_decoder_that_needs_the_mask_gets_it() -> None:
    rows, _ = reconstruction_rows(1, prepare_batch=MaskedPrepareBatch())
    assert shown(rows()) == [[0.25, 0.375, 0.125]]


def test_cases_are_drawn_as_validation_sees_them() -> None:
    from monai.transforms import Compose, RandSpatialCropd

    volume = torch.arange(20.0**3).view(1, 20, 20, 20) / 20**3
    crop = Compose([RandSpatialCropd(["image", "valid"], roi_size=[4, 4, 4], random_size=False)])
    dataset = KeyedDataset([{"image": volume, "valid": torch.ones_like(volume)}], transform=crop, progress=False)
    network: Any = Halving()
    rows = ReconstructionRows(network, dataset, prepare_batch=VolumePrepareBatch(), seed=7, device="cpu")
    validated = dataset[next(iter(EpochSampler(1, seed=7, shuffle=False)))]["image"]
    for _ in range(2):
        torch.testing.assert_close(rows()[0][0].volume, torch.as_tensor(validated)[0])


# --- what stages 2 and 3 draw


class Known(nn.Module):
    """Stands for a network of the target "sample" that knows the latent: as much everywhere as there is mask."""

    def forward(self, z_t: Tensor, timesteps: Tensor, conditions: dict[str, Tensor] | None = None) -> Tensor:
        level = conditions["mask"][:, 0].mean() if conditions else 0.5
        return torch.full_like(z_t, 7.0 if self.training else float(level))


class Noise(nn.Module):
    """One that leaves the noise as it is."""

    def forward(self, z_t: Tensor, timesteps: Tensor, conditions: dict[str, Tensor] | None = None) -> Tensor:
        return z_t


def test_figures_are_those_of_fibldm_evaluate() -> None:
    shape, rng = (2, 24, 20, 16), np.random.default_rng(0)
    real = [ndimage.gaussian_filter(rng.uniform(-1, 1, shape), [0, 1, 1, 1]).astype(np.float32) for _ in range(3)]
    labels = [rng.integers(0, 2, shape[1:]).astype(np.uint8) for _ in range(3)]
    labels[0][:12] = 255
    figures = PreviewFigures({"0": "background", "1": "organ"}, (1.0, 1.0, 2.0))
    same = figures(real, real, labels, follows_masks=True)
    assert (same["ssim"], same["ms_ssim"]) == pytest.approx((1, 1)) and list(same) == ["ssim", "ms_ssim", "kid"]
    worse = [ndimage.gaussian_filter(image, [0, 2, 2, 2]) for image in real]
    found = figures(worse, real, labels, follows_masks=True)
    quality = [
        image_quality(one, other, {"": known})["ssim"]
        for image, blurred, known in zip(real, worse, (mask != 255 for mask in labels), strict=True)
        for one, other in zip(image, blurred, strict=True)
    ]
    assert found["ssim"] == pytest.approx(np.mean(quality))
    assert found["ms_ssim"] == pytest.approx(
        np.mean([channel_similarity(*pair) for pair in zip(real, worse, strict=True)])
    )
    assert found["kid"] > same["kid"] and same["kid"] <= 0
    assert list(figures(worse, real, labels, follows_masks=False)) == ["kid"]
    assert list(figures(worse[:1], real[:1], labels[:1], follows_masks=True)) == ["ssim", "ms_ssim"]


@pytest.fixture
def latents(tiny_run: Path) -> Latents:
    """Three cases, which count as those of validation."""
    opened = Latents.open(tiny_run)
    items = [*opened.facts["items"]["validation"], *opened.facts["items"]["training"]]
    return replace(opened, facts={**opened.facts, "items": {"validation": items[:3]}})


def sample_rows(latents: Latents, network: Any, *, masked: bool = False, **settings: Any) -> SampleRows:
    mask = latents.mask(1) if masked else None
    prepare = LatentPrepareBatch(RectifiedFlow(), target="sample", times=GridTimes(2), conditions={"mask": mask})
    return SampleRows(network, latents, prepare_batch=prepare, **{"seed": 3, "device": "cpu", "steps": 2, **settings})


def first_stage(latents: Latents) -> FrozenFirstStage:
    return FrozenFirstStage(StageFolder(latents.run_dir, "autoencoder").trained())


def tensors_of(latents: Latents, case: int) -> dict[str, Tensor]:
    return load_file(latents.items("validation")[case]["file"])


def titles(rows: list[list[Panel]]) -> list[list[str]]:
    return [[panel.title for panel in row[::3]] for row in rows]


def volumes(rows: list[list[Panel]]) -> list[list[Tensor]]:
    return [[panel.volume for panel in row[::3]] for row in rows]


def test_without_a_mask_there_are_samples_alone(latents: Latents) -> None:
    """What the network knows, decoded; and the network is left as it was."""
    network = Known()
    rows = sample_rows(latents, network, samples=2)()
    assert titles(rows) == [[f"case {case}\nsample {number}" for number in (1, 2)] for case in (1, 2)]
    z = torch.full((1, *tensors_of(latents, 0)["mean"].shape), 0.5)
    expected = first_stage(latents).decode(latents.space.denormalise(z))[0, 0].clamp(-1, 1)
    for volume in sum(volumes(rows), []):
        torch.testing.assert_close(volume, expected, rtol=0, atol=1e-5)
    assert network.training
    assert [panel.plane for panel in rows[0]] == [0, 1, 2] * 2


def test_mask_and_real_volume_stand_beside_the_sample(latents: Latents) -> None:
    """Every case with its own."""
    rows = sample_rows(latents, Known(), masked=True)()
    assert titles(rows) == [[f"case {case}\n{name}" for name in ("mask", "real", "sample 1")] for case in (1, 2)]
    decode = first_stage(latents).decode
    for case, (mask, real, made) in enumerate(volumes(rows)):
        cached = tensors_of(latents, case)
        expected = decode(cached["mean"][None])[0, 0].clamp(-1, 1)
        torch.testing.assert_close(real, expected, rtol=0, atol=1e-5)
        known = [*sorted(int(label) for label in latents.facts["labels"]), 255]
        assert len(known) > 2
        for index, label in enumerate(known):
            shown = mask[cached["labels"][0] == label]
            torch.testing.assert_close(shown, torch.full_like(shown, 2 * index / (len(known) - 1) - 1))
        level = (cached["labels"] == 0).float().mean()
        z = torch.full_like(cached["mean"], float(level))[None]
        expected = decode(latents.space.denormalise(z))[0, 0].clamp(-1, 1)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert not torch.equal(rows[0][0].volume, rows[1][0].volume)


def test_the_noise_of_a_sample_belongs_to_its_case(latents: Latents) -> None:
    """Whatever else is drawn, and however often."""
    noise = volumes(sample_rows(latents, Noise(), samples=2)())
    torch.manual_seed(9)
    again = volumes(sample_rows(latents, Noise(), cases=3)())
    assert len(again) == 3
    for case in range(2):
        assert torch.equal(noise[case][0], again[case][0])
    assert not torch.equal(noise[0][0], noise[0][1]) and not torch.equal(noise[0][0], noise[1][0])
    other = volumes(sample_rows(latents, Noise(), seed=4)())
    assert not torch.equal(other[0][0], noise[0][0])


def test_sampler_steps_and_eta_can_be_chosen(latents: Latents) -> None:
    """DDIM of 200 steps with an eta of 1 as well as the default."""
    rows = sample_rows(latents, Known(), sampler="ddim", steps=200, eta=1.0)
    assert len(rows.times) == 201
    assert rows.draw.func is ddim and rows.draw.keywords == {"eta": 1.0}  # type: ignore[attr-defined]
    shifted = sample_rows(latents, Known(), steps=2, shift=3.0)
    assert shifted.times.tolist() == pytest.approx([1.0, 0.75, 0.0])
    with pytest.raises(FibldmError, match="sampler must be one of"):
        sample_rows(latents, Known(), sampler="pndm")
    with pytest.raises(FibldmError, match="sampling needs steps >= 1; got 0"):
        sample_rows(latents, Known(), steps=0)
    with pytest.raises(FibldmError, match="eta is for the sampler ddim only; got 0.5 for heun"):
        sample_rows(latents, Known(), sampler="heun", eta=0.5)
    with pytest.raises(FibldmError, match=r"eta must be in \[0, 1\]; got 1.5"):
        sample_rows(latents, Known(), sampler="ddim", eta=1.5)


def test_the_first_stage_is_read_once_and_only_if_it_is_needed(
    latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, read = StageFolder.trained, []

    def count(self: StageFolder, **overrides: Any) -> Any:
        read.append(self.name)
        return trained(self, **overrides)

    monkeypatch.setattr(StageFolder, "trained", count)
    rows = sample_rows(latents, Known())
    assert read == []
    for _ in range(2):
        rows()
    assert read == ["autoencoder"]


def test_a_volume_of_one_slice_is_shown_once() -> None:
    assert [panel.plane for panel in _panels("slice", torch.zeros(4, 6, 1))] == [0]
    assert [panel.plane for panel in _panels("volume", torch.zeros(4, 6, 2))] == [0, 1, 2]


@pytest.mark.parametrize("stage", ["diffusion", "controlnet"])
def test_a_stage_that_draws_samples_ends_with_the_weights_of_one_that_does_not(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path, stage: str
) -> None:
    """Over several epochs, as what is drawn after one could only change the next."""
    for earlier in ("autoencoder", "latents", *(("diffusion",) if stage == "controlnet" else ())):
        for run in ("plain", "drawn"):
            (tmp_path / run).mkdir(exist_ok=True)
            (tmp_path / run / earlier).symlink_to(tiny_run / earlier)
    for run, every in (("plain", 0), ("drawn", 1)):
        given = {"preview_every": every, "preview_metrics": 2 * every, "preview_sampler": "ddim", "preview_eta": 1.0}
        tiny_stage(stage, tmp_path / run, epochs=2, **given).run()
    plain, drawn = (StageFolder(tmp_path / run, stage) for run in ("plain", "drawn"))
    assert plain.require()["weights"] == drawn.require()["weights"]
    last = [folder.weights("last")["objects"]["network"] for folder in (plain, drawn)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert not (plain.path / "previews").exists()
    assert sorted(path.name for path in drawn.path.rglob("*.png")) == ["epoch_0001.png", "epoch_0002.png"]
    table = list(csv.DictReader((drawn.path / "previews" / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], int(row["cases"]) > 0) for row in table] == [("1", True), ("2", True)]
    assert ("ssim" in table[0]) == (stage == "controlnet")
