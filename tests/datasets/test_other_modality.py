"""Microscopy, simulations, shapes: ``--modality other`` with a declared range."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.torch_datasets import WorkDataset
from fibldm.delivery.measured import Measured
from fibldm.delivery.model_card import CardText, card
from fibldm.errors import FibldmError
from fibldm.volumes.bids_writer import check_bids
from fibldm.volumes.datalist import SPLITS, load_datalist
from fibldm.volumes.dicom.output import DicomOutput
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import Volume
from fibldm.volumes.intensity import Intensity, load_intensity

OTHER = PrepareSettings(modality="other", range=(0, 4095))
MICRONS = np.diag([0.4, 0.5, 2.0, 1.0])


def stack(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (8, 9, 7)).astype(np.uint16)


def microscopy(root: Path, unit: str = "micron") -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
        for number in range(4):
            array = stack(number) if folder == "images" else (stack(number) > 2000).astype(np.uint8)
            image = nibabel.Nifti1Image(array, MICRONS)
            image.header.set_xyzt_units(unit)
            nibabel.save(image, root / folder / f"c{number}.nii.gz")
    return root


def entries(work: Path) -> dict[str, dict]:
    return {entry["case"]: entry for split in SPLITS for entry in load_datalist(work, split)}


def test_micrometres_become_millimetres_and_the_range_comes_back_c21(tmp_path: Path) -> None:
    report = prepare(microscopy(tmp_path / "s"), tmp_path / "w", OTHER, progress=False)
    assert any("lengths in micron, as the header says, were brought to mm" in f.message for f in report.findings)
    image = nibabel.load(entries(tmp_path / "w")["c2"]["image"])
    np.testing.assert_allclose(image.header.get_zooms(), [0.0004, 0.0005, 0.002], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(image.dataobj), stack(2))
    intensity = load_intensity(tmp_path / "w/intensity.json")
    assert (intensity.kind, intensity.output_range) == ("range", (0, 4095))
    item = WorkDataset(tmp_path / "w", "training")[0]
    back = intensity.to_disk(item["image"][0].numpy())
    np.testing.assert_allclose(back, stack(int(item["meta"]["case"][1:])), atol=0.01)


def test_scanners_files_must_be_in_mm(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="the file must be in mm; its header says micron"):
        prepare(microscopy(tmp_path / "s"), tmp_path / "w", PrepareSettings(modality="mr"), progress=False)
    with pytest.raises(FibldmError, match=r"must be 2.5 to 3000 mm; the extent is 0.0032 x 0.0045 x 0.014 mm"):
        prepare(
            shrunk(microscopy(tmp_path / "t", "mm")), tmp_path / "w2", PrepareSettings(modality="mr"), progress=False
        )


def shrunk(source: Path) -> Path:
    """The same with a header in metres that does not say so."""
    for file in source.rglob("*.nii.gz"):
        image = nibabel.load(file)
        array = np.asarray(image.dataobj).copy()
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.001, 0.001, 0.001, 1]) @ image.affine), file)
    return source


def test_colours_are_three_channels_c21(tmp_path: Path) -> None:
    rows = ["image,subject"]
    for number in range(3):
        (tmp_path / f"s{number}").mkdir()
        colours = np.random.default_rng(number).integers(0, 256, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / f"s{number}/a.png")
        rows.append(f"s{number},p{number}")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    settings = PrepareSettings(
        modality="other", range=(0, 255), channels=("red", "green", "blue"), spacing=(0.1, 0.1, 0.1)
    )
    prepare(tmp_path / "cases.csv", tmp_path / "w", settings, progress=False)
    item = WorkDataset(tmp_path / "w", "training")[0]
    assert item["image"].shape == (3, 5, 6, 1)
    number = Path(item["meta"]["case"]).name[-1]
    expected = np.random.default_rng(int(number)).integers(0, 256, (6, 5, 3))
    shown = item["image"].numpy()[:, ::-1, ::-1, 0]
    np.testing.assert_allclose((shown.transpose(2, 1, 0) + 1) / 2 * 255, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(OTHER, range=None), "the modality other needs `range`"),
        (replace(OTHER, range=(5, 5)), "`range` must be two increasing numbers; got 5 and 5"),
        (replace(OTHER, modality="mr"), "`range` is for the modality other; it is mr"),
        (replace(OTHER, window=(0, 1)), "`window` is for the modality ct or pt; it is other"),
        (replace(OTHER, derive="lung"), "`derive` is for the modality ct; it is other"),
        (replace(OTHER, bias_field=True), "`bias_field` is for the modality mr; it is other"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings: PrepareSettings, message: str, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match=message):
        prepare(microscopy(tmp_path / "s"), tmp_path / "w", settings, progress=False)


def test_neither_dicom_nor_bids_is_written(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="needs a run of CT, MR or PET; this one is of the modality other"):
        DicomOutput.read().check(Volume(stack(0), MICRONS).grid, {}, Intensity("range", low=0, high=1))
    with pytest.raises(FibldmError, match="must fit the modality of the run, OTHER; got T1w"):
        check_bids("T1w", modality="other", skull_stripped=True)


def test_micrometres_are_told_apart_in_messages() -> None:
    near = ((0.0004, 0.0004),) * 3
    envelope = Envelope(near, ((0.003, 0.004),) * 3, {1: (1e-9, 1e-8)})
    found = envelope.outside(Volume(np.ones((8, 8, 8), np.uint8), np.diag([0.0008, 0.0004, 0.0004, 1])))
    assert "spacing along R 0.0008 mm (training up to 0.0004 mm)" in found
    assert "field of view along R 0.0064 mm (training 0.003-0.004 mm)" in found
    assert any(text.startswith("label 1 fills 6.55e-11 ml") for text in found)


def facts(modality: str, intensity: Intensity) -> dict[str, Any]:
    grid = {"size": [8, 8, 8], "spacing": [1, 1, 1]}
    said = dict.fromkeys(("licence", "data_licence", "name", "fibldm"), "x") | {"split": "s" * 64, "data": "d" * 64}
    return {
        **said,
        "modality": modality,
        "intensity": intensity.to_dict(),
        "labels": {"1": "cell"},
        "grid": grid,
        "sees_mask": True,
        "covariates": {},
        "process": {"_target_": "fibldm.models.process.RectifiedFlow"},
        "sampling": {},
        "shift": 1.0,
        "weights": {},
    }


def test_the_card_speaks_of_no_patients_where_there_are_none_c21() -> None:
    text = card(facts("other", Intensity("range", low=0, high=4095)), CardText(), Measured({}), size=1)
    assert "Volumes are in the units of the training data, from 0 to 4095" in text
    assert "Subjects were split" in text and "copies of training subjects" in text
    for word in ("patient", "medical", "diagnosis", "HU"):
        assert word not in text, word
    ct = card(facts("ct", Intensity("window", low=-900, high=300)), CardText(), Measured({}), size=1)
    assert "Volumes are in HU, from -900 to 300" in ct and "Patients were split" in ct and "- medical" in ct
