"""Geometry of volumes: H5 (world coordinates survive), A3 (image and mask move together), A5 (divisible sizes), A27."""

import gzip
import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from nibabel import orientations
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid, ModelGrid, Volume, resample, turned_like
from fibldm.volumes.transforms import AsPlainTensorsd, ToModelGridd

AXIS_ORDERS = [
    np.array(list(zip(order, flips, strict=True)), dtype=float)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
RAMP = (0.7, -1.3, 2.1)


def rotation(*degrees: float) -> NDArray[np.float64]:
    """Rotations about x, y and z, one after the other."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def oblique_affine(spacing=(2.0, 3.5, 5.0), origin=(-41.0, 17.0, 230.0)) -> NDArray[np.float64]:
    """Turned about all three axes by unequal angles."""
    return nibabel.affines.from_matvec(rotation(11, -7, 16) @ np.diag(spacing), origin)


def stored_as(volume: Volume, turn: NDArray[np.float64]) -> Volume:
    """The same voxels at the same places, in another axis order."""
    array = orientations.apply_orientation(volume.array, turn)
    return Volume(array, volume.affine @ orientations.inv_ornt_aff(turn, volume.array.shape))


def world(grid: Grid) -> NDArray[np.float64]:
    """RAS+ mm of every voxel centre, ``(X, Y, Z, 3)``."""
    index = np.stack(np.meshgrid(*(np.arange(length) for length in grid.shape), indexing="ij"), axis=-1)
    return nibabel.affines.apply_affine(grid.affine, index)


def ramp_on(grid: Grid) -> Volume:
    """A linear function of the world's coordinates."""
    return Volume((world(grid) @ np.array(RAMP)).astype(np.float32), grid.affine)


def asymmetric(shape=(4, 5, 7), affine=None) -> Volume:
    """Every voxel another value."""
    affine = oblique_affine() if affine is None else affine
    return Volume(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)


def write(path: Path, array: NDArray[np.generic], affine=None, units: str = "mm") -> str:
    image = nibabel.Nifti1Image(array, oblique_affine() if affine is None else affine)
    image.header.set_xyzt_units(units)
    nibabel.save(image, path)
    return str(path)


@pytest.mark.parametrize("turn", AXIS_ORDERS, ids=lambda turn: "".join(orientations.ornt2axcodes(turn)))
def test_all_48_axis_orders_give_one_canonical_volume_and_turn_back_exactly(turn):
    plain = asymmetric()
    stored = stored_as(plain, turn)
    canonical = stored.canonical()
    np.testing.assert_array_equal(canonical.array, plain.array)
    np.testing.assert_allclose(canonical.affine, plain.affine, atol=1e-9)
    back = turned_like(canonical, stored.grid)
    np.testing.assert_array_equal(back.array, stored.array)
    np.testing.assert_array_equal(back.affine, stored.affine)


def test_canonical_axes_point_to_right_front_and_head():
    """H5, against nibabel's own letters."""
    for turn in AXIS_ORDERS:
        assert nibabel.aff2axcodes(stored_as(asymmetric(), turn).canonical().affine) == ("R", "A", "S")


@settings(max_examples=30, deadline=None)
@given(
    turn=st.sampled_from(AXIS_ORDERS),
    shape=st.tuples(*[st.integers(3, 9)] * 3),
    spacing=st.tuples(*[st.sampled_from([1.0, 2.4, 4.7, 5.0, 5.6, 8.0])] * 3),
    angles=st.tuples(*[st.integers(-12, 12)] * 3),
    kind=st.sampled_from(["image", "label"]),
)
def test_model_grid_voxels_do_not_depend_on_the_stored_axis_order(turn, shape, spacing, angles, kind):
    """The networks see the very same voxels."""
    affine = nibabel.affines.from_matvec(rotation(*angles) @ np.diag(spacing), (13.0, -80.0, 5.0))
    plain, model = asymmetric(shape, affine), ModelGrid((5.0, 5.0, 5.0), (8, 8, 8))
    seen = []
    for volume in (plain, stored_as(plain, turn).canonical()):
        grids = model.synthesis_grid(volume.grid, 4), model.training_grid(volume.grid)
        seen.append([resample(volume, grid, kind=kind, fill=-9).array for grid in grids])
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spacing", [(2.0, 3.5, 5.0), (5.0, 5.0, 5.0), (5.3, 4.8, 5.0), (6.0, 7.5, 9.0)])
def test_world_ramp_stays_right_on_the_training_grid(spacing):
    """Oblique, anisotropic, flipped, cropped at some sides and padded at others."""
    source = Grid((40, 26, 17), oblique_affine(spacing))
    stored = stored_as(ramp_on(source), AXIS_ORDERS[29])
    canonical = stored.canonical()
    grid = ModelGrid((5.0, 5.0, 5.0), (14, 20, 24)).training_grid(canonical.grid)
    assert grid.shape == (14, 20, 24)
    moved = resample(canonical, grid, kind="image", fill=np.nan)
    interior = _interior(grid, source, margin=20)
    assert interior.sum() > 200
    np.testing.assert_allclose(moved.array[interior], ramp_on(grid).array[interior], rtol=0, atol=1e-3)


@pytest.mark.parametrize("spacing", [(2.0, 3.5, 5.0), (5.3, 4.8, 5.0), (6.0, 7.5, 9.0)])
def test_world_ramp_survives_the_way_to_the_synthesis_grid_and_back(spacing):
    source = Grid((40, 26, 19), oblique_affine(spacing))
    stored = stored_as(ramp_on(source), AXIS_ORDERS[13])
    canonical = stored.canonical()
    grid = ModelGrid((5.0, 5.0, 5.0), (1, 1, 1)).synthesis_grid(canonical.grid, 8)
    there = resample(canonical, grid, kind="image")
    back = turned_like(resample(there, canonical.grid, kind="image"), stored.grid)
    interior = stored_as(Volume(_interior(source, source, margin=25), source.affine), AXIS_ORDERS[13]).array
    assert interior.sum() > 200
    np.testing.assert_allclose(back.array[interior], stored.array[interior], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(15, 16, 17), (21, 8, 16)])
