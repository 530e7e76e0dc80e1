"""A blinded folder of real and synthetic volumes, whose key lies outside of it: G6."""

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.files import hash_file, write_json
from fibldm.report.reader_study import write_reader_study
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_nifti, write_synthetic

SHAPE = (6, 7, 5)
AFFINE = np.array([[-2.0, 0, 0, 91.5], [0, 3, 0, -7], [0, 0, 4, 12], [0, 0, 0, 1]])


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An evaluation, synthetic volumes of all six test patients, and the work folder."""
    work, synthetic, measured = tmp_path / "work", tmp_path / "synthetic", tmp_path / "measured"
    generator = np.random.default_rng(0)
    entries = []
    for number in range(6):
        case = f"case{number}"
        voxels = generator.integers(-1200, 500, SHAPE).astype(np.int16)
        write_nifti(work / "images" / f"{case}.nii.gz", voxels, AFFINE, "MUELLER, 2019")
        write_labels(work / "labels" / f"{case}.nii.gz", Volume(np.ones(SHAPE, dtype=np.uint8), AFFINE))
        files = {"image": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz"}
        entries.append({**files, "case": case, "subject": f"s{number}"})
        write_synthetic(synthetic / f"{case}_000.nii.gz", Volume(voxels.astype(np.float32), AFFINE), {})
    splits = {"training": [], "validation": [], "test": entries}
    write_json(work / "datalist.json", {"content": "d", "labels": {"1": "one"}, **splits})
    write_json(work / "report.json", {"ok": True, "cases": {}})
    write_json(work / "intensity.json", {"kind": "window", "low": -1000.0, "high": 300.0})
    write_json(measured / "metrics.json", {"realism": {"figures": {}}})
    return measured, synthetic, work


def written(study: tuple[Path, Path, Path], out: Path, seed: int = 0) -> list[dict[str, str]]:
    measured, synthetic, work = study
    made = write_reader_study(measured, out, synthetic=synthetic, data=work, seed=seed)
    assert (made.real, made.synthetic, made.key) == (3, 3, out.with_name("study.key.csv"))
    return list(csv.DictReader(made.key.read_text().splitlines()))


def test_nothing_in_the_folder_tells_real_from_synthetic_and_the_key_does(study, tmp_path: Path) -> None:
    out = tmp_path / "study"
    key = written(study, out)
    files = sorted((out / "volumes").iterdir())
    assert [file.name for file in files] == [f"{row['number']}.nii.gz" for row in key] and len(files) == 6
    headers = set()
    for file, row in zip(files, key, strict=True):
        image = nibabel.load(file)
        headers.add(image.header.binaryblock)
        assert not image.header.extensions and b"MUELLER" not in file.read_bytes()
        voxels = np.asanyarray(image.dataobj)
        assert voxels.dtype == np.int16 and voxels.min() == 0 and voxels.max() == 255
        assert hash_file(file) == row["volume_sha256"]
    assert len(headers) == 1 and b"READER STUDY: real or SYNTHETIC" in headers.pop()
    assert np.allclose(nibabel.load(files[0]).affine, np.diag([2, 3, 4, 1]))
    inside = "".join(path.name + path.read_text() for path in out.glob("*.*"))
    assert "SYNTHETIC" in inside and "case" not in inside and "patient data" in inside
    assert (out / "answers.csv").read_text().count("\n") == 7
    assert (tmp_path / "study.key.csv").stat().st_mode & 0o077 == 0


def test_no_patient_is_there_twice(study, tmp_path: Path) -> None:
    """Nobody finds the pair of a scan and the volume of its mask; the seed decides which patients are which."""
    kinds = []
    for seed in (0, 1):
        key = written(study, tmp_path / str(seed) / "study", seed)
        assert len({row["source"].removesuffix(".nii.gz").removesuffix("_000") for row in key}) == 6
        kinds.append({row["source"] for row in key if row["kind"] == "real"})
    assert kinds[0] != kinds[1]


def test_a_voxel_is_where_it_was(study, tmp_path: Path) -> None:
    key = written(study, tmp_path / "study")
    row = next(row for row in key if row["kind"] == "real")
    source = nibabel.as_closest_canonical(nibabel.load(study[2] / "images" / row["source"])).get_fdata()
    voxels = nibabel.load(tmp_path / "study" / "volumes" / f"{row['number']}.nii.gz").get_fdata()
    assert np.abs(voxels - (np.clip(source, -1000, 300) + 1000) / 1300 * 255).max() <= 0.51


def test_a_study_that_lies_there_is_kept(study, tmp_path: Path) -> None:
    written(study, tmp_path / "study")
    with pytest.raises(FibldmError, match="study lies there already"):
        written(study, tmp_path / "study")
    with pytest.raises(FibldmError, match="needs synthetic volumes"):
        write_reader_study(study[0], tmp_path / "other", synthetic=None, data=study[2], seed=0)
