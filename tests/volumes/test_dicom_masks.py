"""DICOM segmentations and RT structure sets become label maps on the grid of their image (FEATURES H2)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import (
    AXIAL,
    BOX,
    CORONAL,
    OBLIQUE,
    PLANTED,
    SAGITTAL,
    box,
    complete,
    contour,
    example,
    expected,
    in_space,
    new_uid,
    write_segmentation,
    write_series,
    write_structures,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.contours import Contour, filled
from fibldm.volumes.dicom.masks import on_grid_of, read_segmentation, read_structures, segment_names
from fibldm.volumes.scan import Scan

SHAPE = (6, 7, 9)
NAMES = {"Lung": 1, "Honeycombing": 2}
ORIENTATIONS = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL, "oblique": OBLIQUE}
Labels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def labels() -> Labels:
    """``(slice, row, column)``: two labels without symmetry on slices 1, 2 and 4 of six."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[1:3, 1:4, 2:8] = 1
    array[2, 5, 0:3] = 2
    array[4, 0, 8] = 2
    return array


def make_series(folder: Path, orientation: Sequence[float] = OBLIQUE) -> list[Dataset]:
    files = write_series(folder, example(SHAPE), orientation=orientation, change=complete)
    return [pydicom.dcmread(file) for file in files]


def image_of(orientation: Sequence[float] = OBLIQUE) -> Scan:
    array, affine = expected(example(SHAPE), orientation=orientation)
    return Scan(array, affine, "")


def one_hot(labels: Labels) -> Labels:
    return np.stack([labels == 1, labels == 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_segmentation_lands_where_its_voxels_are(tmp_path: Path, labels: Labels, kind: str, orientation: str) -> None:
    """Every kind, every orientation; slices without a label are not in the file."""
    directions = ORIENTATIONS[orientation]
    pixels = labels if kind == "LABELMAP" else one_hot(labels).astype(float if kind == "FRACTIONAL" else np.uint8)
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path, directions), pixels, kind)
    image = image_of(directions)

    found = read_segmentation(file, NAMES)
    placed = on_grid_of(found, image)

    assert found.array.dtype == np.uint8 and found.array.size < labels.size
    np.testing.assert_array_equal(placed.array, expected(labels, orientation=directions)[0])
    assert placed.affine is image.affine
    assert placed.names == {1: "Lung", 2: "Honeycombing"} and placed.findings == ()


def test_segmentation_agrees_with_simpleitk(tmp_path: Path, labels: Labels) -> None:
    """Frames and places as ITK reads them."""
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), one_hot(labels)[..., :1], names=["Lung"])
    image = SimpleITK.ReadImage([str(path) for path in sorted(tmp_path.glob("0*.dcm"))])

    found = on_grid_of(read_segmentation(file, NAMES), image_of())

    for index in np.argwhere(found.array):
        point = np.diag([-1, -1, 1]) @ (found.affine @ [*index, 1])[:3]
        column, row, place = image.TransformPhysicalPointToIndex(point.tolist())
        assert labels[place, row, column] == 1
    assert found.array.sum() == (labels == 1).sum()


def test_frames_in_any_order(tmp_path: Path, labels: Labels) -> None:
    series = make_series(tmp_path)
    file = write_segmentation(tmp_path / "seg.dcm", series[::-1], labels[::-1], "LABELMAP", omit_empty_frames=False)

    found = read_segmentation(file, NAMES)

    np.testing.assert_array_equal(found.array, expected(labels, orientation=OBLIQUE)[0])
    np.testing.assert_allclose(found.affine, image_of().affine, atol=1e-6)


def test_segmentation_of_some_slices(tmp_path: Path, labels: Labels) -> None:
    """The other slices of the image are background."""
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path)[2:5], labels[2:5], "LABELMAP")

    found = on_grid_of(read_segmentation(file, NAMES), image_of())

    kept = labels.copy()
    kept[1] = 0
    np.testing.assert_array_equal(found.array, expected(kept, orientation=OBLIQUE)[0])