def test_training_grid_of_a_volume_at_the_model_spacing_moves_whole_voxels(shape):
    """Nothing is interpolated where nothing has to be, whether odd or even."""
    volume = asymmetric(shape, oblique_affine((5.0, 5.0, 5.0)))
    grid = ModelGrid((5.0, 5.0, 5.0), (16, 16, 16)).training_grid(volume.grid)
    moved = resample(volume, grid, kind="image", fill=-1)
    present = moved.array[moved.array >= 0]
    assert set(present.tolist()) <= set(volume.array.ravel().tolist())
    assert len(present) == np.prod(np.minimum(shape, 16))


def test_labels_never_get_a_new_value():
    rng = np.random.default_rng(3)
    labels = Volume(rng.choice([0, 2, 7], (13, 11, 9)).astype(np.uint8), oblique_affine())
    for model in (ModelGrid((1.7, 1.7, 1.7), (40, 40, 40)), ModelGrid((6.0, 5.0, 9.0), (8, 8, 8))):
        grid = model.training_grid(labels.grid)
        assert set(np.unique(resample(labels, grid, kind="label").array)) <= {0, 2, 7}
        assert set(np.unique(resample(labels, grid, kind="label", fill=UNKNOWN_LABEL).array)) <= {0, 2, 7, 255}
        assert resample(labels, grid, kind="label").array.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 9.0)] * 3),
    multiple=st.sampled_from([1, 4, 8, 16, 24, (16, 16, 4), (1, 24, 8)]),
)
def test_synthesis_grid_covers_the_mask_and_is_divisible(shape, spacing, multiple):
    """Every voxel of the mask lies within the grid, in multiples of one number or one per axis."""
    source, model = Grid(shape, oblique_affine(spacing)), ModelGrid((2.0, 2.0, 3.0), (64, 64, 64))
    grid = model.synthesis_grid(source, multiple)
    multiples = (multiple,) * 3 if isinstance(multiple, int) else multiple
    assert all(length % step == 0 for length, step in zip(grid.shape, multiples, strict=True))
    corners = np.array(list(itertools.product(*((-0.5, length - 0.5) for length in shape))))
    at = nibabel.affines.apply_affine(np.linalg.inv(grid.affine) @ source.affine, corners)
    slack = 1e-2  # an extent is rounded to thousandths of a voxel before it is rounded up
    assert (at >= -0.5 - slack).all() and (at <= np.array(grid.shape) - 0.5 + slack).all()
    assert all(length >= trained for length, trained in zip(grid.shape, model.size, strict=True))
    kept, resampled = (np.allclose(grid.spacing, wanted, rtol=1e-6) for wanted in (source.spacing, model.spacing))
    near = (np.abs(np.array(source.spacing) / model.spacing - 1) <= 0.1).all()
    assert resampled or (kept and near)


