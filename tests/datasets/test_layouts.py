"""Layouts of datasets: found by themselves, read whole, refused with every finding."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dicom_files import example, write_series

from fibldm.datasets.layouts import LAYOUTS, find_source
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError

PREAMBLE = bytes(128) + b"DICM"


def find(source: Path, layout: str = "auto", **options: object) -> Source:
    return find_source(source, PrepareSettings(layout, **options))  # type: ignore[arg-type]


def refused(source: Path, layout: str = "auto", **options: object) -> str:
    with pytest.raises(FibldmError) as caught:
        find(source, layout, **options)
    return str(caught.value)


def touch(root: Path, *names: str, content: bytes = b"x") -> Path:
    """Files without voxels: a layout finds them and reads none."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def cases(source: Source) -> dict[str, Case]:
    return {case.name: case for case in source.cases}


def relative(case: Case, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in case.files]


# Which layout it is


def test_the_only_layout_that_fits_is_taken_a2(tmp_path: Path) -> None:
    made = {
        "decathlon": make_decathlon,
        "nnunet": make_nnunet,
        "bids": make_bids,
        "folders": make_folders,
        "csv": make_table,
        "organs": make_organs,
    }
    assert set(LAYOUTS) == {"auto", "dicom", "pack", *made}
    for layout, make in made.items():
        source = make(tmp_path / layout)
        options = {"merge_masks": ("liver",)} if layout == "organs" else {}
        assert find(source, **options) == find(source, layout, **options)
        assert find(source, **options).layout == layout


def test_none_or_several_layouts_say_what_was_looked_for_and_found_a2(tmp_path: Path) -> None:
    touch(tmp_path / "none", "a.nii.gz", "b.nii.gz", "CT.1.2.840.77", "sub/x.nii", ".hidden")
    message = refused(tmp_path / "none")
    for part in (
        "must follow one layout; none fits. Looked for a dataset.json with a training list (decathlon)",
        "the folders images/ and labels/ (folders)",
        "DICOM files (dicom); found 1 folders and 3 files (2 .nii.gz, 1 others)",
        "arrange the files in one of these ways",
    ):
        assert part in message
    assert "840" not in message
    make_decathlon(make_folders(tmp_path / "both"))
    assert "decathlon, folders fits" in refused(tmp_path / "both")
    assert "choose with `layout` decathlon|folders" in refused(tmp_path / "both")
    assert len(find(tmp_path / "both", "folders").cases) == 2
    with pytest.raises(FibldmError, match="`layout` must be one of auto, decathlon, nnunet, bids, .*; got 'tiff'"):
        find(tmp_path / "both", "tiff")
    assert "the source" in refused(tmp_path / "gone") and "must exist" in refused(tmp_path / "gone")


def test_options_of_another_layout_are_refused(tmp_path: Path) -> None:
    source = make_folders(tmp_path)
    assert "`merge_masks` is for the layouts organs, csv and dicom; the layout is folders" in refused(
        source, merge_masks=("liver",)
    )
    assert "`bids_mask` is for the layout bids; the layout is folders" in refused(source, bids_mask="*")


def test_loops_of_links_end_and_names_of_any_script_work(tmp_path: Path) -> None:
    touch(tmp_path, "images/Jörg 1.nii.gz", "images/患者.nii.gz", "labels/患者.nii.gz")
    (tmp_path / "labels" / "Jo\u0308rg 1.nii.gz").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find(tmp_path)
    assert sorted(cases(found)) == ["J_rg_1", "case__"]
    assert found.cases[0].masks[0].files[0].name == "Jo\u0308rg 1.nii.gz"
    touch(tmp_path, "images/病人.nii.gz", "labels/病人.nii.gz")
    assert "the name case__ stands for 2 cases" in refused(tmp_path)
    ring = tmp_path / "dicom"
    touch(ring, "a/b/slice.bin")
    (ring / "a/b/up").symlink_to(ring)
    assert "none fits" in refused(ring)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert "must exist" in refused(tmp_path / "self")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    source = make_folders(tmp_path)
    monkeypatch.setattr(Path, "iterdir", denied)
    assert f"{source} must be readable; Permission denied; check the permissions" in refused(source, "folders")


# Decathlon


def make_decathlon(root: Path) -> Path:
    touch(root, *(f"{folder}/a_{i}.nii.gz" for i in range(2) for folder in ("imagesTr", "labelsTr")))
    touch(root, "imagesTs/b_7.nii.gz")
    listed = [{"image": f"./imagesTr/a_{i}.nii.gz", "label": f"./labelsTr/a_{i}.nii.gz"} for i in (1, 0)]
    facts = {"modality": {"1": "FLAIR", "0": "T1"}, "licence": "CC0", "labels": {"0": "bg", "3": "lesion"}}
    write_json(root / "dataset.json", facts | {"name": "Brains", "reference": "Someone", "training": listed})
    return root


