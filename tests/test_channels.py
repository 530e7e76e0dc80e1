"""Images of several channels, and cases without a mask, from the work folder to what is measured."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from builders import STAGES, data_file, tiny_configuration, write_nifti
from monai.transforms import LoadImaged
from numpy.typing import NDArray
from safetensors import safe_open

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, each_channel
from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS, evaluate
from fibldm.evaluation.memorisation import TrainingDetails, detail_of
from fibldm.evaluation.reconstruction import Reconstructor, image_quality
from fibldm.files import read_json, write_json
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import Synthesizer
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.intensity import NormaliseIntensityd
from fibldm.volumes.transforms import ToModelGridd

SPLIT = {"training": 3, "validation": 1, "test": 2}
SHAPE = (18, 22, 26)
# oblique, anisotropic, and stored right to left
AFFINE = np.array([[-3.9, 0.3, 0.0, 60.0], [0.3, 4.1, 0.2, -41.0], [0.0, -0.2, 4.0, 12.0], [0.0, 0.0, 0.0, 1.0]])

Array = NDArray[np.float32]
Stage = Callable[..., Configuration]


def anatomy(number: int) -> NDArray[np.uint8]:
    """A large label and a small one within it, off the centre."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, length) for length in SHAPE), indexing="ij")
    labels = ((x / 0.7) ** 2 + ((y - 0.02 * number) / 0.8) ** 2 + (z / 0.6) ** 2 < 1).astype(np.uint8)
    labels[(x - 0.2) ** 2 + (y + 0.1) ** 2 + (z - 0.02 * number) ** 2 < 0.12] = 2
    return labels


def scan(number: int) -> Array:
    """``(X, Y, Z, 2)``: the first channel shows the large label, the second, far brighter, the small one."""
    drawn = np.random.default_rng(number).normal(0, 0.05, (*SHAPE, 2))
    shown = np.stack([anatomy(number) > 0, 0.3 * (anatomy(number) > 0) + (anatomy(number) == 2)], axis=-1)
    return np.float32((shown + drawn) * (10, 1000))


def write_work(work: Path) -> Path:
    """A work folder of two-channel MR scans."""
    splits: dict[str, list[dict[str, str]]] = {}
    names = iter(range(sum(SPLIT.values())))
    for split, count in SPLIT.items():
        splits[split] = []
        for number in (next(names) for _ in range(count)):
            entry = {"image": f"images/p{number}.nii.gz", "label": f"labels/p{number}.nii.gz"}
            write_nifti(work / entry["image"], scan(number), AFFINE)
            write_nifti(work / entry["label"], anatomy(number), AFFINE)
            splits[split].append({**entry, "case": f"p{number}", "subject": f"s{number}"})
    envelope: dict[str, object] = {
        name: {"min": [1.0] * 3, "max": [200.0] * 3} for name in ("spacing_mm", "field_of_view_mm")
    }
    envelope["label_volume_ml"] = {value: {"min": 1.0, "max": 1e4} for value in ("1", "2")}
    facts = {"name": "two channels", "licence": None, "modality": "mr", "channels": ["T1", "FLAIR"]}
    labels = {"0": "background", "1": "brain", "2": "lesion"}
    write_json(work / "datalist.json", {**facts, "labels": labels, "envelope": envelope, "content": "c" * 64, **splits})
    output = {"output_low": [-1.0, -100.0], "output_high": [11.0, 1200.0]}
    cases = {
        entry["case"]: {"label_volume_ml": volumes_ml(work / entry["label"])}
        for part in splits.values()
        for entry in part
    }
    write_json(work / "report.json", {"cases": cases})
    write_json(work / "intensity.json", {"kind": "percentile", "lower": 0.5, "upper": 99.5, **output})
    return work


def volumes_ml(label: Path) -> dict[str, float]:
    image = nibabel.Nifti1Image.from_filename(label)
    values, counts = np.unique(np.asarray(image.dataobj), return_counts=True)
    voxel = float(abs(np.linalg.det(image.affine[:3, :3]))) / 1000
    return {str(int(value)): count * voxel for value, count in zip(values, counts.tolist(), strict=True)}


def without_masks(work: Path, copy: Path, *splits: str, but: int = 0) -> Path:
    """A copy of a work folder in which all but the first few cases of some splits have no mask."""
    shutil.copytree(work, copy)
    content, report = read_json(copy / "datalist.json"), read_json(copy / "report.json")
    for split in splits:
        for entry in content[split][but:]:
            (copy / entry.pop("label")).unlink()
            report["cases"][entry["case"]]["label_volume_ml"] = None
    write_json(copy / "report.json", report)
    write_json(copy / "datalist.json", content)
    return copy


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training cases, one validation case, two test cases."""
    return write_work(tmp_path_factory.mktemp("channels") / "work")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The configuration of a stage at the smallest size: ``stage(name, work, run)``."""
    data = data_file(tmp_path_factory.mktemp("configs"), 4.0, 32, 32, 32)

    def configuration(name: str, work: Path, run: Path, **more: object) -> Configuration:
        return tiny_configuration(name, work, run, data, "tiny", **more)

    return configuration