def test_every_axis_is_padded_to_its_own_multiple():
    """No axis grows more than its own multiple asks for."""
    model, source = ModelGrid((2.0, 2.0, 5.0), (1, 1, 1)), Grid((17, 33, 9), oblique_affine((2.0, 2.0, 5.0)))
    assert model.synthesis_grid(source, (16, 8, 4)).shape == (32, 40, 12)
    assert model.synthesis_grid(source, [1, 16, 8]).shape == (17, 48, 16)


def test_a_mask_within_ten_percent_is_padded_by_whole_voxels_only():
    model = ModelGrid((5.0, 5.0, 5.0), (32, 32, 32))
    labels = asymmetric((9, 14, 11), oblique_affine((5.5, 4.5, 5.0)))
    grid = model.synthesis_grid(labels.grid, 8)
    assert grid.shape == model.size
    placed = resample(labels, grid, kind="label", fill=-1)
    np.testing.assert_array_equal(placed.array[11:20, 9:23, 10:21], labels.array)
    assert (placed.array == -1).sum() == 32**3 - labels.array.size
    back = resample(Volume(placed.array.astype(np.float32), grid.affine), labels.grid, kind="image")
    np.testing.assert_array_equal(back.array, labels.array)


@pytest.mark.parametrize("spacing", [(5.51, 5.0, 5.0), (5.0, 4.49, 5.0), (1.0, 1.0, 1.0)])
def test_a_mask_more_than_ten_percent_off_is_resampled(spacing):
    model, source = ModelGrid((5.0, 5.0, 5.0), (32, 32, 32)), Grid((20, 20, 20), oblique_affine(spacing))
    np.testing.assert_allclose(model.synthesis_grid(source, 8).spacing, model.spacing)


def test_a_mask_within_ten_percent_is_resampled_rather_than_given_a_larger_grid():
    """A27: 33 voxels of 4.8 mm would need 40, but are 32 of 5 mm, the size of training."""
    model = ModelGrid((5.0, 5.0, 5.0), (32, 32, 32))
    fits = model.synthesis_grid(Grid((33, 32, 30), oblique_affine((4.8, 5.0, 5.0))), 8)
    assert fits.shape == model.size
    np.testing.assert_allclose(fits.spacing, model.spacing)


def test_going_coarser_smooths_and_going_finer_does_not():
    """Detail finer than the target must not alias."""
    index = np.indices((32, 32, 32)).sum(axis=0)
    board = Volume(np.where(index % 2, 1.0, -1.0).astype(np.float32), np.diag([1.0, 1, 1, 1]))
    coarse = resample(board, ModelGrid((3.0, 3.0, 3.0), (10, 10, 10)).training_grid(board.grid), kind="image")
    assert np.abs(coarse.array[1:-1, 1:-1, 1:-1]).max() < 1e-3
    fine = resample(board, Grid((63, 63, 63), np.diag([0.5, 0.5, 0.5, 1])), kind="image")
    np.testing.assert_array_equal(fine.array[::2, ::2, ::2], board.array)


