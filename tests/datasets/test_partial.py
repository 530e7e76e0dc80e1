"""Masks in which not all labels were annotated: what nobody drew is unknown, and never background."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import write_nifti

from fibldm import UNKNOWN_LABEL
from fibldm.datasets import preparation
from fibldm.datasets.annotated import with_annotated
from fibldm.datasets.preparation import Report, prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.slices import write_slices
from fibldm.datasets.source import Case
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.volumes.datalist import SPLITS, annotated_of, known_of, load_datalist, with_annotation
from fibldm.volumes.formats.nifti import read_volume

SHAPE = (8, 6, 7)
AFFINE = np.diag([1.5, 1.5, 3, 1])
NAMES = {1: "liver", 2: "spleen"}


def drawn(seed: int) -> np.ndarray:
    """Both organs; where they lie depends on the case."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 1:3, 1 : 4 + seed % 3] = 1
    labels[5:7, 3:5, 2 : 4 + seed % 2] = 2
    return labels


def write_case(source: Path, number: int, labels: np.ndarray) -> dict[str, Any]:
    image = np.random.default_rng(number).integers(-1000, 400, SHAPE).astype(np.int16)
    write_nifti(source / f"images/c{number}.nii.gz", image, AFFINE)
    write_nifti(source / f"labels/c{number}.nii.gz", labels, AFFINE)
    return {"image": f"images/c{number}.nii.gz", "label": f"labels/c{number}.nii.gz"}


def without(labels: np.ndarray, *hidden: int) -> np.ndarray:
    return np.where(np.isin(labels, hidden), 0, labels).astype(np.uint8)


def make_table(source: Path, said: dict[int, str], cases: int = 6, hidden: dict[int, int] | None = None) -> Path:
    rows = []
    for number in range(cases):
        labels = without(drawn(number), *([hidden[number]] if hidden and number in hidden else []))
        entry = write_case(source, number, labels)
        rows.append(f"c{number},{entry['image']},{entry['label']},{said.get(number, '')}")
    (source / "cases.csv").write_text("\n".join(["case,image,label,annotated_labels", *rows]) + "\n")
    return source / "cases.csv"


def settings(**more: Any) -> PrepareSettings:
    return PrepareSettings(**{"modality": "ct", "labels": NAMES, **more})


def entries(work: Path) -> dict[str, dict[str, Any]]:
    return {entry["case"]: entry for split in SPLITS for entry in load_datalist(work, split)}


def written(work: Path, case: str) -> np.ndarray:
    return np.asarray(read_volume(str(work / f"labels/{case}.nii.gz")).array)


def about_labels(report: Report) -> list[str]:
    return [note for note in report.notes if note.startswith("label ")]


@pytest.fixture
def half(tmp_path: Path) -> tuple[Path, Report]:
    """The spleen withheld from cases 0, 2 and 4, the liver from 1; 3 and 5 say nothing and have both."""
    source = make_table(
        tmp_path / "source", {0: "liver", 1: "spleen", 2: "1", 4: "liver"}, hidden={0: 2, 1: 1, 2: 2, 4: 2}
    )
    return tmp_path / "work", prepare(source, tmp_path / "work", settings(), progress=False)


def test_the_background_of_a_case_that_lacks_a_label_is_unknown_and_all_else_as_it_was(
    half: tuple[Path, Report],
) -> None:
    work, report = half
    for number in range(6):
        before, after = drawn(number), written(work, f"c{number}")
        kept = {0: [1], 1: [2], 2: [1], 4: [1]}.get(number, [0, 1, 2])
        assert np.array_equal(after, np.where(np.isin(before, kept), before, UNKNOWN_LABEL))
    consequence = "what is not annotated there is unknown, not background"
    assert about_labels(report) == [
        f"label liver was not annotated in 1 of 6 cases with a mask: {consequence}",
        f"label spleen was not annotated in 3 of 6 cases with a mask: {consequence}",
    ]
    assert "annotated_labels" not in " ".join(note for note in report.notes if "left out" in note)