@pytest.fixture(scope="module")
def run(work: Path, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage trained for an epoch on two channels."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for name in STAGES:
        stage(name, work, folder).run()
    return folder


@pytest.fixture
def evaluated(work: Path, run: Path, tmp_path: Path) -> Evaluated:
    shutil.copytree(run, tmp_path / "run")
    return Evaluated.open(tmp_path / "run", work)


# --- several channels


def test_two_channels_go_through_every_stage(run: Path) -> None:
    facts = read_json(run / "latents" / "latents.json")
    assert facts["channels"] == ["T1", "FLAIR"]
    assert facts["intensity"]["output_high"] == [11.0, 1200.0]
    assert len(facts["items"]["training"]) == SPLIT["training"]
    # as where the data are not: the number of channels stands in the run
    network = StageFolder(run, "autoencoder").trained(work="absent")
    first_stage = FrozenFirstStage(network)
    mean = first_stage.encode(torch.zeros(1, 2, 32, 32, 32)).mean
    assert mean.shape == (1, 4, 8, 8, 8)
    assert first_stage.decode(mean).shape == (1, 2, 32, 32, 32)
    assert StageFolder(run, "controlnet").trained().unet.conv_in.conv.in_channels == 4


def test_a_scan_is_measured_as_training_saw_it(evaluated: Evaluated) -> None:
    case = evaluated.real("test")[0]
    item: dict = {"image": str(case.image), "label": str(case.label)}
    for transform in (
        LoadImaged(["image", "label"], reader="NibabelReader", ensure_channel_first=True),
        NormaliseIntensityd(["image"], intensity=evaluated.intensity),
        ToModelGridd(evaluated.grid),
    ):
        item = transform(item)
    sample = evaluated.read(case)
    assert sample.image.shape == (2, 32, 32, 32)
    np.testing.assert_allclose(sample.image, item["image"], atol=1e-6)
    np.testing.assert_array_equal(sample.labels, item["label"][0])
    np.testing.assert_array_equal(sample.valid, item["valid"][0])
    large, small = (float(sample.image[channel][sample.labels == 2].mean()) for channel in range(2))
    assert large > 0.6 and small > 0.6
    assert float(sample.image[1][sample.labels == 1].mean()) < -0.1 < 0.6 < sample.image[0][sample.labels == 1].mean()


@pytest.mark.slow
def test_everything_is_measured_of_two_channels(evaluated: Evaluated, tmp_path: Path) -> None:
    """Scans of the test patients in the place of volumes, and one of a training patient."""
    folder = tmp_path / "synthetic"
    (folder / "masks").mkdir(parents=True)
    for case in (*evaluated.real("test"), evaluated.real("training")[0]):
        shutil.copy(case.image, folder / f"{case.name}_000.nii.gz")
        shutil.copy(case.label, folder / "masks" / f"{case.name}.nii.gz")  # type: ignore[arg-type]
    sections = evaluate(
        [*DEFAULT_MEASUREMENTS, "copies"],
        run_dir=evaluated.run_dir,
        work=evaluated.work,
        synthetic=folder,
        segmenter_settings={"steps": 2, "segmenter_channels": [4, 8, 8], "batch_size": 1},
        device="cpu",
        say=lambda text: None,
    )
    copies = {row["case"]: row for row in sections["copies"].cases}
    assert copies["p0_000"]["similarity"] > 0.99 > 0.5 > copies["p4_000"]["similarity"]
    assert copies["p0_000"]["named"]
    assert sections["realism"].figures["spectrum"].value == sections["realism"].figures["spectrum"].real_vs_real
    assert sections["realism"].facts["extractors"]["radiomics"]["features"] == 2 * 3 * 9
    row = next(row for row in sections["reconstruction"].cases if row["case"] == "p4")
    sample = evaluated.read(evaluated.real("test")[0])
    made = np.where(sample.valid, Reconstructor.from_run(evaluated.run_dir)(sample.image), sample.image)
    parts = [image_quality(a, b, {"": sample.valid}) for a, b in zip(sample.image, made, strict=True)]
    assert parts[0]["mae"] != parts[1]["mae"]
    assert row["mae"] == pytest.approx((parts[0]["mae"] + parts[1]["mae"]) / 2)
    assert (evaluated.folder / "reconstruction.png").stat().st_size > 0


def test_a_copy_with_its_channels_swapped_is_none() -> None:
    generator = np.random.default_rng(0)
    scans = [generator.standard_normal((2, 20, 21, 22)).astype(np.float32) for _ in range(4)]
    cases = [Case(f"p{n}", f"s{n}", "training", Path(), None) for n in range(4)]
    known = TrainingDetails.of(cases, [detail_of(one) for one in scans])
    moved = np.roll(scans[2], 1, axis=3)
    assert known.nearest(cases[0], detail_of(moved)).training.name == "p2"
    assert known.nearest(cases[0], detail_of(moved)).similarity > 0.9
    assert known.nearest(cases[0], detail_of(moved[::-1].copy())).similarity < 0.3


def test_the_details_of_two_channels_are_those_of_each() -> None:
    image = np.random.default_rng(1).standard_normal((2, 70, 9, 8)).astype(np.float32)
    both = detail_of(image)
    assert both.shape == (2, 64, 9, 8)
    for channel, alone in zip(both, each_channel(image), strict=True):
        np.testing.assert_allclose(channel, detail_of(alone), atol=1e-6)


def test_a_scan_with_other_channels_than_the_run_is_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    write_nifti(tmp_path / "one.nii.gz", scan(0)[..., 0], AFFINE)
    with pytest.raises(FibldmError, match=r"one\.nii\.gz must hold 2 channels, as \(X, Y, Z, C\); its shape is"):
        evaluated.read(Case("one", "one", None, tmp_path / "one.nii.gz", None))
    whole = evaluated.real("test")[0].image.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:-4])
    with pytest.raises(FibldmError, match=r"cut\.nii\.gz cannot be read to its last byte"):
        evaluated.read(Case("cut", "cut", None, tmp_path / "cut.nii.gz", None))