@pytest.mark.parametrize("turn", AXIS_ORDERS[::7])
def test_resample_takes_any_axis_order(turn):
    """Also where only one axis goes coarser and is smoothed."""
    rng = np.random.default_rng(5)
    plain = Volume(rng.normal(size=(9, 10, 24)).astype(np.float32), oblique_affine((2.0, 3.0, 1.0)))
    grid = ModelGrid((2.0, 3.0, 4.0), (9, 10, 6)).training_grid(plain.grid)
    wanted, got = (resample(volume, grid, kind="image").array for volume in (plain, stored_as(plain, turn)))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_the_field_of_view_ends_at_the_edge_of_the_outermost_voxels(kind):
    """What lies between their centres and their edges is no padding."""
    thick = Volume(np.full((2, 2, 2), 3, dtype=np.uint8), np.diag([10.0, 10, 10, 1]))
    grid = ModelGrid((2.5, 2.5, 2.5), (10, 10, 10)).training_grid(thick.grid)
    moved = resample(thick, grid, kind=kind, fill=UNKNOWN_LABEL).array
    assert (moved[1:-1, 1:-1, 1:-1] == 3).all()
    assert (moved == UNKNOWN_LABEL).sum() == 10**3 - 8**3


def test_read_volume_keeps_integers_and_takes_a_fourth_axis_of_one(tmp_path):
    array = asymmetric().array
    read = read_volume(write(tmp_path / "one.nii.gz", array[..., None]))
    np.testing.assert_array_equal(read.array, array)
    assert read.array.dtype == np.int16
    np.testing.assert_allclose(read.affine, oblique_affine(), atol=1e-4)


def test_read_volume_refuses_what_is_no_volume(tmp_path):
    rgb = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    array = asymmetric().array
    bad = [
        (
            write(tmp_path / "series.nii", np.stack([array] * 2, axis=-1)),
            r"one 3-D volume of plain numbers; it holds int16 of shape \(4, 5, 7, 2\)",
        ),
        (
            write(tmp_path / "flat.nii", array[..., 0]),
            r"one 3-D volume of plain numbers; it holds int16 of shape \(4, 5\)",
        ),
        (write(tmp_path / "rgb.nii", rgb), "must hold one 3-D volume of plain numbers"),
        (
            write(tmp_path / "complex.nii", array.astype(np.complex64)),
            "plain numbers; it holds complex64",
        ),
        (write(tmp_path / "metre.nii", array, units="meter"), "must be in mm; its header says meter"),
        (str(tmp_path / "absent.nii.gz"), "absent.nii.gz must exist and be a file; check the path"),
    ]
    for path, message in bad:
        with pytest.raises(FibldmError, match=message):
            read_volume(path)
    nibabel.save(nibabel.MGHImage(array.astype(np.float32), np.eye(4)), tmp_path / "brain.mgz")
    with pytest.raises(FibldmError, match="brain.mgz cannot be read to its last byte|must not be compressed"):
        read_volume(str(tmp_path / "brain.mgz"))


@pytest.mark.parametrize("missing", [1, 8, 300])
def test_read_volume_refuses_a_truncated_file(tmp_path, missing):
    """Even one that was cut off within the checksum, when all voxels can still be read."""
    rng = np.random.default_rng(0)
    whole = Path(write(tmp_path / "whole.nii.gz", rng.integers(0, 9000, (8, 9, 10)).astype(np.int16)))
    for name, content in (("cut.nii.gz", whole.read_bytes()), ("cut.nii", gzip.decompress(whole.read_bytes()))):
        (tmp_path / name).write_bytes(content[:-missing])
        with pytest.raises(FibldmError, match="cannot be read to its last byte"):
            read_volume(str(tmp_path / name))


@pytest.mark.parametrize("column", [(0, 0, 0), (4, 0, 0), (np.nan, 0, 0)])
def test_read_volume_refuses_an_affine_without_inverse(tmp_path, column):
    affine = np.diag([2.0, 3, 4, 1])
    image = nibabel.Nifti1Image(asymmetric().array, affine)
    affine[:3, 1] = column
    data = bytearray(image.to_bytes())
    header = image.header.copy()
    for row, name in enumerate("xyz"):
        header[f"srow_{name}"] = affine[row]
    header["sform_code"], header["vox_offset"] = 1, 352
    data[:348] = header.binaryblock
    (tmp_path / "flat.nii").write_bytes(bytes(data))
    with pytest.raises(FibldmError, match="the affine must be finite and invertible"):
        read_volume(str(tmp_path / "flat.nii"))


