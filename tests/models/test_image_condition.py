"""A second image of the patient as a condition: from a table of two grids to volumes that follow it."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from builders import data_file, tiny_configuration, unet_numbers, write_nifti
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from monai.transforms import Compose, RandAffined
from safetensors.torch import load_file
from second_images import CT_AFFINE, MR_AFFINE, MR_SHAPE, PLACE, ball, write_dataset
from torch.nn import functional as F

from fibldm.cli import run as cli
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.resolve import plain
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.image import ImageEncoding, ImageMixture
from fibldm.models.network import ConditionedNetwork
from fibldm.synthesis import Synthesizer
from fibldm.synthesis.asked import ConditionsTable, known_cases, read
from fibldm.synthesis.bundle import GENERATOR
from fibldm.synthesis.definitions import build
from fibldm.synthesis.scans import AskedScan
from fibldm.training.encode_stage import EncodeStage, about_second_images
from fibldm.training.latents import Latents
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.second_image import check_overlap, on_grid, read_on_grid
from fibldm.volumes.writer import sidecar

PERCENTILES = Intensity("percentile", output_low=-1.0, output_high=1.0).to_dict()
MR = ImageEncoding((2, 2, 1), "mr", PERCENTILES)
SECOND = PrepareSettings(modality="ct", second_modality="mr")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared; the second patient has no second image."""
    folder = tmp_path_factory.mktemp("pairs")
    prepare(write_dataset(folder, without=(1,)), folder / "work", SECOND, progress=False)
    return folder / "work"


# --- the condition


def test_every_voxel_of_an_image_has_a_channel_of_its_cell() -> None:
    seen = torch.rand(2, 4, 6, 3).mul(2).sub(1)
    seen[1] = 1
    seen[:, 2:] = 0  # not known
    encoded = MR.encode([seen])[0]
    assert encoded.shape == MR.shape((2, 3, 3)) == (5, 2, 3, 3)
    for x, y, z in ((0, 0, 0), (1, 3, 2), (0, 5, 1), (3, 1, 1)):
        assert encoded[2 * (x % 2) + y % 2, x // 2, y // 2, z] == seen[0, x, y, z]
    assert (encoded[-1, 0] == 1).all() and not encoded[:, 1].any()
    with pytest.raises(FibldmError, match="must be divisible by"):
        MR.encode([torch.zeros(2, 5, 6, 3)])


def test_a_case_without_an_image_is_as_one_whose_image_was_dropped() -> None:
    seen = torch.ones(2, 4, 4, 2)
    case = Case(torch.zeros(1, 4, 4, 2), {}, {"second_image": seen})
    encoded = torch.stack([MR.encode_case(case), MR.encode_case(case)])
    assert encoded.all()
    dropped = MR.drop(encoded, torch.tensor([[True], [False]]))
    assert torch.equal(dropped[0], MR.encode_case(Case(case.labels, {}))) and torch.equal(dropped[1], encoded[1])
    assert torch.equal(MR.null(encoded), torch.zeros_like(encoded)) and MR.chances({"all": 0.25}).tolist() == [0, 0.25]


def test_an_image_condition_is_plain_values_in_a_bundle() -> None:
    definition = json.loads(json.dumps(plain(ImageMixture(MR, 3) and MR, "image")))
    assert build(definition, "test") == MR
    assert MR.facts() == {"scan": "MR", "kind": "percentile", "lower": 0.5, "upper": 99.5, "units": "arbitrary"}
    with pytest.raises(FibldmError, match="needs latents of data with second images; these have none"):
        ImageEncoding.fit({}, (4, 4, 4))


@pytest.mark.slow
def test_a_network_follows_an_image_in_what_the_mask_leaves_open() -> None:
    """Two kinds of patient with one mask: which it is only the image says, and without it the mean is best."""
    torch.manual_seed(0)
    image = ImageEncoding((2, 2, 2), "mr", PERCENTILES)
    unet = DiffusionModelUNet(in_channels=1 + 1 + 4, out_channels=1, **unet_numbers())
    parts = {"mask": torch.nn.Identity(), "image": ImageMixture(image, 4)}
    network = ConditionedNetwork(unet, channels=parts)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)

    def error(unknown: bool) -> torch.Tensor:
        kind = torch.randint(2, (8, 1, 1, 1, 1)) * 2.0 - 1
        seen = torch.cat([kind, torch.ones_like(kind)], dim=1).expand(8, 2, 8, 8, 8)
        encoded = image.drop_(image.encode(list(seen)), torch.rand(8, 1) < (1.0 if unknown else 0.2))
        given = {"mask": torch.ones(8, 1, 4, 4, 4), "image": encoded}
        made = network(torch.randn(8, 1, 4, 4, 4), torch.full((8,), 999.0), given)
        return F.mse_loss(made, kind.expand_as(made))

    for _ in range(120):
        optimizer.zero_grad()
        error(False).backward()
        optimizer.step()
    with torch.no_grad():
        blind = torch.stack([error(True) for _ in range(8)]).mean()
        seeing = torch.stack([error(False) for _ in range(8)]).mean()
    assert seeing < 0.5 * blind and 0.7 < blind < 1.5


