"""A folder of DICOM studies becomes cases with their masks (FEATURES H2)."""

import gzip
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from builders import write_nifti as write_image
from dicom_files import (
    AXIAL,
    BOX,
    NAME,
    PLANTED,
    complete,
    example,
    expected,
    in_space,
    new_uid,
    write_scout,
    write_segmentation,
    write_series,
    write_structures,
)
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from fibldm.datasets.case import prepare_case
from fibldm.datasets.layouts import detect_layout, find_source
from fibldm.datasets.layouts.facts import Search
from fibldm.datasets.masks import read_mask
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.datalist import SPLITS, read_datalist
from fibldm.volumes.formats.readers import read_scan

SHAPE = (6, 7, 9)
LABELS = np.zeros(SHAPE, np.uint8)
LABELS[1:3, 1:4, 2:8] = 1
LABELS[4, 0, 8] = 2


def dicom_tree(folder: Path, merge_masks: tuple[str, ...] = ()) -> Source:
    return find_source(folder, PrepareSettings("dicom", merge_masks=merge_masks))


def add_study(folder: Path, name: str, *, patient: str = "ID-1", modality: str = "CT", series: str = "series") -> Path:
    options: dict[str, Any] = {"study": name, "patient": patient, "modality": modality, "series": series}
    write_series(folder, example(SHAPE, seed=len(name)), change=complete, **options)
    return folder


def segment(folder: Path, file: Path, names: tuple[str, ...] = ("Lung", "Honeycombing"), **options: Any) -> Path:
    """Write a segmentation of the series in ``folder``."""
    series = [pydicom.dcmread(path) for path in sorted(folder.glob("0*.dcm"))]
    labels = LABELS if len(names) > 1 else (LABELS == 1).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_segmentation(file, series, labels, names=names, **options)


def write_nifti(file: Path) -> Path:
    return write_image(file, *expected(LABELS))


def case_of(cases: tuple[Case, ...], study: str) -> Case:
    return next(case for case in cases if case.name == new_uid(study, "series"))


def test_studies_become_private_cases(tmp_path: Path) -> None:
    """Masks are found by what they refer to, wherever they lie; their names are numbered over all of them."""
    first = add_study(tmp_path / NAME / "one", "study one")
    second = add_study(tmp_path / "b" / "two", "study two", patient="ID-2")
    third = add_study(tmp_path / "c" / "three", "study three", patient="ID-2")
    a = segment(first, tmp_path / "masks" / "a", ("Lung", "Honeycombing"))
    b = segment(second, tmp_path / "masks" / "b", ("Nodule",))
    write_scout(tmp_path / "d", study="study four", series="scout")
    (first / "notes.txt").write_text("no DICOM")
    (first / "loop").symlink_to(tmp_path)
    (first / "gone").symlink_to(tmp_path / "nowhere")

    source = dicom_tree(tmp_path)

    assert source.labels == {1: "Honeycombing", 2: "Lung", 3: "Nodule"}
    assert (source.layout, source.name, source.modality, source.licence) == ("dicom", "DICOM", "CT", None)
    one, two, three = (case_of(source.cases, f"study {name}") for name in ("one", "two", "three"))
    assert list(source.cases) == sorted((one, two, three), key=lambda case: case.name)
    assert one.images == (tuple(sorted(first.glob("0*.dcm"))),)
    assert one.masks == (Mask((a,), names={"Lung": 2, "Honeycombing": 1}),)
    assert two.masks == (Mask((b,), names={"Nodule": 3}),) and three.masks == ()
    assert three.images == (tuple(sorted(third.glob("0*.dcm"))),)
    assert [case.subject for case in (one, two, three)] == ["ID-1", "ID-2", "ID-2"]
    assert all(case.private and case.path == "" for case in source.cases)
    assert source.notes == (
        "1 series are no volumes of CT or MR and were left out (1 scout)",
        "1 patients have no series of CT or MR and were left out (study 4 of 4, series 1 of 1)",
        "1 series have no mask (study 2 of 4, series 1 of 1)",
        "1 links lead to nothing that is there and were left out (folder 1/1)",
    )