def test_fractions_count_from_half(tmp_path: Path) -> None:
    fractions = np.zeros(SHAPE)
    fractions[3, 2, 1:5] = 0.25, 0.49, 0.5, 1.0
    file = write_segmentation(
        tmp_path / "seg.dcm", make_series(tmp_path), fractions, "FRACTIONAL", ["Lung"], max_fractional_value=200
    )

    found = on_grid_of(read_segmentation(file, NAMES), image_of())

    np.testing.assert_array_equal(found.array, expected((fractions >= 0.5).astype(np.uint8), orientation=OBLIQUE)[0])


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_other_segments_are_left_out(tmp_path: Path, labels: Labels, kind: str) -> None:
    pixels = labels if kind == "LABELMAP" else one_hot(labels)
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), pixels, kind)

    found = on_grid_of(read_segmentation(file, {"Honeycombing": 7}), image_of())

    np.testing.assert_array_equal(found.array, 7 * expected((labels == 2).astype(np.uint8), orientation=OBLIQUE)[0])
    assert found.findings == (("warning", "left out, as not asked for: Lung"),)


def test_segments_of_one_label_join(tmp_path: Path, labels: Labels) -> None:
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), one_hot(labels), names=["Nodule", "Nodule"])

    found = on_grid_of(read_segmentation(file, {"Nodule": 3}), image_of())

    assert segment_names(file) == ["Nodule"]
    np.testing.assert_array_equal(found.array, 3 * expected((labels > 0).astype(np.uint8), orientation=OBLIQUE)[0])


def without_spacing(dataset: Dataset) -> None:
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices


@pytest.mark.parametrize("slices", [[3], [0, 3], [0, 2, 4]])
def test_spacing_that_the_file_leaves_open_is_the_images(tmp_path: Path, slices: list[int]) -> None:
    """Frames of slices 0, 2 and 4 alone look like slices twice as far apart; one slice like any."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[slices, 2, 3:5] = 1
    file = write_segmentation(
        tmp_path / "seg.dcm", make_series(tmp_path), labels, names=["Lung"], change=without_spacing
    )

    found = on_grid_of(read_segmentation(file, NAMES, image_of()), image_of())

    np.testing.assert_array_equal(found.array, expected(labels, orientation=OBLIQUE)[0])


@pytest.mark.parametrize("slices", [[3], [0, 3, 4]])
def test_spacing_that_nobody_states_is_refused(tmp_path: Path, slices: list[int]) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[slices, 2, 3:5] = 1
    file = write_segmentation(
        tmp_path / "seg.dcm", make_series(tmp_path), labels, names=["Lung"], change=without_spacing
    )
    with pytest.raises(FibldmError, match="does not state the spacing, and its frames do not show it"):
        read_segmentation(file, NAMES)


def test_overlapping_segments_are_refused(tmp_path: Path, labels: Labels) -> None:
    pixels = one_hot(labels)
    pixels[1, 1, 2, 1] = 1
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), pixels)
    with pytest.raises(FibldmError, match=r"must not overlap; Honeycombing does with Lung; .*`merge_masks`"):
        read_segmentation(file, NAMES)
    assert read_segmentation(file, {"Lung": 1}).array.any()


def test_empty_segmentation_is_refused(tmp_path: Path) -> None:
    file = write_segmentation(
        tmp_path / "seg.dcm", make_series(tmp_path), np.zeros(SHAPE, np.uint8), names=["Lung"], omit_empty_frames=False
    )
    with pytest.raises(FibldmError, match="must mark at least one voxel; it marks none"):
        read_segmentation(file, NAMES)


def test_segment_without_voxels_is_said(tmp_path: Path, labels: Labels) -> None:
    pixels = one_hot(labels)
    pixels[..., 1] = 0
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), pixels)

    found = read_segmentation(file, {"Honeycombing": 2})

    assert not found.array.any()
    assert found.findings[-1] == ("warning", "none of its labels marks a voxel")


def test_unknown_segments_are_refused(tmp_path: Path, labels: Labels) -> None:
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), labels)
    with pytest.raises(FibldmError, match="at least one of Liver, Spleen; it holds Honeycombing, Lung"):
        read_segmentation(file, {"Liver": 1, "Spleen": 2})
    with pytest.raises(FibldmError, match=r"within 1\.\.\.254; got 255"):
        read_segmentation(file, {"Lung": 255})


def shift_one_frame(dataset: Dataset) -> None:
    place = dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0]
    place.ImagePositionPatient = [value + 0.7 for value in place.ImagePositionPatient]


def cut_pixels(dataset: Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:4]


def nameless(dataset: Dataset) -> None:
    dataset.SegmentSequence[0].SegmentLabel = ""


def no_segments(dataset: Dataset) -> None:
    del dataset.SegmentSequence


def another_class(dataset: Dataset) -> None:
    dataset.SOPClassUID = uid.CTImageStorage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift_one_frame, "must be one regular stack of known slice spacing; its frames are not"),
        (cut_pixels, "must be readable to its last frame"),
        (nameless, "must hold at least one segment, and each must have a label"),
        (no_segments, "must hold at least one segment, and each must have a label"),
        (another_class, "must be a DICOM segmentation; it holds another kind of object"),
    ],
)
def test_damaged_segmentations_are_refused(
    tmp_path: Path, labels: Labels, change: Callable[[Dataset], None], message: str
) -> None:
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), labels, change=change)
    with pytest.raises(FibldmError, match=message) as caught:
        read_segmentation(file, NAMES)
    assert not any(secret in str(caught.value) for secret in (*PLANTED, str(tmp_path), "1.2."))


def test_private_values_are_not_quoted_in_warnings(tmp_path: Path, labels: Labels) -> None:
    """pydicom's warnings would quote them; here every warning is an error."""

    def break_rules(dataset: Dataset) -> None:
        for keyword, kind, value in (
            ("PatientID", "LO", "X" * 80),
            ("PatientBirthDate", "DA", "23 July"),
            ("StudyInstanceUID", "UI", "1.2.not.a.uid"),
        ):
            tag = pydicom.tag.Tag(keyword)
            dataset[tag] = pydicom.DataElement(tag, kind, value, validation_mode=pydicom.config.IGNORE)

    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), labels, change=break_rules)
    assert read_segmentation(file, NAMES).array.any()
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)]}, change=break_rules)
    assert read_structures(file, NAMES, image_of()).array.any()


