"""Promises D1 and D6: a procedural chest CT with fibrosis, the same for everyone, made offline."""

import json
from functools import cache
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fibldm.cli import run
from fibldm.datasets.layouts import find_source
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.phantoms.anatomy import Anatomy, count_sessions, draw_anatomy
from fibldm.phantoms.fibrosis import Fibrosis
from fibldm.phantoms.phantoms import LABELS, Phantom, make_phantom, write_phantoms
from fibldm.phantoms.rendering import draw_scan

SUBJECTS = range(1, 9)


@cache
def phantom(subject: int, session: int = 1) -> Phantom:
    return make_phantom(3, subject, session)


def in_ras(case: Phantom) -> tuple[np.ndarray, np.ndarray]:
    """Volume and labels with x towards the right, y the front and z the head."""
    turn = nib.orientations.io_orientation(case.affine)
    return nib.orientations.apply_orientation(case.volume, turn), nib.orientations.apply_orientation(case.labels, turn)


def body_hull(volume: np.ndarray) -> np.ndarray:
    """The largest thing above -500 HU with its holes filled, axial slice by axial slice; ``volume`` in RAS."""
    parts, count = ndimage.label(volume > -500)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:])
    return np.stack([ndimage.binary_fill_holes(body[..., z]) for z in range(body.shape[2])], axis=2)


def lung_dice(volume: np.ndarray, labels: np.ndarray) -> float:
    """Air inside the body against the lung labels, airways and fibrosis left out."""
    air = (volume < -500) & body_hull(volume) & (labels < 3)
    lung = np.isin(labels, (1, 2))
    return 2 * (air & lung).sum() / (air.sum() + lung.sum())


def centre_mm(case: Phantom, label: int) -> np.ndarray:
    return nib.affines.apply_affine(case.affine, np.argwhere(case.labels == label).mean(0))


def test_same_seed_gives_identical_arrays() -> None:
    again = make_phantom(3, 1)
    assert np.array_equal(again.volume, phantom(1).volume) and np.array_equal(again.labels, phantom(1).labels)
    assert np.array_equal(again.affine, phantom(1).affine) and again.extent == phantom(1).extent


@pytest.mark.parametrize(("seed", "subject"), [(4, 1), (3, 2)])
def test_another_seed_or_subject_is_another_patient(seed: int, subject: int) -> None:
    given, other = draw_anatomy(3, 1), draw_anatomy(seed, subject)
    assert (given.width, given.depth, given.aeration) != (other.width, other.depth, other.aeration)
    assert not np.array_equal(given.vessels.end, other.vessels.end)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_arrays_are_ct_and_labels_of_the_published_set(subject: int) -> None:
    case = phantom(subject)
    assert case.volume.dtype == np.int16 and case.labels.dtype == np.uint8
    assert case.volume.shape == case.labels.shape and set(np.unique(case.labels)) <= set(LABELS)
    assert case.volume.min() >= -1024 and 200 < case.volume.max() <= 3071
    assert all(50 <= size <= 64 for size in case.volume.shape)
    assert all(4.0 <= edge <= 6.1 for edge in nib.affines.voxel_sizes(case.affine))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_right_lung_lies_towards_larger_x_and_is_larger(subject: int) -> None:
    labels = phantom(subject).labels
    assert centre_mm(phantom(subject), 1)[0] > centre_mm(phantom(subject), 2)[0] + 60
    trachea_x = centre_mm(phantom(subject), 3)[0]
    side = (nib.affines.apply_affine(phantom(subject).affine, np.argwhere(labels != 3)) - trachea_x)[:, 0] > 0
    lung = np.isin(labels[labels != 3], (1, 2, 4, 5, 6))
    assert (lung & side).sum() > (lung & ~side).sum()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_air_in_the_body_is_what_the_lung_labels_say(subject: int) -> None:
    assert lung_dice(*in_ras(phantom(subject))) >= 0.97


def test_swapped_labels_fail_the_dice_figure() -> None:
    volume, labels = in_ras(phantom(1))
    assert lung_dice(volume, np.roll(labels, 2, axis=2)) < 0.97


@pytest.mark.parametrize("subject", SUBJECTS)
def test_outside_is_air_and_airways_are_hollow_and_reach_the_top(subject: int) -> None:
    volume, labels = in_ras(phantom(subject))
    corners = [volume[x, y].mean() for x, y in product((0, -1), repeat=2)]
    assert np.allclose(corners, -1000, atol=25)
    # The lumen's rim shares its voxels with the wall: the core shows the air.
    assert np.percentile(volume[labels == 3], 15) < -920 and volume[labels == 3].mean() < -700
    assert (labels[..., -1] == 3).any()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_fibrosis_is_denser_than_healthy_lung(subject: int) -> None:
    case = phantom(subject)
    fibrotic, healthy = case.labels > 3, np.isin(case.labels, (1, 2))
    assert case.extent == pytest.approx(fibrotic.sum() / (fibrotic.sum() + healthy.sum()))
    if case.extent == 0:
        assert -880 < case.volume[healthy].mean() < -740
        return
    assert fibrotic.sum() >= 150
    assert 200 < case.volume[fibrotic].mean() - case.volume[healthy].mean() < 450
    assert -620 < case.volume[case.labels == 4].mean() < -430