def test_the_datalist_says_what_was_annotated_and_that_is_no_covariate(half: tuple[Path, Report]) -> None:
    work, _ = half
    found = entries(work)
    assert {name: annotated_of(entry) for name, entry in found.items()} == {
        **{"c0": (1,), "c1": (2,), "c2": (1,), "c4": (1,)},
        **{"c3": None, "c5": None},
    }
    assert all(known_of(entry) == {} for entry in found.values())
    items = with_annotation([found["c0"], found["c1"], found["c3"]], [0, 1, 2])
    assert [item["annotated"] for item in items] == [[1, 1, 0], [1, 0, 1], [1, 1, 1]]


def test_no_voxel_of_a_label_that_nobody_drew_is_shown_as_background(half: tuple[Path, Report]) -> None:
    """The encoding says unknown wherever the withheld label lies, and has nothing left for a dropout of it to take."""
    work, _ = half
    encoding = MaskEncoding((0, 1, 2), 1)
    for number, hidden in ((0, 2), (1, 1), (2, 2), (4, 2)):
        labels = torch.from_numpy(written(work, f"c{number}").astype(np.uint8))[None, None]
        place = torch.from_numpy(drawn(number) == hidden)
        shares = encoding.shares(encoding.encode(labels))[0]
        assert bool((shares[-1][place] == 1).all()) and not bool(shares[0].any())
        dropped = torch.tensor([[False, number == 1, number != 1]])
        again = encoding.shares(encoding.drop_(encoding.encode(labels), dropped))[0]
        assert torch.equal(again, shares)


def test_volumes_of_a_label_are_those_of_the_cases_in_which_it_was_annotated(half: tuple[Path, Report]) -> None:
    work, _ = half
    training = {entry["case"] for entry in load_datalist(work, "training")}
    ml = float(np.prod([1.5, 1.5, 3])) / 1000
    wanted = [
        (drawn(number) == 2).sum() * ml for number in range(6) if f"c{number}" in training and number in (1, 3, 5)
    ]
    volume = read_json(work / "datalist.json")["envelope"]["label_volume_ml"]["2"]
    assert volume == pytest.approx({"min": min(wanted), "max": max(wanted)})


def test_a_second_look_finds_the_folder_unchanged_and_another_word_another_folder(tmp_path: Path) -> None:
    source, work = make_table(tmp_path / "source", {0: "liver"}, hidden={0: 2}), tmp_path / "work"
    prepare(source, work, settings(), progress=False)
    content = read_json(work / "datalist.json")["content"]
    assert prepare(source, work, settings(), progress=False).unchanged
    source.write_text(source.read_text().replace(",liver", ","))
    with pytest.raises(FibldmError, match="cases c0"):
        prepare(source, work, settings(), progress=False)
    report = prepare(source, work, settings(), restart=True, progress=False)
    assert not about_labels(report) and read_json(work / "datalist.json")["content"] != content
    assert np.array_equal(written(work, "c0"), without(drawn(0), 2))


