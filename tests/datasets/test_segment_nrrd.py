"""Segmentations of 3D Slicer: values by the names of the segments, whatever the file's own values are."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from fibldm.datasets.layouts import find_source
from fibldm.datasets.layouts.segments import numbered_as_asked
from fibldm.datasets.masks import read_mask
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.formats.segment_nrrd import Segment, segments_of
from fibldm.volumes.masks import read_mask as read_drawn

SHAPE = (9, 8, 7)
ORIGIN = (12.0, -30.0, 5.0)
SPACING = (1.5, 2.0, 2.5)
RIGHT, LEFT = (slice(1, 4), slice(2, 7), slice(1, 6)), (slice(5, 8), slice(2, 7), slice(1, 6))


def write(path: Path, array: np.ndarray, segments: list[tuple[str, int, int]] = (), origin=ORIGIN, **more: str) -> Path:
    """``array`` ``(X, Y, Z[, layer])`` along L, P, S; segments as (name, value, layer)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = np.moveaxis(array, (0, 1, 2), (2, 1, 0))
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(turned), isVector=array.ndim == 4)
    image.SetSpacing(SPACING)
    image.SetOrigin(origin)
    for number, (name, value, layer) in enumerate(segments):
        image.SetMetaData(f"Segment{number}_ID", f"Segment_{number + 1}")
        image.SetMetaData(f"Segment{number}_Name", name)
        image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        image.SetMetaData(f"Segment{number}_Layer", str(layer))
    for key, value in more.items():
        image.SetMetaData(key, value)
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    return path