def test_fibrosis_is_mainly_at_the_bases_and_under_the_pleura() -> None:
    heights, depths = [], []
    for case in filter(lambda case: case.extent > 0, map(phantom, SUBJECTS)):
        _, labels = in_ras(case)
        fibrotic, lung = labels > 3, np.isin(labels, (1, 2, 4, 5, 6))
        depth = ndimage.distance_transform_edt(lung)
        heights.append(np.argwhere(fibrotic)[:, 2].mean() - np.argwhere(lung & ~fibrotic)[:, 2].mean())
        depths.append(depth[fibrotic].mean() - depth[lung & ~fibrotic].mean())
    assert max(heights) < 0 and np.mean(depths) < -0.5


def test_about_a_fifth_is_healthy_and_the_others_reach_end_stage() -> None:
    rng = np.random.default_rng(0)
    extents = np.array([Fibrosis.draw(rng).extent for _ in range(200)])
    assert 0.12 < np.mean(extents == 0) < 0.28
    assert extents[extents > 0].min() < 0.06 and extents.max() > 0.5


def test_about_a_sixth_has_two_examinations() -> None:
    counts = [count_sessions(3, subject) for subject in range(1, 601)]
    assert set(counts) == {1, 2} and 0.12 < np.mean(np.array(counts) == 2) < 0.22


def test_spacings_and_orientations_vary_and_can_be_asked_for() -> None:
    cases = [phantom(subject) for subject in SUBJECTS]
    assert len({nib.aff2axcodes(case.affine) for case in cases}) >= 3
    assert len({case.volume.shape for case in cases}) >= 4
    given = make_phantom(3, 1, spacing=(6.0, 7.0, 8.0), orientation="SLP")
    assert nib.aff2axcodes(given.affine) == ("S", "L", "P")
    assert np.allclose(nib.affines.voxel_sizes(given.affine), (8, 6, 7))


def test_one_anatomy_renders_alike_in_every_orientation() -> None:
    turned = [make_phantom(3, 2, orientation=codes, spacing=(5.0, 5.5, 6.0)) for codes in ("RAS", "PSL")]
    (volume, labels), (other, other_labels) = (in_ras(case) for case in turned)
    assert (labels == other_labels).mean() > 0.999
    # The noise is drawn along the stored axes, the anatomy is not.
    assert abs(float(volume.mean()) - float(other.mean())) < 1 and np.corrcoef(volume.flat, other.flat)[0, 1] > 0.99


def test_two_examinations_share_the_anatomy_and_the_disease_progresses() -> None:
    twice = (subject for subject in range(1, 60) if count_sessions(3, subject) == 2)
    subject = next(subject for subject in twice if draw_anatomy(3, subject).fibrosis.extent > 0.1)
    first, second = phantom(subject), phantom(subject, 2)
    assert (first.name, second.name) == (f"sub-{subject:04d}_ses-1", f"sub-{subject:04d}_ses-2")
    assert not np.array_equal(first.affine, second.affine)
    assert second.extent > first.extent
    overlap = [_overlap(subject, draw_anatomy(3, other)) for other in (subject, subject + 1, subject + 2)]
    assert overlap[0] > max(overlap[1:])


def _overlap(subject: int, other: Anatomy) -> float:
    """Dice of the lungs of ``subject`` at examination 1 and of ``other`` at 2, in the patient's coordinates."""
    points = np.stack(np.meshgrid(*[np.arange(-150.0, 150, 8)] * 3, indexing="ij"))
    lungs = []
    for session, anatomy in ((1, draw_anatomy(3, subject)), (2, other)):
        scan = draw_scan(anatomy, np.random.default_rng([3, session]), session=session)
        breathed = points.copy()
        breathed[2] = 115 - (115 - points[2]) / scan.breath
        lungs.append(np.minimum(anatomy.lung(breathed, 1), anatomy.lung(breathed, -1)) < 0)
    return 2 * (lungs[0] & lungs[1]).sum() / (lungs[0].sum() + lungs[1].sum())