# --- on the model grid


def test_an_image_of_another_grid_lies_where_it_was_and_is_unknown_elsewhere() -> None:
    mr = 100.0 + 400 * ball(MR_SHAPE, MR_AFFINE, 18)
    grid = Grid((40, 32, 32), CT_AFFINE)
    voxels, known = on_grid(Volume(mr, MR_AFFINE), grid, Intensity.from_dict(PERCENTILES))
    bright = np.argwhere(voxels > 0.5).mean(axis=0)
    assert np.abs(nibabel.affines.apply_affine(CT_AFFINE, bright) - PLACE).max() < 1
    reached = nibabel.affines.apply_affine(
        np.linalg.inv(MR_AFFINE) @ CT_AFFINE, np.moveaxis(np.indices(grid.shape), 0, -1)
    )
    inside = ((reached > -0.5) & (reached < np.array(MR_SHAPE) - 0.5)).all(axis=-1)
    assert np.array_equal(known > 0, inside) and 0 < inside.mean() < 1
    assert not voxels[~inside].any() and voxels[inside].min() == -1 and voxels.max() == 1  # its own percentiles


def test_images_of_different_places_are_refused() -> None:
    grid = Grid((32, 32, 32), CT_AFFINE)
    check_overlap(Grid((8, 8, 8), CT_AFFINE), grid)  # a part of it
    away = CT_AFFINE.copy()
    away[2, 3] += 100
    with pytest.raises(FibldmError, match="must show the same place; 22 % of the smaller field of view"):
        check_overlap(Grid((32, 32, 32), away), grid)


