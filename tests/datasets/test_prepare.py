"""``fibldm prepare``: find, check, split by patient, write the work folder."""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from builders import write_nifti as write_image
from hypothesis import given
from hypothesis import strategies as st
from monai.data import load_decathlon_datalist

from fibldm.cli.prepare import prepare as command
from fibldm.datasets import preparation, work_folder
from fibldm.datasets.case import prepare_case, stored_image
from fibldm.datasets.facts import notes_on_facts
from fibldm.datasets.findings import Finding, Findings, table
from fibldm.datasets.fitting_grid import fitting_grid
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings, parse_label_names, parse_remap
from fibldm.datasets.source import Case, Mask
from fibldm.datasets.split import find_subjects, split_cases, split_subjects
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.grid import ModelGrid
from fibldm.volumes.intensity import load_intensity

CT = PrepareSettings(modality="ct")
MR = PrepareSettings(modality="mr")
SHAPE = (7, 9, 5)
DATA = Path(os.environ.get("FIBLDM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def oblique_affine() -> np.ndarray:
    """Anisotropic, oblique, left-handed, with permuted axes."""
    angle = np.deg2rad(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0, -0.7, 0], [0, 0, 1.3], [-2.5, 0, 0]])
    affine[:3, 3] = (31, -17, 240)
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    return write_image(path, array, np.diag([1.5, 1.5, 3, 1]) if affine is None else affine)


def ct_array(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


def label_array(seed: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2:5, 1:3] = 1
    array[4, 2 : 4 + seed % 3, 3] = 2
    return array


def make_folders(root: Path, cases: int = 4, affine: np.ndarray | None = None) -> Path:
    for index in range(cases):
        write_nifti(root / f"images/p{index}.nii.gz", ct_array(index), affine)
        write_nifti(root / f"labels/p{index}.nii.gz", label_array(index), affine)
    return root


def entries(work: Path) -> dict[str, dict]:
    return {entry["case"]: {**entry, "split": split} for split in SPLITS for entry in load_datalist(work, split)}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def world(volume: nib.Nifti1Image) -> dict[tuple, float]:
    """Value by position in RAS+ millimetres."""
    indices = np.indices(volume.shape).reshape(3, -1).T
    points = np.round(nib.affines.apply_affine(volume.affine, indices), 2) + 0.0
    values = np.asarray(volume.dataobj).ravel()
    return {tuple(point): value for point, value in zip(points, values, strict=True)}


# Layouts


def test_folders_are_paired_by_stem_and_written_as_decathlon_a2(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", cases=10)
    before = snapshot(source)
    report = prepare(source, tmp_path / "work", CT)
    work = tmp_path / "work"
    assert report.counts == {"training": 7, "validation": 1, "test": 2}
    assert sorted(path.name for path in work.iterdir()) == sorted(work_folder.WRITTEN)
    datalist = read_json(work / "datalist.json")
    assert datalist["labels"] == {"0": "background", "1": "label 1", "2": "label 2"}
    assert (datalist["name"], datalist["modality"], datalist["licence"]) == ("data", "ct", None)
    assert set(datalist["test"][0]) == {"image", "label", "case", "subject"}
    monai = load_decathlon_datalist(work / "datalist.json", True, "training")
    assert [Path(item["image"]) for item in monai] == [Path(e["image"]) for e in load_datalist(work, "training")]
    assert snapshot(source) == before
    assert any("the licence of the data is not known" in note for note in report.notes)


def test_dataset_json_beside_folders_gives_modality_names_and_licence_a2(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data")
    names = {"background": 0, "right lung": 1, "nodule": 2}
    facts = {"modality": {"0": "CT"}, "labels": names, "license": "CC-BY 4.0"}
    write_json(source / "dataset.json", facts | {"name": "Lungs", "reference": "Someone 2020"})
    prepare(source, tmp_path / "work")
    datalist = read_json(tmp_path / "work/datalist.json")
    assert datalist["labels"] == {"0": "background", "1": "right lung", "2": "nodule"}
    assert datalist["licence"] == "CC-BY 4.0"
    assert (datalist["name"], datalist["reference"]) == ("Lungs", "Someone 2020")


def make_decathlon(root: Path, cases: int = 3) -> Path:
    listed = []
    for index in range(cases):
        write_nifti(root / f"imagesTr/a_{index}.nii.gz", ct_array(index).astype(np.float32) + 2000)
        write_nifti(root / f"labelsTr/a_{index}.nii.gz", label_array(index))
        listed.append({"image": f"./imagesTr/a_{index}.nii.gz", "label": f"./labelsTr/a_{index}.nii.gz"})
    write_json(root / "dataset.json", {"modality": {"0": "MRI"}, "licence": "CC0", "training": listed, "test": ["x"]})
    return root


def test_decathlon_a2(tmp_path: Path) -> None:
    report = prepare(make_decathlon(tmp_path / "Task"), tmp_path / "work")
    assert "images of the test list that do not exist are left out: 1" in report.notes
    assert sorted(entries(tmp_path / "work")) == ["a_0", "a_1", "a_2"]
    intensity = load_intensity(tmp_path / "work/intensity.json")
    assert (intensity.kind, intensity.lower, intensity.upper) == ("percentile", 0.5, 99.5)
    assert nib.load(tmp_path / "work/images/a_0.nii.gz").get_data_dtype() == np.float32


def make_csv(root: Path, text: str | None = None, name: str = "cases.csv") -> Path:
    for index in range(4):
        write_nifti(root / f"site-{index}/ct.nii.gz", ct_array(index))
        write_nifti(root / f"site-{index}/lung.nii.gz", label_array(index))
    rows = "".join(f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,pat{i % 3},{50 + i},\n" for i in range(4))
    (root / name).write_text(text or f"image,label,subject,age,centre\n{rows}".replace("51,\n", ",B\n"))
    return root / name


def test_csv_names_covariates_and_patients_b5(tmp_path: Path) -> None:
    prepare(make_csv(tmp_path / "data"), tmp_path / "work", CT)
    found = entries(tmp_path / "work")
    assert sorted(found) == ["site-0_ct", "site-1_ct", "site-2_ct", "site-3_ct"]
    assert found["site-0_ct"]["split"] == found["site-3_ct"]["split"]
    assert found["site-3_ct"]["subject"] == found["site-0_ct"]["subject"] != found["site-1_ct"]["subject"]
    assert [found[f"site-{i}_ct"]["age"] for i in range(4)] == [50.0, None, 52.0, 53.0]
    assert [found[f"site-{i}_ct"]["centre"] for i in range(4)] == [None, "B", None, None]
    assert Path(found["site-0_ct"]["image"]) == (tmp_path / "work/images/site-0_ct.nii.gz").resolve()


def test_a_folder_with_one_manifest_semicolons_and_own_names_b5(tmp_path: Path) -> None:
    rows = "".join(
        f"site-{i}/ct.nii.gz;site-{i}/lung.nii.gz;c{i};{s}\n" for i, s in enumerate(["Train", "train", "val", "TEST"])
    )
    make_csv(tmp_path, f"\ufeffimage;label;case;split\n{rows}\n")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    report = prepare(tmp_path, tmp_path / "work", CT)
    assert report.counts == {"training": 2, "validation": 1, "test": 1}
    assert entries(tmp_path / "work")["c3"]["split"] == "test"


# Geometry and intensity


def test_reoriented_to_ras_by_flips_and_permutations_only(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3, oblique_affine())
    prepare(source, tmp_path / "work", CT)
    for kind, dtype in (("images", np.int16), ("labels", np.uint8)):
        original = nib.load(source / f"{kind}/p1.nii.gz")
        written = nib.load(tmp_path / f"work/{kind}/p1.nii.gz")
        assert nib.aff2axcodes(written.affine) == ("R", "A", "S")
        assert written.shape == (SHAPE[1], SHAPE[2], SHAPE[0])
        np.testing.assert_allclose(written.header.get_zooms(), (0.7, 1.3, 2.5), rtol=1e-6)
        assert written.get_data_dtype() == dtype
        assert world(written) == world(original)
        np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-4)
        assert written.header.get_xyzt_units()[0] == "mm"


def test_a_label_stored_in_another_orientation_is_on_the_same_grid(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3)
    label = nib.load(source / "labels/p1.nii.gz")
    expected = np.asarray(label.dataobj)
    flipped = label.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "L")))
    nib.save(flipped, source / "labels/p1.nii.gz")
    prepare(source, tmp_path / "work", CT)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "work/labels/p1.nii.gz").dataobj), expected)


