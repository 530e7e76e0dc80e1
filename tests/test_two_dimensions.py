"""Slices: cut out of volumes, and through every stage with networks in two dimensions."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from builders import STAGES, data_file, tiny_configuration
from monai.bundle import ConfigParser
from PIL import Image
from safetensors.torch import load_file

from fibldm import UNKNOWN_LABEL
from fibldm.cli import run
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.slices import heights, relative_position, write_slices
from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import evaluate
from fibldm.evaluation.memorisation import TrainingDetails, detail_of
from fibldm.evaluation.ms_ssim import ms_ssim, scale_weights
from fibldm.evaluation.radiomics import gradient_magnitude
from fibldm.evaluation.segmentation_metrics import hd95
from fibldm.evaluation.spectrum import frequency_edges, radial_spectrum
from fibldm.files import read_json
from fibldm.runs import StageFolder
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration
from fibldm.runs.stages import TABLE
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.grid import Grid, ModelGrid

SliceStage = Callable[..., Configuration]

GRID = ModelGrid((1.0, 2.0, 5.0), (32, 16, 1))


@pytest.fixture(scope="module")
def slices_work(phantom_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of slices of the phantoms."""
    folder = tmp_path_factory.mktemp("slices")
    write_slices(phantom_work, folder / "source", every=40)
    prepare(folder / "source", folder / "work", PrepareSettings(modality="ct"), progress=False)
    return folder / "work"