def test_an_augmented_view_moves_both_images_alike() -> None:
    """As the image itself is moved, which a second one that equals it shows."""
    moving = RandAffined(
        ["image", "label", "valid"], prob=1.0, rotate_range=[0.3] * 3, translate_range=[3] * 3,
        mode=[5, "nearest", "nearest"], padding_mode=["nearest", "border", "border"],
    )  # fmt: skip
    stage = EncodeStage(
        "run", datalist={}, preprocessing=Compose(), augmentation=Compose([moving]), views=3, facts={}, inputs={},
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    image, valid = MetaTensor(torch.rand(1, 12, 10, 8)), torch.ones(1, 12, 10, 8)
    valid[:, 8:] = 0
    prepared: dict[Any, Any] = {"image": image, "label": (image > 0.5).float(), "valid": valid}
    prepared |= {"second_image": torch.cat([image.as_tensor(), valid])}
    plain_view, first, second = (stage.cache.view(prepared, 0, view) for view in range(3))
    assert torch.equal(plain_view["second_image"], prepared["second_image"])
    for view in (first, second):
        assert torch.equal(view["second_image"], torch.cat([view["image"] * view["valid"], view["valid"]]))
    assert not torch.equal(first["second_image"], second["second_image"])


# --- prepare


def test_prepare_keeps_second_images_on_their_own_grids(work: Path) -> None:
    about = read_json(work / "second_images" / "about.json")
    assert about == {"modality": "mr", "intensity": PERCENTILES}
    cases = load_datalist(work, "training")
    assert about_second_images(cases) == {"second_image": about} and about_second_images(cases[:0]) == {}
    (with_one, *_), (without,) = ([c for c in cases if ("second_image" in c) == there] for there in (True, False))
    stored = read_volume(with_one["second_image"])
    assert np.linalg.det(stored.affine[:3, :3]) > 0 and np.allclose(np.diag(stored.affine)[:3], (5, 3, 3))
    assert stored.array.shape == (28, 40, 38) and without["label"]
    voxels, known = read_on_grid(with_one["second_image"], read_volume(with_one["image"]).grid)
    bright = nibabel.affines.apply_affine(read_volume(with_one["image"]).affine, np.argwhere(voxels > 0.5).mean(axis=0))
    assert np.abs(bright - PLACE).max() < 1 and known.mean() > 0.5
    report = read_json(work / "report.json")["cases"]
    assert len(report[with_one["case"]]["second_sha256"]) == 1 and "second_sha256" not in report[without["case"]]


def test_second_images_belong_to_what_a_work_folder_was_made_of(work: Path, tmp_path: Path) -> None:
    source = work.parent / "cases.csv"
    assert prepare(source, work, SECOND, progress=False).unchanged
    with pytest.raises(FibldmError, match="was prepared otherwise, .* different: `second_modality` mr -> other"):
        other = PrepareSettings(modality="ct", second_modality="other", second_window=(0, 600))
        prepare(source, work, other, progress=False)
    prepare(write_dataset(tmp_path), tmp_path / "all", SECOND, progress=False)
    assert read_datalist(tmp_path / "all")["content"] != read_datalist(work)["content"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PrepareSettings(modality="ct"), "`second_modality` must say what the second images are"),
        (PrepareSettings(modality="ct", second_modality="pet"), "`second_modality` must be one of|unknown"),
        (
            PrepareSettings(modality="ct", second_modality="mr", second_window=(0, 1)),
            "`second_window` is for ct, pt and other",
        ),
        (PrepareSettings(modality="ct", second_modality="other"), "need `second_window`"),
        (PrepareSettings(modality="ct", second_modality="ct"), "second image: a CT must have air|second image: .*HU"),
    ],
)
def test_second_images_of_no_known_kind_are_refused(settings: PrepareSettings, message: str, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match=message):
        prepare(write_dataset(tmp_path), tmp_path / "work", settings, progress=False)


def test_a_second_image_that_is_the_first_or_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="second image: it must be another one than the image; both are the same"):
        prepare(write_dataset(tmp_path, second_image="ct0.nii.gz"), tmp_path / "work", SECOND, progress=False)
    away = MR_AFFINE.copy()
    away[0, 3] += 400
    write_nifti(tmp_path / "away.nii.gz", np.random.default_rng(0).random(MR_SHAPE, np.float32), away)
    with pytest.raises(FibldmError, match="second image: a second image must show the same place; 0 %"):
        prepare(write_dataset(tmp_path, second_image="away.nii.gz"), tmp_path / "work", SECOND, progress=False)
    with pytest.raises(FibldmError, match="gone.nii.gz does not exist"):
        prepare(write_dataset(tmp_path, second_image="gone.nii.gz"), tmp_path / "work", SECOND, progress=False)


# --- what is asked


def test_the_scan_asked_for_is_what_training_saw(work: Path) -> None:
    """The file of the dataset, in its own axis order, as the one that was prepared."""
    case = load_datalist(work, "test")[0]
    grid = read_volume(case["image"]).grid
    kinds = {"image": ImageEncoding((4, 4, 4), "mr", PERCENTILES)}
    own = kinds["image"].own(known_cases(work)[Path(case["label"])])
    source = work.parent / "mr4.nii.gz"
    volume = Volume(np.asarray(nibabel.load(source).dataobj), MR_AFFINE)
    asked = [read(kinds, {"image": value})["image"] for value in (own, str(source), volume)]
    seen = [kinds["image"].place(value, grid).voxels for value in asked]
    assert torch.equal(seen[0], torch.from_numpy(read_on_grid(case["second_image"], grid)))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    placed = kinds["image"].place(asked[1], grid)
    assert kinds["image"].recorded(placed) == {"name": "mr4.nii.gz", "sha256": hash_file(source)}
    assert kinds["image"].recorded(kinds["image"].place(None, grid)) is None
    assert not kinds["image"].encode([kinds["image"].place(None, grid)]).any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gone.nii.gz", "an image must be a file, or a folder with one series; .*does not exist"),
        (3, "must be a Volume"),
        ("flat.nii.gz", "image flat.nii.gz: it must not be constant"),
        ("away.nii.gz", "image away.nii.gz: a second image must show the same place; 0 %"),
        ("four.nii.gz", "image four.nii.gz: it must be one image"),
    ],
)
def test_scans_that_cannot_be_followed_are_refused(asked: Any, message: str, tmp_path: Path) -> None:
    voxels, away = np.random.default_rng(0).random((8, 8, 8), np.float32), CT_AFFINE + 0
    away[:3, 3] += 500
    write_nifti(tmp_path / "flat.nii.gz", np.ones((8, 8, 8), np.float32), CT_AFFINE)
    write_nifti(tmp_path / "away.nii.gz", voxels, away)
    write_nifti(tmp_path / "four.nii.gz", np.stack([voxels] * 2, axis=-1), CT_AFFINE)
    with pytest.raises(FibldmError, match=message):
        scan = AskedScan.open(tmp_path / asked if isinstance(asked, str) else asked)
        MR.place(scan, Grid((8, 8, 8), CT_AFFINE))


