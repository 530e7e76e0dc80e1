"""From a tree of DICOM studies to synthetic DICOM, all by the command line: no patient shows in any file or message."""

import contextlib
import gzip
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from builders import STAGES
from dicom_files import BIRTH_DATE, DATE, NAME, complete, write_segmentation, write_series
from highdicom.seg import segread

from fibldm.cli import run
from fibldm.files import read_json
from fibldm.phantoms.phantoms import LABELS, make_phantom
from fibldm.volumes.grid import Volume

PATIENTS = ("PLANTED-4711", "PLANTED-4712", "PLANTED-4713", "PLANTED-4714")
FOLDER = "planted_paula"


def write_study(root: Path, number: int, patient: str) -> Path:
    """A phantom as a study of the patient, the segmentation beside its series, the patient's name in the path."""
    phantom = make_phantom(5, number, 1)
    volume = Volume(phantom.volume[::2, ::2, ::2], phantom.affine @ np.diag([2, 2, 2, 1])).canonical()
    labels = Volume(phantom.labels[::2, ::2, ::2], phantom.affine @ np.diag([2, 2, 2, 1])).canonical()
    folder = root / f"{FOLDER}_{number}"
    lps = np.diag([-1, -1, 1, 1]) @ volume.affine
    directions = lps[:3, :3] / volume.grid.spacing
    files = write_series(
        folder / "ct",
        volume.array.transpose(2, 1, 0),
        spacing=volume.grid.spacing,
        origin=lps[:3, 3],
        orientation=(*directions[:, 0], *directions[:, 1]),
        study=f"study {number}",
        series=f"series {number}",
        patient=patient,
        change=complete,
    )
    drawn = labels.array.transpose(2, 1, 0)
    present = [value for value in LABELS if value and (drawn == value).any()]
    pixels = np.stack([drawn == value for value in present], axis=-1).astype(np.uint8)
    (folder / "seg").mkdir()
    series = [pydicom.dcmread(file) for file in files]
    write_segmentation(folder / "seg" / "labels.dcm", series, pixels, names=[LABELS[value] for value in present])
    return folder


def planted_in(folder: Path) -> set[bytes]:
    """Names, IDs, dates and UIDs of instances, series, studies and frames of reference in the sources."""
    values = {NAME, BIRTH_DATE, DATE, FOLDER, "Planted", "Paula", *PATIENTS}
    for file in folder.rglob("*.dcm"):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        keywords = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
        values |= {str(header.get(keyword)) for keyword in keywords if header.get(keyword)}
    return {value.encode() for value in values}


def told(content: bytes, planted: set[bytes]) -> set[bytes]:
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).lower()
    return {value for value in planted if value.lower() in text}


@pytest.mark.slow
def test_no_patient_shows_in_what_a_whole_run_writes_or_says(tmp_path: Path, tiny_data: Path) -> None:
    """Planted names, IDs, dates and UIDs are in no output, though they are in tags and in folder names."""
    source, work, runs, out = tmp_path / "source", tmp_path / "work", tmp_path / "runs", tmp_path / "out"
    studies = [write_study(source, number, patient) for number, patient in enumerate(PATIENTS, start=1)]
    planted = planted_in(source)
    assert len(planted) > 100 and told((studies[0] / "ct/0001.dcm").read_bytes(), planted) >= {NAME.encode()}
    options = ["--data", str(work), "--run", str(runs), "--config", str(tiny_data), "--config", "tiny"]
    options += ["--set", "device=cpu"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert run(["prepare", str(source), "--out", str(work), "--workers", "1"]) == 0
        for stage in STAGES:
            assert run(["encode", *options] if stage == "latents" else ["train", stage, *options]) == 0
        mask = work / read_json(work / "datalist.json")["training"][0]["label"]
        command = ["synthesize", "--run", str(runs), "--masks", str(mask), "--steps", "2", "--device", "cpu"]
        assert run([*command, "--out", str(out / "nifti"), "--bids", "ct"]) == 0
        assert run([*command, "--out", str(out / "dicom"), "--format", "dicom"]) == 0
        case = mask.name.removesuffix(".nii.gz")
        template = Path(read_json(tmp_path / "work.key.json")["cases"][case])
        command += ["--out", str(out / "like"), "--format", "dicom", "--template", str(template)]
        assert run(command) == 0
    files = [file for folder in (work, runs, out) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 100
    said_of_sources = said.getvalue().replace(str(source), "")
    assert told(said_of_sources.encode(), planted) == set()
    assert {file: found for file in files if (found := told(file.read_bytes(), planted))} == {}
    assert not [file for file in files if told(str(file.relative_to(tmp_path)).encode(), planted)]
    made = pydicom.dcmread(next((out / "like").glob("*/*.dcm")))
    assert made.SyntheticData == "YES" and str(made.PatientName).startswith("SYNTHETIC^")
    assert len(segread(next((out / "like/masks").glob("*.dcm"))).SegmentSequence) >= 3
