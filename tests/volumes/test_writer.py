"""Written volumes: H1 (the mark), H5 (geometry, as two readers see it), A32 (NIfTI with affine)."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fibldm.errors import FibldmError
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume, squared_up
from fibldm.volumes.writer import sidecar, volume_stem, write_labels, write_synthetic

COS, SIN = np.cos(0.3), np.sin(0.3)
TURNED = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, COS, -SIN], [0, SIN, COS]])
AFFINES = {
    "oblique": nibabel.affines.from_matvec(TURNED @ np.diag([0.7, 0.8, 2.5]), (-150.25, 33.5, -812.75)),
    "flipped": nibabel.affines.from_matvec(TURNED @ np.diag([-0.7, 0.8, 2.5])[:, [0, 2, 1]], (150.25, -33.5, 99.0)),
}


def volume(affine: NDArray[np.float64] = AFFINES["oblique"], dtype: type = np.int16) -> Volume:
    """CT-like, every voxel another value, negative ones among them."""
    return Volume((np.arange(4 * 5 * 6) * 7 - 400).reshape(4, 5, 6).astype(dtype), affine)


@pytest.mark.parametrize("name", AFFINES)
def test_two_readers_find_the_same_voxels_at_the_same_places(tmp_path, name):
    """Nibabel is RAS+, SimpleITK is LPS+."""
    written = volume(AFFINES[name])
    write_synthetic(tmp_path / "a_000.nii.gz", written, {})
    image = nibabel.load(tmp_path / "a_000.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), written.array)
    np.testing.assert_allclose(image.affine, written.affine, atol=1e-4)
    np.testing.assert_allclose(image.get_qform(), written.affine, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert image.get_data_dtype() == np.int16
    itk = SimpleITK.ReadImage(str(tmp_path / "a_000.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(itk).transpose(2, 1, 0), written.array)
    assert itk.GetPixelID() == SimpleITK.sitkInt16
    for index in ((0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 5), (3, 4, 5)):
        left, back, up = itk.TransformIndexToPhysicalPoint(index)
        wanted = nibabel.affines.apply_affine(written.affine, index)
        np.testing.assert_allclose((-left, -back, up), wanted, atol=1e-4)


def test_a_synthetic_volume_says_so_three_times(tmp_path):
    """Header text, header extension and sidecar."""
    path = tmp_path / "case.7_002.nii.gz"
    write_synthetic(path, volume(), {"seed": 5, "synthetic": False})
    header = nibabel.load(path).header
    assert header["descrip"].item().decode().startswith("SYNTHETIC")
    (extension,) = header.extensions
    content = extension.get_content()
    assert json.loads(content) == {"synthetic": True, "seed": 5}
    assert sidecar(path) == tmp_path / "case.7_002.json"
    assert json.loads(sidecar(path).read_text()) == {"synthetic": True, "seed": 5}
    assert "synthetic" in SimpleITK.ReadImage(str(path)).GetMetaData("descrip").lower()


@pytest.mark.parametrize("degrees", [0.01, 0.1, 0.5])
def test_axes_that_are_not_at_right_angles_are_refused_and_can_be_squared_up(tmp_path, degrees):
    """ITK opens no such file."""
    lean = nibabel.affines.from_matvec([[1, 0, np.tan(np.radians(degrees))], [0, 1, 0], [0, 0, 1]])
    sheared = volume(nibabel.affines.from_matvec(np.diag([2.0, 2.0, 2.0])) @ lean)
    with pytest.raises(FibldmError, match=rf"right angles to be written; two are {degrees:.2g} degrees off; square"):
        write_synthetic(tmp_path / "a_000.nii.gz", sheared, {})
    assert not list(tmp_path.iterdir())
    straight, moved = squared_up(sheared.grid)
    write_synthetic(tmp_path / "a_000.nii.gz", replace(sheared, affine=straight.affine), {})
    SimpleITK.ReadImage(str(tmp_path / "a_000.nii.gz"))
    np.testing.assert_allclose(straight.spacing, sheared.grid.spacing)
    np.testing.assert_allclose(straight.centre, sheared.grid.centre)
    length = np.linalg.norm(np.multiply(np.subtract(sheared.array.shape, 1), sheared.grid.spacing)[[0, 2]]) / 2
    assert moved == pytest.approx(2 * length * np.sin(np.radians(degrees) / 4), rel=1e-2)
    turned, _ = squared_up(sheared.canonical().grid)
    np.testing.assert_allclose(turned.affine, Volume(sheared.array, straight.affine).canonical().affine, atol=1e-9)


ANGLES = st.tuples(*[st.one_of(st.floats(-180, 180), st.sampled_from([0.0, 90.0, -180.0, 1e-3, 179.9]))] * 3)


@settings(max_examples=50, deadline=None)
@given(
    angles=ANGLES,
    spacing=st.tuples(*[st.floats(0.05, 12)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    space=st.sampled_from([1, 2, 4]),
)
def test_whatever_is_written_opens_in_simpleitk_at_the_same_place(angles, spacing, origin, flips, shape, space):
    """As sform or as qform, which a float32 quaternion near half a turn blurs."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = nibabel.affines.from_matvec(turn @ np.diag(np.multiply(spacing, flips)), origin).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.nii"
        write_synthetic(file, Volume(np.zeros(shape, dtype=np.int8), affine.astype(np.float64), space), {})
        opened, header = SimpleITK.ReadImage(str(file)), nibabel.load(file).header
    assert header["sform_code"] == space and opened.GetSize() == shape
    last = [length - 1 for length in shape]
    left, back, up = opened.TransformIndexToPhysicalPoint(last)
    off = nibabel.affines.apply_affine(affine, last) - (-left, -back, up)
    assert np.abs(np.linalg.solve(affine[:3, :3], off)).max() < 0.02


