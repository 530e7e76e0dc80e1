"""Readers on files of other libraries; what is wrong with single volumes stands in the corpus of bad inputs, too."""

import hashlib
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
import SimpleITK
from builders import write_nifti
from dicom_files import AXIAL, example, expected, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.transforms import LoadImaged
from nibabel import orientations
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from fibldm.datasets.masks import read_mask
from fibldm.datasets.source import Mask
from fibldm.errors import FibldmError
from fibldm.runs.config_files import shipped
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES, WITHOUT_GEOMETRY, read_scan, stem
from fibldm.volumes.scan import Scan

Array = NDArray[Any]
SPACING = (0.75, 1.25, 3.5)
NOBODY = 65534
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AXIS_ORDERS = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]
GEOMETRIC = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def voxels(shape: tuple[int, ...] = (4, 5, 7), dtype: str = "int16") -> Array:
    """Every voxel another value."""
    return np.random.default_rng(3).permutation(int(np.prod(shape))).reshape(shape).astype(dtype)


def affine_of(codes: str = "RAS", turn: tuple[float, ...] = (11.0, -7.0, 16.0), origin=(-41.0, 17.0, 230.0)) -> Array:
    """Spacing along the patient's x, y, z; axes stored as ``codes`` say; turned about all three axes by degrees."""
    stored = orientations.axcodes2ornt(codes)
    matrix = np.zeros((3, 3))
    axes = stored[:, 0].astype(int)
    matrix[axes, range(3)] = stored[:, 1] * np.array(SPACING)[axes]
    return nibabel.affines.from_matvec(Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ matrix, origin)


def write(path: Path, array: Array, affine: Array | None = None, *, compress: bool = True) -> Path:
    """By nibabel or SimpleITK."""
    affine = affine_of() if affine is None else affine
    if ".nii" in path.suffixes:
        return write_nifti(path, array, affine)
    itk = SimpleITK.GetImageFromArray(np.moveaxis(array, (0, 1, 2), (2, 1, 0)), isVector=array.ndim == 4)
    lps = LPS @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    itk.SetSpacing(steps.tolist())
    itk.SetDirection((lps[:3, :3] / steps).ravel().tolist())
    itk.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(itk, str(path), useCompression=compress)
    return path


def write_array(path: Path, image: Array, label: Array | None = None) -> Path:
    """By the library of the format; ``label`` beside the image where the format takes several."""
    arrays = {"image": image} | ({} if label is None else {"label": label})
    if path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip")
    elif path.suffix == ".mat":
        scipy.io.savemat(path, arrays | {"comment": "text", "scale": 2.0, "row": np.arange(3)}, do_compression=True)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        np.save(path, image)
    return path