def test_case_reads_as_drawn(tmp_path: Path) -> None:
    """The segmentation lies on its image, voxel for voxel."""
    segment(add_study(tmp_path / "ct", "study"), tmp_path / "seg.dcm")
    (case,) = dicom_tree(tmp_path).cases

    image = read_scan(case.images[0])
    mask = read_mask(case.masks[0], image)

    wanted = expected(np.array([0, 2, 1], np.uint8)[LABELS])[0]
    np.testing.assert_array_equal(mask.array, wanted)
    np.testing.assert_array_equal(image.array, expected(example(SHAPE, seed=5))[0])


def test_structures_refer_to_their_series(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    add_study(tmp_path / "other", "study", series="other")
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)], "Body": [in_space(BOX)]})

    source = dicom_tree(tmp_path)

    assert case_of(source.cases, "study").masks == (Mask((file,), names={"Lung": 2, "Body": 1}),)
    assert sum(bool(case.masks) for case in source.cases) == 1


def without_reference(dataset: Dataset) -> None:
    for keyword in ("ReferencedSeriesSequence", "SourceImageSequence"):
        if keyword in dataset:
            delattr(dataset, keyword)


def test_mask_without_reference_goes_by_its_place(tmp_path: Path) -> None:
    file = segment(add_study(tmp_path / "ct", "study"), tmp_path / "seg.dcm", change=without_reference)
    add_study(tmp_path / "other", "another study")
    assert case_of(dicom_tree(tmp_path).cases, "study").masks[0].files == (file,)

    add_study(tmp_path / "again", "study", series="again")
    refused = (
        r"series \d of 3: the mask of Lung, Honeycombing in the source itself refers to no series, and 2 images are"
    )
    with pytest.raises(FibldmError, match=refused):
        dicom_tree(tmp_path)


def test_nifti_beside_nothing_is_said(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    write_nifti(tmp_path / "deep" / "er" / "mask.nii")

    source = dicom_tree(tmp_path)

    assert source.cases[0].masks == () and source.labels == {}
    assert source.notes == (
        "1 NIfTI files lie beside no series and were left out (folder 2/1)",
        "1 series have no mask (study 1 of 1, series 1 of 1)",
    )


def renewed(dataset: Dataset) -> None:
    """As dicom-anonymizer and re-exports leave it: what a mask refers to is a series of another name."""
    if "ReferencedSeriesSequence" in dataset:
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = new_uid("before")
    else:
        study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        study.RTReferencedSeriesSequence[0].SeriesInstanceUID = new_uid("before")


def test_masks_whose_series_was_renamed_go_by_their_place(tmp_path: Path) -> None:
    """Study and frame of reference leave one image, of a segmentation among several that on whose slices it lies."""
    folder = add_study(tmp_path / "ct", "study")
    rt = write_structures(tmp_path / "rt.dcm", {"Body": [in_space(BOX)]}, change=renewed)
    other = add_study(tmp_path / "mr", "another study", modality="MR")
    write_series(tmp_path / "thin", example((3, 5, 5)), study="another study", series="thin", modality="MR")
    seg = segment(other, tmp_path / "seg.dcm", change=renewed)

    source = dicom_tree(tmp_path)

    assert case_of(source.cases, "study").masks == (Mask((rt,), names={"Body": 1}),)
    assert case_of(source.cases, "another study").masks == (Mask((seg,), names={"Lung": 3, "Honeycombing": 2}),)
    note = "2 DICOM masks name no series that is there, and were taken for the only image in their place (study "
    assert source.notes[-1].startswith(note) and folder.name not in source.notes[-1]


def test_structures_of_several_frames_of_reference_go_to_their_images(tmp_path: Path) -> None:
    """What was drawn on an MR is not drawn on the CT of the same structure set."""

    def two_frames(dataset: Dataset) -> None:
        other = Dataset()
        other.FrameOfReferenceUID = new_uid("mr study", "frame of reference")
        dataset.ReferencedFrameOfReferenceSequence.insert(0, other)
        dataset.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = other.FrameOfReferenceUID

    add_study(tmp_path / "ct", "study")
    drawn = {"Lung": [in_space(BOX)], "Oedema": [in_space(BOX)]}
    file = write_structures(tmp_path / "rt.dcm", drawn, change=two_frames)

    (case,) = dicom_tree(tmp_path).cases

    assert case.masks == (Mask((file,), names={"Lung": 1}),)


def image_gone(root: Path) -> None:
    gone = add_study(root / "gone", "gone")
    segment(gone, root / "seg.dcm")
    shutil.rmtree(gone)


def other_frame(root: Path) -> None:
    def change(dataset: Dataset) -> None:
        renewed(dataset)
        dataset.FrameOfReferenceUID = new_uid("elsewhere")

    segment(root / "ct", root / "seg.dcm", change=change)


def two_in_place(root: Path) -> None:
    add_study(root / "again", "study", series="again")
    write_structures(root / "rt.dcm", {"Lung": [in_space(BOX)], "Body": [in_space(BOX)]}, change=renewed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            image_gone,
            "Lung, Honeycombing in the source itself refers to a series that is not there, and its study has no",
        ),
        (
            other_frame,
            "refers to a series that is not there, and none of the 1 images of its study is in its frame of re",
        ),
        (
            two_in_place,
            "Lung, Body in the source itself refers to a series that is not there, and 2 images are in",
        ),
    ],
)
def test_masks_of_no_image_are_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    add_study(tmp_path / "ct", "study")
    spoil(tmp_path)
    with pytest.raises(FibldmError, match=rf"study \d of \d, series \d of \d: the mask of .*{message}") as caught:
        dicom_tree(tmp_path)
    assert "export masks together with the series they were drawn on" in caught.value.remedy