def test_what_is_no_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seg.dcm").write_bytes(b"no DICOM" * 40)
    for read in (segment_names, lambda file: read_segmentation(file, NAMES)):
        with pytest.raises(FibldmError, match=r"must be a readable DICOM file; it is not \(InvalidDicomError\)"):
            read(tmp_path / "seg.dcm")


def test_mask_on_another_grid_stays_as_it_is() -> None:
    image = image_of()
    for change in (np.diag([1, 1, 2, 1]), np.diag([1.05, 1, 1, 1]), np.eye(4) + 0.4 * np.eye(4, k=3)):
        mask = Scan(np.ones((3, 4, 2), np.uint8), image.affine @ change, "")
        assert on_grid_of(mask, image) is mask
    beyond = Scan(np.ones((3, 4, 2), np.uint8), image.affine @ (np.eye(4) + 20 * np.eye(4, k=3)), "")
    assert on_grid_of(beyond, image) is beyond


def test_what_lies_outside_of_the_image_is_said() -> None:
    image = image_of()
    shift = np.eye(4)
    shift[:3, 3] = -1, 2, 3
    mask = Scan(np.arange(1, 25, dtype=np.uint8).reshape(2, 3, 4), image.affine @ shift, "", names={1: "Lung"})

    placed = on_grid_of(mask, image)

    wanted = np.zeros(image.array.shape, np.uint8)
    wanted[0, 2:5, 3:6] = mask.array[1, :, :3]
    np.testing.assert_array_equal(placed.array, wanted)
    assert placed.findings == (("warning", "15 labelled voxels lie outside of the image and were cut"),)
    assert placed.names == {1: "Lung"}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_boxes_with_holes_are_exact(tmp_path: Path, orientation: str) -> None:
    """The centres inside, and no others; an inner contour is a hole, one within it an island."""
    directions = ORIENTATIONS[orientation]
    drawn = [
        box((0.5, 7.5), (0.5, 5.5), 1),
        box((1.5, 6.5), (1.5, 4.5), 1),
        box((3.5, 4.5), (2.5, 3.5), 1),
        box((-0.5, 2.4), (3.6, 6.5), 4),
    ]
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(points, directions) for points in drawn]})
    inside = np.zeros(SHAPE, np.uint8)
    inside[1, 1:6, 1:8] = 1
    inside[1, 2:5, 2:7] = 0
    inside[1, 3, 4] = 1
    inside[4, 4:7, 0:3] = 1

    found = read_structures(file, {"Lung": 5}, image_of(directions))

    np.testing.assert_array_equal(found.array, 5 * expected(inside, orientation=directions)[0])
    assert found.array.dtype == np.uint8 and found.names == {5: "Lung"}
    assert found.findings == (("warning", "Lung is drawn on 2 slices of 4; none was filled in"),)