def test_an_interrupted_preparation_goes_on_from_masks_as_they_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the background was hidden; then the column goes, and with it what was unknown."""
    source, work = make_table(tmp_path / "source", {0: "liver"}, hidden={0: 2}), tmp_path / "work"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "write_lists", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, work, settings(), progress=False)
    source.write_text(source.read_text().replace(",liver", ","))
    prepare(source, work, settings(), progress=False)
    assert np.array_equal(written(work, "c0"), without(drawn(0), 2))


def test_the_word_may_stand_in_the_list_of_dataset_json_or_beside_the_mask(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = [write_case(source, number, without(drawn(number), *([2] if number < 2 else []))) for number in range(4)]
    listed[0]["annotated_labels"] = ["liver"]
    write_json(source / "labels/c1.json", {"annotated_labels": [1]})
    facts = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "spleen"}, "training": listed}
    write_json(source / "dataset.json", facts)
    prepare(source, tmp_path / "work", PrepareSettings(layout="decathlon"), progress=False)
    found = entries(tmp_path / "work")
    assert [annotated_of(found[f"c{number}"]) for number in range(4)] == [(1,), (1,), None, None]


def test_missing_is_unknown_takes_what_a_case_has_for_what_was_annotated(tmp_path: Path) -> None:
    """Also without names; what a case says of itself goes before."""
    source = make_table(tmp_path / "source", {5: "1;2"}, hidden={0: 2, 1: 1, 5: 2})
    asked = settings(labels={}, missing_is_unknown=True)
    report = prepare(source, tmp_path / "work", asked, progress=False)
    found = entries(tmp_path / "work")
    known = [annotated_of(found[f"c{number}"]) for number in range(6)]
    assert known == [(1,), (2,), None, None, None, None]
    assert [note[: note.index(":")] for note in about_labels(report)] == [
        "label 1 was not annotated in 1 of 6 cases with a mask",
        "label 2 was not annotated in 1 of 6 cases with a mask",
    ]
    assert not (written(tmp_path / "work", "c5") == UNKNOWN_LABEL).any()
    plain = prepare(source, tmp_path / "plain", settings(labels={}), progress=False)
    assert not about_labels(plain) and not (written(tmp_path / "plain", "c0") == UNKNOWN_LABEL).any()


def test_a_binary_mask_that_is_not_there_is_unknown_only_if_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(4):
        image = np.random.default_rng(number).integers(-1000, 400, SHAPE).astype(np.int16)
        write_nifti(source / f"s{number}/ct.nii.gz", image, AFFINE)
        for value, name in NAMES.items():
            if (number, name) != (0, "spleen"):
                mask = (drawn(number) == value).astype(np.uint8)
                write_nifti(source / f"s{number}/segmentations/{name}.nii.gz", mask, AFFINE)
    asked = {"layout": "organs", "merge_masks": ("liver", "spleen"), "labels": {}}
    with pytest.raises(FibldmError, match="s0/segmentations has no mask spleen"):
        prepare(source, tmp_path / "work", settings(**asked), progress=False)
    prepare(source, tmp_path / "work", settings(**asked, missing_is_unknown=True), progress=False)
    assert annotated_of(entries(tmp_path / "work")["s0"]) == (1,)


def make_nnunet(source: Path, ignore: int = 3, cases: int = 4) -> Path:
    """The last slices are not annotated."""
    for number in range(cases):
        labels = drawn(number)
        labels[..., -2:] = ignore
        image = np.random.default_rng(number).integers(-1000, 400, SHAPE).astype(np.int16)
        write_nifti(source / f"imagesTr/c{number}_0000.nii.gz", image, AFFINE)
        write_nifti(source / f"labelsTr/c{number}.nii.gz", labels, AFFINE)
    names = {"background": 0, "liver": 1, "spleen": 2, "ignore": ignore}
    facts = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz", "numTraining": cases}
    write_json(source / "dataset.json", facts)
    return source


@pytest.mark.parametrize("ignore", [3, 255])
def test_the_ignore_label_of_nnunet_is_unknown_and_no_label(tmp_path: Path, ignore: int) -> None:
    report = prepare(make_nnunet(tmp_path / "source", ignore), tmp_path / "work", progress=False)
    assert f"voxels of the ignore label ({ignore}) are unknown" in report.notes
    for number in range(4):
        labels = written(tmp_path / "work", f"c{number}")
        assert (labels[..., -2:] == UNKNOWN_LABEL).all()
        assert np.array_equal(labels[..., :-2], drawn(number)[..., :-2])
    datalist = read_json(tmp_path / "work/datalist.json")
    assert datalist["labels"] == {"0": "background", "1": "liver", "2": "spleen"}
    assert list(datalist["envelope"]["label_volume_ml"]) == ["1", "2"]


def test_of_ignored_voxels_nothing_is_said_where_a_label_was_not_annotated_either(tmp_path: Path) -> None:
    source = make_nnunet(tmp_path / "source")
    write_json(source / "labelsTr/c0.json", {"annotated_labels": ["liver", "spleen"]})
    labels = np.asarray(read_volume(str(source / "labelsTr/c1.nii.gz")).array)
    write_nifti(source / "labelsTr/c1.nii.gz", without(labels, 2), AFFINE)
    prepare(source, tmp_path / "work", PrepareSettings(missing_is_unknown=True), progress=False)
    found = entries(tmp_path / "work")
    assert found["c1"]["annotated_labels"] == [1] and annotated_of(found["c1"]) is None
    assert "annotated_labels" not in found["c0"]


def test_slices_of_such_a_folder_know_what_was_annotated_and_what_is_ignored(tmp_path: Path) -> None:
    """Case 0 lacks the spleen; case 1 does, too, and has ignored slices; the others have all but these slices."""
    source = make_nnunet(tmp_path / "source")
    for number in (0, 1):
        labels = without(np.asarray(read_volume(str(source / f"labelsTr/c{number}.nii.gz")).array), 2)
        write_nifti(source / f"labelsTr/c{number}.nii.gz", without(labels, *([3] if not number else [])), AFFINE)
    prepare(source, tmp_path / "work", PrepareSettings(missing_is_unknown=True), progress=False)
    write_slices(tmp_path / "work", tmp_path / "slices", every=3)
    report = prepare(tmp_path / "slices", tmp_path / "again", PrepareSettings(modality="ct"), progress=False)
    assert "voxels of the ignore label (255) are unknown" in report.notes
    found = entries(tmp_path / "again")
    for case, entry in found.items():
        before = written(tmp_path / "work", case[:2])[..., [int(case[-1])]]
        assert np.array_equal(written(tmp_path / "again", case), before)
        assert entry.get("annotated_labels") == ([1] if case[:2] in ("c0", "c1") else None)
    assert {annotated_of(entry) for case, entry in found.items() if case[:2] == "c0"} == {(1,)}


# --- what is refused


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("kidney", "'kidney' is none of liver, spleen"),
        ("1;3", "3 is no label of 1, 2"),
        ("1.5", "1.5 is none of liver, spleen"),
        ("liver;;spleen", "'' is none of liver, spleen"),
    ],
)
def test_a_word_that_names_no_label_is_refused(tmp_path: Path, said: str, message: str) -> None:
    source = make_table(tmp_path / "source", {2: said})
    with pytest.raises(FibldmError, match=f"annotated_labels must name labels of the dataset; c2: {message}"):
        prepare(source, tmp_path / "work", settings(), progress=False)


def test_a_mask_with_a_label_that_nobody_drew_is_refused(tmp_path: Path) -> None:
    source = make_table(tmp_path / "source", {2: "liver"})
    with pytest.raises(
        FibldmError, match="c2 .*annotated labels only; annotated_labels leaves out spleen, which it holds"
    ):
        prepare(source, tmp_path / "work", settings(), progress=False)


def test_values_that_become_one_label_were_annotated_together_or_not_at_all() -> None:
    def known(said: Any, remap: dict[int, int]) -> tuple[int, ...] | None:
        case = Case("c", (), (), "c", covariates={"annotated_labels": said})
        return with_annotated([case], {}, remap)[0].annotated

    assert known([2, 4], {2: 1, 4: 1}) == (1,)
    assert known([2], {2: 1, 4: 1}) == ()
    assert known("2|3", {2: 5}) == (3, 5)
    assert known([2.0, 3], {2: 0}) == (3,)
    assert known(None, {2: 1}) is None


def test_missing_is_unknown_needs_masks_and_the_ignore_label_stays(tmp_path: Path) -> None:
    source = make_nnunet(tmp_path / "source")
    with pytest.raises(FibldmError, match="`remap` must leave the label of voxels that were not annotated .* got 3"):
        prepare(source, tmp_path / "work", PrepareSettings(remap={3: 0}), progress=False)
    bare = tmp_path / "bare"
    for number in range(3):
        write_case(bare, number, drawn(number))
        (bare / f"labels/c{number}.nii.gz").unlink()
    with pytest.raises(FibldmError, match="`missing_is_unknown` is for data with masks; no case has one"):
        prepare(bare, tmp_path / "work", settings(missing_is_unknown=True), progress=False)
