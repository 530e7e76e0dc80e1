"""Pictures while a stage trains: what is where, when they come, and that training does not notice them (E7, D19)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior
from fibldm.runs import StageFolder
from fibldm.training.configuration import Configuration
from fibldm.training.draws import EpochSampler, KeyedDataset
from fibldm.training.pictures import Panel, compared, middle, render, slice_of, write_picture
from fibldm.training.prepare_batch import VolumePrepareBatch
from fibldm.training.preview import Preview, ReconstructionRows

TinyStage = Callable[..., Configuration]

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


def drawn(folder: Path, *, epochs: int, every: int, interval: int = 1, after: int = 0) -> list[str]:
    rows = [[Panel("", torch.zeros(4, 4, 4), 0)]]
    engine = Engine(lambda engine, batch: None)
    Preview(folder, "stage", lambda: rows, spacing=[1.0, 1.0, 1.0], every=every, interval=interval).attach(engine)
    engine.state.epoch = engine.state.iteration = after
    engine.run([0], max_epochs=epochs)
    return sorted(path.name for path in (folder / "stage").rglob("*.png"))


@pytest.mark.parametrize(
    ("epochs", "every", "interval", "expected"),
    [(5, 2, 1, [2, 4, 5]), (5, 1, 3, [3, 5]), (12, 2, 3, [6, 12]), (3, 0, 1, [])],
)
def test_e7_pictures_come_with_every_so_many_validations(
    tmp_path: Path, epochs: int, every: int, interval: int, expected: list[int]
) -> None:
    files = [f"epoch_{epoch:04d}.png" for epoch in expected]
    assert drawn(tmp_path, epochs=epochs, every=every, interval=interval) == files


def test_e7_tensorboard_shows_them_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # files of one second are read in the order of a count that sorts as text, in which the tenth comes before the ninth
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    drawn(tmp_path, epochs=3, every=1)
    drawn(tmp_path, epochs=4, every=1, after=1)
    events = EventAccumulator(str(tmp_path / "stage" / "previews")).Reload()
    assert [event.step for event in events.Images("preview")] == [1, 2, 3, 4]
    assert events.Images("preview")[0].width > 50


def test_pictures_cannot_come_backwards() -> None:
    with pytest.raises(FibldmError, match="preview_every must be at least 0 .* got -1"):
        Preview(Path(), "stage", list, spacing=[1.0, 1.0, 1.0], every=-1)


def test_h7_drawing_leaves_the_random_numbers_of_training_as_they_are(tmp_path: Path) -> None:
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


def test_h7_a_stage_with_pictures_ends_with_the_weights_of_one_without(
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


def test_e7_the_first_cases_are_drawn_beside_their_reconstruction() -> None:
    rows, network = reconstruction_rows(3)
    assert shown(rows()) == [[0.25, 0.125, -0.125], [0.5, 0.25, -0.25]]
    assert network.training  # as it was
    assert shown(reconstruction_rows(1)[0]()) == [[0.25, 0.125, -0.125]]


def test_e7_a_decoder_that_needs_the_mask_gets_it() -> None:
    rows, _ = reconstruction_rows(1, prepare_batch=MaskedPrepareBatch())
    assert shown(rows()) == [[0.25, 0.375, 0.125]]


def test_e7_cases_are_drawn_as_validation_sees_them() -> None:
    from monai.transforms import Compose, RandSpatialCropd

    volume = torch.arange(20.0**3).view(1, 20, 20, 20) / 20**3
    crop = Compose([RandSpatialCropd(["image", "valid"], roi_size=[4, 4, 4], random_size=False)])
    dataset = KeyedDataset([{"image": volume, "valid": torch.ones_like(volume)}], transform=crop, progress=False)
    network: Any = Halving()
    rows = ReconstructionRows(network, dataset, prepare_batch=VolumePrepareBatch(), seed=7, device="cpu")
    validated = dataset[next(iter(EpochSampler(1, seed=7, shuffle=False)))]["image"]
    for _ in range(2):
        torch.testing.assert_close(rows()[0][0].volume, torch.as_tensor(validated)[0])
