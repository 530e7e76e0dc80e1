"""HDF5 packs: one file, many cases."""

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from fibldm.datasets.layouts import find_source
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.volumes.datalist import SPLITS, load_datalist

SPACING = (1.0, 2.0, 3.0)
IMAGES = np.random.default_rng(0).integers(-1000, 900, (6, 5, 6, 7)).astype(np.int16)
SETTINGS = PrepareSettings(modality="ct", spacing=SPACING)


def arrays(path: Path, **more: object) -> Path:
    with h5py.File(path, "w") as file:
        file["images"], file["masks"] = IMAGES, (IMAGES > 0).astype(np.uint8)
        for name, values in more.items():
            file[name] = values
    return path


def prepared(work: Path) -> dict[str, dict]:
    return {entry["case"]: entry for split in SPLITS for entry in load_datalist(work, split)}


def test_every_image_of_an_array_is_a_case_f7(tmp_path: Path) -> None:
    patients = [b"a", b"a", b"b", b"c", b"d", b"e"]
    source = arrays(tmp_path / "pack.h5", subject=patients, age=[50.0, 51, 52, 53, 54, 55])
    report = prepare(source, tmp_path / "work", SETTINGS, progress=False)
    assert sum(report.counts.values()) == 6
    entries = prepared(tmp_path / "work")
    for index in range(6):
        entry = entries[f"pack_{index}"]
        image, label = (nibabel.load(entry[key]) for key in ("image", "label"))
        np.testing.assert_array_equal(np.asarray(image.dataobj), IMAGES[index])
        np.testing.assert_array_equal(np.asarray(label.dataobj), IMAGES[index] > 0)
        np.testing.assert_allclose(image.affine, np.diag([*SPACING, 1]))
        assert entry["age"] == 50 + index
    assert entries["pack_0"]["subject"] == entries["pack_1"]["subject"] != entries["pack_2"]["subject"]
    assert prepare(source, tmp_path / "work", SETTINGS, progress=False).unchanged


def test_every_group_is_a_case_f7(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "pack.hdf5", "w") as file:
        for index, image in enumerate(IMAGES):
            group = file.create_group(f"scan{index}")
            group["image"], group["mask"] = image[: 4 + index % 2], image[: 4 + index % 2] > 0
            group.attrs.update({"sex": "F" if index % 2 else "M", "subject": f"P{index // 2}"})
    prepare(tmp_path / "pack.hdf5", tmp_path / "work", SETTINGS, progress=False)
    entry = prepared(tmp_path / "work")["pack_scan3"]
    np.testing.assert_array_equal(np.asarray(nibabel.load(entry["image"]).dataobj), IMAGES[3])
    assert entry["sex"] == "F"


def test_classes_are_a_column(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "pack.h5", "w") as file:
        file["images"], file["labels"] = IMAGES[..., 0], [3, 1, 4, 1, 5, 9]
    found = find_source(tmp_path / "pack.h5", PrepareSettings())
    assert [case.covariates for case in found.cases] == [{"class": value} for value in (3, 1, 4, 1, 5, 9)]
    assert not any(case.masks for case in found.cases)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"coordinates": np.zeros((6, 3))}, "masks and columns of 6 entries each; coordinates has the shape .6, 3."),
        ({"age": [1.0, 2.0]}, r"columns of 6 entries each; age has the shape .2,."),
        ({"split": [b"train"] * 5 + [b"later"]}, "image 5: split must be one of train, .* got 'later'"),
        ({"case": [b"x"] * 6}, "the name x stands for 6 cases"),
        ({"group/image": IMAGES[0]}, "it must hold arrays or groups; it holds 2 and 1"),
    ],
)
def test_what_a_pack_may_not_hold_is_told(more: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match=message):
        find_source(arrays(tmp_path / "pack.h5", **more), PrepareSettings())


def test_files_that_are_no_packs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"text")
    with pytest.raises(FibldmError, match="must be HDF5; it cannot be read"):
        find_source(tmp_path / "a.h5", PrepareSettings())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["row"] = [1, 2]
    with pytest.raises(FibldmError, match=r"it must hold images \(N, X, Y.*; it holds row \(2,\)"):
        find_source(tmp_path / "b.h5", PrepareSettings())
