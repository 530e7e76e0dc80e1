"""Copies of training scans among synthetic volumes."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from scipy import ndimage, stats

from fibldm.datasets.preparation import prepare
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.memorisation import TrainingDetails, detail_of, measure_copies
from fibldm.evaluation.results import Section
from fibldm.phantoms.phantoms import LABELS, make_phantom, write_phantoms
from fibldm.volumes.grid import ModelGrid
from fibldm.volumes.intensity import Intensity


class Smoothing:
    """Stands in for an autoencoder, which loses detail of about a voxel."""

    fingerprint = "smoothing"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.calls += 1
        return ndimage.gaussian_filter(image, 0.6)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Evaluated:
    """Phantoms of fourteen patients, the middle 24 cm of them, and an empty run."""
    folder = tmp_path_factory.mktemp("copies")
    write_phantoms(folder / "source", subjects=14, seed=5, progress=iter)
    prepare(folder / "source", folder / "work", progress=False)
    grid = ModelGrid((6.0, 6.0, 6.0), (40, 40, 40))
    return Evaluated(folder / "run", folder / "work", grid, Intensity("window"), LABELS)


def measure(evaluated: Evaluated, folder: Path, reconstruct=None) -> Section:
    synthetic = evaluated.synthetic(folder)
    return measure_copies(evaluated, synthetic, pictures=folder / "pictures", reconstruct=reconstruct or Smoothing())


def plant(case: Case, folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    shutil.copy(case.image, folder / f"{name}_000.nii.gz")


def named(section: Section) -> dict[str, str]:
    return {case["case"]: case["nearest"] for case in section.cases if case["named"]}


@pytest.fixture(scope="module")
def planted(evaluated, tmp_path_factory) -> Path:
    """Three training scans, every held-out scan, and patients of two other seeds."""
    folder = tmp_path_factory.mktemp("planted")
    for number, case in enumerate(evaluated.real("training")[1:8:3]):
        plant(case, folder, f"planted-{number}")
    for case in evaluated.real("validation", "test"):
        plant(case, folder, f"held-out-{case.name}")
    for seed, subject in itertools.product((21, 22), (1, 2)):
        phantom = make_phantom(seed, subject)
        image = nibabel.Nifti1Image(phantom.volume, phantom.affine)
        nibabel.save(image, folder / f"other-{seed}-{subject}_000.nii.gz")
    return folder


@pytest.fixture(scope="module")
def section(evaluated, planted) -> Section:
    return measure(evaluated, planted)


def test_planted_training_scans_are_named_and_no_other_patient_is(evaluated, planted, section):
    sources = [case.name for case in evaluated.real("training")[1:8:3]]
    assert named(section) == {f"planted-{number}_000": source for number, source in enumerate(sources)}
    similarities = {case["case"]: case["similarity"] for case in section.cases}
    assert [similarities[f"planted-{number}_000"] for number in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    closest_test = max(similarities[f"held-out-{case.name}_000"] for case in evaluated.real("test"))
    assert section.facts["closest_test_similarity"] == pytest.approx(closest_test)
    assert section.facts["threshold"] == pytest.approx((1 + closest_test) / 2)
    volumes = len(section.cases)
    assert section.figures["named"].value == pytest.approx(3 / volumes)
    assert section.figures["named"].n == volumes and section.figures["named"].real_vs_real == 0
    closer = sum(similarity > closest_test + 1e-9 for similarity in similarities.values())
    assert section.figures["closer_than_any_real"].value == pytest.approx(closer / volumes)
    assert f"Copies of training scans are 3 of {volumes} volumes" in section.notes[0]
    assert all(f"planted-{number}_000 (of {source})" in section.notes[0] for number, source in enumerate(sources))
    assert (planted / "pictures" / section.facts["picture"]).stat().st_size > 10_000


def test_figures_of_real_scans_are_means_over_patients(evaluated, section):
    similarities = {case["case"]: case["similarity"] for case in section.cases}

    def mean(split: str) -> float:
        cases = evaluated.real(split)
        patients = {case.subject: [] for case in cases}
        for case in cases:
            patients[case.subject].append(similarities[f"held-out-{case.name}_000"])
        return float(np.mean([np.mean(values) for values in patients.values()]))

    figure, validation = (section.figures[f"nearest_training_similarity{name}"] for name in ("", "/validation"))
    assert figure.value == pytest.approx(np.mean(list(similarities.values())))
    assert figure.real_vs_real == pytest.approx(mean("test"))
    assert validation.value == pytest.approx(mean("validation")) and validation.real_vs_real == figure.real_vs_real
    facts = section.facts
    for split in ("training", "validation", "test"):
        assert facts[f"{split}_scans"] == len(evaluated.real(split))
    assert facts["autoencoder"] == "smoothing" and facts["from_training_masks"] == 0


def test_changed_copies_are_named(evaluated, tmp_path):
    """Noise, blur, shifts, another brightness, whole HU and another order of the axes hide no copy."""
    source = evaluated.real("training")[2]
    image = nibabel.load(source.image)
    volume = np.asarray(image.dataobj).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 50, volume.shape)
    changed = {
        "noise": volume + noise,
        "blur": ndimage.gaussian_filter(volume, 0.8),
        "shift-1": ndimage.shift(volume, (1, 0, -1), order=0, mode="nearest"),
        "shift-2": ndimage.shift(volume, (-2, 2, 1), order=0, mode="nearest"),
        "bright": volume * 0.9 + 40,
        "rounded": np.rint(volume / 25) * 25,
    }
    for name, copy in changed.items():
        written = nibabel.Nifti1Image(np.rint(copy).astype(np.int16), image.affine)
        nibabel.save(written, tmp_path / f"{name}_000.nii.gz")
    nibabel.save(nibabel.as_closest_canonical(image), tmp_path / "canonical_000.nii.gz")
    assert named(measure(evaluated, tmp_path)) == {f"{name}_000": source.name for name in (*changed, "canonical")}


def test_order_of_files_does_not_matter_and_volumes_are_reconstructed_once(evaluated, planted, section):
    reconstruct = Smoothing()
    backwards = evaluated.synthetic(planted)[::-1]
    again = measure_copies(evaluated, backwards, pictures=planted / "pictures", reconstruct=reconstruct)
    assert again.to_dict() == section.to_dict() and reconstruct.calls == 0


def test_another_autoencoder_reconstructs_anew(evaluated, tmp_path):
    plant(evaluated.real("test")[0], tmp_path, "planted")
    reconstruct = Smoothing()
    reconstruct.fingerprint = "another"
    measure(evaluated, tmp_path, reconstruct)
    assert reconstruct.calls == len(evaluated.real()) + 1


def test_volumes_of_training_masks_and_few_test_patients_are_said(evaluated, tmp_path):
    case = evaluated.real("training")[0]
    plant(case, tmp_path, case.name)
    section = measure(evaluated, tmp_path)
    assert section.facts["from_training_masks"] == 1 and section.cases[0]["from_training_mask"]
    assert section.notes[1].startswith("1 of 1 volumes follow a training patient's mask")
    assert "test patients only" in section.notes[2]


def test_an_empty_volume_is_like_no_scan(evaluated, tmp_path):
    image = nibabel.load(evaluated.real("training")[0].image)
    empty = np.full(image.shape, -1000, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(empty, image.affine), tmp_path / "empty_000.nii.gz")
    section = measure(evaluated, tmp_path)
    assert -1 <= section.cases[0]["similarity"] < section.facts["closest_test_similarity"]
    assert not named(section)


def test_without_validation_scans_nothing_is_said_of_them(evaluated, tmp_path):
    class Split(Evaluated):
        def real(self, *splits: str) -> list[Case]:
            return [] if splits == ("validation",) else super().real(*splits)

    plant(evaluated.real("test")[0], tmp_path, "planted")
    section = measure(Split(**vars(evaluated)), tmp_path)
    assert "nearest_training_similarity/validation" not in section.figures
    assert section.figures["named"].real_vs_real is None and section.facts["validation_scans"] == 0


def test_similarity_is_the_largest_pearson_correlation_of_all_shifts():
    rng = np.random.default_rng(3)
    training, volume = rng.normal(size=(3, 9, 8, 7)).astype(np.float32), rng.normal(size=(9, 8, 7))
    known = TrainingDetails.of(["a", "b", "c"], training)
    inner = training[:, 2:-2, 2:-2, 2:-2]
    mean = inner.mean(axis=0)
    best = {
        name: max(
            stats.pearsonr((scan - mean).ravel(), (volume[x : x + 5, y : y + 4, z : z + 3] - mean).ravel())[0]
            for x, y, z in itertools.product(range(5), repeat=3)
        )
        for name, scan in zip("abc", inner, strict=True)
    }
    nearest = known.nearest("volume", volume.astype(np.float32))
    assert nearest.training == max(best, key=best.get)
    assert nearest.similarity == pytest.approx(max(best.values()), abs=1e-6)


def test_similarity_of_a_shifted_copy_is_one_up_to_two_voxels():
    training = np.random.default_rng(4).normal(size=(4, 14, 13, 12)).astype(np.float32)
    known = TrainingDetails.of(range(4), training)
    for shift in ((0, 0, 0), (1, 0, 0), (-2, 2, 1), (2, -2, -2)):
        nearest = known.nearest("moved", np.roll(training[2], shift, axis=(0, 1, 2)))
        assert nearest.training == 2 and nearest.similarity == pytest.approx(1, abs=1e-6)
    assert known.nearest("moved", np.roll(training[2], (3, 0, 0), axis=(0, 1, 2))).similarity < 0.5


def test_similarity_falls_with_noise_and_inputs_stay():
    rng = np.random.default_rng(6)
    training, noise = rng.normal(size=(5, 12, 12, 12)).astype(np.float32), rng.normal(size=(12, 12, 12))
    before = training.copy()
    known = TrainingDetails.of(range(5), training)
    noisy = [(training[1] + level * noise).astype(np.float32) for level in (0, 0.3, 1, 3)]
    similarities = [known.nearest("noisy", volume).similarity for volume in noisy]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] - similarities[-1] > 0.3
    assert (training == before).all() and (noisy[0] == training[1]).all()


def test_equal_scans_are_told_by_their_order_and_nothing_left_is_zero():
    scan = np.random.default_rng(8).normal(size=(8, 8, 8)).astype(np.float32)
    known = TrainingDetails.of("abc", [scan, -scan, scan])
    assert known.nearest("scan", scan).training == "a"
    assert TrainingDetails.of("ab", [scan, scan]).nearest("scan", scan).similarity == 0


def test_detail_is_what_a_blur_takes_away_on_at_most_64_voxels():
    assert detail_of(np.zeros((130, 64, 20), dtype=np.float32)).shape == (64, 64, 20)
    assert np.abs(detail_of(np.full((9, 8, 7), 0.7, dtype=np.float32))).max() < 1e-6
    impulse = np.zeros((128, 9, 9), dtype=np.float32)
    impulse[60:62, 4, 4] = 1
    coarse = impulse[::2]
    expected = coarse - ndimage.gaussian_filter(coarse, 1.0, mode="nearest")
    assert detail_of(impulse) == pytest.approx(expected, abs=1e-6)


def test_refusals(evaluated, planted, tmp_path):
    with pytest.raises(FibldmError, match="at least one synthetic volume; got none"):
        measure_copies(evaluated, [], pictures=tmp_path, reconstruct=Smoothing())
    cases = {"training": evaluated.real("training")[:2], "validation": [], "test": evaluated.real("test")}
    for split, number, got in (("training", 1, f"got 1 and {len(cases['test'])}"), ("test", 0, "got 2 and 0")):
        fewer = cases | {split: cases[split][:number]}
        lacking = SimpleNamespace(real=fewer.__getitem__)
        with pytest.raises(FibldmError, match=f"two training scans and one test scan; {got}"):
            measure_copies(lacking, evaluated.synthetic(planted), pictures=tmp_path, reconstruct=Smoothing())