def canonical(array: Array, affine: Array) -> tuple[Array, Array]:
    """What must be read; by nibabel alone."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    return np.asanyarray(image.dataobj), np.asarray(image.affine)


def assert_same(scan: Scan, array: Array, affine: Array, atol: float = 1e-4) -> None:
    assert scan.array.dtype == array.dtype
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.affine, affine, atol=atol)


@pytest.mark.parametrize("suffix", GEOMETRIC)
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
def test_one_volume_is_read_alike_from_every_format_with_geometry(suffix, codes, tmp_path):
    """Oblique, anisotropic, flipped and with a negative determinant."""
    array, affine = voxels(), affine_of(codes)
    scan = read_scan((write(tmp_path / f"a b ü{suffix}", array, affine),))
    assert_same(scan, *canonical(array, affine))
    assert scan.findings == ()
    np.testing.assert_allclose(scan.spacing, SPACING, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    codes=st.sampled_from(AXIS_ORDERS),
    turn=st.tuples(*[st.floats(-30, 30)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".nhdr"]),
    shape=st.tuples(*[st.integers(2, 5)] * 3),
)
def test_any_orientation_and_rotation_comes_back(codes, turn, origin, suffix, shape, tmp_path_factory):
    """All 48 orders of axes."""
    array, affine = voxels(shape), affine_of(codes, turn, origin)
    file = write(tmp_path_factory.mktemp("any") / f"a{suffix}", array, affine)
    assert_same(read_scan((file,)), *canonical(array, affine), atol=1e-3)


@pytest.mark.parametrize("suffix", GEOMETRIC)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_voxels_keep_their_type(suffix, dtype, tmp_path):
    array = voxels(dtype=dtype)
    assert_same(read_scan((write(tmp_path / f"a{suffix}", array, compress=False),)), *canonical(array, affine_of()))


@pytest.mark.parametrize("suffix", GEOMETRIC)
def test_channels_come_last(suffix, tmp_path):
    array = voxels((4, 5, 7, 3), "float32")
    scan = read_scan((write(tmp_path / f"a{suffix}", array, affine_of("LPS")),))
    assert_same(scan, *canonical(array, affine_of("LPS")))


def test_vector_nifti_slices_and_single_channels_have_their_plain_shape(tmp_path):
    for shape, read in {
        (4, 5, 7, 1, 2): (4, 5, 7, 2),
        (4, 5): (4, 5, 1),
        (4, 5, 1): (4, 5, 1),
        (4, 5, 7, 1): (4, 5, 7),
    }.items():
        array = voxels(shape)
        assert_same(read_scan((write(tmp_path / "a.nii", array),)), array.reshape(read), affine_of())


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32"])
def test_labels_that_nibabel_scaled_are_labels_again(dtype, tmp_path):
    """A mask saved as floats beside the header of its image is quantised: 1 comes back as 1.0000153."""
    labels = voxels() % 3
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    nibabel.save(nibabel.Nifti1Image(labels.astype(float), affine_of(), header), tmp_path / "a.nii")
    image = read_scan((tmp_path / "a.nii",))
    assert not np.array_equal(image.array, labels) or dtype == "int32"
    mask = read_mask(Mask((tmp_path / "a.nii",)), image)
    np.testing.assert_array_equal(mask.array, labels)
    assert [level for level, _ in mask.findings] == ([] if np.array_equal(image.array, labels) else ["warning"])


@pytest.mark.parametrize("off", [0.002, 0.5])
def test_real_fractions_stay_what_they_are(off, tmp_path):
    labels = (voxels() % 3).astype("float32") + np.float32(off)
    file = write(tmp_path / "a.nii", labels)
    mask = read_mask(Mask((file,)), read_scan((file,)))
    assert_same(mask, labels, affine_of())
    assert mask.findings == ()


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".mat", ".npz"])
def test_arrays_are_chosen_by_name_and_indexed_as_x_y_z(suffix, tmp_path):
    image, label = voxels(dtype="float32"), voxels() % 3 == 0
    file = write_array(tmp_path / f"a{suffix}", image, label)
    scan = read_scan((file,), spacing=SPACING)
    assert_same(scan, image, np.diag([*SPACING, 1]))
    assert scan.findings == (("warning", f"orientation is not stated by {suffix} files; left and right are a guess"),)
    mask = read_mask(Mask((file,)), scan, spacing=SPACING)
    assert_same(mask, label.astype(np.uint8), np.diag([*SPACING, 1]))


def test_a_matlab_7_3_file_is_indexed_as_matlab_does(tmp_path):
    """HDF5 holds MATLAB's axes backwards, and its texts as numbers."""
    array = voxels()
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["volume"] = array.T
        file["name"] = np.arange(12, dtype=np.uint16).reshape(3, 4)
        file["name"].attrs["MATLAB_class"] = np.bytes_("char")
    assert_same(read_scan((tmp_path / "a.mat",), spacing=SPACING), array, np.diag([*SPACING, 1]))