def test_masks_of_what_is_no_volume_of_ct_are_said(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    write_series(tmp_path / "pt", example(SHAPE), study="study", series="pt", modality="PT")
    write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)]}, series="pt")

    source = dicom_tree(tmp_path)

    assert source.cases[0].masks == ()
    assert "1 series are no volumes of CT or MR and were left out (1 PT)" in source.notes
    assert any(
        "1 DICOM masks belong to series that are no volumes of CT or MR and were left" in n for n in source.notes
    )


def test_several_masks_of_one_image(tmp_path: Path) -> None:
    folder = add_study(tmp_path / "ct", "study")
    files = [segment(folder, tmp_path / f"{name}.dcm", (name,)) for name in ("Airway", "Lung")]

    masks = dicom_tree(tmp_path).cases[0].masks

    assert masks == (Mask((files[0],), names={"Airway": 1}), Mask((files[1],), names={"Lung": 2}))
    segment(folder, tmp_path / "second.dcm", ("Lung",))
    with pytest.raises(FibldmError, match=r"study 1 of 1, series \d of 4: several masks hold Lung \(`merge_masks`"):
        dicom_tree(tmp_path)


def test_merged_masks_come_in_order_of_priority(tmp_path: Path) -> None:
    folder = add_study(tmp_path / "ct", "study")
    a, b = segment(folder, tmp_path / "a.dcm"), segment(folder, tmp_path / "b.dcm", ("Lung",))

    source = dicom_tree(tmp_path, ("Lung", "Honeycombing"))

    lung, honey = (None, {"Lung": 1}, ("Honeycombing",)), (None, {"Honeycombing": 2}, ("Lung",))
    assert source.cases[0].masks == (Mask((a,), *lung), Mask((b,), *lung), Mask((a,), *honey))
    assert source.labels == {1: "Lung", 2: "Honeycombing"}
    with pytest.raises(FibldmError, match="`merge_masks` asks for Liver; the masks hold Honeycombing, Lung"):
        dicom_tree(tmp_path, ("Lung", "Liver"))


