"""DICOM series: the right volume or a refusal with its reason, in any order and orientation; H2, B6."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import (
    AXIAL,
    CORONAL,
    NAME,
    ORIGIN,
    PATIENT,
    PLANTED,
    SAGITTAL,
    SPACING,
    Change,
    example,
    expected,
    new_uid,
    position,
    write_enhanced,
    write_scout,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from scipy.spatial.transform import Rotation

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.series import find_series, read_series
from fibldm.volumes.scan import Scan

ARRAY = example()
OBLIQUE = tuple(Rotation.from_euler("xyz", [12, -25, 40], degrees=True).as_matrix()[:, :2].T.ravel().tolist())


def same(scan: Scan, array: NDArray[Any], **geometry: Any) -> None:
    voxels, affine = expected(array, **geometry)
    np.testing.assert_array_equal(scan.array, voxels)
    np.testing.assert_allclose(scan.affine, affine, atol=2e-5)


def refused(files: Sequence[Path], *reasons: str) -> FibldmError:
    """Reading fails, for these reasons (patterns), and the message gives nobody away."""
    with pytest.raises(FibldmError) as caught:
        read_series(files)
    message = str(caught.value)
    for reason in reasons:
        assert re.search(reason, message), message
    assert caught.value.remedy
    assert not any(secret in message for secret in (*PLANTED, "1.2.826", str(files[0].parent)))
    return caught.value


def changed(**values: Any) -> Change:
    """Sets attributes of every slice; ``None`` deletes."""

    def change(dataset: Dataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


def of_slices(keyword: str, values: Sequence[Any]) -> Change:
    return lambda dataset, index: setattr(dataset, keyword, values[index])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"instance_numbers": (4, 1, 6, 3, 2, 5)},
        {"instance_numbers": None},
        {"long_decimals": True, "spacing": (0.7123456789, 1.25, 2.3333333333)},
        {"orientation": CORONAL},
        {"orientation": SAGITTAL, "reverse": True},
        {"orientation": OBLIQUE},
        {"slope": 2.0, "intercept": -1000.0},
        {"transfer_syntax": uid.RLELossless},
        {"transfer_syntax": uid.JPEGLSLossless},
        {"transfer_syntax": uid.JPEGLSLossless, "orientation": OBLIQUE},
    ],
)
def test_a_ct_series_gives_its_voxels_and_grid(tmp_path: Path, options: dict[str, Any]) -> None:
    """The layouts clean, reversed, numbered against space, without numbers, over-long decimals; stored in any way."""
    array = ARRAY // 2 * 2
    scan = read_series(write_series(tmp_path, array, **options))
    same(scan, array, **{key: value for key, value in options.items() if key in ("spacing", "orientation")})
    assert scan.array.dtype == np.int16
    assert scan.facts == {"kernel": "B40f", "slice_thickness_mm": scan_thickness(options), "tube_voltage_kv": 120.0}
    assert scan.findings == ()


def scan_thickness(options: dict[str, Any]) -> float:
    return float(options.get("spacing", SPACING)[2])


@settings(max_examples=15, deadline=None)
@given(
    rotation=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    order=st.permutations(range(4)),
)
def test_any_rotation_spacing_place_and_order_of_files(
    rotation: tuple[float, float, float],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    order: list[int],
) -> None:
    turned = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    geometry: dict[str, Any] = {"spacing": spacing, "origin": origin, "orientation": turned[:, :2].T.ravel().tolist()}
    array = example((4, 3, 5))
    with TemporaryDirectory() as folder:
        files = write_series(Path(folder), array, **geometry, instance_numbers=order)
        scan = read_series([files[index] for index in order])
        frames = [pydicom.dcmread(files[index]) for index in order]
        other = highdicom.get_volume_from_series(frames, perpendicular_tol=1e-3)
    voxels, affine = expected(array, **geometry)
    np.testing.assert_array_equal(scan.array, voxels)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    corner = np.abs(np.linalg.inv(scan.affine) @ np.diag([-1, -1, 1, 1]) @ other.affine @ [0, 0, 0, 1]).round(3)
    assert scan.array[tuple(corner[:3].astype(int))] == other.array[0, 0, 0]


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, CORONAL, OBLIQUE])
def test_simpleitk_reads_the_same(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    files = write_series(tmp_path, ARRAY, orientation=orientation)
    same_as_simpleitk(read_series(files[::-1]), SimpleITK.ReadImage([str(file) for file in files]))


def same_as_simpleitk(scan: Scan, image: SimpleITK.Image) -> None:
    """Every voxel at its place: voxels are looked up by their coordinates."""
    there = SimpleITK.DICOMOrient(image, "RAS")
    np.testing.assert_array_equal(scan.array, SimpleITK.GetArrayViewFromImage(there).transpose(2, 1, 0))
    for index in ((0, 0, 0), tuple(length - 1 for length in scan.array.shape)):
        point = np.array(there.TransformIndexToPhysicalPoint([int(value) for value in index]))
        np.testing.assert_allclose(scan.affine @ [*index, 1], [-point[0], -point[1], point[2], 1], atol=1e-4)


def test_pet_is_rescaled_slice_by_slice(tmp_path: Path) -> None:
    slopes = [0.5, 1.0, 2.0, 0.25, 4.0, 1.5]
    stored = example((6, 7, 9), seed=1).clip(0)
    array = stored * np.array(slopes)[:, None, None]
    scan = read_series(write_series(tmp_path, array, modality="PT", slope=slopes))
    same(scan, array.astype(np.float32))
    assert scan.array.dtype == np.float32


def test_mr_needs_no_rescale_and_says_how_it_was_made(tmp_path: Path) -> None:
    array = ARRAY.clip(0)
    scan = read_series(write_series(tmp_path, array, modality="MR"))
    same(scan, array)
    expected_facts = {"field_strength_t": 3.0, "repetition_time_ms": 2300.0, "echo_time_ms": 2.98}
    assert scan.facts == {"slice_thickness_mm": 2.5, **expected_facts}


def test_hu_that_int16_does_not_hold_become_float32(tmp_path: Path) -> None:
    fine = read_series(write_series(tmp_path / "fine", ARRAY, slope=0.5))
    same(fine, ARRAY.astype(np.float32))
    assert fine.array.dtype == np.float32
    high = read_series(write_series(tmp_path / "high", ARRAY.astype(np.int32) + 40000 * (ARRAY > 1900)))
    assert high.array.dtype == np.float32 and high.array.max() > 41900 and high.array.min() == ARRAY.min()


def test_two_series_and_a_scout_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    other = example(seed=5)
    first = write_series(tmp_path, ARRAY, series="a")
    second = write_series(tmp_path, other, series="b", start=100, orientation=SAGITTAL)
    scout = write_scout(tmp_path, series="a")
    found = {series.uid: series for series in find_series(tmp_path.iterdir())}
    assert {name: set(series.files) for name, series in found.items()} == {
        new_uid("study", "a"): set(first),
        new_uid("study", "b"): set(second),
    }
    same(read_series(found[new_uid("study", "a")].files), ARRAY)
    same(read_series(found[new_uid("study", "b")].files), other, orientation=SAGITTAL)
    refused([*first, *second], "it mixes 2 series, and it mixes slices of several orientations; keep the files of one")
    with_scout = read_series([scout, *first])
    same(with_scout, ARRAY)
    assert with_scout.findings == (("warning", "1 localizers (scouts) under the same series were left out"),)


def test_the_hash_is_of_the_files_along_the_stack(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY, instance_numbers=(4, 1, 6, 3, 2, 5))
    content = b"".join(file.read_bytes() for file in files)
    assert read_series(files[::-1]).sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_enhanced_image_is_read_by_the_place_of_its_frames(tmp_path: Path, modality: str) -> None:
    array = ARRAY.clip(0)
    order = [3, 1, 0, 2, 5, 4]
    file = write_enhanced(tmp_path / "e.dcm", array, modality=modality, order=order, orientation=OBLIQUE)
    scan = read_series([file])
    same(scan, array, orientation=OBLIQUE)
    assert scan.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert scan.facts["slice_thickness_mm"] == 2.5
    assert find_series([file])[0].image


def test_enhanced_images_that_are_no_volume(tmp_path: Path) -> None:
    uneven = write_enhanced(tmp_path / "u.dcm", ARRAY, distances=(0, 1, 2.3, 3, 4, 5))
    refused([uneven], "its slice spacing is uneven, 1.75 to 3.25 mm; give `resample_tilt`")
    gap = write_enhanced(tmp_path / "g.dcm", ARRAY, distances=(0, 1, 2, 4, 5, 6))
    refused([gap], r"slices are missing between -115.75 and -110.75 mm \(spacing 2.50 mm\); transfer")

    def stacks(dataset: Dataset) -> None:
        for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            frame.FrameContentSequence = [Dataset()]
            frame.FrameContentSequence[0].StackID = str(index // 3)

    refused([write_enhanced(tmp_path / "s.dcm", ARRAY, change=stacks)], "it mixes 2 stacks")

    def echoes(dataset: Dataset) -> None:
        for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            frame.MREchoSequence = [Dataset()]
            frame.MREchoSequence[0].EffectiveEchoTime = 5.0 + index % 2

    refused([write_enhanced(tmp_path / "t.dcm", ARRAY, modality="MR", change=echoes)], "it mixes 2 echo times")

    def lost(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence

    refused([write_enhanced(tmp_path / "l.dcm", ARRAY, change=lost)], "6 of 6 slices do not state their Image Position")

    def short(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence[-1]

    refused([write_enhanced(tmp_path / "f.dcm", ARRAY, change=short)], "file 1 of 1 is not .*; transfer")
    several = [write_enhanced(tmp_path / name, ARRAY) for name in ("a.dcm", "b.dcm")]
    refused(several, "it mixes 2 series, and it holds several multi-frame images")


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"skip": (2,)}, [r"slices are missing between -118.25 and -113.25 mm \(spacing 2.50 mm\); transfer"]),
        ({"skip": (2, 3)}, [r"slices are missing between -118.25 and -110.75 mm"]),
        ({"skip": (1, 4)}, [r"slices are missing between .* mm, between .* mm \(spacing 2.50 mm\)"]),
        ({"repeat": (2,)}, [r"several slices lie in one place along the stack \(-115.75 mm\); leave out the copies"]),
        ({"repeat": range(6)}, [r"in one place along the stack \(.* mm, .* mm, .* mm and 3 more\)"]),
        ({"tilt": 12.0}, ["its slices are sheared, as by a gantry tilt of 12.0 degrees; give `resample_tilt`"]),
        ({"tilt": -12.0, "orientation": OBLIQUE}, ["gantry tilt of 12.0 degrees"]),
        ({"tilt": 12.0, "skip": (2,), "repeat": (4,)}, ["one place .* sheared, .* and slices are missing"]),
    ],
)
def test_a_stack_that_is_not_regular_is_refused(tmp_path: Path, options: dict[str, Any], reasons: list[str]) -> None:
    """The layouts missing slice, duplicate and tilt; several faults are named at once."""
    refused(write_series(tmp_path, ARRAY, **options), *reasons)


def moved(index: int, shift: Sequence[float]) -> Change:
    def change(dataset: Dataset, place: int) -> None:
        if place == index:
            values = position(SPACING, ORIGIN, AXIAL, place) + shift
            dataset.ImagePositionPatient = values.tolist()

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (moved(3, (0, 0, 0.8)), "its slice spacing is uneven, 1.70 to 3.30 mm; give `resample_tilt`"),
        (moved(3, (0.5, 0, 0)), "its slices are shifted against each other, by up to 0.50 mm; export"),
        (changed(ImagePositionPatient=None), r"6 of 6 slices do not state their Image Position \(Patient\); export"),
        (changed(ImageOrientationPatient=None, PixelSpacing=None), "their Image Orientation .*, Pixel Spacing"),
        (changed(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "is not two perpendicular directions"),
        (changed(PixelSpacing=[0, 1]), "Pixel Spacing of 0 mm is not positive"),
        (of_slices("PixelSpacing", [[1, 1]] * 5 + [[1, 1.1]]), "it mixes slices of several pixel spacings"),
        (of_slices("ImageOrientationPatient", [list(AXIAL)] * 5 + [list(SAGITTAL)]), "slices of several orientations"),
        (of_slices("FrameOfReferenceUID", ["1.2"] * 5 + ["1.3"]), "it mixes 2 frames of reference"),
        (of_slices("PatientID", ["x"] * 5 + [PATIENT]), "it mixes 2 patients"),
        (of_slices("ConvolutionKernel", ["B40f"] * 3 + ["B70f"] * 3), "it mixes 2 kernels"),
        (of_slices("Rows", [7] * 5 + [6]), "it mixes 2 numbers of rows"),
        (of_slices("ImageType", [["ORIGINAL", "PRIMARY", kind] for kind in ("AXIAL", "MPR") * 3]), "of several types"),
        (changed(RescaleSlope=None), "6 of 6 slices state no usable Rescale Slope and Intercept"),
        (of_slices("RescaleSlope", [1, 1, 0, 1, 1, 1]), "1 of 6 slices state no usable Rescale"),
        (changed(RescaleType="US"), r"its values are not in HU \(Rescale Type\)"),
        (changed(PhotometricInterpretation="MONOCHROME1"), "its pixels are colours or indices of a palette"),
        (changed(PhotometricInterpretation="RGB", SamplesPerPixel=3), "its pixels are colours"),
        (changed(PhotometricInterpretation="PALETTE COLOR"), "its pixels are colours"),
        (changed(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "its slices are tiles of a mosaic"),
        (changed(ModalityLUTSequence=[Dataset()]), "its values need a modality lookup table"),
        (changed(BitsStored=12), "its stored bits are not 8, 16 or 32"),
        (
            changed(BitsStored=12, HighBit=11, PixelPaddingValue=63536),
            "its Pixel Padding Value is none that its pixels",
        ),
        (
            changed(SOPClassUID=uid.SecondaryCaptureImageStorage),
            "its kind of object is Secondary Capture Image Storage; leave",
        ),
        (changed(SOPClassUID="1.2.826.0.1"), "its kind of object is unknown; leave it out, or transfer"),
        (changed(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "it holds localizers .* only; leave it out"),
        (changed(PixelData=None), "slice 1 of 6 .* must hold all its voxels"),
        (changed(Rows=None), "slice 1 of 6 .* must hold all its voxels"),
    ],
)
def test_a_series_that_is_no_volume_is_refused(tmp_path: Path, change: Change, reason: str) -> None:
    refused(write_series(tmp_path, ARRAY, change=change), reason)


def test_an_attribute_that_cannot_be_parsed_is_named_without_its_value(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY)
    files[3].write_bytes(files[3].read_bytes().replace(b"\x18\x00\x10\x12SH", b"\x18\x00\x10\x12SX"))
    refused(files, "the attributes of a DICOM file must be readable; its ConvolutionKernel is not; transfer")


def test_text_in_place_of_numbers_counts_as_not_stated(tmp_path: Path) -> None:
    def spoil(dataset: Dataset, index: int) -> None:
        for tag in (0x00200032, 0x00280120):
            dataset[tag] = pydicom.DataElement(tag, "LO", NAME)
            dataset[tag].VR = "DS"

    refused(write_series(tmp_path, ARRAY, change=spoil), "Pixel Padding Value is none .* do not state their Image Pos")


def test_empty_numbers_count_as_not_stated(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY, change=of_slices("ImagePositionPatient", [[0, 0, 0], *[None] * 5]))
    refused(files, "5 of 6 slices do not state their Image Position")


def test_warnings_of_pydicom_do_not_quote_values(tmp_path: Path) -> None:
    """They would be errors here: a UID and an identifier that are too long, and a UID that is none."""
    with pydicom.config.disable_value_validation():
        change = changed(FrameOfReferenceUID="1." * 50 + "1", PatientID=PATIENT * 9, StudyInstanceUID="0.x")
        files = write_series(tmp_path, ARRAY, change=change)
    same(read_series(files), ARRAY)
    assert find_series(files)[0].study_uid == "0.x"


def test_several_acquisitions_in_one_place_are_named(tmp_path: Path) -> None:
    first = write_series(tmp_path, ARRAY, change=changed(AcquisitionNumber=1))
    second = write_series(tmp_path, example(seed=2), start=100, change=changed(AcquisitionNumber=2))
    refused([*first, *second], r"in one place .* and 3 more\), as it mixes 2 acquisitions; split it")
    half = write_series(tmp_path / "steps", ARRAY, change=of_slices("AcquisitionNumber", [1, 1, 2, 2, 3, 3]))
    same(read_series(half), ARRAY)
    echoes = write_series(
        tmp_path / "m", ARRAY.clip(0), modality="MR", change=of_slices("EchoTime", [3, 3, 3, 5, 5, 5])
    )
    refused(echoes, "it mixes 2 echo times; keep")


def test_one_slice_needs_its_thickness(tmp_path: Path) -> None:
    array = ARRAY[:1]
    scan = read_series(write_series(tmp_path / "with", array))
    same(scan, array)
    assert scan.array.shape == (9, 7, 1)
    without = write_series(tmp_path / "without", array, change=changed(SliceThickness=None))
    refused(without, "its only slice does not state its Slice Thickness; give a series of several slices")


@pytest.mark.parametrize("cut", [0.5, 0.97])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEGLSLossless, uid.RLELossless])
def test_voxels_that_were_cut_off(tmp_path: Path, syntax: str, cut: float) -> None:
    array = example((6, 40, 50))
    files = write_series(tmp_path, array, transfer_syntax=syntax)
    content = files[3].read_bytes()
    files[3].write_bytes(content[: int(cut * len(content))])
    refused(files, "slice 4 of 6 of a DICOM series must hold all its voxels.*; transfer the series again")


def test_a_file_that_was_cut_off_anywhere(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY)
    content = files[3].read_bytes()
    for length in range(0, len(content), 11):
        files[3].write_bytes(content[:length])
        refused(files)


def test_files_that_are_no_dicom(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY)
    files[4].write_bytes(b"no DICOM")
    refused(files, r"file 5 of 6 is not \(InvalidDicomError\); transfer")
    with pytest.raises(FibldmError, match="must hold at least one file"):
        read_series([])


@pytest.mark.parametrize(
    ("syntax", "remedy"),
    [
        (uid.JPEGLosslessSV1, r"no installed library decodes JPEG Lossless.*; pip install 'fibldm\[dicom-codecs\]'"),
        (uid.MPEG2MPML, "no installed library decodes MPEG2"),
    ],
)
def test_a_missing_codec_names_the_extra(
    tmp_path: Path, syntax: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compressed(dataset: Dataset, _: int) -> None:
        dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
        dataset.PixelData = encapsulate([b"\xff\xd8 not decoded \xff\xd9"])
        dataset["PixelData"].VR = "OB"

    monkeypatch.setattr("fibldm.volumes.dicom.pixels._DECODERS", ("pydicom", "pyjpegls", "pillow"))
    refused(write_series(tmp_path, ARRAY, change=compressed), remedy)


@pytest.mark.parametrize(("value", "limit"), [(0, None), (0, 3), (3, 0)])
def test_padding_becomes_air(tmp_path: Path, value: int, limit: int | None) -> None:
    array = ARRAY.clip(-900)
    array[1:3, :2] = -2000
    array[4, 6, 8] = -1998
    limits = {} if limit is None else {"PixelPaddingRangeLimit": limit}
    change = changed(PixelPaddingValue=value, **limits)
    scan = read_series(write_series(tmp_path, array, intercept=-2000.0, change=change))
    array[1:3, :2] = -1024
    if limit is not None:
        array[4, 6, 8] = -1024
    same(scan, array)
    slices = 2 if limit is None else 3
    assert scan.findings == (("warning", f"pixel padding in {slices} of 6 slices became -1024"),)


def test_padding_that_is_written_in_the_other_sign(tmp_path: Path) -> None:
    array = ARRAY.clip(-900)
    array[0, 0] = -2000

    def signed(dataset: Dataset, index: int) -> None:
        dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = array[index].astype("<i2").tobytes()
        dataset.add_new("PixelPaddingValue", "US", 63536)

    scan = read_series(write_series(tmp_path, ARRAY, change=signed))
    array[0, 0] = -1024
    same(scan, array)


def test_padding_of_mr_becomes_the_lowest_value(tmp_path: Path) -> None:
    array = ARRAY.clip(7)
    array[2, 3:] = 5000
    scan = read_series(write_series(tmp_path, array, modality="MR", change=changed(PixelPaddingValue=5000)))
    array[2, 3:] = 7
    same(scan, array)
    assert scan.findings == (("warning", "pixel padding in 1 of 6 slices became 7"),)
    for modality in ("CT", "MR"):
        change = changed(PixelPaddingValue=1024 if modality == "CT" else 0)
        nothing = write_series(tmp_path / modality, ARRAY * 0, modality=modality, change=change)
        refused(nothing, "holds nothing but padding; export")


def test_loss_is_said(tmp_path: Path) -> None:
    scan = read_series(write_series(tmp_path, ARRAY, change=changed(LossyImageCompression="01")))
    assert scan.findings == (("warning", "the image was compressed with loss"),)


@pytest.mark.parametrize(
    ("attributes", "facts"),
    [
        ({"ContrastBolusAgent": "Iohexol"}, {"contrast": "yes"}),
        ({"ContrastBolusAgent": "NONE"}, {"contrast": "no"}),
        ({"ContrastBolusAgent": ""}, {}),
        ({"SeriesDescription": "Lung_INSPIRATION 1.0"}, {"respiration": "inspiration"}),
        ({"ProtocolName": "Thorax expiratory"}, {"respiration": "expiration"}),
        ({"SeriesDescription": "insp and expiration"}, {}),
        ({"SeriesDescription": "experimental inspection"}, {}),
        ({"ConvolutionKernel": ["Br38f", "3"]}, {"kernel": "Br38f 3"}),
        ({"BodyPartExamined": "CHEST"}, {"body_part": "CHEST"}),
        ({"BodyPartExamined": ""}, {}),
        ({"KVP": None, "SliceThickness": None, "ConvolutionKernel": None}, {}),
    ],
)
def test_facts_are_what_the_header_states(tmp_path: Path, attributes: dict[str, Any], facts: dict[str, Any]) -> None:
    scan = read_series(write_series(tmp_path, ARRAY, change=changed(**attributes)))
    usual = {"kernel": "B40f", "slice_thickness_mm": 2.5, "tube_voltage_kv": 120.0}
    assert scan.facts == ({} if None in attributes.values() else usual) | facts


def test_facts_that_differ_between_slices_are_left_out(tmp_path: Path) -> None:
    scan = read_series(write_series(tmp_path, ARRAY, change=of_slices("KVP", [120, 120, 100, 120, 120, 120])))
    assert "tube_voltage_kv" not in scan.facts


def test_series_are_found_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "empty.dcm").write_bytes(b"")
    files = write_series(tmp_path, ARRAY, change=changed(StudyDescription=NAME))
    scouts = write_scout(tmp_path, series="scouts")
    secondary = write_series(
        tmp_path / "s", ARRAY[:1], series="z", change=changed(SOPClassUID=uid.SecondaryCaptureImageStorage)
    )
    found = find_series(sorted((file for file in tmp_path.rglob("*") if file.is_file()), reverse=True))
    assert [series.files for series in sorted(found, key=lambda series: series.files)] == [
        tuple(files),
        tuple(secondary),
        (scouts,),
    ]
    ct = next(series for series in found if series.files == tuple(files))
    assert (ct.patient_id, ct.study_uid, ct.modality) == (PATIENT, new_uid("study"), "CT")
    assert (ct.uid, ct.frame_of_reference) == (new_uid("study", "series"), new_uid("study", "frame of reference"))
    assert (ct.sop_class, ct.referenced_series) == (uid.CTImageStorage, ())
    assert ct.image and [series.image for series in found].count(True) == 1


def test_a_dicom_directory_is_passed_over(tmp_path: Path) -> None:
    files = write_series(tmp_path, ARRAY)
    change = changed(SOPClassUID=uid.MediaStorageDirectoryStorage)
    (directory,) = write_series(tmp_path / "media", ARRAY[:1], change=change)
    (found,) = find_series([directory, *files])
    assert found.files == tuple(files)


def test_a_broken_file_is_counted_not_named(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(FibldmError, match="must be readable; 1 of those found cannot be opened or parsed") as caught:
        find_series(tmp_path.iterdir())
    assert NAME not in str(caught.value)


def test_series_without_a_uid_are_told_apart_by_folder(tmp_path: Path) -> None:
    empty = changed(SeriesInstanceUID="", SOPInstanceUID="", SOPClassUID="")
    for name, seed in (("a", 1), ("b", 2)):
        write_series(tmp_path / name, example(seed=seed), change=empty)
    found = find_series(tmp_path.rglob("*.dcm"))
    assert len({series.uid for series in found}) == 2
    assert all(series.image and series.sop_class == uid.CTImageStorage for series in found)
    for series in found:
        same(read_series(series.files), example(seed=1 if series.files[0].parent.name == "a" else 2))


def test_masks_name_the_series_they_refer_to(tmp_path: Path) -> None:
    def segmentation(dataset: Dataset, _: int) -> None:
        dataset.SOPClassUID, dataset.Modality = uid.SegmentationStorage, "SEG"
        dataset.ReferencedSeriesSequence = [Dataset()]
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"

    def structures(dataset: Dataset, _: int) -> None:
        dataset.SOPClassUID, dataset.Modality = uid.RTStructureSetStorage, "RTSTRUCT"
        del dataset.FrameOfReferenceUID, dataset.PixelData
        frame, study, series = Dataset(), Dataset(), Dataset()
        series.SeriesInstanceUID, frame.FrameOfReferenceUID = "1.2.4", "1.2.5"
        study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [series], [study]
        dataset.ReferencedFrameOfReferenceSequence = [frame]

    write_series(tmp_path / "seg", ARRAY[:1], series="s", change=segmentation)
    write_series(tmp_path / "rt", ARRAY[:1], series="r", change=structures)
    found = {series.modality: series for series in find_series(tmp_path.rglob("*.dcm"))}
    assert found["SEG"].referenced_series == ("1.2.3",)
    assert (found["RTSTRUCT"].referenced_series, found["RTSTRUCT"].frame_of_reference) == (("1.2.4",), "1.2.5")
    assert not found["SEG"].image and not found["RTSTRUCT"].image


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "shape", "facts"),
    [
        ("dicom/lungdx-a0002_B40f_8mm/series", (512, 512, 30), {"kernel": "B40f"}),
        ("dicom_tricky/totalsegmentator-jpeg2000/series", (512, 512, 20), {"kernel": "Br38f 3", "contrast": "yes"}),
    ],
)
def test_real_series_agree_with_simpleitk(
    data_folder: Path, folder: str, shape: tuple[int, ...], facts: dict[str, str]
) -> None:
    """One uncompressed, one JPEG 2000 with empty UIDs."""
    (series,) = find_series((data_folder / folder).iterdir())
    scan = read_series(series.files)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(data_folder / folder))
    same_as_simpleitk(scan, SimpleITK.ReadImage(names))
    assert scan.array.shape == shape and scan.array.dtype == np.int16 and scan.findings == ()
    assert facts.items() <= scan.facts.items()


@pytest.mark.data
def test_the_tilted_series_is_refused_for_both_reasons(data_folder: Path) -> None:
    files = sorted((data_folder / "dicom_tricky" / "ge-gantry-tilt-variable-spacing").iterdir())
    error = refused(files, "gantry tilt of 18.5 degrees, and its slice spacing is uneven, 1.08 to 7.00 mm; ")
    assert error.remedy == "give `resample_tilt`, which brings such slices to a regular grid"


@pytest.mark.data
def test_jpeg_2000_that_was_cut_off(data_folder: Path, tmp_path: Path) -> None:
    files = sorted((data_folder / "dicom_tricky" / "totalsegmentator-jpeg2000" / "series").iterdir())[:3]
    copies = [tmp_path / f"{number}.dcm" for number, _ in enumerate(files)]
    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes())
    read_series(copies)
    content = copies[1].read_bytes()
    copies[1].write_bytes(content[: len(content) * 3 // 4])
    refused(copies, "slice 2 of 3 of a DICOM series must hold all its voxels")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "eCT_Supplemental.dcm",
            r"its pixels are colours or indices of a palette, and .*not in HU \(Rescale Type\)",
        ),
        ("emri_small.dcm", r"10 of 10 slices do not state their Image Position \(Patient\), Image Orientation"),
        ("emri_small_jpeg_2k_lossless.dcm", r"10 of 10 slices do not state their Image Position"),
    ],
)
def test_real_enhanced_images_are_refused_for_the_right_reason(data_folder: Path, name: str, reason: str) -> None:
    """A perfusion map in colours, and MR images whose anonymiser removed the frames' places."""
    refused([data_folder / "dicom_tricky" / "multiframe-enhanced" / name], reason)