def test_uncompressed_and_big_endian_matlab_and_numpy(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"slice": voxels((4, 5), "float64"), "c": np.array(["x"], dtype=object)})
    assert read_scan((tmp_path / "a.mat",), spacing=SPACING).array.shape == (4, 5, 1)
    np.save(tmp_path / "b.npy", voxels((4, 5, 7, 2)).astype(">i2"))
    assert_same(read_scan((tmp_path / "b.npy",), spacing=SPACING), voxels((4, 5, 7, 2)), np.diag([*SPACING, 1]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_slices_are_stacked_by_their_numbers_as_radiologists_look_at_them(dtype, tmp_path):
    """Rows from front to back, columns from the patient's right to left, slices from feet to head."""
    stack = voxels((4, 5, 3), dtype)
    files = [tmp_path / f"s{number}.png" for number in (1, 2, 10)]
    for z, file in enumerate(files):
        Image.fromarray(np.ascontiguousarray(stack[::-1, ::-1, z].T)).save(file)
    scan = read_scan((files[2], files[0], files[1]), spacing=SPACING)
    assert_same(scan, stack, np.diag([*SPACING, 1]))
    assert read_scan((files[0],), spacing=SPACING).array.shape == (4, 5, 1)


def test_dicom_goes_to_the_dicom_reader_with_or_without_a_suffix(tmp_path):
    files = write_series(tmp_path, example(), spacing=SPACING, orientation=AXIAL)
    array, affine = expected(example(), spacing=SPACING, orientation=AXIAL)
    assert_same(read_scan(tuple(files)), array, affine)
    bare = [file.rename(file.with_suffix("")) for file in files]
    assert_same(read_scan(tuple(bare)), array, affine)
    with pytest.raises(FibldmError, match="DICOM files state their own spacing, and no other may be given; leave out"):
        read_scan(tuple(bare), spacing=SPACING)


def test_the_hash_is_of_all_bytes(tmp_path):
    one = write(tmp_path / "a.nrrd", voxels())
    assert read_scan((one,)).sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    header = write(tmp_path / "b.mhd", voxels(), compress=False)
    data = header.with_suffix(".raw").read_bytes()
    assert read_scan((header,)).sha256 == hashlib.sha256(header.read_bytes() + data).hexdigest()


def test_stem_and_suffixes():
    assert [stem(Path(f"a/b.c{suffix}")) for suffix in SUPPORTED_SUFFIXES] == ["b.c"] * len(SUPPORTED_SUFFIXES)
    assert (stem(Path("A.NII.GZ")), stem(Path("CT.1.2.3"))) == ("A", "CT.1.2.3")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nhdr"])
def test_monai_loads_what_it_cannot_read_itself(suffix, tmp_path):
    import fibldm.volumes.formats.monai_reader  # noqa: F401  registers the reader

    array, affine = voxels((4, 5, 7, 2), "float32"), affine_of("LPS")
    file = write(tmp_path / f"a{suffix}", array, affine)
    scan = read_scan((file,))
    for reader in ("FibldmReader", None):
        item = LoadImaged("image", reader=reader, ensure_channel_first=True)({"image": file})
        np.testing.assert_array_equal(item["image"].numpy(), np.moveaxis(scan.array, 3, 0))
        np.testing.assert_allclose(item["image"].affine, scan.affine)


def test_the_example_configuration_loads_a_dicom_series_through_monai(tmp_path):
    """By MONAI's parser, as its header says; resampled by MONAI's own transform."""
    import fibldm.volumes.formats.monai_reader  # noqa: F401  registers the reader

    spacing, array = (1.0, 2.0, 3.0), example((8, 12, 10))
    write_series(tmp_path / "series", array, spacing=spacing)
    voxels, affine = expected(array, spacing=spacing)
    parser = ConfigParser(ConfigParser.load_config_file(str(shipped("load_dicom"))))
    parser.update({"series": str(tmp_path / "series"), "spacing": nibabel.affines.voxel_sizes(affine).tolist()})
    image = parser.get_parsed_content("loaded")["image"]
    np.testing.assert_allclose(image[0].numpy(), voxels, atol=1e-2)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    parser["spacing"] = [4.0, 4.0, 4.0]
    coarser = parser.get_parsed_content("loaded")["image"]
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(np.asarray(coarser.affine)), 4.0)


@pytest.mark.parametrize(
    ("suffix", "line"), [(".nrrd", b"space: left-posterior-superior\n"), (".mha", b"TransformMatrix")]
)
def test_a_header_without_orientation_is_said(suffix, line, tmp_path):
    file = write(tmp_path / f"a{suffix}", voxels(), np.diag([-1, -1, 2, 1]))
    replaced = b"space dimension: 3\n" if suffix == ".nrrd" else b"Comment"
    file.write_bytes(file.read_bytes().replace(line, replaced))
    scan = read_scan((file,))
    assert scan.findings == (("warning", "the header has no orientation; left and right are a guess"),)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "left-anterior-superior", "LAS"])
