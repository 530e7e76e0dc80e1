"""Edits of scans: outside the region nothing changes, on NIfTI and on DICOM; what is drawn meets what is around it."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from fibldm.cli import run
from fibldm.editing import Editor, EditRequest, EditSettings, edit_files
from fibldm.editing.blending import blended, fading
from fibldm.editing.region import grown
from fibldm.errors import FibldmError
from fibldm.synthesis import OutputConflict, SamplingSettings, Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.dicom.writer import Identity, make_series, write_series
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import sidecar

QUICK = {"steps": 2, "sampler": "ddim", "allow_extrapolation": True, "device": "cpu"}


@pytest.fixture(scope="module")
def case(phantom_work: Path) -> dict[str, Path]:
    return {key: Path(load_datalist(phantom_work, "test", masks=True)[0][key]) for key in ("image", "label")}


@pytest.fixture(scope="module")
def lesion(case, tmp_path_factory) -> Path:
    """The mask of a case with a cube of fibrosis put into the right lung."""
    mask = nibabel.load(case["label"])
    labels = np.asarray(mask.dataobj).copy()
    centre = np.argwhere(labels == 2).mean(0).astype(int)
    labels[tuple(slice(c - 3, c + 3) for c in centre)] = 5
    file = tmp_path_factory.mktemp("masks") / "with_lesion.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, mask.affine), file)
    return file


def edited(tiny_run, case, lesion, out: Path, **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scan, edited scan and the voxels where the masks differ."""
    (path,) = edit_files(case["image"], lesion, out, run=tiny_run, before=case["label"], **QUICK, **options)
    scan, volume = (np.asarray(nibabel.load(file).dataobj) for file in (case["image"], path))
    return scan, volume, np.asarray(nibabel.load(lesion).dataobj) != np.asarray(nibabel.load(case["label"]).dataobj)


