"""Masks as RT structure sets: every voxel comes back, by other programs too, and objects are as the standard says."""

import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.draw import polygon2mask

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.dicom.label_codes import load_label_codes
from fibldm.volumes.dicom.masks import read_structures, segment_names
from fibldm.volumes.dicom.outlines import outlines
from fibldm.volumes.dicom.output import DicomOutput, mask_files
from fibldm.volumes.dicom.series import read_series
from fibldm.volumes.dicom.writer import in_viewing_order
from fibldm.volumes.grid import Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar

Bools = NDArray[np.bool_]

SHAPE = (16, 14, 5)
NAMES = {1: "left lung", 2: "ground glass", 5: "Tumor"}
VALUES = {name: value for value, name in NAMES.items()}
TURNED = Rotation.from_euler("xyz", [0.2, -0.15, 0.3]).as_matrix()
CENTRE = (80.0, -31.0, 412.0)
AFFINES = {
    "axial": nibabel.affines.from_matvec(np.diag([-0.75, -1.25, 2.5]), CENTRE),
    "oblique": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, 2.5]), CENTRE),
    "sagittal": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, -2.5])[:, [1, 2, 0]], CENTRE),
    "coronal": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, 2.5])[:, [2, 0, 1]], CENTRE),
    "fine": nibabel.affines.from_matvec(TURNED @ np.diag([0.011, 0.007, 0.02]), CENTRE),
}


def rings() -> NDArray[np.uint8]:
    """A wall of one voxel in a wall of two, with an island, voxels alone and in diagonals, and unknown ones."""
    x, y = np.indices(SHAPE[:2])
    labels = np.zeros(SHAPE, np.uint8)
    far = np.maximum(abs(x - 7), abs(y - 7))
    labels[..., 1:4] = np.select([far == 6, far == 4, far == 3, far == 1], [1, 1, 1, 5])[..., np.newaxis]
    labels[x + y == 27, 2] = 1
    labels[15, 0, 0] = labels[0, 13, 4] = labels[7, 7, 2] = 2
    labels[15, 0, 4] = 255
    return labels


def write(folder: Path, affine: NDArray[np.float64] = AFFINES["oblique"], mask_format: str = "rtstruct") -> Path:
    image = np.random.default_rng(1).integers(-1000, 600, SHAPE).astype(np.int16)
    DicomOutput.read(mask_format=mask_format).write(
        folder / "a_000",
        Volume(image, affine),
        Volume(rings(), affine),
        names=NAMES,
        intensity=Intensity("window"),
        request={"mask": "a.nii.gz", "mask_sha256": "0" * 64, "request": "r"},
        provenance={},
    )
    return folder / "a_000"


def structure_set(series: Path) -> pydicom.Dataset:
    return pydicom.dcmread(mask_files(series)[-1])


def known() -> NDArray[np.uint8]:
    """The mask without what no object tells."""
    labels = rings()
    labels[labels == 255] = 0
    return labels


@pytest.mark.parametrize("plane", AFFINES)
def test_every_voxel_comes_back(tmp_path: Path, plane: str) -> None:
    series = write(tmp_path, AFFINES[plane])
    image = read_series(sorted(series.glob("*.dcm")))

    read = read_structures(mask_files(series)[0], VALUES, image, frame_of_reference=image.frame_of_reference)

    np.testing.assert_array_equal(read.array, Volume(known(), AFFINES[plane]).canonical().array)
    assert read.array.dtype == np.uint8 and read.names == NAMES
    assert read.findings == (("warning", "ground glass is drawn on 3 slices of 5; none was filled in"),)


def area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


@settings(deadline=None, max_examples=60)
@given(arrays(bool, (9, 11)))
def test_outlines_are_the_mask_however_they_are_put_together(mask: Bools) -> None:
    """By union as by exclusive or; one for each part; of the area of the voxels; and corners round to voxels inside."""
    polygons = outlines(mask)

    filled = [polygon2mask(mask.shape, polygon) for polygon in polygons]
    np.testing.assert_array_equal(np.any([np.zeros_like(mask), *filled], axis=0), mask)
    assert sum(part.sum() for part in filled) == mask.sum()
    assert len(polygons) == ndimage.label(mask)[1]
    assert sum(map(area, polygons)) == pytest.approx(mask.sum(), rel=0.05)
    assert all(mask[tuple(np.rint(polygon).astype(int).T)].all() for polygon in polygons)
    away = [np.abs(polygon - np.rint(polygon)).min() for polygon in polygons]
    assert all(distance > 0.2 for distance in away)


def test_a_hole_is_in_the_outline_of_what_is_around_it() -> None:
    """Holes beside, above and within each other, and one that two others lie before."""
    mask = np.ones((12, 12), dtype=bool)
    mask[2:4, 2:4] = mask[2:4, 5:8] = mask[6:10, 2:9] = mask[7, 10] = mask[10, 10] = False
    mask[7:9, 4:7] = True
    whole, island = sorted(outlines(mask), key=area, reverse=True)
    assert area(whole) == pytest.approx(144 - 4 - 6 - 28 - 2, rel=0.02) and area(island) == pytest.approx(6, rel=0.02)
    np.testing.assert_array_equal(polygon2mask(mask.shape, whole) | polygon2mask(mask.shape, island), mask)