def test_nrrd_in_another_space(space, tmp_path):
    """SimpleITK itself brings these to LPS."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    file = write(tmp_path / "a.nrrd", voxels(), LPS @ affine)
    file.write_bytes(file.read_bytes().replace(b"left-posterior-superior", space.encode()))
    sign = -1 if space[0] in "lL" else 1
    assert_same(read_scan((file,)), *canonical(voxels(), np.diag([sign, 1, 1, 1]) @ affine))


# Bad input


def refused(match: str, *files: Path, **keywords: Any) -> None:
    with pytest.raises(FibldmError, match=match) as caught:
        read_scan(files, **keywords)
    assert "\n" not in str(caught.value)


def edited(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def spacing_for(suffix: str) -> tuple[float, float, float] | None:
    return SPACING if suffix in WITHOUT_GEOMETRY else None


def write_any(path: Path, *, compress: bool = True) -> Path:
    if path.suffix == ".png":
        Image.fromarray(voxels((30, 40), "uint16")).save(path)
        return path
    if path.suffix in WITHOUT_GEOMETRY:
        return write_array(path, voxels())
    return write(path, voxels(), compress=compress)


SINGLE = [suffix for suffix in SUPPORTED_SUFFIXES if suffix not in (".dcm", ".nhdr", ".mhd")]


@pytest.mark.parametrize("cut", [1, 5, 60])
@pytest.mark.parametrize("suffix", SINGLE)
def test_a_file_that_was_cut_off_is_refused(suffix, cut, tmp_path):
    """To the last byte."""
    file = write_any(tmp_path / f"a{suffix}")
    refused(
        "a.* cannot be read to its last byte: .*copy or export it again",
        edited(file, lambda data: data[:-cut]),
        spacing=spacing_for(suffix),
    )


@pytest.mark.parametrize(
    ("suffix", "voxel_file"), [(".nhdr", "a.raw"), (".mhd", "a.raw"), (".nhdr", "a.raw.gz"), (".mhd", "a.zraw")]
)
def test_voxels_beside_a_header_that_are_cut_off_or_missing_are_refused(suffix, voxel_file, tmp_path):
    header = write(tmp_path / f"a{suffix}", voxels(), compress=voxel_file != "a.raw")
    edited(tmp_path / voxel_file, lambda data: data[:-3])
    refused("cannot be read to its last byte", header)
    (tmp_path / voxel_file).unlink()
    refused("the file of its voxels is missing", header)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".npz", ".png", ".mat"])
def test_one_changed_byte_of_compressed_voxels_is_found(suffix, tmp_path):
    """SimpleITK reads a damaged MetaImage, and wrong voxels, without a word."""
    file = write_any(tmp_path / f"a{suffix}")

    def damaged(data: bytes) -> bytes:
        middle = len(data) - 60
        return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]

    refused("cannot be read to its last byte", edited(file, damaged), spacing=spacing_for(suffix))


@pytest.mark.parametrize("suffix", [suffix for suffix in SUPPORTED_SUFFIXES if suffix != ".dcm"])
def test_a_file_that_is_not_what_its_name_says_is_refused(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    for content in (b"", b"\0" * 1000, b"no image at all " * 60, random.Random(1).randbytes(2000)):
        file.write_bytes(content)
        refused("as its name says, and is not|cannot be read to its last byte", file, spacing=spacing_for(suffix))


def test_voxels_that_are_no_plain_numbers_are_refused(tmp_path):
    colours = np.zeros((4, 5, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for array in (colours, voxels(dtype="complex64")):
        nibabel.save(nibabel.Nifti1Image(array, affine_of()), tmp_path / "a.nii")
        refused("voxels must be plain numbers; in a.nii they are", tmp_path / "a.nii")
        for suffix in (".npy", ".h5"):
            refused("voxels must be plain numbers", write_array(tmp_path / f"a{suffix}", array), spacing=SPACING)
    file = write(tmp_path / "a.nrrd", voxels((4, 5, 7, 3), "uint8"))
    refused("a.nrrd they are colours", edited(file, lambda data: data.replace(b"kinds: vector", b"kinds: RGB-color")))


@pytest.mark.parametrize(
    ("suffix", "old", "new", "message"),
    [
        (".nrrd", b"left-posterior-superior", b"scanner-xyz", "space of a NRRD must be one of .* is scanner-xyz"),
        (".nrrd", b"space directions", b"#space directions", "must give the spacing; that of a.nrrd does not"),
        (".nrrd", b"encoding: gzip", b"encoding: hex", "must be stored raw or compressed; those of a.nrrd are hex"),
        (".nrrd", b"endian:", b'space units: "m" "m" "m"\nendian:', "space units must be mm; in a.nrrd they are m m m"),
        (".nrrd", b"encoding:", b"data file: LIST\nencoding:", "voxels must lie in one file; those of a.nrrd"),
        (".mha", b"ElementSpacing", b"Spacing", "must give the spacing; that of a.mha does not"),
        (".mha", b"BinaryData = True", b"BinaryData = False", "those of a.mha are text"),
        (".mha", b"= LOCAL", b"= s%03d.raw 1 7 1", "voxels must lie in one file"),
        (".mha", b"DimSize = 4 5 7", b"DimSize = 4 5 9", "cannot be read to its last byte"),
        (".mha", b"NDims = 3", b"NDims = x", "cannot be read to its last byte: SimpleITK refuses it"),
    ],
)  # fmt: skip
def test_headers_of_metaimage_and_nrrd_that_are_refused(suffix, old, new, message, tmp_path):
    file = write(tmp_path / f"a{suffix}", voxels())
    assert old in file.read_bytes()
    refused(message, edited(file, lambda data: data.replace(old, new)))


def test_a_two_dimensional_metaimage_has_no_thickness(tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels((4, 5))), str(tmp_path / "a.mha"))
    refused("must hold a 3-D volume; a.mha has 2 axes; save a slice as a volume", tmp_path / "a.mha")


def test_arrays_without_a_clear_name_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", t1=voxels(), t2=voxels())
    refused("must hold an array named 'image', or a single array; it holds t1, t2", tmp_path / "a.npz", spacing=SPACING)
    np.savez(tmp_path / "a.npz", row=np.arange(9), one=1.0)
    refused("it holds none; name the array", tmp_path / "a.npz", spacing=SPACING)
    file = write_array(tmp_path / "b.h5", voxels())
    with pytest.raises(FibldmError, match="must hold an array named 'label', or a single array; it holds image"):
        read_scan((file,), spacing=SPACING, key="label")
    np.save(tmp_path / "c.npy", np.array([[{}, 1], [2, 3]]), allow_pickle=True)
    refused("cannot be read to its last byte: Object arrays cannot be loaded", tmp_path / "c.npy", spacing=SPACING)


def test_hdf5_whose_voxels_lie_elsewhere_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("image", h5py.VirtualLayout((4, 5, 7), "i2"), fillvalue=7)
    refused("the voxels of /image lie in other files", tmp_path / "a.h5", spacing=SPACING)


def test_a_matlab_element_of_unknown_type_does_not_end_the_process(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"image": voxels()})
    at = 192  # the type of the voxels
    edited(tmp_path / "a.mat", lambda data: data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
    refused("it has an element of the unknown type 67", tmp_path / "a.mat", spacing=SPACING)


def test_png_that_is_no_grey_stack_is_refused(tmp_path):
    first, second = tmp_path / "s1.png", tmp_path / "s2.png"
    Image.fromarray(voxels((4, 5), "uint8")).save(first)
    Image.fromarray(voxels((4, 6), "uint8")).save(second)
    refused(
        "slices must have one size and depth; s1.png ... have 5 x 4 uint8, 6 x 4 uint8", first, second, spacing=SPACING
    )
    (second.with_name("s01.png")).write_bytes(first.read_bytes())
    refused("must tell their order; two have equal numbers", first, second.with_name("s01.png"), spacing=SPACING)
    for mode in ("RGB", "LA", "P", "1"):
        Image.new(mode, (4, 5)).save(first)
        refused("a PNG slice must be grey with 8 or 16 bits; s1.png is not", first, spacing=SPACING)


def test_spacing_is_asked_for_where_a_format_has_none_and_refused_where_it_has(tmp_path):
    array, volume = write_array(tmp_path / "a.npy", voxels()), write(tmp_path / "a.mha", voxels())
    refused(".npy files hold no spacing, and it must be known; give `spacing` X,Y,Z in mm", array)
    refused(
        ".mha files state their own spacing, and no other may be given; leave out `spacing`", volume, spacing=SPACING
    )
    for wrong in ((1, 0, 1), (1, 1, -1), (1, 1, float("nan")), (1, 1, float("inf"))):
        refused("spacing must be positive, in mm; got", array, spacing=wrong)


def test_files_that_are_missing_unknown_or_mixed_are_refused(tmp_path):
    refused("a file must be readable; No such file or directory", tmp_path / "a.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refused("a file must be readable; Too many levels of symbolic links", tmp_path / "loop.nii")
    (tmp_path / "folder.nii").mkdir()
    refused("a file must be readable; Is a directory", tmp_path / "folder.nii")
    (tmp_path / "a.txt").write_text("text")
    refused("one file ending in .nii.gz, .nii, .* got 1 files ending in another suffix", tmp_path / "a.txt")
    volumes = [write(tmp_path / name, voxels()) for name in ("a.nii", "b.nii", "c.mha")]
    refused("got 3 files ending in .mha, .nii, .nii", *volumes)
    refused("got 0 files ending in nothing")


def test_a_file_without_permission_is_refused(tmp_path):
    file = write(tmp_path / "a.nii", voxels())
    file.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)  # root may read everything
    try:
        refused("a file must be readable; Permission denied; check the path and its permissions", file)
    finally:
        os.seteuid(user)


def test_a_dicom_mask_must_be_a_segmentation_or_structure_set(tmp_path):
    files = write_series(tmp_path, example())
    with pytest.raises(FibldmError, match="a DICOM mask must be one file, a segmentation or an RT structure set"):
        read_mask(Mask((files[0],), names={"lung": 1}), read_scan(tuple(files)))


# Real data


def itk_canonical(file: Path) -> tuple[Array, Array]:
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(file)), "LPS")
    directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return canonical(
        SimpleITK.GetArrayFromImage(image).T, LPS @ nibabel.affines.from_matvec(directions, image.GetOrigin())
    )


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "cip-ct64/ct-64.nrrd", "cip-ct64/lm-64.nrrd",
        "elastix-3dct/3DCT_lung.mha", "elastix-3dct/3DCT_lung_baseline_mask.mha",
    ],
)  # fmt: skip
def test_real_files_agree_with_simpleitk(name, data_folder):
    file = data_folder / "lung_ct" / name
    scan = read_scan((file,))
    assert_same(scan, *itk_canonical(file))
    assert scan.findings == ()


@pytest.mark.data
@pytest.mark.parametrize("name", ["t2.nii.gz", "t1_seg_gif.nii.gz"])
def test_real_nifti_agrees_with_simpleitk(name, data_folder):
    """An oblique, anisotropic MR and a sagittal label map."""
    file = data_folder / "brain_mri" / "fpg" / name
    assert_same(read_scan((file,)), *itk_canonical(file), atol=1e-3)