def test_a_volume_is_three_dimensional():
    with pytest.raises(FibldmError, match=r"must be 3-D \(X, Y, Z\); its shape is \(2, 3\)"):
        Volume(np.zeros((2, 3)), np.eye(4))


@pytest.mark.parametrize("turn", [AXIS_ORDERS[0], AXIS_ORDERS[29]], ids=["RAS", "turned"])
def test_image_and_label_move_together(turn):
    """A ramp and the thresholded ramp agree after the move, and padding is -1, unknown and not valid."""
    source = Grid((40, 26, 17), oblique_affine((2.0, 3.5, 5.0)))
    ramp = ramp_on(source)
    middle = float(ramp.array.mean())
    image, label = stored_as(ramp, turn), stored_as(Volume((ramp.array > middle).astype(np.uint8), ramp.affine), turn)
    before = image.array.copy()
    data = {"image": _tensor(image), "label": _tensor(label), "case": "a"}
    item = ToModelGridd(ModelGrid((4.0, 4.0, 4.0), (24, 20, 30)))(data)
    assert [item[key].shape for key in ("image", "label", "valid")] == [(1, 24, 20, 30)] * 3
    moved, drawn, valid = (item[key][0].numpy() for key in ("image", "label", "valid"))
    assert set(np.unique(valid)) == {0, 1}
    assert (moved[valid == 0] == -1).all() and (drawn[valid == 0] == UNKNOWN_LABEL).all()
    assert set(np.unique(drawn[valid == 1])) == {0, 1}
    sure = (valid == 1) & (np.abs(moved - middle) > 8)  # the nearest voxel lies at most half a diagonal away
    assert sure.sum() > 1000
    np.testing.assert_array_equal(drawn[sure] == 1, moved[sure] > middle)
    np.testing.assert_array_equal(item["image"].affine, item["label"].affine)
    assert set(data) == {"image", "label", "case"} and item["case"] == "a"
    np.testing.assert_array_equal(data["image"][0].numpy(), before)


def test_a_case_without_label_passes_through():
    item = ToModelGridd(ModelGrid((4.0, 4.0, 4.0), (8, 8, 8)))({"image": _tensor(asymmetric())})
    assert set(item) == {"image", "valid"}
    plain = AsPlainTensorsd(["image", "valid", "label"])(item)
    assert {key: type(value) for key, value in plain.items()} == {"image": torch.Tensor, "valid": torch.Tensor}


def _tensor(volume: Volume) -> MetaTensor:
    array = np.ascontiguousarray(volume.array, dtype=np.float32)[None]
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(volume.affine))


def _interior(grid: Grid, source: Grid, margin: float) -> NDArray[np.bool_]:
    """Voxels of ``grid`` that lie in ``source``, more than ``margin`` mm from the outermost voxel centres."""
    at = nibabel.affines.apply_affine(np.linalg.inv(source.affine), world(grid))
    inset = margin / np.array(source.spacing)
    return ((at >= inset) & (at <= np.array(source.shape) - 1 - inset)).all(axis=-1)


def test_training_keeps_the_voxels_of_a_volume_within_ten_percent_that_fits():
    """Nothing is interpolated; a larger one is brought to the model spacing and cropped."""
    model = ModelGrid((5.0, 5.0, 5.0), (16, 16, 16))
    near = asymmetric((12, 16, 11), oblique_affine((5.4, 4.6, 5.0)))
    kept = model.training_grid(near.grid)
    np.testing.assert_allclose(kept.spacing, near.grid.spacing)
    placed = resample(near, kept, kind="label", fill=-1).array
    np.testing.assert_array_equal(placed[2:14, :, 2:13], near.array)
    large = model.training_grid(Grid((17, 16, 11), oblique_affine((5.4, 4.6, 5.0))))
    np.testing.assert_allclose(large.spacing, model.spacing)