def test_ct_padding_becomes_air_and_whole_hu_become_int16_a6() -> None:
    ct = np.array([[[-2048.0, -1024, 30.0004]]])
    stored = stored_image(ct, "ct")
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(stored, [[[-1024, -1024, 30]]])
    fractions = stored_image(np.array([-3000.0, 30.5]), "ct")
    assert fractions.dtype == np.float32
    np.testing.assert_array_equal(fractions, [-1024, 30.5])
    assert stored_image(np.array([0, 255], np.uint8), "ct").dtype == np.int16
    assert stored_image(np.array([0, 255], np.uint8), "mr").dtype == np.float32


def test_window_and_label_names_are_kept_a6(tmp_path: Path) -> None:
    settings = PrepareSettings(modality="ct", window=(-900, 300), labels={1: "right lung", 2: "nodule", 7: "cyst"})
    report = prepare(make_folders(tmp_path / "data"), tmp_path / "work", settings)
    intensity = load_intensity(tmp_path / "work/intensity.json")
    assert (intensity.low, intensity.high) == (-900, 300)
    labels = read_json(tmp_path / "work/datalist.json")["labels"]
    assert labels == {"0": "background", "1": "right lung", "2": "nodule"}
    assert "labels that are named but occur in no case: 7 (cyst)" in report.notes


def test_mr_output_range_is_the_median_of_the_training_split_a6(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 6)
    prepare(source, tmp_path / "work", MR)
    cases = [entry["case"] for entry in load_datalist(tmp_path / "work", "training")]
    arrays = [np.asarray(nib.load(source / f"images/{case}.nii.gz").dataobj) for case in cases]
    expected = np.median([np.percentile(array, (0.5, 99.5)) for array in arrays], axis=0)
    np.testing.assert_allclose(load_intensity(tmp_path / "work/intensity.json").output_range, expected)


def test_envelope_is_that_of_the_training_split(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3)
    for index, spacing in enumerate((1.0, 1.5, 2.0)):
        affine = np.diag([spacing, 1, 4, 1])
        write_nifti(source / f"images/p{index}.nii.gz", ct_array(index), affine)
        write_nifti(source / f"labels/p{index}.nii.gz", (label_array(0) == 1).astype(np.uint8) * (index + 1), affine)
    report = prepare(source, tmp_path / "work", CT)
    (case,) = load_datalist(tmp_path / "work", "training")
    index = int(case["case"][1:])
    spacing = (1.0, 1.5, 2.0)[index]
    envelope = read_json(tmp_path / "work/datalist.json")["envelope"]
    assert envelope["spacing_mm"] == {"min": [spacing, 1.0, 4.0], "max": [spacing, 1.0, 4.0]}
    assert envelope["field_of_view_mm"]["max"] == [7 * spacing, 9.0, 20.0]
    volume = pytest.approx(3 * 3 * 2 * spacing * 4 / 1000)
    others = [value for value in ("1", "2", "3") if value != str(index + 1)]
    assert envelope["label_volume_ml"][str(index + 1)] == {"min": volume, "max": volume}
    assert all(envelope["label_volume_ml"][value] == {"min": 0.0, "max": 0.0} for value in others)
    assert f"labels that occur in no training case: {', '.join(others)}" in report.notes