def test_files_of_one_mask_series_go_to_their_images(tmp_path: Path) -> None:
    """Segmentations of two studies' images under one series UID."""

    def one_series(dataset: Dataset) -> None:
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = new_uid("masks"), new_uid("study")

    folders = [add_study(tmp_path / name, name) for name in ("x", "y")]
    files = [segment(folder, tmp_path / f"{folder.name}.dcm", change=one_series) for folder in folders]

    cases = dicom_tree(tmp_path).cases

    assert [case_of(cases, name).masks[0].files for name in ("x", "y")] == [(files[0],), (files[1],)]


@pytest.mark.parametrize("place", ["ct/mask.nii.gz", "mask.nii"])
def test_nifti_beside_a_series_is_its_mask(tmp_path: Path, place: str) -> None:
    add_study(tmp_path / "one" / "ct", "study")
    add_study(tmp_path / "two" / "ct", "another study")
    file = write_nifti(tmp_path / "one" / place)

    source = dicom_tree(tmp_path)

    assert case_of(source.cases, "study").masks == (Mask((file,)),)
    assert case_of(source.cases, "another study").masks == () and source.labels == {}


def test_missing_patients_and_both_modalities_are_said(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study", patient="")
    add_study(tmp_path / "mr", "another study", modality="MR")

    source = dicom_tree(tmp_path)

    assert case_of(source.cases, "study").subject == new_uid("study")
    assert source.modality is None
    assert source.notes[1:] == (
        "1 series state no Patient ID; each of their studies counts as a patient (study 1 of 2, series 1 of 1)",
        "1 CT and 1 MR series are mixed",
    )


def ambiguous_nifti(root: Path) -> None:
    add_study(root / "again", "study", patient=PLANTED[1], series="again")
    write_nifti(root / "mask.nii.gz")


def two_nifti(root: Path) -> None:
    write_nifti(root / "ct" / "a.nii.gz")
    write_nifti(root / "b.nii.gz")


def both_kinds(root: Path) -> None:
    segment(root / "ct", root / "seg.dcm")
    write_nifti(root / "ct" / "a.nii.gz")


def another_place(root: Path) -> None:
    def move(dataset: Dataset) -> None:
        dataset.FrameOfReferenceUID = new_uid("elsewhere")

    segment(root / "ct", root / "seg.dcm", change=move)


def nameless_mask(root: Path) -> None:
    def clear(dataset: Dataset) -> None:
        dataset.SegmentSequence[0].SegmentLabel = ""

    segment(root / "ct", root / "seg.dcm", change=clear)


def too_many(root: Path) -> None:
    names = tuple(f"Segment {number:03d}" for number in range(255))
    segment(root / "ct", root / "seg.dcm", names)


def same_uid(root: Path) -> None:
    def rename(dataset: Dataset, index: int) -> None:
        dataset.SeriesInstanceUID = new_uid("study", "series")

    write_series(root / "twin", example(SHAPE), study="another", change=rename)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (ambiguous_nifti, r"study 1 of 1, series 1 of 2: a NIfTI file lies beside it and beside others, 2 in all"),
        (two_nifti, r"study 1 of 1, series 1 of 1: 2 NIfTI files lie beside it, and one may be its label map"),
        (both_kinds, r"masks must all be DICOM or all NIfTI; both were found"),
        (another_place, r"series \d of 2: the mask is in another frame of reference than its image, study 1 of 1"),
        (nameless_mask, r"series \d of 2: a DICOM segmentation must hold at least one segment, and each must have"),
        (too_many, r"there are 255 segments, and at most 254 labels \(`merge_masks`\)"),
        (same_uid, r"series must have UIDs of their own; 1 UIDs stand for several series"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    add_study(tmp_path / "ct", "study", patient=PLANTED[1])
    spoil(tmp_path)
    with pytest.raises(FibldmError, match=message) as caught:
        dicom_tree(tmp_path)
    assert not any(secret in str(caught.value) for secret in (*PLANTED, str(tmp_path), "1.2."))


def test_all_findings_come_together(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    both_kinds(tmp_path)
    two_nifti(tmp_path)
    with pytest.raises(FibldmError, match=r"(?s)2 findings:.*2 NIfTI files.*both were found"):
        dicom_tree(tmp_path)


def test_merged_structures_say_once_what_none_of_them_takes(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    names = ("Lung", "Tumour", "Couch", "Body")
    write_structures(tmp_path / "rt.dcm", {name: [in_space(BOX, AXIAL)] for name in names})
    (case,) = (source := dicom_tree(tmp_path, ("Tumour", "Lung"))).cases

    record = prepare_case(
        case, PrepareSettings(modality="ct", labels=source.labels, merge_masks=("Tumour", "Lung")), None
    )

    said = [finding.message for finding in record.findings if "left out" in finding.message]
    assert said == ["label: left out, as not asked for: Body, Couch"]
    assert record.facts is not None


def test_a_table_of_dicom_masks_says_nothing_of_what_another_entry_merged(tmp_path: Path) -> None:
    add_study(tmp_path / "ct", "study")
    write_structures(tmp_path / "rt.dcm", {name: [in_space(BOX, AXIAL)] for name in ("Lung", "Tumour", "Couch")})
    (tmp_path / "cases.csv").write_text("image,label,subject\nct,rt.dcm,p\n")
    asked = PrepareSettings(modality="ct", merge_masks=("Tumour", "Lung"))
    source = find_source(tmp_path / "cases.csv", asked)
    (case,) = source.cases

    record = prepare_case(case, replace(asked, labels=source.labels), None)

    assert [mask.names for mask in case.masks] == [{"Tumour": 1}, {"Lung": 2}]
    said = [finding.message for finding in record.findings if "left out" in finding.message]
    assert said == ["label: left out, as not asked for: Couch"]


def test_masks_that_hold_none_of_the_wanted_segments_are_said(tmp_path: Path) -> None:
    segment(add_study(tmp_path / "one", "one"), tmp_path / "a.dcm", ("Lung",))
    segment(add_study(tmp_path / "two", "two"), tmp_path / "b.dcm", ("lung",))

    source = dicom_tree(tmp_path, ("Lung",))

    assert [len(case_of(source.cases, name).masks) for name in ("one", "two")] == [1, 0]
    assert source.notes == ("1 series have masks that hold none of Lung, and count as without a mask; they hold lung",)


def bare(folder: Path, implicit: bool) -> None:
    """Files as a data set alone, without preamble and group 2."""
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.file_meta, dataset.preamble = FileMetaDataset(), None
        dataset.save_as(file, enforce_file_format=False, implicit_vr=implicit, little_endian=True)
        file.rename(file.with_suffix(""))


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_a_preamble_are_read(tmp_path: Path, implicit: bool) -> None:
    """Images and both kinds of masks, as planning systems and old archives write them."""
    segment(add_study(tmp_path / "ct", "one"), tmp_path / "mask" / "seg.dcm", ("Lung",))
    add_study(tmp_path / "more", "study", patient="ID-2")
    write_structures(tmp_path / "mask" / "rt.dcm", {"Body": [in_space(BOX, AXIAL)]})
    before = [read_scan(case.images[0]).array for case in dicom_tree(tmp_path).cases]
    masks = [read_mask(case.masks[0], read_scan(case.images[0])).array for case in dicom_tree(tmp_path).cases]
    for name in ("ct", "more", "mask"):
        bare(tmp_path / name, implicit)

    source = dicom_tree(tmp_path)

    assert len(source.cases) == 2 and source.notes == ()
    for case, image, mask in zip(source.cases, before, masks, strict=True):
        scan = read_scan(case.images[0])
        np.testing.assert_array_equal(scan.array, image)
        np.testing.assert_array_equal(read_mask(case.masks[0], scan).array, mask)


def test_compressed_voxels_of_an_unknown_syntax_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, example(SHAPE), transfer_syntax=uid.RLELossless)
    bare(tmp_path, implicit=False)
    (case,) = dicom_tree(tmp_path).cases
    with pytest.raises(FibldmError, match="must state how its voxels are compressed; it has no transfer syntax"):
        read_scan(case.images[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: file.write_bytes(b""),
            r"2 files named as DICOM hold none, in folder 2/1 \(2 are empty, the others",
        ),
        (lambda file: file.write_bytes(bytes(9)), r"2 files named as DICOM hold none, in folder 2/1 \(0 are empty"),
        (
            lambda file: (Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes())), file.unlink()),
            r"2 DICOM files are compressed, in folder 2/1; unpack them \(gunzip -r, unzip\)",
        ),
    ],
    ids=["empty", "damaged", "compressed"],
)
def test_patients_lost_in_transfer_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    add_study(tmp_path / "A", "study")
    for file in write_series(tmp_path / NAME / "ct", example(SHAPE)[:2]):
        spoil(file)
    with pytest.raises(FibldmError, match=message) as caught:
        dicom_tree(tmp_path)
    assert NAME not in str(caught.value)
    shutil.rmtree(tmp_path / "A")
    assert detect_layout(Search(tmp_path, PrepareSettings())) == "dicom"
    with pytest.raises(FibldmError, match=rf"(?s)none of 0 series is one.*{message.replace('2/1', '1/1')}"):
        dicom_tree(tmp_path)


