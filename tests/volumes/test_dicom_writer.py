"""Synthetic DICOM, as other libraries and programs judge it: H1 (marks), H2 (nothing of a patient), H5 (geometry)."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from fibldm import __version__
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.phantoms.phantoms import LABELS
from fibldm.volumes.dicom.label_codes import COLUMNS, SHIPPED, LabelCodes, load_label_codes
from fibldm.volumes.dicom.output import DicomOutput
from fibldm.volumes.dicom.segmentation_writer import write_segmentation
from fibldm.volumes.dicom.template import TECHNICAL, read_template
from fibldm.volumes.dicom.writer import Identity, make_series, quantisation_step, write_series
from fibldm.volumes.grid import Volume
from fibldm.volumes.intensity import Intensity

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
RANGES = {"ct": (-1000.0, 600.0), "mr": (12.5, 812.3)}
SHAPE = (9, 8, 7)
NAMES = {1: "left lung", 2: "ground glass", 5: "Tumor"}
TURNED = Rotation.from_euler("xyz", [0.2, -0.15, 0.3]).as_matrix()
AFFINES = {
    "axial": nibabel.affines.from_matvec(np.diag([-0.75, -1.25, 2.5]), (80.0, -31.0, 412.0)),
    "oblique": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, 2.5]), (80.0, -31.0, 412.0)),
    "mirrored": nibabel.affines.from_matvec(TURNED @ np.diag([-0.75, 1.25, 2.5]), (80.0, -31.0, 412.0)),
    "sagittal": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, -2.5])[:, [1, 2, 0]], (-9.0, 31.0, 99.0)),
    "coronal": nibabel.affines.from_matvec(TURNED @ np.diag([0.75, 1.25, 2.5])[:, [2, 0, 1]], (-9.0, 31.0, 99.0)),
}
IDENTITY = Identity(patient="a mask", key="a request")


def image(modality: str, affine: NDArray[np.float64] = AFFINES["oblique"]) -> Volume:
    """Without any symmetry, and with both ends of the range."""
    low, high = RANGES[modality]
    array = np.random.default_rng(1).uniform(low, high, SHAPE)
    array[1, 2, 3], array[3, 2, 1] = low, high
    return Volume(np.rint(array).astype(np.int16) if modality == "ct" else array.astype(np.float32), affine)


def mask(affine: NDArray[np.float64] = AFFINES["oblique"]) -> Volume:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:5, 2:4, 1:3], labels[5:7, :, 4], labels[8, 0, :], labels[0, 0, 0] = 1, 2, 5, 255
    return Volume(labels, affine)


def series(modality: str, affine: NDArray[np.float64] = AFFINES["oblique"], **options: Any) -> list[pydicom.Dataset]:
    arguments = {"modality": modality, "value_range": RANGES[modality], "identity": IDENTITY, **options}
    return make_series(image(modality, affine), **arguments)


def segment(file: Path, slices: list[pydicom.Dataset], labels: Volume, names: dict[int, str] = NAMES) -> Path:
    meanings = load_label_codes().find(names.values())
    identity = replace(IDENTITY, key=str(slices[0].Modality))
    write_segmentation(file, labels, names=names, meanings=meanings, series=slices, identity=identity)
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with series ``ct`` and ``mr`` and their masks ``ct.dcm`` and ``mr.dcm``."""
    folder = tmp_path_factory.mktemp("dicom")
    for modality in RANGES:
        slices = series(modality, identity=replace(IDENTITY, key=modality))
        write_series(folder / modality, slices)
        segment(folder / f"{modality}.dcm", slices, mask())
    return folder


def assert_same_places(read: Volume, wanted: Volume, *, within: float = 0.0, off: float = 1e-5) -> None:
    """Every voxel of ``wanted`` lies at the place of a voxel of ``read``, with its value."""
    assert sorted(read.array.shape) == sorted(wanted.array.shape)
    index = np.indices(wanted.array.shape).reshape(3, -1).T
    place = nibabel.affines.apply_affine(np.linalg.inv(read.affine) @ wanted.affine, index)
    np.testing.assert_allclose(place, np.rint(place), atol=off)
    found = read.array[tuple(np.rint(place).astype(int).T)]
    np.testing.assert_allclose(found.astype(float), wanted.array.ravel().astype(float), rtol=0, atol=within)