# Findings


def break_header(path: Path, **fields) -> None:
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(nib.Nifti1Image(array, None, image.header), path)


def test_findings_of_all_cases_are_listed_at_once(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 20)
    image, label = (lambda i: source / f"images/p{i}.nii.gz"), (lambda i: source / f"labels/p{i}.nii.gz")
    image(0).write_bytes(image(0).read_bytes()[:-5])
    image(1).write_bytes(b"not an image")
    write_nifti(image(3), np.where(ct_array(3) > 0, np.nan, ct_array(3)).astype(np.float32))
    write_nifti(image(5), ct_array(5).astype(np.int32) + 1000)
    write_nifti(label(6), label_array(6), np.diag([1.5, 1.51, 3, 1]))
    write_nifti(label(8), label_array(8) * np.float32(0.5))
    write_nifti(image(11), ct_array(12).astype(np.float32))
    write_nifti(label(15), np.zeros(SHAPE, np.uint8))
    write_nifti(image(16), ct_array(16).astype(np.int32) - 4000)
    break_header(image(18), srow_x=[1.5, 0, 0, 0.3], qoffset_x=0)
    break_header(label(18), srow_x=[1.5, 0, 0, 0.3], qoffset_x=0)
    sheared = np.diag([1.5, 1.5, 3, 1])
    sheared[1, 2] = 1.0
    nib.save(nib.Nifti1Image(ct_array(19), sheared), image(19))
    with pytest.raises(FibldmError) as caught:
        prepare(source, tmp_path / "work", CT)
    lines = str(caught.value).splitlines()
    expected = {
        "p0": "cannot be read to its last byte",
        "p1": "must be compressed by gzip, as its name says, and is not",
        "p3": "image must be finite",
        "p5": "a CT must have air (-1024 to -500 HU)",
        "p6": "image and label must have one affine; they differ by",
        "p8": "labels must be whole numbers",
        "p12": "image must be there once; it has the same voxels as p11",
        "p15": "the label volume is all background",
        "p16": "for a dataset of MR give --modality mr",
        "p19": "error    image: the axes must be at right angles; their cosine is 0.316",
        "p18": "warning  image: sform and qform of the header differ by 0.20 voxels at the corners; sform is used",
    }
    for case, part in expected.items():
        assert any(line.strip().startswith(f"{case} ") and part in line for line in lines), (case, part)
    report = read_json(tmp_path / "work/report.json")
    assert report["ok"] is False
    assert {finding["case"] for finding in report["findings"]} == set(expected)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [".preparing", "report.json"]