def test_what_is_left_out_of_a_tree_is_said(tmp_path: Path) -> None:
    folder = add_study(tmp_path / "ct", "study")
    for name in (
        "b/one.zip",
        "b/two.tar.gz",
        "c/mask.nrrd",
        "c/seg.mha",
        "d/IM1",
        "d/e.mr",
        "ct/.DS_Store",
        "ct/._1.dcm",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("mr") else b"something else")
    for name in ("notes.txt", "report.pdf", "b/readme.md"):
        (tmp_path / name).write_text("no volume")

    assert dicom_tree(tmp_path).notes == (
        "1 series have no mask (study 1 of 1, series 1 of 1)",
        "2 files are archives and were left out; unpack them if patients or masks are inside (folder 1)",
        "2 volumes of other formats than DICOM and NIfTI were left out; masks may be converted to NIfTI (folder 2)",
        "2 files are empty or have no known ending, hold no DICOM and were left out (folder 4)",
    )
    assert folder.name == "ct"


def test_what_was_left_out_is_said_where_patients_lack(tmp_path: Path) -> None:
    for number in (1, 2):
        add_study(tmp_path / "source" / f"p{number}", f"study {'x' * number}", patient=f"ID-{number}")
    (tmp_path / "source" / "p3.zip").write_bytes(b"PK")
    with pytest.raises(FibldmError, match=r"(?s)at least 3 patients; got 2:.*note: 1 files are archives and were left"):
        prepare(tmp_path / "source", tmp_path / "work", progress=False)