def test_outside_the_region_every_voxel_is_that_of_the_scan(tiny_run, case, lesion, tmp_path):
    scan, volume, region = edited(tiny_run, case, lesion, tmp_path)
    assert volume.dtype == scan.dtype
    assert np.array_equal(volume[~region], scan[~region])
    assert (volume[region] != scan[region]).mean() > 0.5
    facts = json.loads(sidecar(tmp_path / f"{case['image'].name.split('.')[0]}_000.nii.gz").read_text())
    assert facts["synthetic"] is True
    assert facts["edit"]["voxels"] == region.sum() == 216
    assert facts["voxels_of_labels"] and "in part" in facts["notice"]
    again = SimpleITK.ReadImage(str(tmp_path / f"{case['image'].name.split('.')[0]}_000.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(again).T, volume)


def test_the_axis_order_of_the_scan_changes_nothing(tiny_run, case, lesion, tmp_path):
    _, straight, _ = edited(tiny_run, case, lesion, tmp_path / "straight")
    turned = {}
    for key, file in {**case, "new": lesion}.items():
        image = nibabel.load(file)
        (tmp_path / key).mkdir()
        turned[key] = tmp_path / key / case["image"].name
        flipped = nibabel.as_closest_canonical(image).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        nibabel.save(flipped, turned[key])
    (path,) = edit_files(
        turned["image"], turned["new"], tmp_path / "turned", run=tiny_run, before=turned["label"], **QUICK
    )
    back = nibabel.as_closest_canonical(nibabel.load(path))
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(nibabel.as_closest_canonical(
        nibabel.Nifti1Image(straight, nibabel.load(case["image"]).affine)).dataobj))  # fmt: skip


def test_a_series_comes_back_as_a_series_with_the_same_voxels_outside(tiny_run, phantom_work, case, lesion, tmp_path):
    scan = read_volume(case["image"])
    series = make_series(scan, modality="ct", value_range=(-1000, 600), identity=Identity("p", "k"))
    write_series(tmp_path / "scan", series)
    (path,) = edit_files(tmp_path / "scan", lesion, tmp_path / "out", run=tiny_run, before=case["label"], **QUICK)
    before, after = (read_series(sorted(folder.glob("*.dcm"))) for folder in (tmp_path / "scan", path))
    assert np.allclose(before.affine, after.affine)
    differ = before.array != after.array
    region = (
        nibabel.as_closest_canonical(nibabel.load(lesion)).get_fdata()
        != nibabel.as_closest_canonical(nibabel.load(case["label"])).get_fdata()
    )
    assert differ.any() and not (differ & ~region).any()
    first = pydicom.dcmread(next(path.glob("*.dcm")))
    assert first.SyntheticData == "YES" and "in part" in first.DerivationDescription


def test_a_window_around_the_region_is_enough_of_a_large_scan(tiny_run, case, lesion):
    made = Synthesizer.from_run(tiny_run)
    scan, mask = read_volume(case["image"]), read_volume(lesion)
    pad = [(40, 0), (0, 30), (20, 20)]
    shifted = scan.affine @ nibabel.affines.from_matvec(np.eye(3), [-40, 0, -20])
    large = Volume(np.pad(scan.array, pad, constant_values=-1000), shifted)
    labels = Volume(np.pad(mask.array, pad), shifted)
    region = Volume((labels.array == 5).astype(np.uint8), shifted)
    edit = Editor(made)(
        EditRequest(large, labels, region), settings=SamplingSettings(steps=1, sampler="ddim"), allow_extrapolation=True
    )
    covered = np.array(edit.provenance["grid"]["size"]) * edit.provenance["grid"]["spacing_mm"]
    assert (covered <= np.array(made.grid.size) * made.grid.spacing + 1e-6).all()
    assert np.array_equal(edit.volume.array[region.array == 0], large.array[region.array == 0])


def test_blending_meets_the_scan_at_the_border_and_the_drawn_volume_inside():
    rng = np.random.default_rng(0)
    scan = rng.normal(0, 0.1, (24, 24, 24)).astype(np.float32) + 0.5
    around, edited_volume = np.full_like(scan, 0.5), np.full_like(scan, -0.5)
    noise = rng.normal(0, 0.1, scan.shape).astype(np.float32)
    region = np.zeros(scan.shape, dtype=bool)
    region[4:20, 4:20, 4:20] = True
    out = blended(scan, around, edited_volume, noise, region, depth=4)
    assert np.array_equal(out[~region], scan[~region])
    assert np.allclose(out[10:14, 10:14, 10:14], -0.5 + noise[10:14, 10:14, 10:14], atol=1e-3)
    profile = out[:, 8:16, 8:16].mean((1, 2))
    assert np.abs(np.diff(profile)).max() < 0.45  # a plain paste jumps by 1
    shell = fading(region, 4)
    assert 0 < shell[4, 12, 12] < 0.1 and shell[12, 12, 12] == 1


def test_grain_keeps_its_strength_where_the_scans_own_fades_into_drawn_grain():
    rng = np.random.default_rng(1)
    scan, noise = (rng.normal(0, 0.1, (40, 40, 40)).astype(np.float32) for _ in range(2))
    flat, region = np.zeros_like(scan), np.zeros(scan.shape, dtype=bool)
    region[8:32, 8:32, 8:32] = True
    out = blended(scan, flat, flat, noise, region, depth=8)
    for part in (fading(region, 8) > 0.99, (fading(region, 8) > 0.3) & (fading(region, 8) < 0.7), ~region):
        assert out[part].std() == pytest.approx(0.1, rel=0.05)


def test_a_margin_is_in_millimetres():
    region = np.zeros((9, 9, 9), dtype=bool)
    region[4, 4, 4] = True
    inside = grown(region, 2.0, (1.0, 2.0, 3.0))
    assert [inside.any(axis=axes).sum() for axes in ((1, 2), (0, 2), (0, 1))] == [5, 3, 1]


def test_a_rerun_keeps_what_is_there_and_another_edit_is_refused(tiny_run, case, lesion, tmp_path):
    edited(tiny_run, case, lesion, tmp_path)
    (file,) = tmp_path.glob("*.nii.gz")
    before = file.stat().st_mtime_ns
    edited(tiny_run, case, lesion, tmp_path)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(OutputConflict, match="another edit"):
        edited(tiny_run, case, lesion, tmp_path, edit=EditSettings(strength=0.5))


def test_what_does_not_fit_is_refused_in_one_sentence(tiny_run, case, lesion, tmp_path):
    common = {"run": tiny_run, **QUICK}
    image = nibabel.load(lesion)
    small = tmp_path / "small.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-2], image.affine), small)
    moved = tmp_path / "moved.nii.gz"
    shift = nibabel.affines.from_matvec(np.eye(3), [3, 0, 0])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine @ shift), moved)
    for mask, given, message in [
        (small, {"region": "5"}, "the mask must lie on the voxels of the scan"),
        (moved, {"region": "5"}, "the mask must lie where the scan lies"),
        (lesion, {}, "a region must be given"),
        (lesion, {"region": "kidney"}, "a region must be labels of the run"),
        (case["label"], {"before": case["label"]}, "the region must hold a voxel"),
        (lesion, {"region": "5", "margin": -1}, "margin must"),
    ]:
        with pytest.raises(FibldmError, match=message):
            edit_files(case["image"], mask, tmp_path / "out", **common, **given)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_the_command(tiny_run, case, lesion, tmp_path, capsys):
    arguments = ["edit", str(case["image"]), "--mask", str(lesion), "--region", "5", "--margin", "10"]
    arguments += ["--out", str(tmp_path), "--run", str(tiny_run), "--steps", "1", "--sampler", "ddim", "--count", "2"]
    assert run([*arguments, "--allow-extrapolation", "--device", "cpu"]) == 0
    assert "2 edited scans" in capsys.readouterr().out
    first, second = (np.asarray(nibabel.load(file).dataobj) for file in sorted(tmp_path.glob("*.nii.gz")))
    assert (first != second).any()
