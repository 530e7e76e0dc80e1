"""Several datasets prepared as one: labels by their names, and what a dataset does not draw is unknown in its cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import write_nifti

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.preparation import Report, prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.volumes.datalist import SPLITS, annotated_of, load_datalist
from fibldm.volumes.formats.nifti import read_volume

SHAPE = (8, 6, 7)
AFFINE = np.diag([1.5, 1.5, 3, 1])


def anatomy(seed: int) -> dict[str, np.ndarray]:
    """Where the organs of a patient are, whoever draws them."""
    liver, spleen, tumour = (np.zeros(SHAPE, bool) for _ in range(3))
    liver[1:4, 1:3, 1 : 4 + seed % 3] = True
    spleen[5:7, 3:5, 2 : 4 + seed % 2] = True
    tumour[4, 4, seed % 4 : 2 + seed % 4] = True
    return {"liver": liver, "spleen": spleen, "tumour": tumour}


def make(folder: Path, names: dict[int, str], seeds: range, **facts: Any) -> Path:
    """A dataset that draws what ``names`` says; of other organs it knows nothing."""
    listed = []
    for seed in seeds:
        labels = np.zeros(SHAPE, np.uint8)
        for value, name in names.items():
            labels[anatomy(seed)[name.lower().replace("tumor", "tumour")]] = value
        image = np.random.default_rng([seed, *folder.name.encode()]).integers(-1000, 400, SHAPE).astype(np.int16)
        write_nifti(folder / f"imagesTr/p{seed}.nii.gz", image, AFFINE)
        write_nifti(folder / f"labelsTr/p{seed}.nii.gz", labels, AFFINE)
        listed.append({"image": f"imagesTr/p{seed}.nii.gz", "label": f"labelsTr/p{seed}.nii.gz"})
    legend = {"0": "background", **{str(value): name for value, name in names.items()}}
    about = {"name": folder.name, "modality": {"0": "CT"}, "labels": legend, "licence": "CC BY 4.0", "training": listed}
    write_json(folder / "dataset.json", about | facts)
    return folder


def entries(work: Path) -> dict[str, dict[str, Any]]:
    return {entry["case"]: entry for split in SPLITS for entry in load_datalist(work, split)}


def written(work: Path, case: str) -> np.ndarray:
    return np.asarray(read_volume(str(work / f"labels/{case}.nii.gz")).array)


@pytest.fixture
def joined(tmp_path: Path) -> tuple[Path, Report]:
    """The spleen is 1 in one dataset and 2 in the other, the liver is in the first alone, the tumour in the second."""
    first = make(tmp_path / "first", {1: "Spleen", 2: "liver"}, range(4))
    second = make(tmp_path / "second", {2: "spleen", 3: "tumour"}, range(2, 6), licence="CC BY-SA 4.0")
    return tmp_path / "work", prepare([first, second], tmp_path / "work", progress=False)


def test_labels_of_one_name_are_one_and_those_of_the_other_dataset_unknown(joined: tuple[Path, Report]) -> None:
    work, report = joined
    names = {value: name.lower() for value, name in read_json(work / "datalist.json")["labels"].items()}
    assert names == {"0": "background", "1": "spleen", "2": "liver", "3": "tumour"}
    for case, seed, kept in (("p0", 0, (1, 2)), ("first_p3", 3, (1, 2)), ("second_p3", 3, (1, 3)), ("p5", 5, (1, 3))):
        expected = np.full(SHAPE, UNKNOWN_LABEL)
        for value in kept:
            expected[anatomy(seed)[names[str(value)]]] = value
        assert np.array_equal(written(work, case), expected)
        assert annotated_of(entries(work)[case]) == kept
    assert "common legend: 1 Spleen (first, second); 2 liver (first); 3 tumour (second)" in report.notes
    told = [note for note in report.notes if note.startswith("label ")]
    assert [note[: note.index(" cases")] for note in told] == [
        "label liver was not annotated in 4 of 8",
        "label tumour was not annotated in 4 of 8",
    ]


def test_no_voxel_that_a_dataset_does_not_draw_is_background(joined: tuple[Path, Report]) -> None:
    """Planted: every organ is in every patient; no mask says background where one is."""
    work, _ = joined
    for case in entries(work):
        seed = int(case[-1])
        for organ in anatomy(seed).values():
            assert not (written(work, case)[organ] == 0).any()


def test_cases_of_one_name_are_one_patient_in_one_split(joined: tuple[Path, Report]) -> None:
    work, report = joined
    found = entries(work)
    assert sorted(found) == ["first_p2", "first_p3", "p0", "p1", "p4", "p5", "second_p2", "second_p3"]
    assert found["first_p2"]["subject"] == found["second_p2"]["subject"] != found["first_p3"]["subject"]
    split = {entry["case"]: split for split in SPLITS for entry in load_datalist(work, split)}
    assert split["first_p2"] == split["second_p2"] and split["first_p3"] == split["second_p3"]
    assert any("2 names of cases are in several datasets" in note for note in report.notes)
    assert {entry["dataset"] for entry in found.values()} == {"first", "second"}
    assert read_json(work / "datalist.json")["licence"] == "CC BY 4.0 AND CC BY-SA 4.0"


def test_the_legend_is_numbered_as_asked_and_a_second_look_finds_it_unchanged(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {1: "liver"}, range(3))
    sources = [first, make(tmp_path / "b", {1: "spleen", 2: "liver"}, range(3, 6))]
    settings = PrepareSettings(labels={7: "Liver"})
    prepare(sources, tmp_path / "work", settings, progress=False)
    assert read_json(tmp_path / "work/datalist.json")["labels"] == {"0": "background", "1": "spleen", "7": "Liver"}
    assert "annotated_labels" not in entries(tmp_path / "work")["p4"]
    assert set(np.unique(written(tmp_path / "work", "p4"))) == {0, 1, 7}
    assert set(np.unique(written(tmp_path / "work", "p1"))) == {7, UNKNOWN_LABEL}
    assert prepare(sources, tmp_path / "work", settings, progress=False).unchanged


def test_what_a_case_says_of_itself_and_what_it_lacks_hold_in_the_common_legend(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {1: "spleen", 2: "liver"}, range(3))
    second = make(tmp_path / "b", {1: "liver"}, range(3, 6))
    labels = np.asarray(read_volume(str(first / "labelsTr/p0.nii.gz")).array)
    write_nifti(first / "labelsTr/p0.nii.gz", np.where(labels == 1, 0, labels).astype(np.uint8), AFFINE)
    prepare([second, first], tmp_path / "missing", PrepareSettings(missing_is_unknown=True), progress=False)
    assert annotated_of(entries(tmp_path / "missing")["p0"]) == (1,)
    write_json(first / "labelsTr/p0.json", {"annotated_labels": ["liver"]})
    prepare([second, first], tmp_path / "said", progress=False)
    found = entries(tmp_path / "said")
    assert [annotated_of(found[name]) for name in ("p0", "p1", "p4")] == [(1,), None, (1,)]


# --- what is refused


def refused(sources: list[Path], work: Path, **settings: Any) -> str:
    with pytest.raises(FibldmError) as caught:
        prepare(sources, work, PrepareSettings(**settings), progress=False)
    return str(caught.value)


def test_datasets_that_cannot_be_one_are_refused(tmp_path: Path) -> None:
    sound = make(tmp_path / "sound", {1: "liver"}, range(3))
    other = make(tmp_path / "other", {1: "liver"}, range(3), modality={"0": "MRI"})
    assert "must be of one modality; they say sound ct, other mr" in refused([sound, other], tmp_path / "w")
    bare = make(tmp_path / "bare", {1: "liver"}, range(3), labels={})
    assert "bare names no label of its masks" in refused([sound, bare], tmp_path / "w")
    twice = make(tmp_path / "twice", {1: "liver", 2: "LIVER"}, range(3))
    assert "every label of twice must have a name of its own; liver, LIVER" in refused([sound, twice], tmp_path / "w")
    assert "none has kidney, they have liver" in refused([sound, sound], tmp_path / "w", labels={1: "kidney"})
    assert "`remap` changes label values" in refused([sound, sound], tmp_path / "w", remap={1: 2})
    two = make(tmp_path / "two", {1: "liver"}, range(3), modality={"0": "CT", "1": "CT late"})
    assert "the same channels; got sound: CT; two: CT, CT late" in refused([sound, two], tmp_path / "w", modality="ct")


def test_a_value_without_a_name_in_its_own_dataset_is_refused_though_the_other_has_it(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {1: "spleen", 2: "liver"}, range(3), labels={"0": "background", "1": "spleen"})
    second = make(tmp_path / "b", {1: "spleen", 2: "liver"}, range(3, 6))
    message = refused([second, first], tmp_path / "w")
    assert "in the dataset's own legend, as it is matched by that; 2 has none" in message


def test_a_split_in_one_dataset_only_is_refused(tmp_path: Path) -> None:
    sound, other = make(tmp_path / "sound", {1: "liver"}, range(3)), make(tmp_path / "o", {1: "liver"}, range(3, 6))
    files = [f"imagesTr/p{seed}.nii.gz,labelsTr/p{seed}.nii.gz" for seed in range(3, 6)]
    rows = [f"{file},{split}" for file, split in zip(files, SPLITS, strict=True)]
    (other / "cases.csv").write_text("\n".join(["image,label,split", *rows]))
    message = refused([sound, other / "cases.csv"], tmp_path / "w")
    assert "must give a split, or none; cases gives one, sound none" in message
