"""PET in SUV by body weight: exact where the header tells it, refused where it does not, and written as PET again."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_files import PLANTED, example, write_series
from pydicom.dataset import Dataset

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.dicom.patient_position import state_position
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.dicom.writer import Identity, make_series
from fibldm.volumes.dicom.writer import write_series as write_synthetic
from fibldm.volumes.grid import Volume
from fibldm.volumes.intensity import Intensity

WEIGHT, DOSE, HALF_LIFE = 75.0, 3.5e8, 6586.2
SLOPES = (0.5, 1.0, 2.0, 0.25, 4.0, 1.5)
STORED = example((6, 7, 9), seed=1).clip(0)
ACTIVITY = STORED * np.array(SLOPES)[:, None, None]
ONE = Callable[[Dataset], None]


def pet(dataset: Dataset) -> None:
    """What a scanner says: injected at 09:00, scanned from 10:00 on, all corrected to that."""
    dataset.Units, dataset.DecayCorrection = "BQML", "START"
    dataset.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"]
    dataset.PatientWeight = WEIGHT
    dataset.SeriesDate = dataset.AcquisitionDate = "20190314"
    dataset.SeriesTime, dataset.AcquisitionTime = "100000", "100500.00"
    dataset.ActualFrameDuration, dataset.FrameReferenceTime = 120000, 359000
    injected = Dataset()
    injected.RadionuclideTotalDose, injected.RadionuclideHalfLife = DOSE, HALF_LIFE
    injected.RadiopharmaceuticalStartTime = "090000.00"
    dataset.RadiopharmaceuticalInformationSequence = [injected]


def injected(**values: Any) -> ONE:
    return lambda dataset: dataset.RadiopharmaceuticalInformationSequence[0].update(_set(values))


def said(**values: Any) -> ONE:
    return lambda dataset: dataset.update(_set(values))


def without(*keywords: str) -> ONE:
    def change(dataset: Dataset) -> None:
        for keyword in keywords:
            for part in (dataset, dataset.RadiopharmaceuticalInformationSequence[0]):
                if keyword in part:
                    del part[keyword]

    return change


def _set(values: dict[str, Any]) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def write(folder: Path, *changes: ONE, by_slice: Callable[[Dataset, int], None] | None = None) -> list[Path]:
    def change(dataset: Dataset, index: int) -> None:
        for step in (pet, *changes):
            step(dataset)
        if by_slice is not None:
            by_slice(dataset, index)

    return write_series(folder, ACTIVITY, modality="PT", slope=SLOPES, change=change)


def decayed(seconds: float) -> float:
    return DOSE * math.exp(-math.log(2) * seconds / HALF_LIFE)


def private(block: str, values: dict[int, Any], group: int = 0x7053) -> ONE:
    def change(dataset: Dataset) -> None:
        part = dataset.private_block(group, block, create=True)
        for offset, value in values.items():
            part.add_new(offset, "DT" if group == 9 else "DS", value)

    return change


HOUR = WEIGHT * 1000 / decayed(3600)
CONSTANT = math.log(2) / HALF_LIFE * 120
MEAN = math.log(CONSTANT / (1 - math.exp(-CONSTANT))) / CONSTANT * 120
"""s from the start of a frame of 2 min to the time of its mean count rate: a little less than 1 min."""


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ([], HOUR),
        ([said(DecayCorrection="ADMIN")], WEIGHT * 1000 / DOSE),
        (
            [said(DecayCorrection="NONE", CorrectedImage=["ATTN", "SCAT"])],
            WEIGHT * 1000 / decayed(3600 + 300 + MEAN),
        ),
        # over midnight: injected the day before
        ([injected(RadiopharmaceuticalStartTime="233000")], WEIGHT * 1000 / decayed(10.5 * 3600)),
        (
            [
                injected(RadiopharmaceuticalStartDateTime="20190313233000.00", RadiopharmaceuticalStartTime="233000"),
            ],
            WEIGHT * 1000 / decayed(10.5 * 3600),
        ),
        ([injected(RadiopharmaceuticalStartDateTime="20190314090000+0100")], HOUR),
        # written later: the scan's start follows from the frame's reference time, or GE says it
        ([said(SeriesDate="20200101")], WEIGHT * 1000 / decayed(3600 + 300 - 359 + MEAN)),
        ([said(SeriesDate="20200101", FrameReferenceTime=0)], WEIGHT * 1000 / decayed(3900)),
        (
            [said(SeriesDate="20200101"), private("GEMS_PETD_01", {0x0D: "20190314100200.00"}, 9)],
            WEIGHT * 1000 / decayed(3720),
        ),
        ([said(Units="GML", SUVType="BW"), without("PatientWeight")], 1.0),
        ([said(Units="GML"), without("RadionuclideTotalDose")], 1.0),
        ([said(Units="CNTS"), private("Philips PET Private Group", {0x00: "0.000374"})], 0.000374),
        ([said(Units="CNTS"), private("Philips PET Private Group", {0x00: "0", 0x09: "1.75"})], 1.75 * HOUR),
    ],
)
def test_suv_of_known_activity_is_exact(tmp_path: Path, changes: list[ONE], factor: float) -> None:
    files = write(tmp_path, *changes)
    scan = read_series(files, suv=True)
    activity = read_series(files).array.astype(np.float64)
    np.testing.assert_allclose(scan.array, activity * factor, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(activity.ravel()), np.sort(ACTIVITY.ravel()))
    assert scan.array.dtype == np.float32 and scan.modality == "PT"


def test_slices_without_decay_correction_have_factors_of_their_own(tmp_path: Path) -> None:
    def later(dataset: Dataset, index: int) -> None:
        dataset.AcquisitionTime = f"10{2 * index:02d}00"

    raw = said(DecayCorrection="NONE", CorrectedImage=["ATTN"])
    files = write(tmp_path, raw, by_slice=later)
    ratio = read_series(files, suv=True).array / read_series(files).array.clip(1e-9)
    for index in range(6):
        shown = ratio[..., index][ratio[..., index] > 0]
        np.testing.assert_allclose(shown, WEIGHT * 1000 / decayed(3600 + 120 * index + MEAN), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([without("PatientWeight")], "it does not state its Patient's Weight"),
        ([said(PatientWeight=75000)], r"Patient's Weight is not within 0.005 to 500 kg \(is it in kg\?\)"),
        ([without("RadionuclideTotalDose")], "it does not state its Radionuclide Total Dose"),
        ([injected(RadionuclideTotalDose=350.0)], r"Total Dose is not within .* Bq \(is it in Bq\?\)"),
        ([without("RadionuclideHalfLife")], "it does not state its Radionuclide Half Life"),
        ([without("RadiopharmaceuticalStartTime")], "Radiopharmaceutical Start Time or Start DateTime"),
        ([injected(RadiopharmaceuticalStartTime="090060")], "Start Time cannot be read as date and time"),
        ([injected(RadiopharmaceuticalStartDateTime="20190314110000")], "Start Time and Start DateTime differ"),
        (
            [injected(RadiopharmaceuticalStartDateTime="20190314110000"), without("RadiopharmaceuticalStartTime")],
            "an injection after the scan",
        ),
        (
            [injected(RadiopharmaceuticalStartDateTime="20190312090000")],
            "an injection 26.8 half-lives before the scan, more than 10",
        ),
        ([without("AcquisitionTime")], "Acquisition Date and Acquisition Time"),
        ([said(Units="PROPCPS")], "its units are PROPCPS, and neither BQML nor GML"),
        ([said(Units="GML", SUVType="LBM")], "its SUV are by LBM, and not by body weight"),
        ([said(Units="CNTS")], r"counts \(CNTS\), and it states no factor"),
        ([said(DecayCorrection="LATER")], "Decay Correction is LATER"),
        ([without("DecayCorrection")], "it does not state its Decay Correction"),
        ([said(CorrectedImage=["DECY"])], "not corrected for attenuation"),
        ([said(CorrectedImage=["ATTN"])], "its Decay Correction is START, but its Corrected Image does not name DECY"),
        ([said(DecayCorrection="NONE")], "its Decay Correction is NONE, but its Corrected Image names DECY"),
        (
            [said(DecayCorrection="NONE", CorrectedImage=["ATTN"]), without("ActualFrameDuration")],
            "Actual Frame Duration",
        ),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_one_error(tmp_path: Path, changes: list[ONE], reason: str) -> None:
    files = write(tmp_path, *changes)
    with pytest.raises(FibldmError, match=reason) as caught:
        read_series(files, suv=True)
    assert caught.value.remedy and not any(secret in str(caught.value) for secret in PLANTED)
    assert not re.search(r"2019|0900|\b75\b", str(caught.value))  # nor a date, a time or the weight
    read_series(files)  # as it is, it can be read


def test_two_weights_are_refused(tmp_path: Path) -> None:
    def other(dataset: Dataset, index: int) -> None:
        dataset.PatientWeight = WEIGHT + (index == 3)

    with pytest.raises(FibldmError, match="its slices state 2 values of Patient's Weight"):
        read_series(write(tmp_path, by_slice=other), suv=True)


def activity_of(suv: float) -> float:
    return suv / HOUR


def test_a_tree_of_pet_is_prepared_in_suv(tmp_path: Path) -> None:
    """With a CT beside: PET where it is asked for."""
    for patient in range(3):
        suv = np.random.default_rng(patient).uniform(0, 12, (6, 7, 9))
        suv[:, 0] = 0
        stored = np.rint(suv * activity_of(1.0) / 4)
        options: dict[str, Any] = {"patient": f"P{patient}", "study": f"study {patient}"}
        folder = tmp_path / f"source/{patient}"
        write_series(
            folder / "pt", stored * 4, modality="PT", slope=4.0, series="pt", change=lambda d, _: pet(d), **options
        )
        write_series(folder / "ct", example(seed=patient), series="ct", **options)
    report = prepare(tmp_path / "source", tmp_path / "work", PrepareSettings(layout="dicom", modality="pt"))
    assert any("3 series are no volumes of PET and were left out (3 CT)" in note for note in report.notes)
    intensity = read_json(tmp_path / "work/intensity.json")
    assert intensity == {"kind": "suv", "low": 0.0, "high": 20.0, "units": "SUV"}
    assert read_json(tmp_path / "work/datalist.json")["modality"] == "pt"
    for file in (tmp_path / "work/images").iterdir():
        voxels = np.asarray(nibabel.load(file).dataobj)
        assert voxels.dtype == np.float32 and voxels.min() == 0 and 11 < voxels.max() < 12.01


def test_nifti_must_be_in_suv(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "source" / kind).mkdir(parents=True)
    for number in range(3):
        values = np.random.default_rng(number).uniform(0, 30000, (8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"source/images/{number}.nii.gz")
        label = (values > 20000).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / f"source/labels/{number}.nii.gz")
    with pytest.raises(FibldmError, match=r"must be in SUV by body weight; .* \(is it in Bq/ml\?"):
        prepare(tmp_path / "source", tmp_path / "work", PrepareSettings(modality="pt"))


def test_intensity_of_pet_goes_there_and_back() -> None:
    intensity = Intensity("suv", low=0.0, high=20.0)
    assert Intensity.from_dict(intensity.to_dict()) == intensity and intensity.units == "SUV"
    values = np.array([-1.0, 0.0, 5.0, 20.0, 60.0], dtype=np.float32)
    np.testing.assert_allclose(intensity.normalise(values), [-1, -1, -0.5, 1, 1])
    np.testing.assert_allclose(intensity.to_disk(intensity.normalise(values)), [0, 0, 5, 20, 20])


def test_synthetic_pet_is_written_as_pet(tmp_path: Path) -> None:
    suv = np.random.default_rng(0).uniform(0, 20, (9, 7, 6)).astype(np.float32)
    volume = Volume(suv, np.diag([2.0, 2.0, 3.0, 1.0]))
    series = make_series(volume, modality="pt", value_range=(0.0, 20.0), identity=Identity("p", "k"))
    assert {(item.Modality, item.Units, item.SUVType, str(item.SyntheticData)) for item in series} == {
        ("PT", "GML", "BW", "YES")
    }
    write_synthetic(tmp_path / "out", series)
    scan = read_series(sorted((tmp_path / "out").iterdir()), suv=True)
    np.testing.assert_allclose(scan.array, suv, atol=20 / 65535)
    with pytest.raises(FibldmError, match="the window of PET must begin at 0"):
        make_series(volume, modality="pt", value_range=(-1.0, 20.0), identity=Identity("p", "k"))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy")
@pytest.mark.parametrize("position", ["", "HFS", "FFDL"])
def test_dciodvfy_finds_no_error_in_pet(tmp_path: Path, position: str) -> None:
    volume = Volume(np.zeros((9, 7, 6), np.float32), np.diag([2.0, 2.0, 3.0, 1.0]))
    series = make_series(volume, modality="pt", value_range=(0.0, 20.0), identity=Identity("p", "k"))
    for item in series if position else ():
        state_position(item, position)
    write_synthetic(tmp_path / "out", series)
    call = ["dciodvfy", "-new", str(tmp_path / "out/0001.dcm")]
    lines = subprocess.run(call, capture_output=True, text=True, check=False).stderr.splitlines()
    assert "PETImage" in lines
    errors = [line for line in lines if line.startswith("Error")]
    assert [line for line in errors if "(0008,001c)" not in line] == []
