"""Lung masks from HU: against phantoms, whose lungs are known, shapes that break the steps one by one, and CT."""

from pathlib import Path

import numpy as np
import pytest
from nibabel import orientations
from numpy.typing import NDArray

from fibldm.datasets.lung import lung_mask
from fibldm.errors import FibldmError
from fibldm.phantoms.phantoms import make_phantom
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Volume

SHAPE = (80, 64, 60)
SPACING = (4.0, 4.5, 5.0)
TISSUE, LUNG, AIR = 40, -850, -1000

Points = NDArray[np.float64]


def dice(found: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> float:
    return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()))


def within(points: Points, centre: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """An ellipsoid, or an elliptic cylinder along z where two numbers are given."""
    axes = slice(0, len(centre))
    offsets = (points[axes] - np.array(centre)[:, None, None, None]) / np.array(radii)[:, None, None, None]
    return np.asarray((offsets**2).sum(axis=0) < 1)


def chest(*, gap: float = 40.0) -> tuple[NDArray[np.int16], NDArray[np.uint8], Points]:
    """HU, lungs (1 right, 2 left) and RAS+ mm of the voxels; ``gap`` mm lie between the lungs."""
    index = np.stack(np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")).astype(float)
    points = (index - (np.array(SHAPE)[:, None, None, None] - 1) / 2) * np.array(SPACING)[:, None, None, None]
    hu = np.where(within(points, (0, 0), (150, 120)), TISSUE, AIR).astype(np.int16)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for side, sign, radius in ((1, 1, 55.0), (2, -1, 48.0)):
        labels[within(points, (sign * (radius + gap / 2), 0, -10), (radius, 70, 100))] = side
    hu[labels > 0] = LUNG
    return hu, labels, points


def found_in(hu: NDArray[np.int16]) -> NDArray[np.uint8]:
    return lung_mask(Volume(hu, np.diag([*SPACING, 1.0])))


@pytest.mark.parametrize("subject", [1, 4, 10, 12])
def test_lungs_of_phantoms_with_their_disease_are_found(subject):
    """Also where half of the lung is fibrotic (subject 10)."""
    phantom = make_phantom(1, subject)
    mask = lung_mask(Volume(phantom.volume, phantom.affine))
    wanted = np.isin(phantom.labels, (1, 2, 4, 5, 6))
    assert mask.dtype == np.uint8
    assert dice(np.isin(mask, (1, 2)), wanted) > 0.95
    assert dice(mask == 3, phantom.labels == 3) > 0.6
    assert not ((mask == 1) & (phantom.labels == 2)).any()
    assert not ((mask == 2) & (phantom.labels == 1)).any()


@pytest.mark.parametrize("codes", ["LPS", "SRA", "PIR"])
def test_the_mask_lies_on_the_grid_of_the_ct(codes):
    """Turned voxels give the same mask, turned."""
    phantom = make_phantom(1, 2, orientation="RAS")
    straight = lung_mask(Volume(phantom.volume, phantom.affine))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    turned = orientations.apply_orientation(phantom.volume, turn)
    affine = phantom.affine @ orientations.inv_ornt_aff(turn, phantom.volume.shape)
    np.testing.assert_array_equal(lung_mask(Volume(turned, affine)), orientations.apply_orientation(straight, turn))


def test_plain_lungs_are_found_exactly():
    hu, labels, _ = chest()
    np.testing.assert_array_equal(found_in(hu), labels)


def test_lungs_that_touch_are_parted():
    """As at the anterior junction line."""
    hu, labels, _ = chest(gap=-6)
    mask = found_in(hu)
    assert dice(mask > 0, labels > 0) > 0.999
    assert ((mask == 1) & (labels == 2)).sum() + ((mask == 2) & (labels == 1)).sum() < 0.01 * (labels > 0).sum()


def test_vessels_and_a_dense_rind_at_the_pleura_belong_to_the_lung():
    hu, labels, points = chest()
    vessel = (labels == 1) & within(points, (75, 5), (7, 7))
    nodule = (labels == 2) & within(points, (-112, 0, -10), (9, 9, 9))
    hu[vessel | nodule] = TISSUE
    mask = found_in(hu)
    assert (mask[vessel] == 1).mean() > 0.9
    assert (mask[nodule] == 2).mean() > 0.5
    assert dice(mask > 0, labels > 0) > 0.99


def test_the_trachea_is_told_from_the_lungs_that_it_opens_into():
    hu, labels, points = chest()
    trachea = within(points, (0, 0), (9, 9)) & (points[2] > 20) & (labels == 0)
    bronchus = within(points, (0, 0, 20), (40, 9, 9)) & (labels == 0)
    hu[trachea | bronchus] = -990
    mask = found_in(hu)
    assert (mask[trachea | bronchus] == 3).all()
    np.testing.assert_array_equal(mask == 3, trachea | bronchus)
    np.testing.assert_array_equal(np.where(mask == 3, 0, mask), labels)


def test_gas_of_the_bowel_and_air_around_the_patient_are_no_lung():
    hu, labels, points = chest()
    hu[within(points, (-60, 40, -135), (20, 15, 8))] = AIR
    hu[:, :4] = TISSUE  # a couch
    np.testing.assert_array_equal(found_in(hu), labels)


def without_left_lung() -> NDArray[np.int16]:
    hu, labels, _ = chest()
    return np.where(labels == 2, np.int16(TISSUE), hu)


def with_sinuses() -> NDArray[np.int16]:
    hu, labels, points = chest()
    hu[labels > 0] = TISSUE
    hu[within(points, (8, 40, 0), (6, 6, 9)) | within(points, (-8, 40, 0), (6, 6, 9))] = AIR
    return hu


@pytest.mark.parametrize(
    "hu",
    [
        np.full(SHAPE, TISSUE, dtype=np.int16),
        np.full(SHAPE, AIR, dtype=np.int16),
        np.random.default_rng(0).integers(0, 800, SHAPE).astype(np.int16),
        without_left_lung(),
        chest()[0][:, :, -3:],
        with_sinuses(),
    ],
    ids=["tissue", "air", "MR", "one lung", "neck", "head"],
)
def test_a_ct_without_both_lungs_is_refused(hu):
    with pytest.raises(FibldmError, match="only from a CT in HU that shows both lungs .* not found; give a mask, or"):
        found_in(hu)


def compare(ct: Path | tuple[Path, ...], derived: Path) -> list[float]:
    """Dice of right lung, left lung and airways with a mask that others derived from the same HU; no ground truth."""
    mask = lung_mask(read_scan(ct if isinstance(ct, tuple) else (ct,)))
    wanted = read_scan((derived,)).array
    return [dice(mask == label, wanted == label) for label in (1, 2, 3)]


@pytest.mark.data
@pytest.mark.parametrize("name", ["lidc-idri-0001", "lidc-idri-0002", "lungdx-a0001"])
@pytest.mark.slow
def test_lungs_of_patients_agree_with_another_derivation(name, data_folder):
    """Contrast, emphysema with lungs that touch, and a tumour."""
    folder = data_folder / "lung_ct" / name
    right, left, _ = compare(folder / "ct.nii.gz", folder / "lung_derived.nii.gz")
    assert min(right, left) > 0.96


@pytest.mark.data
@pytest.mark.slow
def test_lungs_of_a_dicom_series_agree_with_another_derivation(data_folder):
    folder = data_folder / "dicom" / "lungdx-a0002_B40f_8mm"
    right, left, airways = compare(tuple(sorted((folder / "series").iterdir())), folder / "lung_derived.nii.gz")
    assert min(right, left) > 0.96
    assert airways > 0.8


@pytest.mark.data
def test_lungs_of_a_coarse_nrrd_agree_with_the_mask_beside_it(data_folder):
    """F6, B6: 4 mm voxels."""
    folder = data_folder / "lung_ct" / "cip-ct64"
    mask = lung_mask(read_scan((folder / "ct-64.nrrd",)))
    assert dice(np.isin(mask, (1, 2)), read_scan((folder / "wholeLung-64.nrrd",)).array > 0) > 0.93
    regions = read_scan((folder / "lm-64.nrrd",)).array % 256
    assert dice(mask == 1, np.isin(regions, (12, 13, 14))) > 0.9
    assert dice(mask == 2, np.isin(regions, (9, 10, 11))) > 0.9