def by_highdicom(slices: list[pydicom.Dataset]) -> Volume:
    read = highdicom.get_volume_from_series(slices)
    return Volume(read.array, LPS_TO_RAS @ read.affine)


def by_itk(folder: Path) -> Volume:
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    read = SimpleITK.ReadImage(files)
    matrix = np.reshape(read.GetDirection(), (3, 3)) * read.GetSpacing()
    affine = LPS_TO_RAS @ nibabel.affines.from_matvec(matrix, read.GetOrigin())
    return Volume(SimpleITK.GetArrayFromImage(read).transpose(2, 1, 0), affine)


def read_all(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


def tolerance(modality: str) -> float:
    """Half a quantisation step of MR, and the rounding of float32; CT is exact."""
    return 0.0 if modality == "ct" else quantisation_step("mr", RANGES["mr"]) / 2 + 1e-4


@pytest.mark.parametrize("plane", AFFINES)
@pytest.mark.parametrize("modality", RANGES)
def test_two_libraries_read_the_same_voxels_at_the_same_places(tmp_path, modality, plane):
    """H5, whatever the plane of the slices."""
    write_series(tmp_path / "series", series(modality, AFFINES[plane]))
    wanted = image(modality, AFFINES[plane])
    for read in (by_highdicom(read_all(tmp_path / "series")), by_itk(tmp_path / "series")):
        assert_same_places(read, wanted, within=tolerance(modality))


@pytest.mark.parametrize("modality", RANGES)
def test_stored_values_are_the_same_for_all_readers(written, modality):
    """To the bit."""
    slices = read_all(written / modality)
    slope, intercept = float(slices[0].RescaleSlope), float(slices[0].RescaleIntercept)
    stored = np.stack([item.pixel_array for item in slices]).transpose(2, 1, 0)
    values = stored * slope + intercept
    np.testing.assert_allclose(by_itk(written / modality).array, values, rtol=1e-12 if modality == "ct" else 1e-7)
    # highdicom counts slices against their normal
    np.testing.assert_array_equal(by_highdicom(slices).array[::-1].transpose(2, 1, 0), values)
    assert stored.dtype == {"ct": np.int16, "mr": np.uint16}[modality]
    if modality == "mr":
        assert (stored.min(), stored.max(), slope) == (0, 65535, quantisation_step("mr", RANGES["mr"]))


@pytest.mark.parametrize("modality", RANGES)
def test_dcm2niix_converts_it_to_the_same_volume(written, tmp_path, modality):
    program = _program("dcm2niix")
    subprocess.run([program, "-o", tmp_path, "-f", "out", written / modality], check=True, capture_output=True)
    (file,) = tmp_path.glob("*.nii")
    read = nibabel.load(file)
    rounding = 0.0 if modality == "ct" else 1e-3
    wanted = image(modality)
    assert_same_places(
        Volume(np.asanyarray(read.dataobj), read.affine), wanted, within=tolerance(modality) + rounding, off=1e-3
    )
    stored = np.stack([item.pixel_array for item in read_all(written / modality)]).transpose(2, 1, 0)
    np.testing.assert_array_equal(np.sort(read.dataobj.get_unscaled().ravel()), np.sort(stored.ravel()))


@settings(max_examples=20, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
)
def test_any_orientation_comes_back(angles, spacing, origin, flips):
    """Oblique, mirrored, anisotropic; slices in order along their normal."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = nibabel.affines.from_matvec(turn @ np.diag(np.multiply(spacing, flips)), origin)
    slices = series("ct", affine)
    assert_same_places(by_highdicom(slices), image("ct", affine))
    row, column = np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float)
    along = [np.cross(row, column) @ np.array(item.ImagePositionPatient, dtype=float) for item in slices]
    np.testing.assert_allclose(np.diff(along), spacing[2], rtol=1e-5)


def test_slices_are_shown_as_radiologists_look_at_them():
    """Axial and coronal with the patient's left on the right, head up; sagittal looking from the left."""
    shown = {name: np.reshape(series("ct", AFFINES[name])[0].ImageOrientationPatient, (2, 3)) for name in AFFINES}
    wanted = {"axial": "LP", "oblique": "LP", "mirrored": "LP", "coronal": "LI", "sagittal": "PI"}
    directions = {"L": (1, 0, 0), "P": (0, 1, 0), "I": (0, 0, -1)}
    for plane, letters in wanted.items():
        for letter, direction in zip(letters, shown[plane].astype(float), strict=True):
            assert direction @ directions[letter] > 0.9


def test_one_slice(tmp_path):
    volume = image("ct")
    flat = Volume(volume.array[:, :, :1], volume.affine)
    (only,) = make_series(flat, modality="ct", value_range=RANGES["ct"], identity=IDENTITY)
    assert (only.Rows, only.Columns, float(only.SliceThickness)) == (8, 9, pytest.approx(2.5))


@pytest.mark.parametrize("modality", RANGES)
def test_series_says_that_it_is_synthetic(written, modality):
    """In every file, and the key decides the UIDs."""
    slices = read_all(written / modality)
    for item in slices:
        assert (item.SyntheticData, item.ContentQualification, item.BurnedInAnnotation) == ("YES", "RESEARCH", "NO")
        assert list(item.ImageType)[:2] == ["DERIVED", "SECONDARY"]
        (equipment,) = item.ContributingEquipmentSequence
        purpose = equipment.PurposeOfReferenceCodeSequence[0]
        assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("109100", "DCM")
        assert (equipment.Manufacturer, equipment.SoftwareVersions) == ("FibLDM", __version__)
        assert str(item.PatientName) == f"SYNTHETIC^{IDENTITY.patient_id}"
        assert item.PatientID == f"SYNTHETIC-{IDENTITY.patient_id}"
        assert item.SeriesDescription.startswith("SYNTHETIC") and "no patient" in item.DerivationDescription
        assert not [element for element in item.iterall() if element.VR in ("DA", "TM", "DT") and element.value]
    assert [item.InstanceNumber for item in slices] == list(range(1, 8))
    assert len({item.SOPInstanceUID for item in slices}) == 7
    assert len({(item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID) for item in slices}) == 1


def test_the_same_request_gives_the_same_files_and_another_one_none_of_their_uids():
    one, same = series("ct"), series("ct")
    other = series("ct", identity=replace(IDENTITY, key="another"))
    for item, again, different in zip(one, same, other, strict=True):
        assert item == again and item.file_meta == again.file_meta
        uids = {element.value for element in item.iterall() if element.VR == "UI"}
        others = {element.value for element in different.iterall() if element.VR == "UI"}
        assert len(uids) == 5 and uids & others == {item.SOPClassUID}
        assert item.PatientID == different.PatientID


@pytest.mark.parametrize("plane", AFFINES)
def test_the_mask_as_segmentation(tmp_path, plane):
    """Each label on its voxels, with name, codes, side, and a reference to every slice."""
    slices = series("ct", AFFINES[plane])
    read = highdicom.seg.segread(segment(tmp_path / "mask.dcm", slices, mask(AFFINES[plane])))
    full = read.get_volume(combine_segments=True)
    wanted = mask(AFFINES[plane])
    numbers = np.select([wanted.array == value for value in NAMES], [1, 2, 3], default=0)
    assert_same_places(Volume(full.array, LPS_TO_RAS @ full.affine), Volume(numbers, wanted.affine))
    assert [item.SegmentLabel for item in read.SegmentSequence] == list(NAMES.values())
    lung, glass, tumour = read.SegmentSequence
    kind = lung.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("39607008", "Left")
    assert glass.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "DCM"
    assert glass.AnatomicRegionSequence[0].CodeMeaning == "Lung"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    (reference,) = read.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == slices[0].SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence}
    assert referenced == {item.SOPInstanceUID for item in slices}
    assert (read.SyntheticData, read.ContentQualification) == ("YES", "RESEARCH")
    assert (read.PatientID, read.StudyInstanceUID) == (slices[0].PatientID, slices[0].StudyInstanceUID)
    purposes = [item.PurposeOfReferenceCodeSequence[0].CodeValue for item in read.ContributingEquipmentSequence]
    assert "109100" in purposes and codes.DCM.AcquisitionEquipment.value not in purposes