def edit(source: Path, **changes: object) -> Path:
    path = source / "dataset.json"
    write_json(path, json.loads(path.read_text()) | changes)
    return source


def test_decathlon_with_channels_and_images_without_label_a2(tmp_path: Path) -> None:
    found = find(make_decathlon(tmp_path / "Task"))
    assert (found.name, found.channels, found.modality) == ("Brains", ("T1", "FLAIR"), "T1, FLAIR")
    assert (found.labels, found.licence, found.references) == ({3: "lesion"}, "CC0", {"reference": "Someone"})
    assert [case.name for case in found.cases] == ["a_0", "a_1", "b_7"]
    assert relative(found.cases[1], tmp_path / "Task") == ["imagesTr/a_1.nii.gz", "labelsTr/a_1.nii.gz"]
    assert found.cases[2].masks == ()
    assert found.notes == () and sum(not case.masks for case in found.cases) == 1


def test_a_test_list_goes_before_the_folder_and_may_be_absent_a2(tmp_path: Path) -> None:
    source = edit(make_decathlon(tmp_path), test=["./imagesTs/b_7.nii.gz", "imagesTs/gone.nii.gz"], validation=[1, 2])
    touch(source, "imagesTs/b_8.nii.gz")
    found = find(source)
    assert [case.name for case in found.cases] == ["a_0", "a_1", "b_7"]
    assert found.notes == (
        "images of the test list that do not exist are left out: 1",
        "the list validation of dataset.json is left out: 2 entries",
        "1 images that dataset.json does not list were left out: imagesTs/b_8.nii.gz",
    )


