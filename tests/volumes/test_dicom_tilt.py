"""Gantry tilt and uneven spacing: refused, or brought to a regular grid with the same object in its place."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import (
    AXIAL,
    OBLIQUE,
    ORIGIN,
    SPACING,
    Change,
    complete,
    write_segmentation,
    write_series,
    write_structures,
)
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.dicom.masks import read_segmentation, read_structures
from fibldm.volumes.dicom.pixels import AIR_HU
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.scan import Scan

Array = NDArray[np.float64]
Field = Callable[[Array], Array]
"""HU at points ``(..., 3)``, LPS mm."""

EVEN = tuple(np.arange(9) * 2.5)
UNEVEN = (0.0, 2.5, 5.0, 7.5, 11.0, 14.5, 18.0, 22.5)
SHAPE = (24, 20)
RADIUS = 6.0


def linear(points: Array) -> Array:
    """Interpolated exactly, and different everywhere."""
    return np.asarray((points - ORIGIN) @ (11.0, -17.0, 23.0) + 300)


def centre(orientation: Sequence[float] = AXIAL) -> Array:
    """Of the ball, which lies amid the slices, LPS mm."""
    row, column = np.reshape(orientation, (2, 3))
    return np.array(ORIGIN) + 7.5 * row + 14 * column + 10 * np.cross(row, column)


def ball(orientation: Sequence[float] = AXIAL) -> Field:
    """A ball whose edge is as soft as voxels are large."""

    def field(points: Array) -> Array:
        distance = np.linalg.norm(points - centre(orientation), axis=-1)
        return np.asarray(1000 / (1 + np.exp((distance - RADIUS) / 0.8)))

    return field


def origins(places: Sequence[float], tilt: float, orientation: Sequence[float]) -> Array:
    row, column = np.reshape(orientation, (2, 3))
    along = np.cross(row, column) + np.tan(np.radians(tilt)) * column
    return np.array(ORIGIN) + np.outer(places, along)


def pixels(places: Sequence[float], tilt: float, orientation: Sequence[float] = AXIAL) -> Array:
    """Where the pixels of all slices lie, ``(slice, row, column, 3)``."""
    row, column = np.reshape(orientation, (2, 3))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    in_plane = rows[..., None] * column * SPACING[1] + columns[..., None] * row * SPACING[0]
    return origins(places, tilt, orientation)[:, None, None] + in_plane


def write(
    folder: Path,
    field: Field,
    *,
    places: Sequence[float] = EVEN,
    tilt: float = 0.0,
    orientation: Sequence[float] = AXIAL,
    change: Change | None = None,
    **options: Any,
) -> list[Path]:
    """A series of slices at these places (mm along their normal), each pixel sampled where it lies."""
    corners = origins(places, tilt, orientation)

    def placed(dataset: Dataset, index: int) -> None:
        dataset.ImagePositionPatient = [f"{value:.6f}" for value in corners[index]]
        dataset.GantryDetectorTilt = -tilt  # as some scanners write it: the sign is not to be believed
        if change is not None:
            change(dataset, index)

    array = np.rint(field(pixels(places, tilt, orientation)))
    return write_series(folder, array, orientation=orientation, change=placed, **options)


def at_voxels(scan: Scan) -> Array:
    """LPS mm of every voxel ``(X, Y, Z, 3)``."""
    indices = np.stack(np.meshgrid(*map(np.arange, scan.array.shape), indexing="ij"), axis=-1)
    return nibabel.affines.apply_affine(scan.affine, indices) * (-1, -1, 1)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
@pytest.mark.parametrize(("tilt", "places"), [(18.0, EVEN), (-18.0, EVEN), (0.0, UNEVEN), (-25.0, UNEVEN)])
def test_an_object_stays_in_its_place(
    tmp_path: Path, tilt: float, places: Sequence[float], orientation: Sequence[float]
) -> None:
    """Against the object itself: a field that linear interpolation gives exactly, and the edge of a ball."""
    options: dict[str, Any] = {"tilt": tilt, "places": places, "orientation": orientation}
    with pytest.raises(FibldmError, match="`resample_tilt`"):
        read_series(write(tmp_path / "refused", linear, **options))
    scan = read_series(write(tmp_path / "linear", linear, **options), resample_tilt=True)
    truth, shown = linear(at_voxels(scan)), scan.array != AIR_HU
    inner = ndimage.binary_erosion(shown)  # up to their edges, the outermost pixels are repeated
    assert np.abs(scan.array - truth)[inner].max() <= 1.01  # rounded on the way in and out
    assert 0.6 < shown.mean() <= 1 and (tilt == 0) == bool(shown.all())
    directions = scan.affine[:3, :3] / scan.spacing
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    round_ = read_series(write(tmp_path / "ball", ball(orientation), **options), resample_tilt=True)
    inside = round_.array > 500
    middle = at_voxels(round_)[inside].mean(axis=0)
    volume = inside.sum() * np.prod(round_.spacing)
    np.testing.assert_allclose(middle, centre(orientation), atol=0.2)
    assert volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.04)


def test_what_was_done_is_said(tmp_path: Path) -> None:
    scan = read_series(write(tmp_path, linear, tilt=12.0, places=UNEVEN), resample_tilt=True)
    assert scan.acquired is not None and scan.acquired.to_dict() == {
        "tilt_degrees": 12.0,
        "slice_spacing_before_mm": [2.5, 4.5],
        "slice_spacing_after_mm": 2.5,
        "slices_before": 8,
        "slices_after": 10,
    }
    said = (
        "a gantry tilt of 12.0 degrees was straightened, and slices 2.50 to 4.50 mm apart were interpolated to 2.50 mm"
    )
    assert ("warning", said) in scan.findings


def test_a_regular_series_is_read_as_ever(tmp_path: Path) -> None:
    files = write(tmp_path, linear)
    plain, asked = read_series(files), read_series(files, resample_tilt=True)
    np.testing.assert_array_equal(plain.array, asked.array)
    np.testing.assert_array_equal(plain.affine, asked.affine)
    assert asked.acquired is None and asked.findings == plain.findings


def test_a_slice_that_is_not_moved_keeps_its_voxels(tmp_path: Path) -> None:
    files = write(tmp_path, ball(), tilt=18.0)
    scan = read_series(files, resample_tilt=True)
    first = pydicom.dcmread(files[0])
    stored = first.pixel_array.astype(int) - 1024
    turned = scan.array[::-1, ::-1, 0].T  # back to columns to the left, rows to the back
    np.testing.assert_array_equal(turned[: stored.shape[0]], stored)
    assert (turned[stored.shape[0] :] == AIR_HU).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"places": (0, 2.5, 5, 10, 12.5, 15), "tilt": 10.0}, "slices are missing between"),
        ({"places": (0, 2.5, 5, 5, 8)}, "several slices lie in one place"),
    ],
)
def test_what_no_resampling_mends_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(FibldmError, match=reason):
        read_series(write(tmp_path, linear, **options), resample_tilt=True)


def test_two_slices_nearly_in_one_place_make_no_huge_volume(tmp_path: Path) -> None:
    scan = read_series(write(tmp_path, linear, places=(0, 0.13, 5, 9, 16, 24)), resample_tilt=True)
    assert scan.array.shape[2] == 11 and scan.spacing[2] == pytest.approx(2.4)  # half of the usual 5 mm, at least
    assert np.abs(scan.array - linear(at_voxels(scan))).max() <= 1.01


def test_a_wobble_is_refused(tmp_path: Path) -> None:
    def wobble(dataset: Dataset, index: int) -> None:
        if index == 4:
            dataset.ImagePositionPatient[0] += 1.0

    with pytest.raises(FibldmError, match="shifted against each other"):
        read_series(write(tmp_path, linear, tilt=10.0, change=wobble), resample_tilt=True)


def test_a_scan_planned_in_two_spacings_is_uneven_and_not_incomplete(tmp_path: Path) -> None:
    """As of heads: closer slices at the base, and twice as far apart above."""
    files = write(tmp_path, linear, places=(0, 2.5, 5, 7.5, 12.5, 17.5, 22.5))
    with pytest.raises(FibldmError, match="its slice spacing is uneven, 2.50 to 5.00 mm; give `resample_tilt`"):
        read_series(files)
    assert read_series(files, resample_tilt=True).array.shape[2] == 10


@pytest.mark.parametrize(
    ("tilt", "places", "orientation"), [(15.0, EVEN, OBLIQUE), (-15.0, EVEN, AXIAL), (-15.0, UNEVEN, OBLIQUE)]
)
def test_masks_move_with_their_slices(
    tmp_path: Path, tilt: float, places: Sequence[float], orientation: Sequence[float]
) -> None:
    """A segmentation and a structure set of one ball: at the ball, on the image's grid, and nearly alike."""
    options: dict[str, Any] = {"tilt": tilt, "places": places, "orientation": orientation}
    files = write(tmp_path / "s", ball(orientation), change=complete, **options)
    image = read_series(files, resample_tilt=True)
    points = pixels(places, tilt, orientation)
    inside = np.linalg.norm(points - centre(orientation), axis=-1) < RADIUS
    drawn = write_segmentation(
        tmp_path / "seg.dcm", [pydicom.dcmread(file) for file in files], inside.astype(np.uint8), names=["Ball"]
    )
    scan = read_segmentation(drawn, {"Ball": 3}, image)
    np.testing.assert_array_equal(scan.affine, image.affine)
    assert scan.array.shape == image.array.shape and set(np.unique(scan.array)) == {0, 3}
    marked = scan.array == 3
    np.testing.assert_allclose(at_voxels(scan)[marked].mean(axis=0), centre(orientation), atol=0.35)
    assert marked.sum() * np.prod(scan.spacing) == pytest.approx(
        4 / 3 * np.pi * RADIUS**3, rel=0.12
    )  # few and thick slices
    circles = [
        in_plane(at, orientation) for at in origins(places, tilt, orientation) if abs(height(at, orientation)) < RADIUS
    ]
    outlined = read_structures(write_structures(tmp_path / "rt.dcm", {"Ball": circles}), {"Ball": 3}, image)
    both = (outlined.array == 3) & marked
    assert 2 * both.sum() / ((outlined.array == 3).sum() + marked.sum()) > 0.97


