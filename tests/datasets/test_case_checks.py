"""What is said about the voxels, labels and grids of a case."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm.datasets.checks import (
    extent_findings,
    grid_findings,
    image_findings,
    label_counts,
    label_findings,
    likely_image_findings,
    spacing_findings,
)
from fibldm.volumes.scan import Scan

SPACING = np.array([1.0, 1.5, 3.0])


def said(found) -> list[str]:
    return [f"{level}: {message}" for level, message in found]


def chest(couch: bool = False) -> np.ndarray:
    """A body of 0 HU in air, 200 mm wide and 120 mm deep, its back at the 60th voxel from behind."""
    array = np.full((300, 200, 6), -1000, np.int16)
    array[50:250, 60:140] = 0
    if couch:
        array[40:260, 20:30] = 100
    return array


def test_a_couch_is_said_only_where_something_wide_and_flat_lies_behind_the_body() -> None:
    assert said(image_findings(chest(), "ct", SPACING)) == []
    assert said(image_findings(chest(couch=True), "ct", SPACING)) == [
        "warning: a couch is likely in the field of view; synthetic volumes will show one too"
    ]
    assert said(image_findings(chest(couch=True)[:, ::-1], "ct", SPACING)) == []  # before the chest: no couch
    arm = chest()
    arm[260:290, 60:140] = 0
    assert said(image_findings(arm, "ct", SPACING)) == []


def test_padding_and_implausible_hounsfield_units_are_said() -> None:
    padded = chest()
    padded[:30] = -3024
    assert said(image_findings(padded, "ct", SPACING)) == [
        "warning: 10 % of the voxels lie below -1024 HU (padding, from -3024) and become air"
    ]
    assert "it runs from 24 to 1024; rescale to HU" in said(image_findings(chest() + 1024, "ct", SPACING))[0]
    assert "give --modality mr" in said(image_findings(np.arange(120.0).reshape(4, 5, 6), "ct", SPACING))[0]
    air = np.full((5, 6, 7), -1000, np.int16)
    air[0, 0, 0] = -900
    assert said(image_findings(air, "ct", SPACING)) == [
        "error: a CT must show more than air; its highest value is -900 HU"
    ]


def test_broken_voxels_are_counted_by_channel() -> None:
    array = np.ones((4, 5, 6), np.float32)
    assert said(image_findings(array, "mr", SPACING, "T1")) == ["error: T1 must not be constant; every voxel is 1"]
    array[0, 0, :2] = np.nan, np.inf
    assert said(image_findings(array, "mr", SPACING, "T1")) == [
        "error: T1 must be finite; 2 of 120 voxels are NaN or infinite"
    ]
    nearly = np.zeros((40, 50, 60))
    nearly[0, 0, 0] = 5
    assert "percentiles 0.5 and 99.5 of T1 must differ" in said(image_findings(nearly, "mr", SPACING, "T1"))[0]


def test_labels_without_a_name_are_errors_where_names_are_known() -> None:
    array = np.zeros((4, 5, 6), np.uint8)
    array[0], array[1] = 1, 7
    assert said(label_findings(array)) == []
    assert said(label_findings(array, (1, 7))) == []
    assert said(label_findings(array, (1, 2))) == [
        "error: every label must have a name; 7 has none (name it with --labels, or change it with --remap)"
    ]
    assert "fractions or NaN" in said(label_findings(array + 0.5))[0]
    assert "they run from 0 to 255" in said(label_findings(np.where(array == 7, 255, array)))[0]
    assert said(label_findings(array * 0)) == ["warning: the label volume is all background"]
    assert label_counts(array) == {1: 30, 7: 30}


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ((0, 255), "they run from 0 to 255: 0, 255 (change them with --remap 255=1)"),
        ((0, 128, 255), "they run from 0 to 255: 0, 128, 255 (change them with --remap 255=1)"),
        ((0, 1, 1000, 4000), "they run from 0 to 4000: 0, 1, 1000, 4000 (change them with --remap 1000=2,4000=3)"),
        ((0, 65535), "they run from 0 to 65535: 0, 65535 (change them with --remap 65535=1)"),
        ((-1, 0, 255), "they run from -1 to 255: -1, 0, 255"),
        (range(300), "they run from 0 to 299: 0, 1, 2, 3, 4, ... (300 values)"),
    ],
    ids=["png", "three greys", "large numbers", "16 bits", "negative", "an image"],
)
def test_labels_that_are_too_large_come_with_the_remap_that_makes_them_small(values, remedy: str) -> None:
    array = np.resize(np.array(values, np.int32), (10, 10, 10))
    (found,) = said(label_findings(array))
    assert found == f"error: labels must be within 0...254 (255 is kept for unknown); {remedy}"


@pytest.mark.parametrize(
    ("spacing", "unit"),
    [(0.0007, "metres"), (0.00001, "metres"), (700.0, "micrometres"), (20.0, "micrometres")],
)
def test_an_extent_that_nothing_scanned_has_is_an_error(spacing: float, unit: str) -> None:
    for modality in ("ct", "mr"):
        (found,) = said(extent_findings((512, 512, 60), np.array([spacing] * 3), modality))
        size = f"{512 * spacing:.3g} x {512 * spacing:.3g} x {60 * spacing:.3g} mm"
        assert f"the extent is {size}" in found and f"is it in {unit}?" in found and "--spacing" in found
    assert said(extent_findings((512, 512, 60), np.array([spacing] * 3), "other")) == []


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((512, 512, 300), (0.7, 0.7, 1.0)),
        ((400, 300, 1900), (1, 1, 1)),
        ((30, 30, 25), (0.1, 0.1, 0.1)),
        ((35, 51, 35), (1, 1, 1)),
    ],
    ids=["chest", "whole body", "organ of a mouse", "hippocampus"],
)
def test_extents_of_real_scans_are_none(shape, spacing) -> None:
    assert said(extent_findings(shape, np.array(spacing), "mr")) == []


def test_voxels_outside_of_the_declared_range_are_said() -> None:
    array = np.linspace(0, 255, 1000).reshape(10, 10, 10)
    assert said(image_findings(array, "other", SPACING, limits=(0, 255))) == []
    (few,) = said(image_findings(array, "other", SPACING, limits=(0, 254)))
    assert few.startswith("warning: voxels outside of --range 0 254 are clipped; 4 of 1000 voxels of image lie outside")
    (many,) = said(image_findings(array, "other", SPACING, limits=(0, 1)))
    assert many.startswith("error: voxels must lie within --range 0 1; 996 of 1000")


def test_fractions_are_shown() -> None:
    (found,) = said(label_findings(np.array([[[0, 1, 0.25, 1.00392, np.nan]]])))
    assert found == (
        "error: labels must be whole numbers; the label volume has fractions or NaN, such as 0.25, 1.00392, nan (is it "
        "an image or a probability? bring it to labels, and save it as integers)"
    )


def test_an_image_given_as_labels_is_known_by_its_likeness() -> None:
    image = np.random.default_rng(0).normal(size=(12, 13, 14)).cumsum(axis=0)
    scaled = np.rint(200 * (image - image.min()) / np.ptp(image))
    (found,) = said(likely_image_findings(scaled, image))
    assert found.startswith("error: the label volume must hold labels; its 1") and "correlation 1.00" in found
    many = np.arange(12)[:, None, None] * 10 + np.arange(13)[None, :, None] // 3 + np.zeros((1, 1, 14))
    assert said(likely_image_findings(many, np.random.default_rng(1).normal(size=many.shape))) == []
    assert said(likely_image_findings((image > 0).astype(np.uint8), image)) == []


def test_padding_does_not_stand_in_for_air() -> None:
    raised = chest() + 1024
    raised[:30] = -2000
    assert "it runs from -2000 to 1024" in said(image_findings(raised, "ct", SPACING))[0]


def test_grids_are_compared_in_voxels() -> None:
    affine = np.diag([0.7, 0.8, 2.5, 1])
    image, moved = Scan(np.zeros((4, 5, 6)), affine, ""), affine.copy()
    assert said(grid_findings(image, Scan(np.zeros((4, 5, 6)), affine + 1e-5, ""))) == []
    moved[0, 3] = 0.35
    assert "they differ by 0.5 voxels" in said(grid_findings(image, Scan(np.zeros((4, 5, 6)), moved, "")))[0]
    other = Scan(np.zeros((5, 4, 6)), affine, "")
    assert "image (4, 5, 6), channel (5, 4, 6) voxels" in said(grid_findings(image, other, "channel"))[0]


def test_anisotropy() -> None:
    assert said(spacing_findings(np.array([0.75, 0.75, 2.2]))) == []
    assert "0.75 x 0.75 x 5.5 mm is anisotropic" in said(spacing_findings(np.array([0.75, 0.75, 5.5])))[0]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "face"),
    [("fpg/t2", True), ("mni152/t1", False), ("ms-patient07/T1", False), ("ms-patient07/FLAIR", False)],
)
def test_a_face_is_said_to_be_likely_in_whole_heads_only(data_folder: Path, name: str, face: bool) -> None:
    """MR: skull-stripped brains, of a patient and of a template that is larger than most, have none."""
    image = nibabel.as_closest_canonical(nibabel.load(data_folder / f"brain_mri/{name}.nii.gz"))
    found = said(image_findings(np.asarray(image.dataobj), "mr", nibabel.affines.voxel_sizes(image.affine)))
    assert any("face is likely recognisable" in text for text in found) == face