def lungs(right: int, left: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[RIGHT], array[LEFT] = right, left
    return array


def dataset(root: Path, cases: int = 4) -> Path:
    """Right and left lung, their values swapped in every second file."""
    random = np.random.default_rng(0)
    for number in range(cases):
        hu = random.integers(-1000, 300, SHAPE).astype(np.int16)
        write(root / f"images/c{number}.nrrd", hu)
        right, left = (1, 2) if number % 2 else (2, 1)
        segments = [("right lung", right, 0), ("left lung", left, 0)]
        write(root / f"labels/c{number}.seg.nrrd", lungs(right, left), segments)
    return root


def means(work: Path, value: int) -> set[float]:
    """The middle of a label along the patient's left-right axis, RAS+ mm, in every case."""
    found = set()
    for file in sorted((work / "labels").iterdir()):
        image = nibabel.load(file)
        middle = np.argwhere(np.asarray(image.dataobj) == value).mean(axis=0)
        found.add(round(float(nibabel.affines.apply_affine(image.affine, middle)[0]), 3))
    return found


@pytest.mark.parametrize(("labels", "right"), [({}, 2), ({1: "right lung", 2: "left lung"}, 1), ({7: "right lung"}, 7)])
def test_a_segment_has_one_value_in_all_files(labels: dict[int, str], right: int, tmp_path: Path) -> None:
    """Sorted by name without --labels; with them, the values that they give to the names."""
    prepare(dataset(tmp_path / "s"), tmp_path / "w", PrepareSettings(modality="ct", labels=labels), progress=False)
    at = -(ORIGIN[0] + SPACING[0] * 2)  # voxel 1...3 along L, as R
    assert means(tmp_path / "w", right) == {round(at, 3)}


def test_labels_must_be_names_of_segments(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="they have no lung, but left lung, right lung; give the names of the masks"):
        prepare(dataset(tmp_path / "s"), tmp_path / "w", PrepareSettings(modality="ct", labels={1: "lung"}))


def test_dicom_segments_get_the_values_that_are_asked_for_too() -> None:
    case = Case("a", (), (Mask((), names={"left": 1, "right": 2}),), "a")
    asked = numbered_as_asked(Source("dicom", "x", (case,), labels={1: "left", 2: "right"}), {1: "right"})
    assert asked.cases[0].masks[0].names == {"left": 2, "right": 1}
    assert asked.labels == {1: "right", 2: "left"}


def test_names_that_dataset_json_gives_keep_their_values(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    (source / "dataset.json").write_text('{"labels": {"5": "left lung", "9": "right lung", "3": "heart"}}')
    found = find_source(source, PrepareSettings())
    assert found.labels == {5: "left lung", 9: "right lung"}


def test_a_file_without_names_among_others_is_refused(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    write(source / "labels/c3.seg.nrrd", lungs(1, 2))
    with pytest.raises(FibldmError, match=r"all be DICOM or all label maps; found both .3D Slicer's .seg.nrrd"):
        find_source(source, PrepareSettings())


def overlapping(path: Path) -> Path:
    """A lesion in the second layer, a part of it inside of the right lung."""
    layers = np.zeros((*SHAPE, 2), np.uint8)
    layers[..., 0] = lungs(1, 2)
    layers[2:5, 3:5, 2:4, 1] = 1
    return write(path, layers, [("right lung", 1, 0), ("left lung", 2, 0), ("lesion", 1, 1)])


def test_layers_that_overlap_need_an_order(tmp_path: Path) -> None:
    file, image = overlapping(tmp_path / "a.seg.nrrd"), read_scan((write(tmp_path / "i.nrrd", lungs(7, 8)),))
    names = {"lesion": 1, "left lung": 2, "right lung": 3}
    with pytest.raises(FibldmError, match="segments must not overlap; .* does with .*; name labels in order of prio"):
        read_mask(Mask((file,), names=names), image)
    lesion = read_mask(Mask((file,), names={"lesion": 4}), image)
    assert np.count_nonzero(lesion.array == 4) == 12 and lesion.names == {4: "lesion"}
    assert lesion.findings[-1] == ("warning", "left out, as not asked for: left lung, right lung")


def test_merge_masks_gives_the_order(tmp_path: Path) -> None:
    source = dataset(tmp_path / "s")
    for number in range(4):
        overlapping(source / f"labels/c{number}.seg.nrrd")
    settings = PrepareSettings(modality="ct", merge_masks=("lesion", "right lung"))
    report = prepare(source, tmp_path / "w", settings, progress=False)
    labels = np.asarray(nibabel.load(tmp_path / "w/labels/c0.nii.gz").dataobj)
    assert np.count_nonzero(labels == 1) == 12 and set(np.unique(labels)) == {0, 1, 2}
    assert sum(report.counts.values()) == 4
    said = {finding.message for finding in report.findings if "left out" in finding.message}
    assert said == {"label: left out, as not asked for: left lung"}


def test_a_cropped_segmentation_comes_to_the_grid_of_its_image(tmp_path: Path) -> None:
    """3D Slicer crops to the segments when asked to."""
    image = read_scan((write(tmp_path / "i.nrrd", np.arange(504).reshape(SHAPE).astype(np.int16)),))
    whole = write(tmp_path / "whole.seg.nrrd", lungs(1, 2), [("r", 1, 0), ("l", 2, 0)])
    start = np.array([1, 2, 1])
    part = lungs(1, 2)[1:8, 2:7, 1:6]
    cropped = write(tmp_path / "c.seg.nrrd", part, [("r", 1, 0), ("l", 2, 0)], tuple(ORIGIN + start * SPACING))
    one, other = (read_mask(Mask((file,), names={"r": 3, "l": 4}), image) for file in (whole, cropped))
    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_allclose(other.affine, image.affine)


def test_older_files_have_a_layer_for_each_segment(tmp_path: Path) -> None:
    file = write(tmp_path / "a.seg.nrrd", np.zeros((*SHAPE, 2), np.uint8), Segment0_Name="r", Segment1_Name="l")
    assert segments_of(file) == (Segment("r", 1, 0), Segment("l", 1, 1))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("r", 1, 0), ("l", 1, 0)], "a value must have one name; in a.seg.nrrd 1 is 'r' and 'l'"),
        ([("r", 1, 0)], "every value must belong to a segment; in a.seg.nrrd 2 has no name"),
        ([("r", 1, 0), ("l", 2, 1)], "a.seg.nrrd has 1, and its header names layer 1"),
        ([("r", 0, 0)], "segment 0 of a.seg.nrrd has 'r', 0 and 0"),
    ],
)
def test_what_is_not_clear_is_refused(segments: list[tuple[str, int, int]], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.seg.nrrd", lungs(1, 2), segments)
    with pytest.raises(FibldmError, match=message):
        read_mask(Mask((file,), names={"r": 1, "l": 2}), read_scan((file,)))


def test_a_mask_to_draw_from_has_the_values_of_the_run(tmp_path: Path) -> None:
    file = write(tmp_path / "a.seg.nrrd", lungs(1, 2), [("right lung", 1, 0), ("left lung", 2, 0)])
    drawn = read_drawn(file, {5: "left lung", 6: "right lung"})
    np.testing.assert_array_equal(np.unique(drawn.array), [0, 5, 6])
    assert drawn.array[RIGHT].min() == 6  # in the axis order of the file
    with pytest.raises(FibldmError, match=r"a label of the run .left lung.; got also right lung"):
        read_drawn(file, {5: "left lung"})