def test_keyhole_is_a_hole(tmp_path: Path) -> None:
    """A hole that one contour reaches through a channel without width."""
    outer = [(0.5, 0.5), (7.5, 0.5), (7.5, 5.5), (0.5, 5.5)]
    inner = [(2.5, 1.5), (2.5, 4.5), (5.5, 4.5), (5.5, 1.5)]
    ring = [*outer, outer[0], *inner, inner[0]]
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space([(*point, 2) for point in ring])]})
    inside = np.zeros(SHAPE, np.uint8)
    inside[2, 1:6, 1:8] = 1
    inside[2, 2:5, 3:6] = 0

    found = read_structures(file, NAMES, image_of())

    np.testing.assert_array_equal(found.array, expected(inside, orientation=OBLIQUE)[0])


@pytest.mark.parametrize("wall", [1, 2])
@pytest.mark.parametrize("decimals", [2, 6])
def test_the_rim_of_a_hole_belongs_to_the_structure(tmp_path: Path, wall: int, decimals: int) -> None:
    """Contours as rt-utils traces them around the voxels of a mask: through the centres on both sides of the wall."""
    outer = [(0, 0), (8, 0), (8, 6), (0, 6)]
    i, right, bottom = wall - 1, 9 - wall, 7 - wall
    hole = [(i, i + 1), (i + 1, i), (right - 1, i), (right, i + 1), (right, bottom - 1), (right - 1, bottom)]
    hole += [(i + 1, bottom), (i, bottom - 1)]
    drawn = [in_space([(*point, 2) for point in points], AXIAL).round(decimals) for points in (outer, hole)]
    file = write_structures(tmp_path / "rt.dcm", {"Airway wall": drawn})
    inside = np.zeros(SHAPE, np.uint8)
    inside[2] = 1
    inside[2, wall:-wall, wall:-wall] = 0

    found = read_structures(file, {"Airway wall": 1}, image_of(AXIAL))

    np.testing.assert_array_equal(found.array, expected(inside, orientation=AXIAL)[0])


def test_both_sides_of_a_slanting_wall_may_run_along_the_same_centres(tmp_path: Path) -> None:
    """One in the other sense is the hole; the same one twice is a mistake, wherever it begins."""
    diamond = [(4, 1), (6, 3), (4, 5), (2, 3)]
    traced = [in_space([(*point, 2) for point in points]) for points in (diamond, diamond[::-1])]
    file = write_structures(tmp_path / "rt.dcm", {"Lung": traced})
    rows, columns = np.indices(SHAPE[1:])
    inside = np.zeros(SHAPE, np.uint8)
    inside[2] = abs(rows - 3) + abs(columns - 4) == 2

    found = read_structures(file, NAMES, image_of())

    np.testing.assert_array_equal(found.array, expected(inside, orientation=OBLIQUE)[0])
    for twice in ([diamond, diamond[2:] + diamond[:2]], [BOX[:, :2], BOX[::-1, :2]]):
        drawn = [in_space([(*point, 2) for point in points]) for points in twice]
        file = write_structures(tmp_path / "twice.dcm", {"Lung": drawn})
        with pytest.raises(FibldmError, match="Lung has the same contour twice"):
            read_structures(file, NAMES, image_of())