def test_links_to_patients_are_followed_once(tmp_path: Path) -> None:
    """To folders and files, in the tree or elsewhere; loops and what lies around the tree are not."""
    add_study(tmp_path / "archive" / "one", "one")
    add_study(tmp_path / "archive" / "two", "two", patient="ID-2")
    cohort = tmp_path / "cohort"
    inside = add_study(cohort / "three", "three", patient="ID-3")
    (cohort / "one").symlink_to("../archive/one")
    (cohort / "again").symlink_to(cohort / "one")
    (cohort / "files").mkdir()
    for file in (tmp_path / "archive" / "two").iterdir():
        (cohort / "files" / file.name).symlink_to(file)
    for name, target in (("loop", cohort), ("up", tmp_path), ("self", "self"), ("0001.dcm", inside / "0001.dcm")):
        (cohort / name).symlink_to(target)

    source = dicom_tree(cohort)

    assert sorted(case.name for case in source.cases) == sorted(
        new_uid(study, "series") for study in ("one", "two", "three")
    )
    assert all(len(case.images[0]) == SHAPE[0] for case in source.cases)
    assert source.notes[-1] == "1 links lead to nothing that is there and were left out (the source itself)"
    links = tmp_path / "links"
    links.mkdir()
    (links / "p").symlink_to(tmp_path / "archive" / "one")
    assert detect_layout(Search(links, PrepareSettings())) == "dicom" and len(dicom_tree(links).cases) == 1