def test_the_structure_set_is_of_its_series(tmp_path: Path) -> None:
    """Identity, references, names, codes, colours, and that it is synthetic; nothing by chance, no date."""
    series = write(tmp_path, mask_format="both")
    slices = [pydicom.dcmread(file) for file in sorted(series.glob("*.dcm"))]
    segmentation, dataset = (pydicom.dcmread(file) for file in mask_files(series))

    assert (dataset.Modality, dataset.SOPClassUID) == ("RTSTRUCT", pydicom.uid.RTStructureSetStorage)
    assert (dataset.SyntheticData, dataset.ContentQualification, dataset.ApprovalStatus) == (
        *("YES", "RESEARCH"),
        "UNAPPROVED",
    )
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[keyword].value == slices[0][keyword].value
    assert not [element for element in dataset.iterall() if element.VR in ("DA", "TM", "DT") and element.value]
    instances = {item.SOPInstanceUID for item in (*slices, segmentation, dataset)}
    assert len(instances) == len(slices) + 2
    assert len({item.SeriesInstanceUID for item in (slices[0], segmentation, dataset)}) == 3

    (frame,) = dataset.ReferencedFrameOfReferenceSequence
    (referenced,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert [item.ReferencedSOPInstanceUID for item in referenced.ContourImageSequence] == [
        item.SOPInstanceUID for item in slices
    ]
    by_uid = {item.SOPInstanceUID: item for item in slices}
    for drawn in dataset.ROIContourSequence:
        assert [item.ContourNumber for item in drawn.ContourSequence] == list(range(1, len(drawn.ContourSequence) + 1))
        for item in drawn.ContourSequence:
            points = np.reshape(item.ContourData, (-1, 3)).astype(float)
            image = by_uid[item.ContourImageSequence[0].ReferencedSOPInstanceUID]
            normal = np.cross(*np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float))
            off = (points - np.array(image.ImagePositionPatient, dtype=float)) @ normal
            assert np.abs(off).max() < 2e-3 and len(points) == item.NumberOfContourPoints

    meanings = load_label_codes().find(NAMES.values())
    parts = zip(
        dataset.StructureSetROISequence,
        dataset.ROIContourSequence,
        dataset.RTROIObservationsSequence,
        segmentation.SegmentSequence,
        strict=True,
    )
    for structure, drawn, observed, segment in parts:
        number = segment.SegmentNumber
        assert (structure.ROINumber, drawn.ReferencedROINumber, observed.ReferencedROINumber) == (number,) * 3
        assert structure.ROIName == segment.SegmentLabel
        assert tuple(drawn.ROIDisplayColor) == meanings[structure.ROIName].colour
        code, stated = observed.RTROIIdentificationCodeSequence[0], segment.SegmentedPropertyTypeCodeSequence[0]
        assert (code.CodeValue, code.CodingSchemeDesignator) == (stated.CodeValue, stated.CodingSchemeDesignator)
    side = dataset.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0]
    assert side.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"


@pytest.mark.parametrize(("mask_format", "folders"), [("seg", 1), ("rtstruct", 1), ("both", 2)])
def test_what_is_asked_for_is_written_twice_alike_and_missed_where_it_is_gone(
    tmp_path: Path, mask_format: str, folders: int
) -> None:
    series = write(tmp_path / "one", mask_format=mask_format)
    again = write(tmp_path / "two", mask_format=mask_format)
    output = DicomOutput.read(mask_format=mask_format)

    output.check_whole(series)
    files = mask_files(series)
    assert len(files) == folders and segment_names(files[-1]) == list(NAMES.values())
    if mask_format != "seg":
        assert files[-1].read_bytes() == mask_files(again)[-1].read_bytes()
        assert files[-1].parent.name == "structures"
    assert read_json(sidecar(series))["synthetic"] is True
    files[-1].unlink()
    with pytest.raises(FibldmError, match=f"must hold 5 slices, and .*{files[-1].name} its mask"):
        output.check_whole(series)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(FibldmError, match="`mask_format` must be one of seg, rtstruct, both; got 'stl'"):
        DicomOutput.read(mask_format="stl")
    prints = {DicomOutput.read(mask_format=name).fingerprint(NAMES) for name in ("seg", "rtstruct", "both")}
    assert len(prints) == 3 and DicomOutput.read().fingerprint(NAMES) in prints


def test_an_empty_mask_is_no_structure_set(tmp_path: Path) -> None:
    image, empty = (Volume(np.zeros(SHAPE, kind), AFFINES["axial"]) for kind in (np.int16, np.uint8))
    with pytest.raises(FibldmError, match="an RT structure set needs at least one label.*; the mask is empty"):
        DicomOutput.read(mask_format="rtstruct").write(
            tmp_path / "a_000",
            image,
            empty,
            names=NAMES,
            intensity=Intensity("window"),
            request={"mask_sha256": "0"},
            provenance={},
        )
    assert not list(tmp_path.rglob("*.dcm"))


def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    """But for the Synthetic Data attribute, which is younger than the program's dictionary."""
    file = mask_files(write(tmp_path))[0]
    run = subprocess.run([_program("dciodvfy"), "-new", file], capture_output=True, text=True, check=False)
    said = run.stderr.splitlines()
    assert "RTStructureSet" in said
    errors = [line for line in said if line.startswith("Error")]
    assert [line for line in errors if not line.startswith("Error - </(0008,001c)> - Attribute with an even")] == []


@pytest.mark.parametrize("plane", ["axial", "oblique", "coronal"])
def test_plastimatch_reads_every_voxel(tmp_path: Path, plane: str) -> None:
    """Which fills holes that are contours of their own."""
    series = write(tmp_path, AFFINES[plane])
    out = tmp_path / "plastimatch"
    command = [_program("plastimatch"), "convert", "--input", mask_files(series)[0], "--referenced-ct", series]
    subprocess.run([*command, "--output-prefix", out, "--prefix-format", "nrrd"], check=True, capture_output=True)
    wanted = in_viewing_order(Volume(known(), AFFINES[plane])).array.transpose(2, 1, 0)
    for name, value in VALUES.items():
        read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(out / f"{name}.nrrd"))
        np.testing.assert_array_equal(read != 0, wanted == value, err_msg=name)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