def test_lines_of_one_voxel_are_kept(tmp_path: Path) -> None:
    """Traced there and back along the same centres, alone or as a spur of something wider."""
    line = [(1, 1), (4, 4), (6, 4), (4, 4)]
    spur = [(0, 5), (1, 5), (1, 6), (3, 6), (1, 6), (0, 6)]
    file = write_structures(tmp_path / "rt.dcm", {"Vessel": [in_space([(*p, 2) for p in ps]) for ps in (line, spur)]})
    inside = np.zeros(SHAPE, np.uint8)
    for row, column in ((1, 1), (2, 2), (3, 3), (4, 4), (4, 5), (4, 6)):
        inside[2, row, column] = 1
    inside[2, 5:7, 0:2] = inside[2, 6, 2:4] = 1

    found = read_structures(file, {"Vessel": 1}, image_of())

    np.testing.assert_array_equal(found.array, expected(inside, orientation=OBLIQUE)[0])


PLANE = (12, 14)


def drawn_inside(polygons: Sequence[Sequence[tuple[float, float]]]) -> NDArray[np.bool_]:
    """Voxels ``(x, y)`` of one slice of `PLANE` inside of polygons in voxel indices."""
    contours = [Contour(np.array([(*point, 0.0) for point in points])) for points in polygons]
    return filled(contours, np.eye(4), (*PLANE, 1), 2, "Lung")[0][..., 0]


@settings(deadline=None, max_examples=25)
@given(arrays(bool, PLANE))
def test_contours_that_touch_are_one(mask: NDArray[np.bool_]) -> None:
    """Every voxel drawn as a square of its own: squares meet along edges and in corners, and enclose holes."""
    h = 0.5
    squares = [[(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)] for x, y in np.argwhere(mask)]
    assume(squares)
    np.testing.assert_array_equal(drawn_inside(squares), mask)


@settings(deadline=None, max_examples=50)
@given(
    st.sets(st.integers(1, 10), max_size=3),
    st.sets(st.integers(1, 12), max_size=3),
    st.lists(st.booleans(), min_size=16),
)
def test_rooms_that_share_walls_of_voxels_leave_none_out(across: set[int], along: set[int], kept: list[bool]) -> None:
    """Rooms whose corners are voxel centres: a voxel on a wall belongs to either side, and to the whole once."""
    xs, ys = sorted({0, 11, *across}), sorted({0, 13, *along})
    rooms = [(x, y) for x in zip(xs, xs[1:], strict=False) for y in zip(ys, ys[1:], strict=False)]
    rooms = [room for room, keep in zip(rooms, kept, strict=False) if keep]
    assume(rooms)
    wanted = np.zeros(PLANE, bool)
    for (left, right), (low, high) in rooms:
        wanted[left : right + 1, low : high + 1] = True
    drawn = [[(left, low), (right, low), (right, high), (left, high)] for (left, right), (low, high) in rooms]
    np.testing.assert_array_equal(drawn_inside(drawn), wanted)


@settings(deadline=None, max_examples=50)
@given(st.tuples(*[st.integers(0, 3)] * 4), st.tuples(*[st.integers(0, 2)] * 4), st.booleans(), st.booleans())
def test_a_hole_keeps_its_rim_however_it_is_drawn(
    outer: tuple[int, ...], wall: tuple[int, ...], keyhole: bool, same_sense: bool
) -> None:
    """As a contour of its own or through a channel without width, which may touch the outer one; centres all along."""
    (a, b, c, d), (e, f, g, h) = outer, wall
    left, right, low, high = a, PLANE[0] - 1 - b, c, PLANE[1] - 1 - d
    hole = (left + e, right - f, low + g, high - h)
    assume(wall != (0, 0, 0, 0))
    around = [(left, low), (right, low), (right, high), (left, high)]
    inner = [(hole[0], hole[2]), (hole[0], hole[3]), (hole[1], hole[3]), (hole[1], hole[2])]
    inner = [inner[0], *inner[:0:-1]] if same_sense else inner
    wanted = np.zeros(PLANE, bool)
    wanted[left : right + 1, low : high + 1] = True
    wanted[hole[0] + 1 : hole[1], hole[2] + 1 : hole[3]] = False
    ring = [[*around, around[0], *inner, inner[0]]] if keyhole else [around, inner]
    np.testing.assert_array_equal(drawn_inside(ring), wanted)