def test_scans_of_a_table_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("mask,image\na.nii.gz,mr.nii.gz\nb.nii.gz,\n")
    table = ConditionsTable.read(tmp_path / "table.csv")
    assert table.of(Path("a.nii.gz"), {"image": MR}) == {"image": tmp_path / "mr.nii.gz"}
    assert table.only([Path("b.nii.gz")]).of(Path("b.nii.gz"), {"image": MR}) == {"image": None}


# --- all the way


@pytest.mark.slow
def test_an_image_goes_from_a_table_to_volumes(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = tmp_path / "run", data_file(tmp_path, 4.0, 32, 32, 32)
    for stage, more in (("autoencoder", ()), ("latents", ()), ("diffusion", ("mask_concat", "image"))):
        views = {"views": 2} if stage == "latents" else {}
        tiny_configuration(stage, work, run, data, "tiny", *more, **views).run()
    latents = Latents.open(run)
    cached = [load_file(item["file"]) for item in latents.items("training")]
    assert [("second_image" in part) for part in cached].count(True) == 4 and len(cached) == 6
    case = load_datalist(work, "test")[0]
    synthesizer, mask = Synthesizer.from_run(run), read_volume(case["label"])
    scan = work.parent / "mr4.nii.gz"

    def drawn(given: Synthesizer, **asked: Any) -> np.ndarray:
        made = given(mask, name="m", steps=1, allow_extrapolation=True, conditions=asked)
        return np.asarray(made.volume.array)

    followed = drawn(synthesizer, image=scan)
    assert not np.array_equal(followed, drawn(synthesizer))
    assert np.array_equal(followed, drawn(synthesizer, image=case["second_image"]))

    export(run, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    kept = read_json(tmp_path / "bundle" / GENERATOR)
    assert kept["conditions"]["image"]["intensity"] == PERCENTILES
    assert "by `--image SCAN`" in (tmp_path / "bundle" / "docs" / "README.md").read_text()
    assert np.array_equal(drawn(Synthesizer.from_bundle(tmp_path / "bundle"), image=scan), followed)

    def command(out: str, *words: str) -> dict[str, Any]:
        options = ["--steps=1", "--allow-extrapolation", "--device=cpu", "--out", str(tmp_path / out), "--json"]
        assert cli(["synthesize", "--run", str(run), *options, *words]) == 0
        (file,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
        return dict(read_json(sidecar(Path(file))))["conditions"] | {"file": file}

    by_option = command("one", "--masks", case["label"], "--image", str(scan))
    assert by_option["image"] == {"name": "mr4.nii.gz", "sha256": hash_file(scan)}
    assert str(tmp_path) not in json.dumps(by_option["image"])
    own = command("two", "--data", str(work), "--own-conditions")
    assert own["image"]["name"] == f"{case['case']}.nii.gz"
    one, two = (read_volume(part["file"]).array for part in (by_option, own))
    assert np.array_equal(one, two)
    free = command("three", "--unconditional", "--image", str(scan))
    assert read_volume(free["file"]).array.shape == (28, 40, 38)  # on the grid of the image, RAS+
