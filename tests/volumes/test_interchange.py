"""Images of SimpleITK and TorchIO in and out, compared by the other library's own words about physical space."""

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
import torchio
from scipy.spatial.transform import Rotation

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume
from fibldm.volumes.interchange import as_volume, to_sitk, to_torchio

POINTS = [(0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 6), (3, 4, 6)]


def oblique() -> Volume:
    """Anisotropic, turned about all axes, stored L, P, S."""
    turn = Rotation.from_euler("xyz", (11, -7, 16), degrees=True).as_matrix() @ np.diag([-0.75, -1.25, 3.5])
    array = np.random.default_rng(0).permutation(140).reshape(4, 5, 7).astype(np.int16)
    return Volume(array, nibabel.affines.from_matvec(turn, (-41.0, 17.0, 230.0)))


def test_a_volume_is_the_same_for_simpleitk() -> None:
    volume = oblique()
    image = to_sitk([volume])
    for index in POINTS:
        left, back, up = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose([-left, -back, up], nibabel.affines.apply_affine(volume.affine, index), atol=1e-9)
        assert image.GetPixel(index) == volume.array[index]
    back = as_volume(image)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-12)


def test_a_file_that_simpleitk_reads_is_what_nibabel_reads(tmp_path) -> None:
    SimpleITK.WriteImage(to_sitk([oblique()]), str(tmp_path / "a.nii.gz"))
    read = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(read.dataobj), oblique().array)
    np.testing.assert_allclose(read.affine, oblique().affine, atol=1e-4)


def test_a_volume_is_the_same_for_torchio() -> None:
    volume = oblique()
    image = to_torchio([volume])
    assert image.spacing == pytest.approx((0.75, 1.25, 3.5)) and image.orientation == ("L", "P", "S")
    back = as_volume(torchio.LabelMap(tensor=image.data, affine=image.affine))
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-12)
    both = torchio.Subject(t1=image, seg=torchio.LabelMap(tensor=image.data + 1, affine=image.affine))
    np.testing.assert_array_equal(as_volume(both).array, volume.array + 1)


def test_channels_are_components_and_channels() -> None:
    channels = [oblique(), Volume(oblique().array + 500, oblique().affine)]
    assert to_sitk(channels).GetPixel((1, 2, 3)) == (channels[0].array[1, 2, 3], channels[1].array[1, 2, 3])
    assert to_torchio(channels).shape == (2, 4, 5, 7)


def test_what_is_no_volume_is_refused() -> None:
    image = torchio.ScalarImage(tensor=torch.zeros(1, 4, 5, 6))
    for given, message in [
        (np.zeros((3, 4, 5)), "must be a Volume, a SimpleITK.Image, .*; got ndarray"),
        (torchio.Subject(t1=image), "a subject must have one label map; it has none"),
        (torchio.ScalarImage(tensor=torch.zeros(2, 4, 5, 6)), r"one channel, \(1, X, Y, Z\); its shape is \(2"),
        (SimpleITK.Image(4, 5, SimpleITK.sitkUInt8), "it has 2 axes and 1 components"),
    ]:
        with pytest.raises(FibldmError, match=message):
            as_volume(given)
    sheared = nibabel.affines.from_matvec([[1, 0, 0.1], [0, 1, 0], [0, 0, 1]])
    with pytest.raises(FibldmError, match="axes at right angles"):
        to_sitk([Volume(np.zeros((2, 2, 2)), sheared)])