def test_ellipsoid_with_a_hole(tmp_path: Path) -> None:
    """Polygons of 60 corners, an oblique grid: almost every voxel as the formula says."""
    shape, centre, radii = (40, 50, 60), np.array([31.3, 24.6, 19.2]), np.array([24.0, 19.0, 15.0])
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    contours = []
    for place in range(shape[0]):
        for scale in (1.0, 0.4):
            height = (place - centre[2]) / (scale * radii[2])
            if abs(height) < 1:
                around = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.sqrt(1 - height**2) * scale * radii[:2]
                contours.append(in_space(np.column_stack([around + centre[:2], np.full(60, float(place))])))
    file = write_structures(tmp_path / "rt.dcm", {"Lung": contours})
    image = Scan(*expected(np.zeros(shape, np.uint8), orientation=OBLIQUE), "")

    found = read_structures(file, NAMES, image)

    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")[::-1], axis=-1)
    distance = np.linalg.norm((grid - centre) / radii, axis=-1)
    truth = expected(((distance <= 1) & (distance >= 0.4)).astype(np.uint8), orientation=OBLIQUE)[0]
    dice = 2 * (found.array * truth).sum() / (found.array.sum() + truth.sum())
    assert dice > 0.99 and found.findings == ()
    assert abs(found.array.sum() / truth.sum() - 1) < 0.01


def test_points_and_open_contours_are_left_out(tmp_path: Path) -> None:
    def add_points(dataset: Dataset) -> None:
        items = dataset.ROIContourSequence[0].ContourSequence
        items.append(contour(in_space([(2, 2, 3)]), "POINT"))
        items.append(contour(in_space(box((1, 3), (1, 3), 3)), "OPEN_PLANAR"))
        dataset.ROIContourSequence[1].ContourSequence = [contour(in_space([(2, 2, 3)]), "POINT")]
        del dataset.ROIContourSequence[2].ContourSequence

    drawn = [in_space(box((0.5, 3.5), (0.5, 3.5), 2))]
    file = write_structures(
        tmp_path / "rt.dcm", {"Lung": drawn, "Isocentre": drawn, "Nothing": drawn}, change=add_points
    )

    found = read_structures(file, NAMES | {"Nothing": 3}, image_of())

    assert segment_names(file) == ["Lung"]
    assert found.array.sum() == 9
    assert [message for _, message in found.findings] == [
        "left out, as not asked for: Isocentre",
        "2 points or open contours of Lung were left out",
        "Nothing has no contour",
    ]


def test_contours_beside_the_image_are_cut(tmp_path: Path) -> None:
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(box((-3.5, 1.5), (2.5, 20.5), 2))]})

    found = read_structures(file, NAMES, image_of())

    inside = np.zeros(SHAPE, np.uint8)
    inside[2, 3:, :2] = 1
    np.testing.assert_array_equal(found.array, expected(inside, orientation=OBLIQUE)[0])
    assert found.findings == (("warning", "Lung reaches out of the image and was cut there"),)


def test_exclusive_contours_may_cross(tmp_path: Path) -> None:
    crossing = [in_space(box((0.5, 4.5), (0.5, 2.5), 2)), in_space(box((2.5, 6.5), (0.5, 2.5), 2))]
    file = write_structures(tmp_path / "rt.dcm", {"Lung": crossing}, kind="CLOSEDPLANAR_XOR")

    found = read_structures(file, NAMES, image_of())

    inside = np.zeros(SHAPE, np.uint8)
    inside[2, 1:3, 1:7] = 1
    inside[2, 1:3, 3:5] = 0
    np.testing.assert_array_equal(found.array, expected(inside, orientation=OBLIQUE)[0])