def test_decathlon_lists_all_that_is_wrong_a2(tmp_path: Path) -> None:
    source = make_decathlon(tmp_path)
    entries = json.loads((source / "dataset.json").read_text())["training"]
    entries += ["./x.nii.gz", {"image": "imagesTr/c.nii.gz", "label": "labelsTr/c.nii.gz"}, entries[0]]
    touch(source, "imagesTr/d.tif", "labelsTr/d.nii")
    entries.append({"image": "imagesTr/d.tif", "label": "labelsTr/d.nii"})
    report = "Seen by Dr Planted: mild fibrosis of both lower lobes, no effusion, no pneumothorax."
    entries.append({"picture": "x", "report": report})
    message = refused(edit(source, training=entries, test=[{"path": "x"}]))
    assert "training[6] must be an object with image and label; got a dict of " in message and report not in message
    for part in (
        "must have one image and at most one label, under a name of its own; 7 findings",
        "training[2] must be an object with image and label",
        "imagesTr/c.nii.gz does not exist",
        "labelsTr/c.nii.gz does not exist",
        "imagesTr/d.tif is of no supported format (.nii.gz, .nii",
        "test[0] must be the path of an image",
        "the name a_1 stands for 2 cases",
        "give every file of the training list its own name",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "must have a list 'training' of {image, label} entries; got []"),
        ({"modality": {"0": "T1", "2": "T2"}}, "the channels of dataset.json must be {"),
        ({"modality": ["CT"]}, "the channels of dataset.json must be {"),
        ({"modality": {"0": "MRI", "1": "mri"}}, "the channels of dataset.json must have names of their own"),
        ({"labels": ["lung"]}, "labels of dataset.json must be {"),
        ({"test": "all"}, "the test list must be a list of images"),
    ],
)
def test_wrong_dataset_json_is_refused_a2(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    assert message in refused(edit(make_decathlon(tmp_path), **changes))
    (tmp_path / "dataset.json").write_text("[1]")
    assert "must hold an object; got list" in refused(tmp_path)


# nnU-Net


def make_nnunet(root: Path, ending: str = ".nii.gz") -> Path:
    touch(root, *(f"imagesTr/c{i}_000{channel}{ending}" for i in range(2) for channel in range(2)))
    touch(root, *(f"labelsTr/c{i}{ending}" for i in range(2)), f"imagesTs/t_0000{ending}", f"imagesTs/t_0001{ending}")
    facts = {"channel_names": {"0": "T1w", "1": "FLAIR"}, "file_ending": ending}
    write_json(root / "dataset.json", facts | {"labels": {"background": 0, "lung": 1, "cyst": 2}, "numTraining": 2})
    return root


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd", ".png"])
def test_nnunet_2_pairs_channels_by_number_a2(tmp_path: Path, ending: str) -> None:
    found = find(make_nnunet(tmp_path, ending))
    assert (found.channels, found.modality, found.labels) == (("T1w", "FLAIR"), "T1w, FLAIR", {1: "lung", 2: "cyst"})
    assert [case.name for case in found.cases] == ["c0", "c1", "t"]
    assert [[file.name for file in channel] for channel in found.cases[1].images] == [
        [f"c1_0000{ending}"],
        [f"c1_0001{ending}"],
    ]
    assert found.cases[1].masks == (Mask((tmp_path / f"labelsTr/c1{ending}",)),)
    assert found.cases[2].masks == ()
    assert found.notes == () and sum(not case.masks for case in found.cases) == 1


def test_nnunet_1_is_told_from_decathlon_by_its_numbers_a2(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz")
    listed = [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}]
    write_json(tmp_path / "dataset.json", {"modality": {"0": "MRI"}, "labels": {"1": "atrium"}, "training": listed})
    found = find(tmp_path)
    assert (found.layout, found.channels, found.labels) == ("nnunet", ("MRI",), {1: "atrium"})
    assert relative(found.cases[0], tmp_path) == ["imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz"]
    (tmp_path / "imagesTr/la_003_0000.nii.gz").rename(tmp_path / "imagesTr/la_003.nii.gz")
    assert find(tmp_path).layout == "decathlon"


def test_nnunet_2_takes_listed_files_from_anywhere_a2(tmp_path: Path) -> None:
    source = make_nnunet(tmp_path)
    touch(source, "elsewhere/x.nii.gz", "elsewhere/y.nii.gz", "elsewhere/mask.nii.gz")
    entry = {"images": ["elsewhere/y.nii.gz", "elsewhere/x.nii.gz"], "label": "elsewhere/mask.nii.gz"}
    found = find(edit(source, dataset={"p": entry}))
    assert relative(cases(found)["p"], source) == [
        "elsewhere/y.nii.gz",
        "elsewhere/x.nii.gz",
        "elsewhere/mask.nii.gz",
    ]
    assert "dataset['p'] must have 2 images and a label" in refused(edit(source, dataset={"p": {"images": ["x"]}}))
    assert "dataset of dataset.json must be" in refused(edit(source, dataset=["p"]))
    report = {"images": ["x"], "report": "a 63 year old man " * 9}
    assert "year old" not in refused(edit(source, dataset={"p": report})) + refused(edit(source, dataset=[report]))


def test_nnunet_lists_all_that_is_wrong_a2(tmp_path: Path) -> None:
    source = make_nnunet(tmp_path)
    touch(source, "imagesTr/c9_0000.nii.gz", "imagesTr/c9_0002.nii.gz", "labelsTr/c5.nii.gz", "imagesTr/c0.nii.gz")
    message = refused(source)
    for part in (
        "imagesTr/c9 must have channels 0000 to 0001; got 0000, 0002",
        "imagesTr/c9 has no label",
        "labelsTr/c5.nii.gz has no image",
        "imagesTr/c0.nii.gz must be called NAME_0000.nii.gz",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "one value; whole are regions of several values"),
        (
            {"labels": {"background": 0, "lung": 1, "ignore": 1}},
            "ignore label .* must be one value that no other label",
        ),
        ({"file_ending": ".tif"}, "file_ending of dataset.json must be one of .nii.gz, .nii, .*got '.tif'"),
        ({"channel_names": {"1": "CT"}}, "the channels of dataset.json must be"),
    ],
)
def test_nnunet_labels_must_be_one_value_each_a2(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        find(edit(make_nnunet(tmp_path), **changes))


# BIDS


def make_bids(root: Path) -> Path:
    for subject in ("sub-02", "sub-01"):
        touch(root, f"{subject}/anat/{subject}_T1w.nii.gz", f"derivatives/man/{subject}/anat/{subject}_dseg.nii.gz")
    (root / "participants.tsv").write_text("participant_id\tage\tgroup\nsub-01\t61\tcase\nsub-02\tn/a\tcontrol\n")
    facts = {"Name": "Heads", "License": "CC0", "Authors": ["A. B.", "C. D."], "ReferencesAndLinks": ["doi:1"]}
    write_json(root / "dataset_description.json", facts | {"BIDSVersion": "1.9.0"})
    write_json(root / "T1w.json", {"RepetitionTime": 2.3, "MagneticFieldStrength": 3, "EchoTime": 0.1})
    write_json(root / "sub-01/anat/sub-01_T1w.json", {"EchoTime": 0.00298})
    (root / "derivatives/man/dseg.tsv").write_text("index\tname\n0\tbackground\n2\tgrey matter\n")
    return root


def test_bids_with_covariates_side_files_and_label_names_b5(tmp_path: Path) -> None:
    found = find(make_bids(tmp_path))
    assert (found.name, found.licence, found.channels, found.modality) == ("Heads", "CC0", ("T1w",), "MRI")
    assert found.references == {"reference": "doi:1", "attribution": "A. B., C. D."}
    assert found.labels == {2: "grey matter"}
    first, second = found.cases
    assert (first.name, first.subject, first.path) == ("sub-01", "sub-01", "sub-01/anat/sub-01_T1w.nii.gz")
    assert first.masks == (Mask((tmp_path / "derivatives/man/sub-01/anat/sub-01_dseg.nii.gz",)),)
    acquisition = {"repetition_time_ms": 2300.0, "field_strength_t": 3.0}
    assert first.covariates == {"age": 61.0, "group": "case", "echo_time_ms": 2.98, **acquisition}
    assert second.covariates == {"age": None, "group": "control", "echo_time_ms": 100.0, **acquisition}


def test_texts_of_bids_side_files_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    root = make_bids(tmp_path)
    write_json(root / "sub-01/anat/sub-01_T1w.json", {"BodyPartExamined": "head", "ConvolutionKernel": ["Br38f", "3"]})
    write_json(root / "sub-02/anat/sub-02_T1w.json", {"BodyPartExamined": "of J. Doe", "ConvolutionKernel": None})
    first, second = find(root, facts=("body_part", "kernel", "field_strength_t")).cases
    assert (first.covariates["body_part"], first.covariates["kernel"]) == ("HEAD", "Br38f 3")
    assert not {"body_part", "kernel"} & second.covariates.keys() and second.covariates["field_strength_t"] == 3
    assert not {"body_part", "kernel"} & find(root).cases[0].covariates.keys()


def test_bids_sessions_channels_and_binary_lesions_b5(tmp_path: Path) -> None:
    for session in ("ses-a", "ses-b"):
        stem = f"sub-1_{session}"
        touch(tmp_path, *(f"sub-1/{session}/anat/{stem}_{name}.nii.gz" for name in ("T1w", "run-2_FLAIR", "T2w")))
        write_json(tmp_path / f"sub-1/{session}/anat/{stem}_T1w.json", {"EchoTime": 0.003, "MagneticFieldStrength": 3})
        write_json(tmp_path / "FLAIR.json", {"EchoTime": 0.4, "MagneticFieldStrength": 3})
    touch(tmp_path, "derivatives/l/sub-1/ses-b/anat/sub-1_ses-b_label-lesion_mask.nii.gz")
    touch(tmp_path, "derivatives/b/sub-1/ses-b/anat/sub-1_ses-b_desc-brain_mask.nii.gz")
    message = refused(tmp_path, channels=("T1w", "FLAIR"))
    assert "must have one kind of mask; found b/*_desc-brain_mask, l/*_label-lesion_mask" in message
    assert "choose with `bids_mask` a pattern" in message
    for pattern in ("*_label-lesion_mask.nii.gz", "l/*"):
        found = find(tmp_path, channels=("T1w", "run-2_FLAIR"), bids_mask=pattern)
        assert [case.name for case in found.cases] == ["sub-1_ses-a", "sub-1_ses-b"]
        without, with_mask = found.cases
        assert without.masks == ()
        assert [mask.value for mask in with_mask.masks] == [1]
        assert found.labels == {1: "lesion"}
        assert found.channels == ("T1w", "run-2_FLAIR")
        assert with_mask.covariates == {"field_strength_t": 3.0, "echo_time_ms_T1w": 3, "echo_time_ms_run-2_FLAIR": 400}
        assert found.notes == () and sum(not case.masks for case in found.cases) == 1
    (tmp_path / "derivatives/l/sub-1/ses-b").rename(tmp_path / "derivatives/l/sub-1/ses-c")
    touch(tmp_path, "derivatives/c/sub-9/anat/mask.nii.gz")
    message = refused(tmp_path, channels=("T1w",), bids_mask="c/*")
    assert "none of the 1 masks under derivatives/ belongs to a patient and session with images" in message
    assert "none of 3 fits 'x*'" in refused(tmp_path, channels=("T1w",), bids_mask="x*")
    message = refused(tmp_path, bids_mask="l/*")
    assert "one suffix must be in all 2 sessions" in message
    assert "found FLAIR in 2, T1w in 2, T2w in 2; choose `channels`" in message


def test_links_and_endings_of_bids_lose_nothing(tmp_path: Path) -> None:
    """A pipeline under derivatives/ and a patient that are links, and endings in capitals."""
    store, source = tmp_path / "store", tmp_path / "bids"
    touch(store, *(f"seg/sub-0{i}/anat/sub-0{i}_dseg.nii.gz" for i in (1, 2, 3, 4)), "sub-02/anat/sub-02_T1w.nii.gz")
    touch(source, "sub-01/anat/sub-01_T1w.nii.gz", "sub-03/anat/sub-03_T1w.NII.GZ", "sub-04/func/sub-04_bold.nii.gz")
    (source / "sub-02").symlink_to(store / "sub-02")
    (source / "derivatives").mkdir()
    (source / "derivatives" / "seg").symlink_to(store / "seg")
    (store / "seg" / "loop").symlink_to(source)

    found = find(source)

    assert [(case.subject, len(case.masks)) for case in found.cases] == [("sub-01", 1), ("sub-02", 1), ("sub-03", 1)]
    assert found.notes == (
        "1 masks under derivatives/ of no patient and session with images were left out: "
        "derivatives/seg/sub-04/anat/sub-04_dseg.nii.gz",
        "1 patients without an image under anat/ were left out: sub-04",
    )


def test_images_that_no_list_and_no_name_takes_are_said(tmp_path: Path) -> None:
    """Decathlon's list may be shorter than its folder, and folders of organs may hold neither image nor masks."""
    source = touch(tmp_path / "d", *(f"imagesTr/{n}.nii.gz" for n in "abc"), "labelsTr/a.nii.gz", "imagesTs/d.nii.gz")
    listed = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    write_json(source / "dataset.json", {"training": [listed], "modality": {"0": "CT"}})
    said = "2 images that dataset.json does not list were left out: imagesTr/b.nii.gz, imagesTr/c.nii.gz"
    assert find(source, "decathlon").notes == (said,)
    organs = touch(tmp_path / "o", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "s2/CT.nii.gz", "s3/volume.nii.gz")
    said = "2 folders without ct.nii.gz, mri.nii.gz and segmentations/ were left out: s2, s3"
    assert find(organs, merge_masks=("liver",)).notes == (said,)


def test_bids_lists_all_that_is_wrong_b5(tmp_path: Path) -> None:
    source = make_bids(tmp_path)
    touch(source, "sub-02/anat/sub-02_run-2_T1w.nii.gz", "derivatives/man/sub-01/anat/sub-01_run-2_dseg.nii.gz")
    touch(source, "sub-03/anat/sub-03_T2w.nii.gz")
    (source / "derivatives/man/sub-01/anat/sub-01_run-2_dseg.tsv").write_text("index\tname\n2\twhite matter\n")
    (source / "derivatives/man/sub-02/anat/sub-02_dseg.tsv").write_text("index\tname\n2\twhite matter\n")
    write_json(source / "sub-01/anat/sub-01_T1w.json", {"EchoTime": [0.1, 0.2]})
    message = refused(source, channels=("T1w",))
    for part in (
        "sub-02 must have one image T1w; found sub-02_T1w.nii.gz, sub-02_run-2_T1w.nii.gz",
        "sub-03 must have one image T1w; found sub-03_T2w.nii.gz",
        "sub-01 must have one mask; found derivatives/man/sub-01/anat/sub-01_dseg.nii.gz, derivatives/man/sub-01",
        "EchoTime of sub-01_T1w.nii.gz must be a number; got [0.1, 0.2]",
        "label 2 must have one name; it is 'grey matter', and 'white matter' by sub-02_dseg.tsv",
    ):
        assert part in message


def test_wrong_tables_and_descriptions_of_bids_are_refused_b5(tmp_path: Path) -> None:
    source = make_bids(tmp_path)
    (source / "derivatives/man/dseg.tsv").write_text("index\tlabel\n0\tbackground\n")
    assert "dseg.tsv must have the columns index (whole numbers) and name" in refused(source)
    (source / "derivatives/man/dseg.tsv").unlink()
    touch(source, "derivatives/man/sub-01/anat/sub-01_label-x_mask.nii.gz")
    (source / "derivatives/man/sub-01/anat/sub-01_dseg.nii.gz").unlink()
    assert "masks must all be label maps (_dseg) or all binary (_mask); found both" in refused(
        source, bids_mask="man/*"
    )
    (source / "participants.tsv").write_text("id\tage\nsub-01\t61\n")
    assert "participants.tsv must have a column participant_id" in refused(source, bids_mask="*_dseg*")
    (source / "participants.tsv").unlink()
    (source / "T1w.json").write_text("[]")
    assert "T1w.json must hold a JSON object; got list" in refused(source, bids_mask="*_dseg*")
    assert "must hold images such as sub-01/anat/sub-01_T1w.nii.gz" in refused(touch(tmp_path / "e", "x"), "bids")


# Folders


def make_folders(root: Path) -> Path:
    return touch(root, *(f"{folder}/p{i}.nii.gz" for i in range(2) for folder in ("images", "labels")))


def test_folders_of_any_format_and_slices_in_folders_f7(tmp_path: Path) -> None:
    source = touch(tmp_path, "images/a.mhd", "images/a.raw", "labels/a.NRRD", "images/b/2.png", "images/b/10.png")
    touch(source, "images/c/IM1", "images/c/IM2.dcm", content=PREAMBLE)
    touch(source, "images/c/DICOMDIR", "images/c/notes.txt", "labels/c.nii.gz", "labels/b.png", "images/.DS_Store")
    found = find(source)
    a, b, c = found.cases
    assert relative(a, source) == ["images/a.mhd", "labels/a.NRRD"]
    assert [file.name for file in b.images[0]] == ["10.png", "2.png"]
    assert [file.name for file in c.images[0]] == ["IM1", "IM2.dcm"]
    assert (a.private, b.private, c.private) == (False, False, True)
    assert found.channels == ("image",)


def test_folders_keep_images_without_label_and_list_the_rest_a2(tmp_path: Path) -> None:
    source = make_folders(tmp_path)
    (source / "labels/p0.nii.gz").unlink()
    found = find(source)
    assert found.notes == () and sum(not case.masks for case in found.cases) == 1
    assert [len(case.masks) for case in found.cases] == [0, 1]
    touch(source, "labels/p7.nii.gz", "images/p1.nii", "images/p9.tif", "images/MEIER^ANNA/x.bin", "labels/DOE^JOHN/1")
    message = refused(source)
    for part in (
        "labels/p7.nii.gz has no image",
        "images/ has p1.nii and p1.nii.gz; keep one of them",
        "images/p9.tif is of no supported format",
        "images/ number 1 by name: a folder must hold the slices of one series, DICOM or PNG; it holds 0 PNG, 0 DICOM",
        "folders or DICOM files in labels/ without an image: 1",
    ):
        assert part in message
    assert "ANNA" not in message and "JOHN" not in message


def test_images_alone_must_be_asked_for_a2(tmp_path: Path) -> None:
    source = touch(tmp_path, "images/a.nii.gz")
    assert "none fits" in refused(source)
    assert find(source, "folders").cases[0].masks == ()
    (source / "images/a.nii.gz").unlink()
    assert "no case was found" in refused(source, "folders")
    (source / "images").rmdir()
    assert "must be a folder; put volumes under images/ and labels/" in refused(source, "folders")


# Tables


def make_table(root: Path, text: str = "", name: str = "cases.csv") -> Path:
    touch(root, *(f"site-{i}/{stem}.nii.gz" for i in range(2) for stem in ("ct", "flair", "lung")))
    rows = "".join(f"site-{i}/ct.nii.gz,site-{i}/lung.nii.gz,pat{i}\n" for i in range(2))
    (root / name).write_text(text or f"image,label,subject\n{rows}", encoding="utf-8")
    return root


def test_tables_with_channels_covariates_and_cases_without_label_b5(tmp_path: Path) -> None:
    text = (
        "\ufeffimage:T1\timage:FLAIR\tlabel\tsubject\tsplit\tage\tcentre\tday\n"
        "site-1/ct.nii.gz\tsite-1/flair.nii.gz\tsite-1/lung.nii.gz\tq\tVal\t7e1\tNA\t20200131\n"
        "\t\t\t\t\t\t\t\n"
        "site-0/ct.nii.gz\tsite-0/flair.nii.gz\t\tp\ttrain\t\tB\t20191224\n"
    )
    found = find(make_table(tmp_path, text, "cases.tsv"))
    assert (found.layout, found.name, found.channels) == ("csv", "cases", ("T1", "FLAIR"))
    first, second = found.cases
    assert (first.name, first.subject, first.split, first.masks) == ("site-0_ct", "p", "training", ())
    assert [file.name for file in second.files] == ["ct.nii.gz", "flair.nii.gz", "lung.nii.gz"]
    assert first.covariates == {"age": None, "centre": "B", "day": "20191224"}
    assert second.covariates == {"age": 70.0, "centre": None, "day": "20200131"}
    assert found.notes == () and sum(not case.masks for case in found.cases) == 1


def test_tables_without_labels_and_names_of_ones_own_b5(tmp_path: Path) -> None:
    found = find(make_table(tmp_path, "image;case\nsite-0/ct.nii.gz;x.1\nsite-1/ct.nii.gz;y\n") / "cases.csv")
    assert [(case.name, case.path, case.masks) for case in found.cases] == [
        ("x.1", "site-0/ct.nii.gz", ()),
        ("y", "site-1/ct.nii.gz", ()),
    ]


def test_tables_name_folders_of_slices_whose_names_stay_hidden_b5(tmp_path: Path) -> None:
    touch(tmp_path, "MEIER^ANNA/1/IM0001", "MEIER^ANNA/1/IM0002", content=PREAMBLE)
    touch(tmp_path, "stack/1.png", "lung.nii.gz", "s/1.png", "s/1.txt", "s/other.bin")
    table = tmp_path / "cases.csv"
    table.write_text("image,label\nMEIER^ANNA/1,lung.nii.gz\nstack,lung.nii.gz\n")
    found = cases(find(tmp_path))
    assert found["MEIER_ANNA_1"].private and not found["stack"].private
    assert [file.name for file in found["MEIER_ANNA_1"].images[0]] == ["IM0001", "IM0002"]
    table.write_text("image,case\nMEIER^ANNA/1,a\n")
    assert not find(tmp_path).cases[0].private
    table.write_text("image,label\nMEIER^ANNA/1,gone\ns,lung.nii.gz\nMEIER^ANNA/1,lung.nii.gz\n")
    message = refused(tmp_path)
    for part in (
        "line 2: a DICOM file or a folder does not exist",
        "line 3: a folder must hold the slices of one series, DICOM or PNG; it holds 1 PNG, 0 DICOM, 1 others",
        "the name of a DICOM case stands for 2 cases",
    ):
        assert part in message
    assert "ANNA" not in message.upper()


def test_labels_may_be_folders_of_binary_masks_d2(tmp_path: Path) -> None:
    touch(tmp_path, "ct.nii.gz", "masks/liver.nii.gz", "masks/aorta.nii.gz", "map.nii.gz", "ct2.nii.gz")
    (tmp_path / "cases.csv").write_text("image,label\nct.nii.gz,masks\n")
    found = find(tmp_path, merge_masks=("liver", "aorta"))
    assert found.labels == {1: "liver", 2: "aorta"}
    assert [(mask.files[0].name, mask.value) for mask in found.cases[0].masks] == [
        ("liver.nii.gz", 1),
        ("aorta.nii.gz", 2),
    ]
    assert "their order must be known; found aorta, liver; give `merge_masks`" in refused(tmp_path)
    assert "the folder of binary masks has no mask cyst" in refused(tmp_path, merge_masks=("cyst",))
    (tmp_path / "cases.csv").write_text("image,label\nct.nii.gz,masks\nct2.nii.gz,map.nii.gz\n")
    assert "folders of binary masks or none; 1 of 2 are" in refused(tmp_path, merge_masks=("liver",))
    (tmp_path / "cases.csv").write_text("image,label\nct2.nii.gz,map.nii.gz\n")
    assert "`merge_masks` is for folders of binary masks; the manifest has none" in refused(
        tmp_path, merge_masks=("liver",)
    )


@pytest.mark.parametrize("name", ["label.csv", "labels.csv"])
def test_the_older_table_has_image_and_mask_in_its_first_columns_e15(tmp_path: Path, name: str) -> None:
    """Header names are ignored."""
    source = make_table(tmp_path, "ct_path,image,z\nsite-1/ct.nii.gz,site-1/lung.nii.gz,3\n", name)
    found = find(source)
    assert relative(found.cases[0], source) == ["site-1/ct.nii.gz", "site-1/lung.nii.gz"]
    assert found.notes == (f"columns of {name} beyond the second are left out: 1",)
    (source / name).write_text("image,mask\nsite-0/ct.nii.gz,\n")
    assert f"{name} line 2 must have an image and a mask" in refused(source)
    (source / name).write_text("site-0/ct.nii.gz,site-0/lung.nii.gz\n")
    assert "must be a header; it names files; put a line such as image,mask above" in refused(source)
    (source / name).write_text("label,image\nsite-0/lung.nii.gz,site-0/ct.nii.gz\n")
    assert relative(find(source).cases[0], source) == ["site-0/ct.nii.gz", "site-0/lung.nii.gz"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,image:T1\n", r"either the column image or one column image:NAME a channel; it has image, image:T1"),
        ("image:,label\n", r"either the column image or one column image:NAME"),
        ("image,label,subject\nsite-0/ct.nii.gz,site-0/lung.nii.gz,\n", r"line 2: subject is empty"),
    ],
)
def test_wrong_tables_are_refused_a2(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        find(make_table(tmp_path, text) / "cases.csv")


def test_a_table_that_is_no_text_or_not_the_only_one_is_refused_a2(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_bytes(b"image,label\n\xff\xfe\n")
    assert "must be a CSV file in UTF-8" in refused(tmp_path / "cases.csv")
    assert "must hold one CSV with the columns image and label; found none" in refused(tmp_path, "csv")
    make_table(tmp_path, name="a.csv")
    make_table(tmp_path, name="b.csv")
    assert "found a.csv, b.csv; give the CSV file itself" in refused(tmp_path)


# Binary masks of organs


def make_organs(root: Path) -> Path:
    for name in ("s0001", "s0002"):
        touch(root, f"{name}/ct.nii.gz", *(f"{name}/segmentations/{organ}.nii.gz" for organ in ("liver", "aorta")))
    (root / "meta.csv").write_text("image_id;age;kvp;split\ns0002;70;120;test\ns0001;;100;train\n")
    return root


def test_organs_become_values_in_the_order_of_priority_d2(tmp_path: Path) -> None:
    source = make_organs(tmp_path / "Organs")
    found = find(source, merge_masks=("liver", "aorta"))
    assert (found.name, found.modality, found.channels) == ("Organs", "CT", ("CT",))
    assert found.labels == {1: "liver", 2: "aorta"}
    case = cases(found)["s0002"]
    assert [(file, mask.value) for mask in case.masks for file in mask.files] == [
        (source / "s0002/segmentations/liver.nii.gz", 1),
        (source / "s0002/segmentations/aorta.nii.gz", 2),
    ]
    assert (case.split, case.covariates) == ("test", {"age": 70.0, "tube_voltage_kv": 120.0})
    assert cases(found)["s0001"].covariates == {"age": None, "tube_voltage_kv": 100.0}


def test_organs_list_all_that_is_wrong_d2(tmp_path: Path) -> None:
    source = make_organs(tmp_path)
    message = refused(source)
    assert "so their order must be known; found aorta, liver" in message
    assert "give `merge_masks` NAME,NAME,..., of which an earlier one wins" in message
    assert "must name every mask once; got liver, liver" in refused(source, merge_masks=("liver", "liver"))
    (source / "s0001/segmentations/aorta.nii.gz").unlink()
    touch(source, "s0003/mri.nii.gz", "s0004/segmentations/aorta.nii.gz")
    message = refused(source, merge_masks=("aorta",))
    for part in (
        "s0001/segmentations has no mask aorta",
        "s0003/segmentations has no mask aorta",
        "s0004 must hold one image, ct.nii.gz or mri.nii.gz; found none",
        "meta.csv gives no split for s0003",
        "all cases must be of one modality; found CT and MR",
    ):
        assert part in message
    (source / "meta.csv").write_text("image_id;split\ns0001;dev\n")
    assert "meta.csv: split must be one of train" in refused(source, merge_masks=("aorta",))
    (source / "meta.csv").write_text("name;split\ns0001;dev\n")
    assert "meta.csv must have a column image_id" in refused(source, merge_masks=("aorta",))


# DICOM masks, and DICOM


def test_segments_of_dicom_masks_get_values_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"a.dcm": ["lung", "cyst"], "b.dcm": ["airway"]}
    module = SimpleNamespace(segment_names=lambda file: named[file.name])
    monkeypatch.setitem(sys.modules, "fibldm.volumes.dicom.masks", module)
    source = touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "images/c.nii.gz")
    touch(source, "labels/a.dcm", "labels/b.dcm", content=PREAMBLE)
    found = find(source)
    values = {"airway": 1, "cyst": 2, "lung": 3}
    assert found.labels == {1: "airway", 2: "cyst", 3: "lung"}
    assert [mask.names for case in found.cases for mask in case.masks] == [values, values]
    touch(source, "labels/c.nii.gz")
    assert "masks must all be DICOM or all label maps; found both" in refused(source)