@pytest.mark.parametrize("modality", RANGES)
def test_dciodvfy_finds_no_error(written, tmp_path, modality):
    """But for the Synthetic Data attribute, which is younger than the program's dictionary."""
    program = _program("dciodvfy")
    write_series(tmp_path / "out", series(modality, template=read_template(planted(tmp_path / "source", modality))))
    kind = {"ct": "CTImage", "mr": "MRImage"}[modality]
    checked = {written / modality / "0001.dcm": kind, tmp_path / "out" / "0001.dcm": kind}
    for file, name in (checked | {written / f"{modality}.dcm": "Segmentation"}).items():
        said = subprocess.run([program, "-new", file], capture_output=True, text=True, check=False).stderr.splitlines()
        assert name in said
        errors = [line for line in said if line.startswith("Error")]
        assert [line for line in errors if not line.startswith("Error - </(0008,001c)> - Attribute with an even")] == []


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[str]:
    """The address of an Orthanc server on loopback with a storage folder of its own."""
    program = _program("Orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = {
        "StorageDirectory": str(tmp_path / "storage"),
        "IndexDirectory": str(tmp_path / "storage"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(configuration))
    address = f"http://127.0.0.1:{port}"
    command = [program, str(tmp_path / "orthanc.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"{address}/system", server)
            yield address
        finally:
            server.terminate()


def test_orthanc_keeps_it_unchanged(written, orthanc):
    """Every file comes back as the same bytes; each series and its mask end in one study."""
    for modality in RANGES:
        files = [*sorted((written / modality).iterdir()), written / f"{modality}.dcm"]
        for file in files:
            answer = json.loads(_ask(f"{orthanc}/instances", file.read_bytes()))
            assert answer["Status"] == "Success"
            assert _ask(f"{orthanc}/instances/{answer['ID']}/file") == file.read_bytes()
    studies = json.loads(_ask(f"{orthanc}/studies?expand"))
    assert [len(study["Series"]) for study in studies] == [2, 2]


def _ask(address: str, data: bytes | None = None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, data=data, timeout=200) as answer:
        content: bytes = answer.read()
    return content


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "Orthanc stopped"
        try:
            _ask(address)
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("Orthanc does not answer")


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"needs the program {name}")
    return found


PLANTED = {
    "PatientName": "Planted^Paula",
    "PatientID": "PLANTED-4711",
    "PatientBirthDate": "19560723",
    "StudyDate": "20190314",
    "StudyID": "PLANTED-1",
    "AccessionNumber": "PLANTED-2",
    "StudyDescription": "PLANTED study",
    "SeriesDescription": "PLANTED series",
    "ProtocolName": "PLANTED protocol",
    "InstitutionName": "PLANTED hospital",
    "OperatorsName": "Planted^Otto",
    "DeviceSerialNumber": "PLANTED-3",
    "StationName": "PLANTED-4",
    "Manufacturer": "PLANTED scanners",
    "ImageComments": "PLANTED comment",
    "ContrastBolusAgent": "PLANTED agent",
}
TAKEN: dict[str, dict[str, Any]] = {
    "ct": {"KVP": 120, "ConvolutionKernel": ["B40f", "3"], "SliceThickness": 3.5, "PatientPosition": "FFS"},
    "mr": {
        "MagneticFieldStrength": 3,
        "RepetitionTime": 2300.5,
        "EchoTime": 2.98,
        "InversionTime": 900,
        "ScanningSequence": ["GR", "IR"],
    },
}


def planted(folder: Path, modality: str, affine: NDArray[np.float64] = AFFINES["oblique"]) -> Path:
    """A series of a patient, with technical tags, one of which differs between slices."""
    slices = series(modality, affine, identity=Identity("patient", "planted"))
    for number, item in enumerate(slices):
        for keyword, value in (PLANTED | TAKEN[modality] | {"BodyPartExamined": "CHEST"}).items():
            setattr(item, keyword, value)
        item.private_block(0x0099, "PLANTED", create=True).add_new(1, "LO", "PLANTED private")
        item.SeriesInstanceUID, item.StudyInstanceUID = (
            generate_uid(entropy_srcs=["s"]),
            generate_uid(entropy_srcs=["t"]),
        )
        if modality == "ct":
            item.ReconstructionDiameter = 300 + number
    write_series(folder, slices[::-1])
    (folder / "notes.txt").write_text("no DICOM")
    return folder


@pytest.mark.parametrize("modality", RANGES)
def test_template_gives_technical_tags_and_nothing_of_the_patient(tmp_path, modality):
    """No planted value and no UID of the template appears; the marks stay."""
    source = planted(tmp_path / "source", modality)
    template = read_template(source)
    assert {item.keyword for item in template.tags} <= set(TECHNICAL[template.modality])
    slices = series(modality, template=template)
    write_series(tmp_path / "out", slices)
    segment(tmp_path / "mask.dcm", slices, mask())
    for keyword, value in TAKEN[modality].items():
        assert slices[3][keyword].value == value
    assert "BodyPartExamined" not in slices[0] and "ReconstructionDiameter" not in slices[0]
    assert slices[0].Manufacturer == "FibLDM" and slices[0].SyntheticData == "YES"
    secret = {str(value) for value in PLANTED.values()} | {"PLANTED", "Planted"}
    originals = [item for item in map(_read_if_dicom, source.iterdir()) if item]
    standard = {originals[0].SOPClassUID}
    secret |= {element.value for item in originals for element in item.iterall() if element.VR == "UI"} - standard
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "mask.dcm"):
        content = file.read_bytes()
        assert [text for text in secret if text.encode() in content] == []


def _read_if_dicom(file: Path) -> pydicom.Dataset | None:
    return pydicom.dcmread(file) if file.suffix == ".dcm" else None


@pytest.mark.data
def test_a_template_of_a_real_series(data_folder):
    """The tags of a Siemens CT, on its own grid."""
    template = read_template(data_folder / "dicom" / "lungdx-a0002_B40f_8mm" / "series")
    lungs = nibabel.load(data_folder / "dicom" / "lungdx-a0002_B40f_8mm" / "lung_derived.nii.gz")
    template.check("ct", Volume(np.asanyarray(lungs.dataobj), lungs.affine).grid)
    assert template.tags.ConvolutionKernel == "B40f"


def test_templates_that_do_not_fit_are_refused(tmp_path):
    """Says what differs."""
    template = read_template(planted(tmp_path / "source", "ct"))
    volume = image("ct")
    template.check("ct", volume.grid)
    template.check("ct", volume.canonical().grid)
    moved = volume.affine @ nibabel.affines.from_matvec(np.eye(3), (0.0, 0.0, 0.5))
    wrong = [
        ("mr", volume, "must be of the modality MR; it is CT; give a series"),
        (
            "ct",
            Volume(volume.array[:8], volume.affine),
            "grid of the template.*; size 8 x 8 x 7 instead of 9 x 8 x 7 vo",
        ),
        ("ct", Volume(volume.array, AFFINES["oblique"] @ np.diag([1, 2, 1, 1])), "spacing 0.75 x 2.5 x 2.5 instead of"),
        ("ct", Volume(volume.array, moved), "position or direction up to 1.25 mm off; draw the mask on that series"),
    ]
    for modality, other, message in wrong:
        with pytest.raises(FibldmError, match=message):
            template.check(modality, other.grid)
    with pytest.raises(FibldmError, match="size 8 x 8 x 7"):
        make_series(wrong[1][1], modality="ct", value_range=RANGES["ct"], identity=IDENTITY, template=template)


def test_folders_that_are_no_template(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("two", "gap", "unplaced", "scan"):
        planted(tmp_path / name, "ct")
    for file in sorted((tmp_path / "two").glob("*.dcm"))[:2]:
        _change(file, SeriesInstanceUID=generate_uid(entropy_srcs=["other"]))
    (tmp_path / "gap" / "0003.dcm").unlink()
    _change(tmp_path / "unplaced" / "0002.dcm", ImagePositionPatient=None)
    for file in (tmp_path / "scan").glob("*.dcm"):
        _change(file, SOPClassUID=pydicom.uid.SecondaryCaptureImageStorage)
    wrong = {
        "absent": "a template must be a folder .*there is no such folder",
        "empty": "exactly one CT, MR or PET series of single-frame images; it holds 0 kinds of images in 0 DICOM files",
        "two": "it holds 2 kinds of images in 7 DICOM files; put the files of one series into a folder",
        "scan": "exactly one CT, MR or PET series.*it holds 1 kind of images",
        "gap": "must be parallel, alike and regularly spaced; give a regularly spaced series without gantry tilt",
        "unplaced": "must say where its slices lie; some do not",
    }
    for name, message in wrong.items():
        with pytest.raises(FibldmError, match=message) as raised:
            read_template(tmp_path / name)
        assert "lanted" not in str(raised.value) and "PLANTED" not in str(raised.value)


def _change(file: Path, **values: Any) -> None:
    dataset = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)


def test_volumes_that_are_refused():
    sheared = AFFINES["oblique"].copy()
    sheared[:3, 2] += 0.1 * sheared[:3, 0]
    half, large, nan = image("ct"), image("mr"), image("mr")
    half = Volume(half.array + 0.5, half.affine)
    large.array[0, 0, 0], nan.array[0, 0, 0] = 900, np.nan
    wrong = [
        ("ct", image("ct", sheared), r"voxel axes at right angles; two of them are 1.72 degrees off; resample"),
        ("ct", half, r"CT must be whole HU within \[-32768, 32767\]"),
        ("mr", large, r"MR must lie within its range \[12.5, 812.3\].*; it reaches from 12.5 to 900"),
        ("mr", nan, "MR must lie within its range"),
    ]
    for modality, volume, message in wrong:
        with pytest.raises(FibldmError, match=message):
            make_series(volume, modality=modality, value_range=RANGES[modality], identity=IDENTITY)


def test_masks_without_labels_or_names_are_refused(tmp_path):
    empty = Volume(np.full(SHAPE, 255, dtype=np.uint8), AFFINES["oblique"])
    for labels, names, message in [
        (empty, NAMES, "at least one label, and a name for each; the mask is empty"),
        (mask(), {1: "left lung"}, "there is none for 2, 5"),
    ]:
        with pytest.raises(FibldmError, match=message):
            segment(tmp_path / "mask.dcm", series("ct"), labels, names)
    assert list(tmp_path.iterdir()) == []


def test_a_series_is_whole_or_absent(tmp_path, monkeypatch):
    write_series(tmp_path / "there", series("ct"))
    with pytest.raises(FibldmError, match="cannot write .*there: "):
        write_series(tmp_path / "there", series("ct"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_disk)
        with pytest.raises(FibldmError, match="cannot write .*new: No space left on device; check its permissions"):
            write_series(tmp_path / "new", series("ct"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def _full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_every_code_of_the_shipped_table_is_in_the_dictionaries():
    """Code and meaning as pydicom has them, categories of DICOM's own list; the phantoms' labels are there."""
    known = {
        (code.scheme_designator, code.value, code.meaning)
        for scheme in (codes.SCT, codes.DCM)
        for code in (getattr(scheme, keyword) for keyword in scheme.dir())
    }
    categories = {getattr(codes.cid7150, keyword).value for keyword in codes.cid7150.dir()}
    table = load_label_codes()
    for name, code in table.by_name.items():
        assert code.category.value in categories, name
        for part in (code.category, code.type, code.modifier, code.region):
            assert part is None or (part.scheme_designator, part.value, part.meaning) in known, name
        assert (code.modifier is not None and code.modifier.meaning == "Left") == ("left" in name.split()), name
    assert len(table.find([name for value, name in LABELS.items() if value])) == 6
    assert table.find(["LEFT_lung"])["LEFT_lung"] == table.find(["lung-left"])["lung-left"]


def _table(tmp_path: Path, *rows: str, header: str = ",".join(COLUMNS)) -> Path:
    file = tmp_path / "codes.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_own_codes_come_before_the_shipped_ones(tmp_path):
    row = "{},{},49755003,Morphologically Abnormal Structure,SCT,52988006,Lesion,,,39607008,Lung,#0a0B0c"
    own = load_label_codes(_table(tmp_path, row.format("strange", "odd|Liver")))
    for name in ("Strange", "odd", "liver"):
        found = own.find([name])[name]
        assert (found.type.meaning, found.region.meaning, found.colour) == ("Lesion", "Lung", (10, 11, 12))
    assert own.find(["spleen"]) == load_label_codes().find(["spleen"])


def test_unknown_labels_and_unsound_tables_are_refused(tmp_path):
    with pytest.raises(
        FibldmError, match="coded meaning for every label; .*none for Anterior, x y; give `label_codes`"
    ):
        load_label_codes().find(["lung", "Anterior", "x y"])
    good = "a,,91723000,Anatomical Structure,SCT,39607008,Lung,,,,,#010203"
    wrong = [
        ([good, good], "must give every name once; a comes twice"),
        ([good.replace("39607008", "lung")], "row 2: type must be a code of digits and a meaning of up to 64"),
        ([good, good.replace("SCT", "SRT")], "row 3: type_scheme must be SCT or DCM, got 'SRT'"),
        (
            [good.replace("#010203", "red"), good[1:]],
            "row 2: colour must be #rrggbb, got 'red'; row 3: name must not be",
        ),
        ([good + ",x"], "row 2: must have 12 fields"),
        ([good.rsplit(",", 1)[0]], "row 2: must have 12 fields"),
    ]
    for rows, message in wrong:
        with pytest.raises(FibldmError, match=message):
            load_label_codes(_table(tmp_path, *rows))
    with pytest.raises(
        FibldmError, match="codes.csv must have all columns of label codes; it lacks synonyms, category"
    ):
        load_label_codes(_table(tmp_path, header="name"))
    with pytest.raises(FibldmError, match="absent.csv must be a readable table"):
        load_label_codes(tmp_path / "absent.csv")
    (tmp_path / "codes.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(FibldmError, match="codes.csv must be a readable table"):
        load_label_codes(tmp_path / "codes.csv")


def test_output_with_sidecar(tmp_path):
    """Series, mask and sidecar; the mask's name, which may tell a patient, is in no DICOM file."""
    output = DicomOutput.read()
    assert isinstance(output.codes, LabelCodes) and SHIPPED.exists()
    request = {"mask": "Planted.nii.gz", "mask_sha256": "abc", "request": "1"}
    rule = Intensity("percentile", output_low=RANGES["mr"][0], output_high=RANGES["mr"][1])
    arguments = {"names": NAMES, "intensity": rule, "request": request, "provenance": {"synthetic": False, "number": 1}}
    output.write(tmp_path / "Planted_001", image("mr"), mask(), **arguments)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert names == [
        *("Planted_001.json", *(f"Planted_001/{number:04d}.dcm" for number in range(1, 8)), "masks/Planted_001.dcm")
    ]
    facts = read_json(tmp_path / "Planted_001.json")
    assert facts["synthetic"] is True and facts["number"] == 1 and facts["mask_sha256"] == "abc"
    step = quantisation_step("mr", RANGES["mr"])
    assert facts["dicom"] == {"quantisation_step": step, "template": False, "slices": 7}
    for file in tmp_path.rglob("*.dcm"):
        assert b"Planted" not in file.read_bytes()


def test_several_channels_are_refused():
    rule = Intensity("percentile", output_low=(0.0, 1.0), output_high=(5.0, 6.0))
    with pytest.raises(FibldmError, match="a DICOM series holds one channel; this run gives several; use `format` nif"):
        DicomOutput.read().check(image("mr").grid, NAMES, rule)


@pytest.mark.parametrize(("stated", "position", "written"), [("", None, ""), ("", "FFP", "FFP"), ("HFS", None, "HFS")])
def test_patient_position_is_known_or_empty(tmp_path, stated, position, written):
    """A grid is the same whichever way the patient lay."""
    template = series("ct", AFFINES["axial"])
    for item in template:
        item.PatientPosition = stated
    write_series(tmp_path / "template", template)
    dicom = DicomOutput.read(tmp_path / "template", position=position)
    volume = image("ct", AFFINES["axial"])
    labels = Volume(np.ones(SHAPE, dtype=np.uint8), volume.affine)
    given = {"names": NAMES, "intensity": Intensity("window", low=-1000, high=600), "provenance": {}}
    dicom.write(tmp_path / "a_000", volume, labels, request={"mask_sha256": "a"}, **given)
    assert {item.PatientPosition or "" for item in read_all(tmp_path / "a_000")} == {written}
    assert (dicom.fingerprint(NAMES) == replace(dicom, position=None).fingerprint(NAMES)) == (position is None)
    with pytest.raises(FibldmError, match="`patient_position` must be one of HFS, .*; got 'supine'"):
        DicomOutput.read(position="supine")
    if stated:
        with pytest.raises(FibldmError, match="must be that of the template, HFS; got FFS"):
            DicomOutput.read(tmp_path / "template", position="FFS")


def test_sheared_masks_are_refused_before_a_volume_is_made():
    sheared = AFFINES["oblique"] + np.outer(AFFINES["oblique"][:, 0], (0, 0.1, 0, 0))
    with pytest.raises(FibldmError, match="voxel axes at right angles"):
        DicomOutput.read().check(image("ct", sheared).grid, NAMES, Intensity("window"))