def test_a_folder_of_a_patient_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_study(tmp_path / "ct", "study")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def denied(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(FibldmError, match="must be readable; Permission denied"):
        dicom_tree(tmp_path)


def test_modality_that_no_tag_states_is_that_of_the_object(tmp_path: Path) -> None:
    def clear(dataset: Dataset, index: int = 0) -> None:
        complete(dataset, index)
        dataset.Modality = ""

    write_series(tmp_path / "ct", example(SHAPE), change=clear)
    write_structures(tmp_path / "rt.dcm", {"Body": [in_space(BOX, AXIAL)]}, change=clear)
    (case,) = dicom_tree(tmp_path).cases
    assert case.masks and read_mask(case.masks[0], read_scan(case.images[0])).names == {1: "Body"}


@pytest.mark.parametrize("content", [b"", bytes(2000)], ids=["empty", "zeroed"])
def test_slices_that_hold_no_dicom_any_more_are_said(tmp_path: Path, content: bytes) -> None:
    """A series does not become shorter without a word."""
    for number, name in enumerate(("0006.dcm", "IM7", "8")):
        folder = add_study(tmp_path / name, f"study {number}")
        (folder / name).write_bytes(content)
    with pytest.raises(FibldmError) as caught:
        dicom_tree(tmp_path)
    for number in (1, 2, 3):
        said = f"study {number} of 3, series 1 of 1: 1 files beside its slices are empty or damaged"
        assert said in caught.value.message


@pytest.mark.data
def test_real_study_with_a_flipped_nifti(data_folder: Path) -> None:
    """A JPEG 2000 series and a NIfTI segmentation that is stored upside down: soft tissue where it says so."""
    (case,) = (source := dicom_tree(data_folder / "dicom_tricky" / "totalsegmentator-jpeg2000")).cases
    assert source.modality == "CT" and source.labels == {}

    image = read_scan(case.images[0])
    mask = read_mask(case.masks[0], image)

    assert mask.array.shape == image.array.shape
    np.testing.assert_allclose(np.linalg.solve(image.affine, mask.affine), np.eye(4), atol=1e-6)
    liver = image.array[mask.array == 5]
    assert liver.size > 50_000 and 50 < np.median(liver) < 180 and liver.std() < 60
    upside_down = image.array[mask.array[:, ::-1] == 5]
    assert upside_down.std() > 2 * liver.std()


@pytest.mark.data
def test_real_series_with_a_nifti(data_folder: Path) -> None:
    (case,) = dicom_tree(data_folder / "dicom").cases
    image = read_scan(case.images[0])
    mask = read_mask(case.masks[0], image)
    assert np.median(image.array[(mask.array == 1) | (mask.array == 2)]) < -700
    assert abs(np.linalg.solve(image.affine, mask.affine) - np.eye(4)).max() < 1e-3


def test_the_part_of_the_body_is_carried_along_if_asked(tmp_path: Path) -> None:
    """A work folder that nobody asked for it stays what it was."""
    for number in range(4):
        part = ("CHEST", "ABDOMEN", "")[min(number, 2)]

        def state(dataset: Dataset, _: int, part: str = part) -> None:
            dataset.BodyPartExamined = part

        options = {"patient": f"ID-{number}", "study": f"study {number}", "series": f"series {number}"}
        write_series(tmp_path / "source" / str(number), example(SHAPE, seed=number), change=state, **options)
    works = {facts: tmp_path / "-".join(("work", *facts)) for facts in ((), ("body_part", "kernel"))}
    for facts, work in works.items():
        report = prepare(tmp_path / "source", work, PrepareSettings(facts=facts), progress=False)
        datalist = read_datalist(work)
        entries = [entry for split in SPLITS for entry in datalist[split]]
        found = sorted(str(entry.get("body_part")) for entry in entries)
        assert found == (["ABDOMEN", "CHEST", "None", "None"] if facts else ["None"] * 4)
        assert {entry["kernel"] for entry in entries} == {"B40f"}
        assert ("body_part is stated by 2 of 4 cases, of the others unknown" in report.notes) == bool(facts)