def test_magnetic_resonance_stays_float(tmp_path):
    write_synthetic(tmp_path / "a_000.nii.gz", volume(dtype=np.float32), {})
    assert nibabel.load(tmp_path / "a_000.nii.gz").get_data_dtype() == np.float32


def test_labels_are_written_on_their_own_grid(tmp_path):
    labels = Volume((np.arange(60).reshape(3, 4, 5) % 7).astype(np.uint8), AFFINES["flipped"])
    write_labels(tmp_path / "masks" / "a.nii.gz", labels)
    read = read_volume(str(tmp_path / "masks" / "a.nii.gz"))
    np.testing.assert_array_equal(read.array, labels.array)
    np.testing.assert_allclose(read.affine, labels.affine, atol=1e-4)
    assert read.array.dtype == np.uint8


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path, value):
    broken = volume(dtype=np.float32)
    broken.array[1, 2, 3] = value
    with pytest.raises(FibldmError, match="a synthetic volume must be finite; a_000.nii.gz is not"):
        write_synthetic(tmp_path / "a_000.nii.gz", broken, {})
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_nothing_and_says_so_once(tmp_path, monkeypatch):
    def full_disk(image: nibabel.Nifti1Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full_disk)
    with pytest.raises(FibldmError, match="cannot write .*a_000.nii.gz: No space left on device; check the free disk"):
        write_synthetic(tmp_path / "a_000.nii.gz", volume(), {})
    with pytest.raises(FibldmError, match="cannot write .*a.nii.gz: No space left"):
        write_labels(tmp_path / "a.nii.gz", volume())
    assert not list(tmp_path.iterdir())


def test_a_volume_is_never_without_its_sidecar(tmp_path):
    """What cannot be said in the sidecar keeps the volume from being written."""
    with pytest.raises(ValueError, match="JSON"):
        write_synthetic(tmp_path / "a_000.nii.gz", volume(), {"guidance": float("nan")})
    assert not list(tmp_path.iterdir())


def test_stems():
    assert volume_stem(Path("x/a.b.nii.gz")) == "a.b"
    assert volume_stem(Path("x/a.b.nii")) == "a.b"