def height(origin: Array, orientation: Sequence[float]) -> float:
    """Of a slice above the ball's centre, mm."""
    row, column = np.reshape(orientation, (2, 3))
    return float((origin - centre(orientation)) @ np.cross(row, column))


def in_plane(origin: Array, orientation: Sequence[float]) -> Array:
    """The circle in which a slice cuts the ball, LPS mm."""
    row, column = np.reshape(orientation, (2, 3))
    off = height(origin, orientation)
    radius, angles = np.sqrt(RADIUS**2 - off**2), np.linspace(0, 2 * np.pi, 60, endpoint=False)
    middle = centre(orientation) + off * np.cross(row, column)
    return middle + radius * (np.cos(angles)[:, None] * row + np.sin(angles)[:, None] * column)


def in_air(brightness: float) -> Field:
    """The ball in water, with air beyond, as a CT has."""

    def field(points: Array) -> Array:
        distance = np.linalg.norm(points - centre(), axis=-1)
        return np.where(distance < 2 * RADIUS, ball()(points) + brightness, -1000.0)

    return field


def test_the_work_folder_says_what_was_done(tmp_path: Path) -> None:
    for patient in range(3):
        options: dict[str, Any] = {
            "tilt": 14.0 if patient else 0.0,
            "patient": f"P{patient}",
            "study": f"study {patient}",
        }
        files = write(tmp_path / f"source/{patient}", in_air(10 * patient), change=complete, **options)
        inside = np.linalg.norm(pixels(EVEN, options["tilt"]) - centre(), axis=-1) < RADIUS + patient
        slices = [pydicom.dcmread(file) for file in files]
        write_segmentation(tmp_path / f"source/{patient}/seg.dcm", slices, inside.astype(np.uint8), names=["Ball"])
    with pytest.raises(FibldmError, match="gantry tilt of 14.0 degrees; give `resample_tilt`"):
        prepare(tmp_path / "source", tmp_path / "work", PrepareSettings(layout="dicom"))
    report = prepare(tmp_path / "source", tmp_path / "work", PrepareSettings(layout="dicom", resample_tilt=True))
    said = sorted(finding.message for finding in report.findings)
    assert sum("a gantry tilt of 14.0 degrees was straightened" in message for message in said) == 2
    cases = read_json(tmp_path / "work/report.json")["cases"]
    done = [case["resampled"] for case in cases.values() if "resampled" in case]
    assert len(cases) == 3 and [about["tilt_degrees"] for about in done] == [14.0, 14.0]
    for name in cases:
        image, label = (nibabel.load(tmp_path / f"work/{kind}/{name}.nii.gz") for kind in ("images", "labels"))
        np.testing.assert_array_equal(image.affine, label.affine)
        voxels, marked = np.asarray(image.dataobj), np.asarray(label.dataobj) == 1
        assert voxels[marked].mean() > 400 and voxels[~marked & (voxels > AIR_HU)].mean() < 100


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="needs dcm2niix")
def test_dcm2niix_gives_the_same(tmp_path: Path) -> None:
    """Rows that lean to the feet, as its place is right for these only: for others it is 5 mm off the object."""
    leaning = (1.0, 0.0, 0.0, 0.0, float(np.cos(np.radians(15))), -float(np.sin(np.radians(15))))

    def dressed(dataset: Dataset, index: int) -> None:
        dataset.Manufacturer, dataset.PatientPosition, dataset.PixelRepresentation = "GE MEDICAL SYSTEMS", "HFS", 1
        dataset.AcquisitionDate, dataset.AcquisitionTime, dataset.AcquisitionNumber = "20190314", "101010", 1

    files = write(tmp_path / "in", ball(leaning), tilt=-15.0, orientation=leaning, change=dressed)
    scan = read_series(files, resample_tilt=True)
    call = ["dcm2niix", "-z", "y", "-b", "n", "-o", str(tmp_path), "-f", "x", str(tmp_path / "in")]
    subprocess.run(call, check=True, capture_output=True)
    (straightened,) = tmp_path.glob("x_Tilt*.nii.gz")
    image = nibabel.as_closest_canonical(nibabel.load(straightened))
    np.testing.assert_allclose(image.affine, scan.affine, atol=1e-3)
    shown = scan.array != AIR_HU
    assert np.abs(image.get_fdata() - scan.array)[shown].max() <= 1


@pytest.mark.data
def test_a_real_head_under_a_tilted_gantry(data_folder: Path) -> None:
    files = sorted((data_folder / "dicom_tricky" / "ge-gantry-tilt-variable-spacing").iterdir())
    scan = read_series(files, resample_tilt=True)
    assert scan.acquired is not None and scan.acquired.to_dict() == {
        "tilt_degrees": 18.5,
        "slice_spacing_before_mm": [1.0811, 6.9986],
        "slice_spacing_after_mm": 3.3961,
        "slices_before": 20,
        "slices_after": 34,
    }
    assert scan.array.shape == (512, 589, 34) and scan.array.min() == AIR_HU