@pytest.mark.parametrize(
    ("structures", "message"),
    [
        ({"Lung": [box((0.5, 4.5), (0.5, 2.5), 2.5)]}, "one of Lung lies 0.5 slices off the nearest"),
        ({"Lung": [box((0.5, 4.5), (0.5, 2.5), 7)]}, "one of Lung lies 2 slices beyond the last"),
        ({"Lung": [box((0.5, 4.5), (0.5, 2.5), -1)]}, "one of Lung lies 1 slices beyond the last"),
        ({"Lung": [BOX + [[0, 0, 0], [0, 0, 2], [0, 0, 3], [0, 0, 1]]]}, "reach through 2 slices at least"),
        ({"Lung": [BOX, BOX[:, [2, 0, 1]]]}, "all along one axis; they reach through"),
        ({"Lung": [BOX, box((2.5, 6.5), (0.5, 2.5), 2)]}, "must not cross; two of Lung do on a slice"),
        ({"Lung": [BOX, BOX]}, "Lung has the same contour twice"),
        ({"Lung": [BOX], "Honeycombing": [BOX]}, "must not overlap; Honeycombing does with Lung"),
        ({"Liver": [BOX]}, "at least one of Lung, Honeycombing; it holds Liver"),
        ({"Lung": [box((0.7, 0.9), (0.7, 0.9), 2)]}, "must mark at least one voxel"),
        ({"Lung": []}, "must mark at least one voxel"),
        ({"": [BOX]}, "each must have a number and a name"),
        ({}, "must hold at least one structure"),
    ],
)
def test_structures_that_do_not_fit_are_refused(tmp_path: Path, structures: dict[str, list[Any]], message: str) -> None:
    drawn = {name: [in_space(points) for points in contours] for name, contours in structures.items()}
    file = write_structures(tmp_path / "rt.dcm", drawn)
    with pytest.raises(FibldmError, match=message) as caught:
        read_structures(file, NAMES, image_of())
    assert not any(secret in str(caught.value) for secret in (*PLANTED, str(tmp_path), "1.2."))


def test_broken_points_are_refused(tmp_path: Path) -> None:
    def drop_one(dataset: Dataset) -> None:
        item = dataset.ROIContourSequence[0].ContourSequence[0]
        item.ContourData = item.ContourData[:-3]

    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)]}, change=drop_one)
    with pytest.raises(FibldmError, match="must be finite points x, y, z, as many as stated"):
        read_structures(file, NAMES, image_of())


def test_frame_of_reference_must_match(tmp_path: Path) -> None:
    file = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)]})
    same = new_uid("study", "frame of reference")
    assert read_structures(file, NAMES, image_of(), frame_of_reference=same).array.any()
    with pytest.raises(FibldmError, match="in the image's frame of reference; Lung is in another"):
        read_structures(file, NAMES, image_of(), frame_of_reference=new_uid("another"))


def test_wrong_kind_is_refused(tmp_path: Path, labels: Labels) -> None:
    series = make_series(tmp_path)
    segmentation = write_segmentation(tmp_path / "seg.dcm", series, labels)
    structures = write_structures(tmp_path / "rt.dcm", {"Lung": [in_space(BOX)]})
    with pytest.raises(FibldmError, match="must be an RT structure set; it holds another kind of object"):
        read_structures(segmentation, NAMES, image_of())
    with pytest.raises(FibldmError, match="must be a DICOM segmentation; it holds another kind of object"):
        read_segmentation(structures, NAMES)
    with pytest.raises(FibldmError, match="must be a DICOM segmentation or an RT structure set"):
        segment_names(tmp_path / "0001.dcm")


def test_names_come_from_the_header(tmp_path: Path, labels: Labels) -> None:
    file = write_segmentation(tmp_path / "seg.dcm", make_series(tmp_path), labels, "LABELMAP")
    assert segment_names(file) == ["Lung", "Honeycombing"]
