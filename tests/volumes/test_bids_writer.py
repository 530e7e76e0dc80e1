"""The BIDS derivative folder: A32, H1."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.volumes.bids_writer import check_bids, write_bids
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_synthetic

NAMES = {2: "posterior hippocampus", 1: "anterior hippocampus"}


def outputs(folder: Path, licence: str | None = "CC-BY-SA-4.0") -> list[Path]:
    """Two volumes of one mask and one of another, as synthesize writes them."""
    paths = []
    for mask, number in (("Planted_000", 0), ("Planted_000", 1), ("b", 0)):
        path = folder / f"{mask}_{number:03d}.nii.gz"
        facts = {"mask": f"{mask}.nii.gz", "mask_sha256": mask, "number": number, "source": {"licence": licence}}
        array = np.full((2, 3, 4), number, dtype=np.float32)
        write_synthetic(path, Volume(array, np.diag([1.0, 2, 3, 1])), facts)
        write_labels(folder / "masks" / f"{mask}.nii.gz", Volume((array + 1).astype(np.uint8), np.diag([1.0, 2, 3, 1])))
        paths.append(path)
    return paths


def test_dataset_of_mr(tmp_path):
    """Names, description, label table and sidecars as the standard has them; H1: the mark goes along."""
    folder = tmp_path / "bids"
    volumes = outputs(tmp_path)
    for _ in range(2):
        write_bids(folder, volumes, suffix="T1w", names=NAMES, skull_stripped=True)
    described = json.loads((folder / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative" and described["License"] == "CC-BY-SA-4.0"
    assert [(item["Name"], item["Version"]) for item in described["GeneratedBy"]] == [("FibLDM", __version__)]
    table = (folder / "dseg.tsv").read_text()
    assert table == "index\tname\n0\tbackground\n1\tanterior hippocampus\n2\tposterior hippocampus\n"
    subjects = sorted(path.name for path in folder.glob("sub-*"))
    assert len(subjects) == 2 and all(name.removeprefix("sub-").isalnum() for name in subjects)
    two = next(name for name in subjects if len(list((folder / name / "anat").glob("*.nii.gz"))) == 3)
    assert sorted(path.name for path in (folder / two / "anat").iterdir()) == [
        f"{two}_dseg.nii.gz",
        *(f"{two}_run-{k:03d}_desc-synthetic_T1w.{end}" for k in (0, 1) for end in ("json", "nii.gz")),
    ]
    copied = nibabel.load(folder / two / "anat" / f"{two}_run-001_desc-synthetic_T1w.nii.gz")
    assert copied.header["descrip"].item().startswith(b"SYNTHETIC") and np.asanyarray(copied.dataobj).max() == 1
    facts = json.loads((folder / two / "anat" / f"{two}_run-001_desc-synthetic_T1w.json").read_text())
    assert facts["SkullStripped"] is True and facts["synthetic"] is True
    assert not [path for path in folder.rglob("*") if "Planted" in path.name]
    assert not (folder / ".bidsignore").exists()


def test_ct_is_left_out_of_validation(tmp_path):
    """The standard has no CT yet."""
    write_bids(tmp_path / "bids", outputs(tmp_path, None), suffix="ct", names=NAMES)
    assert (tmp_path / "bids" / ".bidsignore").read_text() == "**/ct\n"
    assert len(list((tmp_path / "bids").glob("sub-*/ct/*_desc-synthetic_ct.nii.gz"))) == 3
    assert "License" not in json.loads((tmp_path / "bids" / "dataset_description.json").read_text())


@pytest.mark.parametrize(("suffix", "stripped"), [("ct", None), ("T1w", False), ("FLAIR", True)])
def test_the_validator_of_bids_finds_no_error(tmp_path, suffix, stripped):
    """As the community's own program judges it; who the authors are it must be told by the user."""
    program = shutil.which("bids-validator-deno") or shutil.which(
        "bids-validator-deno", path=Path(sys.executable).parent
    )
    if program is None:
        pytest.skip("needs bids-validator-deno (pip install bids-validator-deno)")
    write_bids(tmp_path / "bids", outputs(tmp_path), suffix=suffix, names=NAMES, skull_stripped=stripped)
    command = [program, str(tmp_path / "bids"), "--format", "json"]
    judged = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    issues = json.loads(judged.stdout)["issues"]["issues"]
    assert judged.returncode == 0 and {issue["code"] for issue in issues} == {"TOO_FEW_AUTHORS"}


@pytest.mark.parametrize(
    ("suffix", "modality", "stripped", "message"),
    [
        ("t1", "mr", True, "the BIDS suffix must be one of T1w, T2w, .*ct; got 't1'"),
        ("ct", "mr", True, "must fit the modality of the run, MR; got ct"),
        ("T1w", "ct", None, "must fit the modality of the run, CT; got T1w"),
        ("T1w", "mr", None, "whether it is skull-stripped; give --skull-stripped or --no-skull-stripped with MR"),
        ("ct", "ct", False, "and only of MR"),
    ],
)
def test_what_is_refused(suffix, modality, stripped, message):
    with pytest.raises(FibldmError, match=message):
        check_bids(suffix, modality=modality, skull_stripped=stripped)
    check_bids("FLAIR", modality="mr", skull_stripped=False)
    check_bids("ct", modality="ct", skull_stripped=None)