def test_a_work_folder_from_before_channels_had_names_has_one(work: Path, tmp_path: Path) -> None:
    content = read_json(work / "datalist.json")
    del content["channels"]
    write_json(tmp_path / "datalist.json", content)
    assert read_datalist(tmp_path)["channels"] == ["image"]
    assert read_datalist(work)["channels"] == ["T1", "FLAIR"]


# --- cases without a mask


def test_cases_without_a_mask_are_for_the_autoencoder_only(work: Path, stage: Stage, tmp_path: Path) -> None:
    mixed = without_masks(work, tmp_path / "work", "training", but=1)
    folder = tmp_path / "run"
    stage("autoencoder", mixed, folder).run()
    stage("latents", mixed, folder).run()
    seen = (folder / "autoencoder" / "metrics.csv").read_text().splitlines()[1].split(",")[1]
    assert int(seen) == 2  # batches of two of the three cases
    items = read_json(folder / "latents" / "latents.json")["items"]
    assert [item["case"] for item in items["training"]] == ["p0"]
    assert [item["case"] for item in items["validation"]] == ["p3"]
    assert [case.name for case in Evaluated.open(folder, mixed).real("training")] == ["p0"]
    assert [entry["case"] for entry in load_datalist(mixed, "training")] == ["p0", "p1", "p2"]
    assert ["label" in entry for entry in load_datalist(mixed, "training")] == [True, False, False]


@pytest.mark.parametrize(("split", "count"), [("training", 3), ("validation", 1)])
def test_without_any_mask_only_the_autoencoder_trains(
    work: Path, run: Path, stage: Stage, tmp_path: Path, split: str, count: int
) -> None:
    bare = without_masks(work, tmp_path / "work", split)
    message = rf"needs {split} cases with a mask; none of the {count} in {bare} has one; .* masks_only=false"
    shutil.copytree(run / "autoencoder", tmp_path / "run" / "autoencoder")
    for name in ("latents", "segmenter"):
        with pytest.raises(FibldmError, match=message):
            stage(name, bare, tmp_path / "run").run()
    assert not (tmp_path / "run" / "latents").exists()


def test_without_masks_all_stages_of_an_unconditional_generator_train(
    work: Path, run: Path, stage: Stage, tmp_path: Path
) -> None:
    bare, folder = without_masks(work, tmp_path / "work", "training", "validation", but=0), tmp_path / "run"
    shutil.copytree(run / "autoencoder", folder / "autoencoder")
    stage("latents", bare, folder, masks_only=False).run()
    latents = read_json(folder / "latents" / "latents.json")
    with safe_open(folder / "latents" / latents["items"]["training"][0]["file"], framework="np") as content:
        assert set(np.unique(content.get_tensor("labels"))) == {UNKNOWN_LABEL}
    stage("diffusion", bare, folder).run()
    made = Synthesizer.from_run(folder, unconditional=True)(seed=1, steps=1)
    assert [volume.array.shape for volume in made.channels] == [(32, 32, 32)] * 2
    assert all(np.isfinite(volume.array).all() for volume in made.channels)


def test_scans_without_masks_are_not_measured(work: Path, run: Path, tmp_path: Path) -> None:
    bare = without_masks(work, tmp_path / "work", "test")
    with pytest.raises(FibldmError, match="this step needs test cases with a mask; none of the 2 in"):
        Evaluated.open(run, bare).real("test")