def test_after_a_correction_the_failed_report_is_replaced(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data")
    write_nifti(source / "images/p0.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match="1 error and 0 warnings in 4 cases, nothing was prepared"):
        prepare(source, tmp_path / "work", CT)
    write_nifti(source / "images/p0.nii.gz", ct_array(0))
    assert not prepare(source, tmp_path / "work", CT).unchanged
    assert read_json(tmp_path / "work/report.json")["ok"] is True


def test_warnings_are_recorded_and_do_not_fail(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data")
    write_nifti(source / "labels/p2.nii.gz", np.zeros(SHAPE, np.uint8))
    break_header(source / "images/p1.nii.gz", sform_code=0, qform_code=0)
    break_header(source / "labels/p1.nii.gz", sform_code=0, qform_code=0)
    report = prepare(source, tmp_path / "work", CT)
    messages = {(finding.case, finding.message) for finding in report.findings}
    assert messages == {
        ("p1", f"{what}: the header has no orientation (sform and qform codes are 0); left and right are a guess")
        for what in ("image", "label")
    } | {
        ("p2", "the label volume is all background"),
    }
    assert len(read_json(tmp_path / "work/report.json")["findings"]) == 3


def test_mr_that_is_nearly_all_background_is_refused(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3)
    array = np.zeros(SHAPE, np.float32)
    array[3, 3, 3] = 9
    write_nifti(source / "images/p0.nii.gz", array)
    with pytest.raises(FibldmError, match="p0  error    percentiles 0.5 and 99.5 of image must differ; both are 0"):
        prepare(source, tmp_path / "work", MR)


# Split


@given(st.sets(st.text(min_size=1), min_size=3, max_size=400), st.integers(0, 9))
def test_split_is_70_10_20_by_patient_and_does_not_depend_on_order_h13(subjects: set[str], seed: int) -> None:
    split = split_subjects(subjects, seed)
    counts = Counter(split.values())
    total = len(subjects)
    assert set(split) == subjects and set(counts) == set(SPLITS)
    assert abs(counts["validation"] - 0.1 * total) <= max(0.5, 1 - 0.1 * total)
    assert abs(counts["test"] - 0.2 * total) <= max(0.5, 1 - 0.2 * total)
    assert split_subjects(sorted(subjects, reverse=True) * 2, seed) == split


def test_200_patients_give_140_20_40_h13() -> None:
    subjects = [f"p{index}" for index in range(200)]
    split = split_subjects(subjects, 0)
    assert Counter(split.values()) == {"training": 140, "validation": 20, "test": 40}
    assert split_subjects(subjects, 1) != split
    expected = {"a": "training", "b": "test", "c": "validation", "d": "training"}
    assert split_subjects(["a", "b", "c", "d"], 0) == expected, "a split must stay the same in later versions"


@given(st.lists(st.integers(0, 8), min_size=12, max_size=60), st.integers(0, 3))
def test_no_patient_is_in_two_splits_h13(patients: list[int], seed: int) -> None:
    patients = [0, 1, 2, *patients]
    cases = [Case(f"c{i}", Path("i"), Path("l"), f"sub-{p:02d}/scan{i}") for i, p in enumerate(patients)]
    findings = Findings()
    cases = find_subjects(cases, findings)
    split = split_cases(cases, seed)
    by_patient: dict[str, set[str]] = {}
    for case in cases:
        by_patient.setdefault(str(case.subject), set()).add(split[case.name])
    assert all(len(splits) == 1 for splits in by_patient.values()) and len(by_patient) == len(set(patients))
    assert findings == Findings()


def test_where_the_patient_comes_from_h13(tmp_path: Path) -> None:
    source = tmp_path / "data"
    for index, name in enumerate(("sub-01_a", "sub-01_b", "x7_a", "x7_b", "x8_a")):
        write_nifti(source / f"images/{name}.nii.gz", ct_array(index))
        write_nifti(source / f"labels/{name}.nii.gz", label_array(index))
    report = prepare(source, tmp_path / "work", CT)
    subjects = {name: entry["subject"] for name, entry in entries(tmp_path / "work").items()}
    assert subjects["sub-01_a"] == subjects["sub-01_b"] and len(set(subjects.values())) == 4
    assert sum("3 cases name no patient" in note for note in report.notes) == 1
    pattern = PrepareSettings(modality="ct", subject_pattern=r"/(x\d+)_")
    report = prepare(source, tmp_path / "other", pattern)
    subjects = {name: entry["subject"] for name, entry in entries(tmp_path / "other").items()}
    assert subjects["x7_a"] == subjects["x7_b"] and len(set(subjects.values())) == 3
    assert not any("name no patient" in note for note in report.notes)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(p", r"`subject_pattern` must be a regular expression; '\(p'"),
        ("p", r"`subject_pattern` must have a group around the patient; got 'p'; for example"),
        ("(p[012])", r"must match every image; it does not match images/p3.nii.gz"),
    ],
)
def test_wrong_subject_patterns_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        prepare(make_folders(tmp_path), tmp_path / "work", PrepareSettings(modality="ct", subject_pattern=pattern))


def test_too_few_patients_are_refused_h13(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="needs at least 3 patients; got 2; add patients"):
        prepare(make_folders(tmp_path, 2), tmp_path / "work", CT)


def test_given_split_with_a_patient_in_two_or_an_empty_part_is_refused_h13(tmp_path: Path) -> None:
    rows = [f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,p{i % 3}" for i in range(4)]
    head = "image,label,subject,split\n"
    text = head + "".join(f"{row},{split}\n" for row, split in zip(rows, ("train", "val", "test", "test"), strict=True))
    with pytest.raises(FibldmError, match="cases of one patient apart: site-0_ct in training, site-3_ct in test"):
        prepare(make_csv(tmp_path, text), tmp_path / "work", CT)
    text = head + "".join(f"{row},train\n" for row in rows)
    with pytest.raises(FibldmError, match="validation and test came empty"):
        prepare(make_csv(tmp_path, text), tmp_path / "work", CT)


# Written once


def test_a_second_run_changes_nothing_and_says_so_h13(tmp_path: Path) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    prepare(source, work, CT)
    before = snapshot(work)
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    for path in source.rglob("*.gz"):
        os.utime(path, (1, 1))
    again = prepare(source, work, PrepareSettings(layout="folders", modality="ct", window=(-1000, 1000)))
    assert again.unchanged and sum(again.counts.values()) == 4
    assert snapshot(work) == before and times == {path: path.stat().st_mtime_ns for path in work.rglob("*")}


def test_the_same_data_and_settings_give_the_same_folder_h13(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 5)
    prepare(source, tmp_path / "one", CT)
    (tmp_path / "two.key.json").write_bytes((tmp_path / "one.key.json").read_bytes())
    prepare(source, tmp_path / "two", CT, workers=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    with pytest.raises(FibldmError, match="`workers` must be at least 1; got 0"):
        prepare(source, tmp_path / "none", CT, workers=0)
    prepare(source, tmp_path / "other", CT)  # a salt of its own: other names of patients, the same data
    one, other = (read_json(tmp_path / name / "datalist.json") for name in ("one", "other"))
    assert one["content"] == other["content"] and one["training"] != other["training"]
    content = read_json(tmp_path / "one/datalist.json")["content"]
    write_nifti(source / "labels/p4.nii.gz", label_array(5))
    prepare(source, tmp_path / "three", CT)
    assert read_json(tmp_path / "three/datalist.json")["content"] != content


def test_other_settings_or_data_are_refused_without_restart_h13(tmp_path: Path) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    prepare(source, work, CT)
    before = snapshot(work)
    other = PrepareSettings(modality="ct", seed=4)
    with pytest.raises(FibldmError, match="a split is never changed silently; different: `seed` 0 -> 4; .*`restart`"):
        prepare(source, work, other)
    write_nifti(source / "labels/p1.nii.gz", label_array(2))
    with pytest.raises(FibldmError, match="different: files of p1"):
        prepare(source, work, CT)
    make_folders(source, 5)
    write_json(source / "dataset.json", {"licence": "CC0"})
    with pytest.raises(FibldmError, match="different: what the dataset says of itself; cases p4"):
        prepare(source, work, CT)
    assert snapshot(work) == before
    assert sum(prepare(source, work, other, restart=True).counts.values()) == 5
    assert read_json(work / "report.json")["settings"]["seed"] == 4


def test_a_failed_restart_leaves_the_work_folder_as_it_was_h13(tmp_path: Path) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    prepare(source, work, CT)
    before = snapshot(work)
    write_nifti(source / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match="image must not be constant"):
        prepare(source, work, CT, restart=True)
    assert {name: content for name, content in snapshot(work).items() if not name.startswith(".preparing/")} == before
    assert prepare(make_folders(source), work, CT).unchanged


def test_a_lost_file_is_noticed(tmp_path: Path) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    prepare(source, work, CT)
    (work / "labels/p2.nii.gz").unlink()
    with pytest.raises(FibldmError, match="must be complete; it lacks labels/p2.nii.gz; write it anew with `restart`"):
        prepare(source, work, CT)


def test_an_interrupted_run_looks_unfinished_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    read: list[str] = []

    def interrupted(case: Case, rules, folder):
        read.append(case.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return prepare_case(case, rules, folder)

    monkeypatch.setattr(preparation, "prepare_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, work, CT)
    assert [path.name for path in work.iterdir()] == [".preparing"]
    assert not prepare(source, work, CT).unchanged
    assert read == ["p0", "p1", "p2", "p2", "p3"]
    assert sorted(path.name for path in work.iterdir()) == sorted(work_folder.WRITTEN)


def test_foreign_folders_are_never_overwritten(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data")
    other = make_folders(tmp_path / "other")
    write_json(other / "report.json", {"ok": False, "settings_hash": ""})
    for restart in (False, True):
        with pytest.raises(
            FibldmError, match="the work folder must be empty, absent or a finished work folder; .* images, labels"
        ):
            prepare(source, other, CT, restart=restart)
    with pytest.raises(
        FibldmError, match="the work folder must not be the source, a folder around it, or one among its data"
    ):
        prepare(source, source, CT)
    for work in (tmp_path, source / "images" / "work"):
        with pytest.raises(FibldmError, match="must not be the source, a folder around it, or one among its"):
            prepare(source, work, CT)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FibldmError, match="the work folder must be a folder; .* is a file"):
        prepare(source, tmp_path / "file", CT)


# Settings and command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PrepareSettings(), "`modality` must be ct, mr, pt, other; nothing says it; give `modality`: ct"),
        (PrepareSettings(modality="pet"), "`modality` must be one of ct, mr, pt, other; got 'pet'"),
        (PrepareSettings(modality="mr", window=(0, 1)), "`window` is for the modality ct or pt; it is mr"),
        (
            PrepareSettings(modality="ct", window=(100, 100)),
            "two increasing values in HU; got 100 and 100",
        ),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: PrepareSettings, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        prepare(make_folders(tmp_path), tmp_path / "work", settings)


def test_label_names() -> None:
    assert parse_label_names("1=right lung, 2 = left lung") == {1: "right lung", 2: "left lung"}
    for wrong in ("", "1", "1=", "0=air", "255=x", "a=b", "1=a,1=b", "1=a,2=a"):
        with pytest.raises(FibldmError, match="`labels` must be VALUE=NAME,... with values 1...254"):
            parse_label_names(wrong)


def test_load_datalist_refuses_unknown_splits_and_other_folders(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="split must be one of training, validation, test; got 'train'"):
        load_datalist(tmp_path, "train")
    with pytest.raises(FibldmError, match="datalist.json must exist"):
        load_datalist(tmp_path, "training")


def test_command_reports(tmp_path: Path, capsys) -> None:
    source, work = make_folders(tmp_path / "data"), tmp_path / "work"
    outcome = command(source, work, modality="ct", window=(-1000, 500), labels="1=right lung,2=left lung")
    assert outcome["counts"] == {"training": 2, "validation": 1, "test": 1}
    assert all(Path(path).is_file() for path in outcome["outputs"]) and json.dumps(outcome)
    shown = capsys.readouterr()
    assert "is prepared: 2 training, 1 validation, 1 test" in shown.out
    assert f"\n  spacing: {outcome['grid']['spacing']}\n  size: {outcome['grid']['size']}\n" in shown.out
    assert "note: 4 cases name no patient" in shown.err
    assert command(source, work, modality="ct", window=(-1000, 500), labels="1=right lung,2=left lung")["unchanged"]
    assert "is prepared already from this source with these settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(76, 78, 49), (33, 64, 50), (16, 65, 50)], (80, 80, 64)),
        ([(28, 28, 1)], (32, 32, 1)),
        ([(28, 28, 1), (28, 28, 17)], (32, 32, 32)),
        ([(64, 32, 16)], (64, 32, 16)),
    ],
)
def test_the_proposed_grid_has_the_usual_spacing_and_holds_every_volume(
    tmp_path: Path, shapes: list[tuple[int, int, int]], size: tuple[int, int, int]
) -> None:
    cases = {str(index): {"shape": shape, "spacing_mm": [1.953124, 1, 3.27]} for index, shape in enumerate(shapes)}
    cases["bad"] = {"shape": [999, 999, 999], "spacing_mm": [9, 9, 9]}
    write_json(tmp_path / "report.json", {"cases": cases, "left_out": ["bad"]})
    assert fitting_grid(tmp_path) == ModelGrid((1.95, 1.0, 3.27), size)
    cases["coarse"] = {"shape": [40, 8, 8], "spacing_mm": [4, 1, 3.27]}
    cases |= {"b": cases["0"], "c": cases["0"]}
    write_json(tmp_path / "report.json", {"cases": cases, "left_out": ["bad"]})
    assert fitting_grid(tmp_path).spacing[0] == 1.95 and fitting_grid(tmp_path).size[0] == 96  # 160 mm


def test_a_warning_that_many_cases_share_is_said_once_and_errors_one_by_one() -> None:
    many = [Finding(f"p{index}", "warning", "image: no orientation") for index in range(60)]
    few = [Finding(f"p{index}", "warning", "a couch") for index in range(3)]
    errors = [Finding(f"p{index}", "error", "image: NaN") for index in range(5)]
    assert table([*many[:2], *few, *errors, *many[2:]]) == [
        "60 cases  warning  image: no orientation (p0, p1, p2, ...)",
        *(f"p{index}        warning  a couch" for index in range(3)),
        *(f"p{index}        error    image: NaN" for index in range(5)),
    ]
    assert table([]) == []


def test_files_of_the_same_size_and_time_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """An interrupted preparation of one dataset lends nothing to another of the same names, sizes and times."""
    for number, name in enumerate(("one", "two")):
        for index in range(4):
            write_raw(tmp_path / name / f"images/p{index}.nii", ct_array(10 * number + index))
            write_raw(tmp_path / name / f"labels/p{index}.nii", label_array(2))
    broken = tmp_path / "one/images/p3.nii"
    write_raw(broken, np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match="p3  error    image must not be constant"):
        prepare(tmp_path / "one", tmp_path / "work", CT)
    prepare(tmp_path / "two", tmp_path / "work", CT)
    for index in range(4):
        written = nib.load(tmp_path / f"work/images/p{index}.nii.gz").get_fdata()
        np.testing.assert_array_equal(written, ct_array(10 + index))
    first, second = (tmp_path / f"two/images/p{index}.nii" for index in (0, 1))
    first.rename(tmp_path / "swap.nii")
    second.rename(first)
    (tmp_path / "swap.nii").rename(second)
    with pytest.raises(FibldmError, match="different: files of p0; files of p1"):
        prepare(tmp_path / "two", tmp_path / "work", CT)


def write_raw(path: Path, array: np.ndarray) -> None:
    write_nifti(path, array)
    os.utime(path, (1e9, 1e9))


def test_a_failed_restart_keeps_the_key_of_what_is_there(tmp_path: Path) -> None:
    one, two = make_folders(tmp_path / "one"), make_folders(tmp_path / "two")
    prepare(one, tmp_path / "work", CT)
    key = (tmp_path / "work.key.json").read_text()
    write_nifti(two / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match="work.pending.json says where each lies"):
        prepare(two, tmp_path / "work", CT, restart=True)
    assert (tmp_path / "work.key.json").read_text() == key
    assert str(two) in (tmp_path / "work.pending.json").read_text()
    assert prepare(one, tmp_path / "work", CT).unchanged


def test_too_few_sound_patients_are_said_with_the_findings(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3)
    write_nifti(source / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match=r"needs at least 3 patients; got 2:\n  p1  error    image must not be"):
        prepare(source, tmp_path / "work", PrepareSettings(modality="ct", skip_bad=True))
    assert read_json(tmp_path / "work/report.json")["findings"][0]["case"] == "p1"


def test_leaving_bad_cases_out_reads_no_case_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folders(tmp_path / "data", 6)
    write_nifti(source / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(FibldmError, match="leave them out with `skip_bad`"):
        prepare(source, tmp_path / "work", CT)
    monkeypatch.setattr(preparation, "prepare_case", None)
    report = prepare(source, tmp_path / "work", replace(CT, skip_bad=True, seed=3))
    assert report.left_out == ("p1",) and sum(report.counts.values()) == 5


def test_labels_are_missed_in_the_split_without_the_cases_that_are_left_out(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 6)
    write_nifti(source / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    rare = label_array(0)
    rare[0, 0, 0] = 9
    write_nifti(source / "labels/p0.nii.gz", rare)
    names = [f"p{index}" for index in range(6)]
    kept = [name for name in names if name != "p1"]
    seed = next(
        seed
        for seed in range(100)
        if split_subjects(names, seed)["p0"] == "training" != split_subjects(kept, seed)["p0"]
    )
    report = prepare(source, tmp_path / "work", replace(CT, skip_bad=True, seed=seed))
    assert "labels that occur in no training case: 9" in report.notes


def test_spacing_of_the_files_is_carried_along_if_asked(tmp_path: Path) -> None:
    """Along the axes of RAS+, whatever the axes of the file; and a folder made without it stays as it is."""
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 3.0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1]])
    source = make_folders(tmp_path / "data", affine=affine)
    report = prepare(source, tmp_path / "work", PrepareSettings(modality="ct", facts=("spacing",)))
    for entry in entries(tmp_path / "work").values():
        assert [entry[f"spacing_{axis}_mm"] for axis in "xyz"] == pytest.approx([2, 3, 1.5])
    assert not report.unchanged and read_json(tmp_path / "work/report.json")["settings"]["facts"] == ["spacing"]
    prepare(source, tmp_path / "plain", CT)
    assert not any(name.startswith("spacing") for entry in entries(tmp_path / "plain").values() for name in entry)
    assert "facts" not in read_json(tmp_path / "plain/report.json")["settings"]
    with pytest.raises(FibldmError, match="`facts` must be one of spacing, kernel, .*, body_part; got 'modality'"):
        prepare(source, tmp_path / "other", PrepareSettings(modality="ct", facts=("modality",)))


def test_facts_that_are_asked_for_must_be_stated_by_some_case(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data")
    with pytest.raises(
        FibldmError, match=r"by the files of some case; none of \d+ states body_part; .* column of a table"
    ):
        prepare(source, tmp_path / "other", PrepareSettings(modality="ct", facts=("spacing", "body_part")))
    known = {"a": {"kernel": "b"}, "b": {"kernel": None}, "c": {"echo_time_ms_T1w": 3.0}}
    noted = notes_on_facts(["spacing", "kernel", "echo_time_ms"], known)
    assert noted == [f"{name} is stated by 1 of 3 cases, of the others unknown" for name in ("kernel", "echo_time_ms")]
    assert notes_on_facts(["kernel"], {}) == notes_on_facts(["kernel"], {"a": {"kernel": "b"}}) == []


def test_only_columns_that_tell_no_patient_are_carried_along(tmp_path: Path) -> None:
    """Names, numbers as long as identifiers, and texts that patients have to themselves stay outside of WORK."""
    head = "image,label,subject,age,kernel_group,Fallnummer,scanned,Nachname,code\n"
    rows = "".join(
        f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,p{i},{50 + i},{'ab'[i % 2]},{7 + i},{i}-Mar-2019,X{i},"
        f"{2019031400 + i}\n"
        for i in range(4)
    )
    source = make_csv(tmp_path / "data", head + rows)
    report = prepare(source, tmp_path / "work", CT)
    entry = entries(tmp_path / "work")["site-2_ct"]
    assert entry["age"] == 52 and entry["kernel_group"] == "a"
    assert set(entry) == {"image", "label", "case", "subject", "split", "age", "kernel_group"}
    assert any("--keep-columns takes them along): Fallnummer, Nachname, code, scanned" in n for n in report.notes)
    prepare(source, tmp_path / "kept", PrepareSettings(modality="ct", keep_columns=("code",)))
    assert entries(tmp_path / "kept")["site-2_ct"]["code"] == 2019031402


def test_columns_are_known_in_any_case_and_likely_ones_are_asked_for(tmp_path: Path) -> None:
    rows = "".join(f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,p{max(i - 1, 0)}\n" for i in range(4))
    for head, message in (
        ("Image,LABEL,Patient_ID", "no column subject, but Patient_ID"),
        ("image,seg,subject", "seg"),
    ):
        with pytest.raises(FibldmError, match=f"{message}.*, which may be meant"):
            prepare(make_csv(tmp_path / "data", f"{head}\n{rows}"), tmp_path / "work", CT)
    prepare(make_csv(tmp_path / "data", f"Image,LABEL,Subject\n{rows}"), tmp_path / "x", CT)
    found = entries(tmp_path / "x")
    assert found["site-0_ct"]["subject"] == found["site-1_ct"]["subject"] and "label" in found["site-3_ct"]


# What was asked for beyond the defaults


def test_bad_cases_are_left_out_only_when_asked(tmp_path: Path) -> None:
    source, work = make_folders(tmp_path / "data", 6), tmp_path / "work"
    write_nifti(source / "images/p1.nii.gz", np.zeros(SHAPE, np.int16))
    write_nifti(source / "images/p4.nii.gz", ct_array(3))
    settings = PrepareSettings(modality="ct", skip_bad=True)
    report = prepare(source, work, settings)
    assert report.left_out == ("p1", "p4") and sum(report.counts.values()) == 4
    assert sorted(entries(work)) == ["p0", "p2", "p3", "p5"]
    assert {finding.case for finding in report.findings if finding.level == "error"} == {"p1", "p4"}
    assert read_json(work / "report.json")["left_out"] == ["p1", "p4"]
    assert not (work / "images/p1.nii.gz").exists()
    again = prepare(source, work, settings)
    assert again.unchanged and again.left_out == ("p1", "p4")
    write_nifti(source / "images/p1.nii.gz", ct_array(1))
    with pytest.raises(FibldmError, match="different: files of p1"):
        prepare(source, work, settings)


def test_a_mask_on_another_grid_is_brought_to_its_image_when_asked(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 3)
    affine = np.diag([1.5, 1.5, 3, 1])
    fine = np.repeat(np.repeat(label_array(1), 2, axis=0), 3, axis=2)
    finer = np.diag([0.75, 1.5, 1.0, 1])
    finer[:3, 3] = (-0.375, 0, -1)
    write_nifti(source / "labels/p1.nii.gz", fine, finer)
    with pytest.raises(FibldmError, match=r"image \(7, 9, 5\), label \(14, 9, 15\).*; --resample-masks brings it"):
        prepare(source, tmp_path / "work", CT)
    report = prepare(source, tmp_path / "other", PrepareSettings(modality="ct", resample_masks=True))
    np.testing.assert_array_equal(nib.load(tmp_path / "other/labels/p1.nii.gz").get_fdata(), label_array(1))
    assert [(f.case, f.level) for f in report.findings] == [("p1", "warning")]
    affine[0, 3] = 500
    write_nifti(source / "labels/p1.nii.gz", label_array(1), affine)
    with pytest.raises(FibldmError, match="label must lie inside of the image; only 0 % of it does"):
        prepare(source, tmp_path / "far", PrepareSettings(modality="ct", resample_masks=True))


def test_labels_are_changed_as_asked_b7(tmp_path: Path) -> None:
    """Several labels become one; 0 takes a label away."""
    source = make_folders(tmp_path / "data", 3)
    settings = PrepareSettings(modality="ct", labels={1: "coarse"}, remap={2: 1})
    prepare(source, tmp_path / "work", settings)
    written = nib.load(tmp_path / "work/labels/p2.nii.gz").get_fdata()
    np.testing.assert_array_equal(written, label_array(2) > 0)
    assert parse_remap("2=1, 4=0") == {2: 1, 4: 0}
    for wrong in ("", "2", "2=a", "2=255", "2=1,2=3"):
        with pytest.raises(FibldmError, match="`remap` must be OLD=NEW,... with new values 0...254"):
            parse_remap(wrong)


def make_organs(root: Path) -> Path:
    """Airways (5 voxels) inside of a lung (30 voxels)."""
    for index in range(3):
        lung, airways = np.zeros((2, *SHAPE), np.uint8)
        lung[1:4, 2:4, 0:5] = 1
        airways[2, 2, 0:5] = 1
        write_nifti(root / f"s{index}/ct.nii.gz", ct_array(index))
        write_nifti(root / f"s{index}/segmentations/lung.nii.gz", lung)
        write_nifti(root / f"s{index}/segmentations/airways.nii.gz", airways)
    return root


def test_binary_masks_are_merged_by_importance_d2(tmp_path: Path) -> None:
    """One label map of many binary masks, the first name winning where two overlap."""
    source = make_organs(tmp_path / "data")
    for order, voxels in ((("airways", "lung"), (5, 25)), (("lung", "airways"), (30, 0))):
        work = tmp_path / order[0]
        prepare(source, work, PrepareSettings(modality="ct", merge_masks=order))
        counted = np.bincount(np.asarray(nib.load(work / "labels/s1.nii.gz").dataobj).ravel(), minlength=3)
        assert tuple(counted[1:]) == voxels
        names = read_json(work / "datalist.json")["labels"]
        assert names["1"] == order[0]
    write_nifti(source / "s1/segmentations/lung.nii.gz", np.full(SHAPE, 3, np.uint8))
    with pytest.raises(FibldmError, match="a binary mask must hold 0 and 1; it holds 3"):
        prepare(source, tmp_path / "other", PrepareSettings(modality="ct", merge_masks=("airways", "lung")))


def test_dicom_masks_that_overlap_need_an_order(tmp_path: Path) -> None:
    """Nothing is guessed where two segmentations claim a voxel; `_label` of a case tells."""
    make_organs(tmp_path)
    masks = tuple(Mask((tmp_path / f"s0/segmentations/{n}.nii.gz",), value=v) for v, n in ((1, "lung"), (2, "airways")))
    case = Case("a", ((tmp_path / "s0/ct.nii.gz",),), masks, "a")
    refused = prepare_case(case, CT, None)
    assert [f.message for f in refused.findings] == [
        "masks must not overlap; they do in 5 voxels (`merge_masks` says which goes first)"
    ]
    assert prepare_case(case, replace(CT, merge_masks=("lung", "airways")), None).findings == ()


def test_cases_without_masks_are_kept_and_go_to_training(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "data", 10)
    before = {name: entry["split"] for name, entry in prepared(source, tmp_path / "all").items()}
    for index in range(3):
        write_nifti(source / f"images/extra{index}.nii.gz", ct_array(50 + index))
    found = prepared(source, tmp_path / "more")
    assert {name: entry["split"] for name, entry in found.items() if "label" in entry} == before
    assert {found[f"extra{index}"]["split"] for index in range(3)} == {"training"}
    assert len(load_datalist(tmp_path / "more", "training", masks=True)) == 7


def prepared(source: Path, work: Path) -> dict[str, dict]:
    prepare(source, work, CT)
    return entries(work)


def test_names_of_patients_stay_outside_of_the_work_folder(tmp_path: Path) -> None:
    """A salted hash links the cases of one patient; the key lies beside the work folder, for its owner only."""
    rows = "".join(f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,DOE^JANE{i % 3},{i},1956-07-23\n" for i in range(4))
    source = make_csv(tmp_path / "data", f"image,label,subject,age,patient_id\n{rows}".replace("1956", "2019"))
    work = tmp_path / "work"
    report = prepare(source, work, PrepareSettings(modality="ct", hide_names=True))
    assert any("may tell the patient are left out" in note and "patient_id" in note for note in report.notes)
    found = entries(work)
    assert all(name.startswith("case-") for name in found) and len(found) == 4
    assert len({entry["subject"] for entry in found.values()}) == 3
    assert sorted(entry["age"] for entry in found.values()) == [0, 1, 2, 3]
    for content in snapshot(work).values():
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        assert not any(planted in text for planted in (b"DOE", b"JANE", b"2019-07-23", b"site-"))
    key = tmp_path / "work.key.json"
    assert key.stat().st_mode & 0o777 == 0o600
    assert set(read_json(key)["cases"]) == set(found) and "site-0" in key.read_text()
    assert prepare(source, work, PrepareSettings(modality="ct", hide_names=True)).unchanged
    key.unlink()
    with pytest.raises(FibldmError, match="is known by its key .*work.key.json, which is gone; put it back"):
        prepare(source, work, PrepareSettings(modality="ct", hide_names=True))
    prepare(source, work, PrepareSettings(modality="ct", hide_names=True), restart=True, keep_salt=True)
    key.unlink()
    assert prepare(source, work, PrepareSettings(modality="ct", hide_names=True)).unchanged


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "hippocampus_mri").is_dir(), reason=f"no folder hippocampus_mri in {DATA} ($FIBLDM_DATA)"
)
def test_hippocampus_gives_140_20_40_h13(tmp_path: Path) -> None:
    report = prepare(DATA / "hippocampus_mri", tmp_path / "work")
    assert report.counts == {"training": 141, "validation": 20, "test": 40}
    assert report.findings == () and "cases without a mask, for the autoencoder only: 1" in report.notes
    assert len(load_datalist(tmp_path / "work", "training", masks=True)) == 140
    datalist = read_json(tmp_path / "work/datalist.json")
    assert datalist["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert datalist["licence"] == "CC-BY-SA 4.0" and "Simpson" in datalist["reference"]
    assert len({entry["subject"] for entry in entries(tmp_path / "work").values()}) == 201
    intensity = load_intensity(tmp_path / "work/intensity.json")
    for entry in load_datalist(tmp_path / "work", "training"):
        tensor = intensity.normalise(np.asarray(nib.load(entry["image"]).dataobj))
        assert tensor.min() == -1 and tensor.max() == 1 and tensor.std() > 0.1