def test_a_dicom_mask_that_holds_no_segments_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz")
    touch(tmp_path, "labels/a.dcm", content=PREAMBLE)
    assert "DICOM mask 1: " in refused(tmp_path)


def test_a_tree_of_dicom_files_is_found_by_their_content_h2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Source("dicom", "x", ())
    module = SimpleNamespace(dicom_tree=lambda search: expected)
    monkeypatch.setitem(sys.modules, "fibldm.datasets.layouts.dicom_tree", module)
    touch(tmp_path, "readme.txt", "study/series/notes")
    assert "none fits" in refused(tmp_path)
    touch(tmp_path, "study/series/IM0001", content=PREAMBLE)
    assert find(tmp_path) == expected


def test_series_of_one_patient_are_known_by_their_files_h13(tmp_path: Path) -> None:
    """A table without the column subject does not tear the series of one patient apart."""
    for name, patient in (("a", "P1"), ("b", "P2"), ("c", "P1")):
        write_series(tmp_path / name, example(), patient=patient, series=name)
    (tmp_path / "cases.csv").write_text("image\na\nb\nc\n")
    subjects = [case.subject for case in find(tmp_path / "cases.csv").cases]
    assert subjects[0] == subjects[2] == "P1" and subjects[1] == "P2"


# Real data


@pytest.mark.data
def test_the_hippocampus_set_is_decathlon_a2(data_folder: Path) -> None:
    found = find(data_folder / "hippocampus_mri")
    assert (found.layout, found.channels, found.licence) == ("decathlon", ("MRI",), "CC-BY-SA 4.0")
    assert found.labels == {1: "Anterior", 2: "Posterior"}
    assert [bool(case.masks) for case in found.cases].count(True) == 200
    assert len(found.cases) == 201
