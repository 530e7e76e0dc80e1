"""In and out by every way: the same voxels at the same places, whatever the axes."""

import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import example, expected, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fibldm.errors import FibldmError
from fibldm.volumes.dicom.writer import Identity, make_series
from fibldm.volumes.dicom.writer import write_series as write_synthetic_series
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Volume
from fibldm.volumes.scan import Scan
from fibldm.volumes.writer import write_nifti, write_synthetic

ANGLES = st.tuples(*[st.floats(-180, 180)] * 3)
SPACINGS = st.tuples(*[st.floats(0.3, 7)] * 3)
ORIGINS = st.tuples(*[st.floats(-900, 900)] * 3)
FLIPS = st.tuples(*[st.sampled_from([1, -1])] * 3)


def volume_of(angles: tuple, spacing: tuple, origin: tuple, flips: tuple) -> Volume:
    """Oblique, anisotropic, of either handedness; every voxel differs from its neighbours."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = nibabel.affines.from_matvec(turn @ np.diag(np.multiply(spacing, flips)), origin)
    return Volume(example((5, 6, 8)), affine)


def assert_same(found: Scan | Volume, volume: Volume) -> None:
    given_one = volume.canonical()
    placed = Volume(found.array, found.affine).canonical()
    np.testing.assert_array_equal(placed.array, given_one.array)
    np.testing.assert_allclose(placed.affine, given_one.affine, atol=2e-3)


@given(angles=ANGLES, spacing=SPACINGS, origin=ORIGINS, flips=FLIPS)
@settings(max_examples=15, deadline=None)
def test_nifti_and_dicom_out_give_one_volume(angles: tuple, spacing: tuple, origin: tuple, flips: tuple) -> None:
    """Written as NIfTI and as DICOM and read back, a volume has its voxels at the same places."""
    volume = volume_of(angles, spacing, origin, flips)
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder) / "a.nii.gz", volume, {})
        slices = make_series(volume, modality="ct", value_range=(-1024, 3071), identity=Identity("a", "b"))
        write_synthetic_series(Path(folder) / "series", slices)
        assert_same(read_volume(Path(folder) / "a.nii.gz"), volume)
        assert_same(read_scan((Path(folder) / "a.nii.gz",)), volume)
        assert_same(read_scan(tuple((Path(folder) / "series").iterdir())), volume)


@given(angles=ANGLES, spacing=SPACINGS, origin=ORIGINS)
@settings(max_examples=10, deadline=None)
def test_nifti_and_dicom_in_give_one_volume(angles: tuple, spacing: tuple, origin: tuple) -> None:
    """A scanner's series and the NIfTI of the same volume are read as one array and affine."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    geometry = {"spacing": spacing, "origin": origin, "orientation": (*turn[:, 0], *turn[:, 1])}
    with tempfile.TemporaryDirectory() as folder:
        files = write_series(Path(folder) / "series", example(), **geometry)
        array, affine = expected(example(), **geometry)
        write_nifti(Path(folder) / "a.nii.gz", array, affine)
        series, nifti = read_scan(tuple(files)), read_scan((Path(folder) / "a.nii.gz",))
    np.testing.assert_array_equal(series.array, nifti.array)
    np.testing.assert_allclose(series.affine, nifti.affine, atol=2e-3)


@pytest.mark.parametrize("shear", [0.05, -0.3])
def test_sheared_volumes_are_refused_by_every_way(tmp_path: Path, shear: float) -> None:
    """Nothing is straightened by guess."""
    volume = volume_of((10, 20, 30), (1, 2, 3), (5, 6, 7), (1, 1, 1))
    sheared = Volume(volume.array, volume.affine @ nibabel.affines.from_matvec([[1, shear, 0], [0, 1, 0], [0, 0, 1]]))
    nibabel.save(nibabel.Nifti1Image(sheared.array, sheared.affine), tmp_path / "a.nii.gz")
    with pytest.raises(FibldmError, match="the axes must be at right angles"):
        read_volume(tmp_path / "a.nii.gz")
    (finding,) = read_scan((tmp_path / "a.nii.gz",)).findings
    assert finding[0] == "error" and "the axes must be at right angles" in finding[1]
    with pytest.raises(FibldmError, match="right angles"):
        make_series(sheared, modality="ct", value_range=(-1024, 3071), identity=Identity("a", "b"))
    tilted = write_series(tmp_path / "tilted", example(), tilt=np.degrees(np.arctan(abs(shear))))
    with pytest.raises(FibldmError, match="sheared, as by a gantry tilt"):
        read_scan(tuple(tilted))