@pytest.fixture(scope="module")
def slice_stage(slices_work: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceStage:
    """Makes the configuration of a stage with tiny networks, on a model grid of one slice."""
    data = data_file(tmp_path_factory.mktemp("configs"), 10.0, 32, 32, 1)

    def configuration(stage: str, run_dir: Path, *configs: str, **overrides: Any) -> Configuration:
        return tiny_configuration(stage, slices_work, run_dir, data, *configs, "tiny", **overrides)

    return configuration


@pytest.fixture(scope="module")
def slice_run(slice_stage: SliceStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of slices with every stage trained for an epoch."""
    run_dir = tmp_path_factory.mktemp("runs") / "slices"
    changes: dict[str, dict[str, Any]] = {"autoencoder": {"preview_every": 1}, "latents": {"views": 2}}
    for stage in STAGES:
        slice_stage(stage, run_dir, **changes.get(stage, {})).run()
    return run_dir


# --- cutting


@pytest.mark.parametrize(
    ("spacing", "count", "every", "expected"),
    [
        (2.0, 11, 8.0, [1, 5, 9]),
        (2.0, 9, 8.0, [0, 4, 8]),
        (5.0, 3, 1.0, [0, 1, 2]),
        (1.5, 10, 4.0, [0, 3, 5, 8]),
        (5.0, 4, 100.0, [1]),
        (5.0, 1, 10.0, [0]),
    ],
)
def test_slices_are_as_far_apart_as_asked_and_lie_in_the_middle(
    spacing: float, count: int, every: float, expected: list[int]
) -> None:
    assert heights(spacing, count, every) == expected


def test_slices_are_cut_where_there_are_labels() -> None:
    label = np.zeros((3, 2, 20), dtype=np.uint8)
    label[1, 0, 6], label[2, 1, 14], label[:, :, 18:] = 2, 1, UNKNOWN_LABEL
    assert heights(1.0, 20, 4.0, label) == [6, 10, 14]
    assert heights(10.0, 3, 10.0, np.zeros((3, 2, 3), dtype=np.uint8)) == [0, 1, 2]


def test_a_slice_lies_where_it_lay_in_its_volume(phantom_work: Path, slices_work: Path) -> None:
    volumes = {entry["case"]: entry for split in SPLITS for entry in load_datalist(phantom_work, split)}
    slices = [entry for split in SPLITS for entry in load_datalist(slices_work, split)]
    assert len(slices) > 3 * len(volumes)
    for entry in slices[::5]:
        case, _, number = entry["case"].rpartition("_z")
        for key in ("image", "label"):
            one, whole = nibabel.load(entry[key]), nibabel.load(volumes[case][key])
            assert np.array_equal(one.get_fdata()[..., 0], whole.get_fdata()[..., int(number)])
            at = nibabel.affines.apply_affine(whole.affine, [3, 5, int(number)])
            assert np.allclose(nibabel.affines.apply_affine(one.affine, [3, 5, 0]), at, atol=1e-4)
            assert np.allclose(one.header.get_zooms(), whole.header.get_zooms())


def test_all_slices_of_a_patient_are_in_the_split_of_its_volumes(phantom_work: Path, slices_work: Path) -> None:
    def patients(work: Path) -> dict[str, set[str]]:
        """Names of the volumes by split; a phantom's name says its patient."""
        return {split: {entry["case"].partition("_z")[0] for entry in load_datalist(work, split)} for split in SPLITS}

    assert patients(slices_work) == patients(phantom_work)
    by_subject = defaultdict(set)
    for split in SPLITS:
        for entry in load_datalist(slices_work, split):
            by_subject[entry["subject"]].add((split, entry["case"][:8]))
    assert all(len(found) == 1 for found in by_subject.values())


def test_a_slice_knows_its_place_in_its_volume(phantom_work: Path, slices_work: Path) -> None:
    counts = {
        e["case"]: nibabel.load(e["image"]).shape[2] for split in SPLITS for e in load_datalist(phantom_work, split)
    }
    for split in SPLITS:
        for entry in load_datalist(slices_work, split):
            volume, _, index = entry["case"].rpartition("_z")
            assert entry["position"] == pytest.approx(int(index) / (counts[volume] - 1), abs=1e-4)
    assert relative_position(0, 1) == 0.5


def test_the_command_cuts_and_says_how_to_go_on(
    phantom_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slices"
    assert run(["slices", str(phantom_work), "--out", str(out), "--every", "80", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["slices"] == len(list((out / "slices").iterdir())) == len(list((out / "masks").iterdir()))
    command = f"fibldm prepare {out} --out {out}_work --modality ct --window -1000 1000"
    assert said["next"] == command
    assert run([*command.split()[1:], "--workers", "1"]) == 0
    assert "anisotropic" not in capsys.readouterr().err
    before, after = read_json(phantom_work / "datalist.json"), read_json(Path(f"{out}_work") / "datalist.json")
    for key in ("labels", "channels", "modality", "licence", "name"):
        assert after[key] == before[key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0.0}, "`every` must be a length above 0 in mm; got 0"),
        ({"out": "full"}, "the folder must be empty or absent; .*full is not"),
        ({"work": "none"}, "datalist.json must exist"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    phantom_work: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    work = tmp_path / changes["work"] if "work" in changes else phantom_work
    with pytest.raises(FibldmError, match=message):
        write_slices(work, tmp_path / changes.get("out", "out"), every=changes.get("every", 10.0))


# --- the model grid


def grid_of(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    return Grid(shape, np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("thickness", [1.0, 5.0, 30.0])
def test_the_thickness_of_a_slice_is_its_own(thickness: float) -> None:
    source = grid_of((30, 15, 1), (1.05, 2.0, thickness))
    for target in (GRID.training_grid(source), GRID.synthesis_grid(source, [16, 16, 4])):
        assert target.shape == (32, 16, 1)
        assert target.spacing == pytest.approx(source.spacing)
    coarse = GRID.training_grid(grid_of((15, 30, 1), (2.0, 1.0, thickness)))
    assert coarse.shape == (32, 16, 1)
    assert coarse.spacing == pytest.approx((1.0, 2.0, thickness))
    assert coarse.centre == pytest.approx([14.0, 14.5, 0.0])
    assert GRID.synthesis_grid(grid_of((40, 15, 1), (1.0, 2.0, thickness)), 16).shape == (48, 16, 1)


def test_a_model_grid_of_one_slice_refuses_volumes() -> None:
    source = grid_of((32, 16, 4), (1.0, 2.0, 5.0))
    for call in (GRID.training_grid, lambda grid: GRID.synthesis_grid(grid, 16)):
        with pytest.raises(FibldmError, match=r"takes single axial slices; the size is \(32, 16, 4\)") as raised:
            call(source)
        assert "fibldm slices" in str(raised.value.remedy)


# --- every stage


def test_every_stage_runs_on_slices(slice_run: Path, slices_work: Path, tmp_path: Path) -> None:
    """Stage 1 to synthesis with networks of two dimensions, by the configurations of volumes."""
    facts = read_json(slice_run / "latents" / "latents.json")
    assert facts["compression"] == [4, 4, 1]
    for stage in ("autoencoder", "diffusion", "controlnet"):
        weights = StageFolder(slice_run, stage).weights()["model"]
        assert {value.ndim for name, value in weights.items() if "conv" in name and value.ndim > 1} == {4}
    entry = load_datalist(slices_work, "test")[0]
    settings = SamplingSettings(steps=2)
    (path,) = synthesize_files(slice_run, [entry["label"]], tmp_path, count=1, settings=settings, device="cpu")
    made, asked = nibabel.load(path), nibabel.load(entry["label"])
    assert made.shape == asked.shape
    assert np.allclose(made.affine, asked.affine, atol=1e-4)


def test_slices_have_a_discriminator_of_patches(slice_stage: SliceStage, tmp_path: Path) -> None:
    """Of two dimensions; one of slices along three axes makes no sense of them."""
    begun = {"discriminator_start": 0, "discriminator_layers": 1, "discriminator_channels": 4}
    slice_stage("autoencoder", tmp_path / "patches", "autoencoder_adversarial", **begun).run()
    assert StageFolder(tmp_path / "patches", "autoencoder").require()["epochs"] == 1
    of_slices = {**begun, "volume_adversarial_weight": 0.0, "slice_adversarial_weight": 0.1}
    with pytest.raises(FibldmError, match="slices along three axes need volumes; these are single slices"):
        slice_stage("autoencoder", tmp_path / "slices", "autoencoder_adversarial", **of_slices).run()


def test_views_of_a_slice_stay_in_its_plane(slice_run: Path) -> None:
    items = read_json(slice_run / "latents" / "latents.json")["items"]["training"]
    stored = [load_file(slice_run / "latents" / item["file"]) for item in items]
    assert {part["mean"].shape for part in stored} == {(4, 8, 8, 1)}
    lungs = [int(((part["labels"] == 1) | (part["labels"] == 2)).sum()) for part in stored]
    largest = max(range(0, len(lungs), 2), key=lungs.__getitem__)  # plain views and augmented ones take turns
    assert 0.7 < lungs[largest + 1] / lungs[largest] < 1.4
    assert not torch.equal(stored[largest]["labels"], stored[largest + 1]["labels"])


def test_pictures_show_the_plane_of_a_slice_only(slice_run: Path) -> None:
    with Image.open(slice_run / "autoencoder" / "previews" / "epoch_0001.png") as picture:
        assert picture.width < 2 * picture.height  # two rows of three panels, and not of nine
    with Image.open(slice_run / "latents" / "interpolation.png") as picture:
        assert picture.width > 3 * picture.height  # one row


@pytest.mark.slow
def test_slices_are_measured(slice_run: Path, slices_work: Path, tmp_path: Path) -> None:
    masks = [entry["label"] for split in SPLITS[1:] for entry in load_datalist(slices_work, split)]
    settings = SamplingSettings(steps=1)
    synthesize_files(slice_run, masks, tmp_path, count=1, settings=settings, device="cpu", allow_extrapolation=True)
    sections = evaluate(
        ["faithfulness", "realism", "reconstruction", "copies", "audit"],
        run_dir=slice_run,
        work=slices_work,
        synthetic=tmp_path,
        segmenter_settings={"steps": 4, "segmenter_channels": [4, 8, 8], "precision": "float32"},
        device="cpu",
    )
    for name, figure in {
        "faithfulness": "dice",
        "realism": "spectrum",
        "reconstruction": "ssim",
        "copies": "nearest_training_similarity",
    }.items():
        value = sections[name].figures[figure].value
        assert value is not None
        assert np.isfinite(value)


@pytest.mark.slow
def test_slices_from_contours_by_the_presets(slice_stage: SliceStage, slices_work: Path, tmp_path: Path) -> None:
    """Latents of 8 channels, contours as input channels, cosine schedule; no ControlNet."""
    presets = {"autoencoder": ["autoencoder_slices"], "latents": [], "diffusion": ["mask_contour_slices"]}
    changes: dict[str, Any] = {"autoencoder": {"autoencoder_channels": [8, 8, 8, 8], "patch": [64, 64, 1]}}
    for stage, configs in presets.items():
        slice_stage(stage, tmp_path / "run", *configs, size=[64, 64, 1], **changes.get(stage, {})).run()
    facts = read_json(tmp_path / "run" / "latents" / "latents.json")
    assert (facts["compression"], len(facts["space"]["mean"])) == ([16, 16, 1], 8)
    assert StageFolder(tmp_path / "run", "diffusion").component("process").schedule == "cosine"
    mask = load_datalist(slices_work, "test")[0]["label"]
    settings = SamplingSettings(steps=2, guidance=2.0)
    (path,) = synthesize_files(
        tmp_path / "run", [mask], tmp_path / "out", count=1, settings=settings, device="cpu", allow_extrapolation=True
    )
    assert nibabel.load(path).shape[2] == 1


def test_the_preset_makes_16_x_16_cells_of_8_channels_of_256_x_256_voxels() -> None:
    names = ("common", *TABLE["autoencoder"].files, "data_chest_slices", "autoencoder_slices")
    parser = ConfigParser(ConfigParser.load_config_files([str(shipped(name)) for name in names]))
    parser["image_channels"] = 1
    network = parser.get_parsed_content("network_def")
    assert network.compression == (16, 16, 1)
    assert network.encode(torch.zeros(1, 1, 256, 256, 1)).mean.shape == (1, 8, 16, 16, 1)


# --- what measures


def test_a_slice_is_measured_in_its_plane() -> None:
    """What is told of a slice is what the same functions tell of two axes, or of a volume that repeats it."""
    rng = np.random.default_rng(0)
    image, other = (rng.normal(size=(40, 48, 1)).astype(np.float32) for _ in range(2))
    repeated = np.repeat(image, 3, axis=2)
    spacing = (1.5, 2.0, 30.0)
    in_plane = gradient_magnitude(repeated, spacing)[:, :, 1:2]
    assert np.allclose(gradient_magnitude(image, spacing), in_plane, atol=1e-6)
    assert scale_weights((40, 48, 1)) == scale_weights((40, 48, 48))
    assert ms_ssim(image, image) == pytest.approx(1.0)
    assert ms_ssim(image, other) < 0.5
    edges = frequency_edges((40, 48, 1), spacing)
    assert edges.tolist() == frequency_edges((40, 48, 100), (1.5, 2.0, 2.0)).tolist()
    flat = 10 ** radial_spectrum(image, spacing, edges=edges) / np.prod(spacing)
    assert flat.mean() == pytest.approx(1.0, rel=0.1)  # white noise


def test_distances_in_a_slice_are_between_outlines() -> None:
    """A disc in a larger one: from outline to outline, as in a volume whose slices are all alike."""
    x, y = np.indices((41, 41)) - 20
    small, large = (np.hypot(x, y) <= radius for radius in (6, 12))
    found, wanted = small[..., None], large[..., None]
    assert hd95(found, wanted, (2.0, 2.0, 50.0)) == pytest.approx(12.0, abs=1.5)
    assert hd95(np.zeros_like(found), wanted, (2.0, 2.0, 5.0)) == pytest.approx(np.hypot(82, 82), abs=0.5)


def test_a_copy_that_was_shifted_in_its_plane_is_found() -> None:
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(24, 20, 1)).astype(np.float32) for _ in range(3)]
    cases: Any = ["a", "b", "c"]
    known = TrainingDetails.of(cases, [detail_of(image) for image in images])
    found = known.nearest(cases[0], detail_of(np.roll(images[1], (2, -1), axis=(0, 1))))
    assert found.training == "b"
    assert found.similarity > 0.9