def test_written_files_are_nifti_pairs_marked_synthetic(tmp_path: Path) -> None:
    images = write_phantoms(tmp_path, subjects=2, seed=3, progress=iter)
    assert [path.parent.name for path in images] == ["images"] * len(images) and len(images) >= 2
    image = nib.load(images[0])
    labels = nib.load(tmp_path / "labels" / images[0].name)
    assert image.header["descrip"].item() == b"SYNTHETIC phantom" and image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    assert np.allclose(image.affine, phantom(1).affine, atol=1e-4)
    assert np.allclose(image.get_qform(), image.affine, atol=1e-3)
    assert np.array_equal(np.asanyarray(image.dataobj), phantom(1).volume)
    assert np.array_equal(np.asanyarray(labels.dataobj), phantom(1).labels) and labels.get_data_dtype() == np.uint8
    described = json.loads((tmp_path / "dataset.json").read_text())
    assert described["labels"]["6"] == "honeycombing" and described["modality"] == {"0": "CT"}
    assert described["licence"] == "CC0-1.0" and described["name"] and described["description"]


def test_rerun_writes_only_what_is_missing(tmp_path: Path) -> None:
    images = write_phantoms(tmp_path, subjects=2, seed=3, progress=iter)
    before = {path: path.stat().st_mtime_ns for path in images}
    (tmp_path / "labels" / images[1].name).unlink()
    assert write_phantoms(tmp_path, subjects=2, seed=3, progress=iter) == images
    assert images[0].stat().st_mtime_ns == before[images[0]]
    assert (tmp_path / "labels" / images[1].name).exists() and not list(tmp_path.rglob(".writing-*"))


@pytest.mark.parametrize("recipe", [{"seed": 4, "subjects": 1}, {"seed": 3, "subjects": 2}])
def test_folder_of_other_phantoms_is_refused(tmp_path: Path, recipe: dict[str, int]) -> None:
    write_phantoms(tmp_path, subjects=1, seed=3, progress=iter)
    with pytest.raises(FibldmError, match="must hold phantoms made with .*; choose another folder, or delete this one"):
        write_phantoms(tmp_path, **recipe, progress=iter)


def test_folder_of_foreign_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.nii.gz").touch()
    with pytest.raises(FibldmError, match="must be empty or hold phantoms"):
        write_phantoms(tmp_path, subjects=1, seed=3)


@pytest.mark.parametrize(
    ("subjects", "seed", "message"), [(0, 3, "subjects must be at least 1, got 0"), (1, -1, "seed must be 0 or more")]
)
def test_impossible_recipe_is_refused(tmp_path: Path, subjects: int, seed: int, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        write_phantoms(tmp_path, subjects=subjects, seed=seed)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_phantoms_of_a_spacing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["phantoms", "--out", str(tmp_path / "made"), "--subjects", "1", "--seed", "3"]
    assert run([*given, "--spacing", "6", "6", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["phantoms"] == 1
    (image,) = (tmp_path / "made" / "images").iterdir()
    assert sorted(nib.load(image).header.get_zooms()) == pytest.approx([6, 6, 9])
    assert run(given) == 2 and "must hold phantoms made with" in capsys.readouterr().err
    assert not (tmp_path / "made" / "cases.csv").exists()
    assert run([*given, "--spacing", "6", "0", "9"]) == 2
    assert "spacing must be three numbers of 0.5 to 20 mm, got (6.0, 0.0, 9.0)" in capsys.readouterr().err


def test_a_table_names_the_disease_of_phantoms_and_its_extent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As their labels have it; `fibldm prepare` takes the table, with the names of the labels."""
    assert run(["phantoms", "--out", str(tmp_path), "--subjects", "4", "--seed", "3", "--spacing", "9", "9", "9"]) == 0
    empty = min((tmp_path / "labels").iterdir())
    mask = nib.load(empty)
    array = np.asanyarray(mask.dataobj)
    nib.save(nib.Nifti1Image(np.where(array > 3, 1, array).astype(np.uint8), mask.affine), empty)
    command = ["phantoms", "--out", str(tmp_path), "--subjects", "4", "--seed", "3", "--spacing", "9", "9", "9"]
    assert run([*command, "--table", "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert outputs == [str(tmp_path), str(tmp_path / "cases.csv")]
    source = find_source(tmp_path / "cases.csv", PrepareSettings(modality="ct"))
    assert source.labels[4] == "ground glass" and len(source.cases) == len(list((tmp_path / "images").iterdir()))
    for case in source.cases:
        labels = np.asanyarray(nib.load(case.masks[0].files[0]).dataobj)
        share = 100 * (labels > 3).sum() / np.isin(labels, (1, 2, 4, 5, 6)).sum()
        assert case.covariates["extent_percent"] == pytest.approx(share, abs=0.01)
        assert case.covariates["disease"] == ("fibrosis" if share else "healthy")
    assert {case.covariates["disease"] for case in source.cases} == {"fibrosis", "healthy"}
    assert all(str(case.subject) in case.images[0][0].name for case in source.cases)
