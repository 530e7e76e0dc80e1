"""Edits of masks: right to the voxel on masks that a person can count, and never where nothing may lie."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.mask_editing.anatomy import Anatomy, Variation
from fibldm.mask_editing.deformation import Deform
from fibldm.mask_editing.fibrosis import SetFibrosis
from fibldm.mask_editing.labels import Grow, Move, Remove, ToVolume
from fibldm.mask_editing.lesion import Insert
from fibldm.mask_editing.outputs import edit_masks
from fibldm.mask_editing.regions import nearest_other
from fibldm.mask_editing.words import EDITS, read_edits
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels

LIVER, TUMOUR, BONE = 1, 2, 3
SPACING = (1.0, 2.0, 2.0)
AFFINE = np.diag([*SPACING, 1.0])
WIDE = ((0.0, 1e3),) * 3
ANATOMY = Anatomy(
    names={0: "background", LIVER: "liver", TUMOUR: "liver tumour", BONE: "bone"},
    hosts={LIVER: frozenset({0}), TUMOUR: frozenset({LIVER}), BONE: frozenset({0})},
    envelope=Envelope(WIDE, WIDE, {0: (0, 1e6), LIVER: (0, 1e6), TUMOUR: (0, 1.0), BONE: (0, 1e6)}),
    variation=Variation((0.05, 0.05, 0.05), (1.0, 2.0, 2.0)),
)
CHEST = Anatomy(
    {0: "background", 1: "right lung", 2: "left lung", 3: "ground glass", 4: "reticulation", 5: "honeycombing"},
    {},
    Envelope(WIDE, WIDE, {}),
    None,
)


def abdomen() -> Volume:
    """A liver of 20 x 12 x 12 voxels with a tumour of 4 x 2 x 2, and bone on one side of it."""
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[4:24, 4:16, 4:16] = LIVER
    labels[24:27, 4:16, 4:16] = BONE
    labels[10:14, 9:11, 9:11] = TUMOUR
    return Volume(labels, AFFINE)


def drawn(edit, mask: Volume | None = None, anatomy: Anatomy = ANATOMY, seed: int = 0):
    before = mask or abdomen()
    kept = before.array.copy()
    labels, done = edit(before, anatomy, np.random.default_rng(seed))
    assert np.array_equal(before.array, kept), "the mask that came was changed"
    return labels, done


def test_a_label_grows_by_millimetres_and_not_by_voxels() -> None:
    """2 mm are two voxels along the first axis, and one along the others."""
    labels, done = drawn(Grow("liver tumour", 2))
    tumour = labels == TUMOUR
    assert tumour[8:16, 9, 9].all() and not tumour[7, 9, 9] and not tumour[16, 9, 9]
    assert tumour[12, 8:12, 9].all() and tumour[12, :, 9].sum() == 4
    assert done["ml"] == [16 * 4 / 1000, int(tumour.sum()) * 4 / 1000]
    assert done["voxels_won_from"] == {"liver": int(tumour.sum()) - 16}


def test_a_label_shrinks_and_what_surrounds_it_closes_the_gap() -> None:
    labels, done = drawn(Grow("liver", -2))
    assert not (labels == LIVER)[4:6, 4, 4].any()
    assert (labels[4:23, 4, 10] == 0).all(), "outside is background"
    assert (labels[22:24, 8, 8] == BONE).all(), "and bone where bone is nearer"
    assert done["voxels_given_to"].keys() == {"background", "bone", "liver tumour"}


def test_growth_stops_at_what_it_may_not_lie_in() -> None:
    mask = abdomen()
    mask.array[20:24, 9:11, 9:11] = TUMOUR  # next to the bone
    labels, done = drawn(Grow("liver tumour", 2), mask)
    assert (labels == BONE).sum() == (mask.array == BONE).sum()
    assert done["voxels_held_back"] > 0
    over, _ = drawn(Grow("liver tumour", 2, over=("liver", "bone")), mask)
    assert (over == BONE).sum() < (mask.array == BONE).sum()


@pytest.mark.parametrize("ml", [0.02, 0.064, 0.5])
def test_a_label_gets_the_volume_that_was_asked_for(ml: float) -> None:
    labels, done = drawn(ToVolume("liver tumour", ml))
    assert (labels == TUMOUR).sum() == round(ml / 0.004)
    assert done["ml"][1] == pytest.approx(ml, abs=0.002)


def test_more_volume_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(FibldmError, match=r"cannot have 100 ml: with all that it may lie in \(liver\) it has 11.5 ml"):
        drawn(ToVolume("liver tumour", 100))


def test_a_label_taken_away_leaves_what_was_around_it() -> None:
    labels, done = drawn(Remove("liver tumour"))
    assert (labels[4:24, 4:16, 4:16] == LIVER).all()
    assert done["voxels_given_to"] == {"liver": 16}


def test_nearest_other_is_that_of_the_whole_volume() -> None:
    rng = np.random.default_rng(0)
    mask = Volume(rng.integers(0, 4, (12, 9, 7)).astype(np.uint8), AFFINE)
    region = ndimage.binary_dilation(mask.array == 3, iterations=1)
    indices = ndimage.distance_transform_edt(region, SPACING, return_distances=False, return_indices=True)
    away = np.argwhere(region) - np.stack(indices)[:, region].T
    found = nearest_other(mask, region)
    assert found.shape == (region.sum(),)
    assert (found == mask.array[tuple(indices)][region]).mean() > 0.9, "but for voxels that are equally near"
    assert np.abs(away).max() < 12


def test_a_label_moves_in_millimetres_along_the_axes_of_the_patient() -> None:
    labels, done = drawn(Move("liver tumour", (3, -4, 1.2)))
    expected = np.zeros_like(labels)
    expected[13:17, 7:9, 10:12] = 1
    assert np.array_equal(labels == TUMOUR, expected == 1)
    assert (labels[10:13, 9:11, 9:11] == LIVER).all()
    assert done["moved_by_mm"] == [3, -4, 2]


def test_a_copy_stays_where_it_was_too() -> None:
    labels, _ = drawn(Move("liver tumour", (6, 0, 0), keep=True))
    assert (labels == TUMOUR).sum() == 32


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ((12, 0, 0), "'liver tumour' may lie in liver; there it would take the place of 8 of bone"),
        ((0, 12, 0), "8 of background"),
        ((25, 0, 0), "would leave the volume with 16 of 16 voxels"),
        ((0.2, 0, 0), "must move by at least one voxel; 0.2,0,0 mm is none"),
    ],
)
def test_a_label_goes_nowhere_where_it_may_not_lie(by: tuple[float, float, float], said: str) -> None:
    with pytest.raises(FibldmError, match=said):
        drawn(Move("liver tumour", by))


def test_a_lesion_of_another_patient_keeps_its_size_and_lies_in_the_organ(tmp_path: Path) -> None:
    """Of voxels of 1 mm, into voxels of 1 x 2 x 2 mm; the largest part is taken, and every seed finds another place."""
    other = np.zeros((40, 40, 40), np.uint8)
    other[5:13, 5:13, 5:13] = TUMOUR
    other[30, 30, 30] = TUMOUR
    write_labels(tmp_path / "other.nii.gz", Volume(other, np.diag([-1.0, 1, 1, 1])))
    mask = abdomen()
    mask.array[mask.array == TUMOUR] = LIVER
    places = set()
    for seed in range(4):
        labels, done = drawn(Insert("liver tumour", tmp_path / "other.nii.gz", "liver"), mask, seed=seed)
        assert (labels == TUMOUR).sum() * 4 == pytest.approx(8**3, rel=0.15)
        assert set(mask.array[labels == TUMOUR]) == {LIVER}
        places.add(tuple(done["middle_mm"]))
    assert len(places) > 1


def test_a_lesion_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    other = np.full((60, 60, 60), TUMOUR, np.uint8)
    write_labels(tmp_path / "other.nii.gz", Volume(other, np.eye(4)))
    with pytest.raises(FibldmError, match="fits nowhere into liver, the largest ball in which has a radius of"):
        drawn(Insert("liver tumour", tmp_path / "other.nii.gz", "liver"))


def test_deforming_keeps_labels_and_is_another_with_every_seed() -> None:
    one, done = drawn(Deform())
    other, _ = drawn(Deform(), seed=1)
    assert set(np.unique(one)) - {255} == {0, LIVER, TUMOUR, BONE}
    assert not np.array_equal(one, other)
    assert np.array_equal(one, drawn(Deform())[0])
    assert np.all(np.array(done["bent_by_mm"]) <= 2 * np.array(ANATOMY.variation.shift) * 1.5)
    was, now = ((labels == LIVER).sum() for labels in (abdomen().array, one))
    assert now == pytest.approx(was, rel=0.4)


def chest() -> Volume:
    """Two lungs, with reticulation at the bottom of the right one."""
    labels = np.zeros((50, 36, 40), np.uint8)
    labels[28:46, 5:31, 4:36] = 1
    labels[4:22, 5:31, 4:36] = 2
    labels[30:40, 8:20, 4:10] = 4
    return Volume(labels, np.diag([5.0, 5, 5, 1]))


@pytest.mark.parametrize("extent", [0, 0.02, 0.1, 0.25, 0.6])
def test_fibrosis_has_the_extent_that_was_asked_for(extent: float) -> None:
    mask = chest()
    labels, done = drawn(SetFibrosis(extent), mask, CHEST)
    lungs = mask.array > 0
    assert np.isin(labels, [3, 4, 5])[lungs].mean() == pytest.approx(extent, abs=1e-4)
    assert (labels[~lungs] == 0).all()
    assert done["extent"] == [pytest.approx(720 / lungs.sum(), abs=1e-4), pytest.approx(extent, abs=1e-4)]


def test_a_larger_extent_holds_the_smaller_and_grows_from_the_patients_own() -> None:
    mask, was = chest(), None
    for extent in (0.01, 0.05, 0.2, 0.5):
        labels, _ = drawn(SetFibrosis(extent), mask, CHEST)
        diseased = np.isin(labels, [3, 4, 5])
        assert was is None or (diseased | ~was).all()
        was = diseased
    assert was[mask.array == 4].all()
    assert not np.isin(drawn(SetFibrosis(0.2), mask, CHEST)[0][mask.array == 4], [3]).any(), "it never goes back"


def test_fibrosis_lies_below_and_under_the_pleura() -> None:
    mask = chest()
    mask.array[mask.array == 4] = 1
    diseased = np.isin(drawn(SetFibrosis(0.15), mask, CHEST)[0], [3, 4, 5])
    lungs = mask.array > 0
    depth = ndimage.distance_transform_edt(lungs)
    assert np.argwhere(diseased)[:, 2].mean() < np.argwhere(lungs)[:, 2].mean() - 3
    assert depth[diseased].mean() < 0.7 * depth[lungs].mean()


def test_training_masks_say_what_may_lie_where(tmp_path: Path, phantom_work: Path) -> None:
    anatomy = Anatomy.of_training(phantom_work)
    assert anatomy.hosts[1] == frozenset({0})
    assert 1 in anatomy.hosts[4] or 2 in anatomy.hosts[4] or 0 in anatomy.hosts[4]
    assert anatomy.names[4] == "ground glass" and anatomy.label("ground_glass") == 4
    assert min(anatomy.variation.scale) > 0


def test_command_writes_masks_with_what_was_done_and_keeps_them(tmp_path: Path, phantom_work: Path, capsys) -> None:
    mask = sorted((phantom_work / "labels").glob("*.nii.gz"))[0]
    out = tmp_path / "out"
    words = ["edit-masks", "--masks", str(mask), "--data", str(phantom_work), "--out", str(out), "--workers", "1"]
    edit = ["--edit", "fibrosis 20%", "--allow-extrapolation"]
    assert run([*words, *edit]) == 0
    (file,) = (tmp_path / "out").glob("*.nii.gz")
    beside, stamp = read_json(file.with_name(file.name.replace(".nii.gz", ".json"))), file.stat().st_mtime_ns
    assert beside["done"][0]["extent"][1] == pytest.approx(0.2, abs=1e-3)
    edited, source = nibabel.load(file), nibabel.load(mask)
    assert np.array_equal(edited.affine, source.affine)
    assert run([*words, *edit]) == 0 and file.stat().st_mtime_ns == stamp
    assert run([*words, "--edit", "fibrosis 30%"]) == 2
    assert "lies there already and is another mask" in capsys.readouterr().err


def test_a_size_outside_of_training_is_refused_and_nothing_is_written(tmp_path: Path, phantom_work: Path) -> None:
    mask = sorted((phantom_work / "labels").glob("*.nii.gz"))[0]
    edits = ["grow airways 40mm over=background,1,2"]
    with pytest.raises(FibldmError, match="would lie outside of what the training masks cover; .*label 3 fills"):
        edit_masks([mask], tmp_path / "out", work=phantom_work, edits=edits, workers=1)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("form", [form for _, form in EDITS.values()])
def test_edits_are_read_as_they_are_written(form: str) -> None:
    words = form.replace("[", "").replace("]", "").replace("LABEL,LABEL", "1,2").replace("R,A,S", "1,0,-2")
    assert len(read_edits([words.replace("LABEL", "1")])) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enlarge liver 3mm", "an edit"),
        ("grow liver", "grow is written grow LABEL 3mm"),
        ("grow liver -3mm", "grow is written"),
        ("move liver 3mm", "move is written move LABEL R,A,Smm"),
        ("move liver nan,0,0mm", "move is written"),
        ("grow 'liver 3mm", "must close its quotes"),
        ("remove liver over=bone", "got also over="),
        ("fibrosis 70%", "must be 0 % to 60% of the lungs; got 0.7"),
        ("insert tumour", "insert is written"),
        ("deform 9", "up to 2 standard deviations; got 9"),
        ("", "an edit"),
    ],
)
def test_an_edit_that_cannot_be_read_says_how_it_is_written(text: str, said: str) -> None:
    with pytest.raises(FibldmError, match=said):
        read_edits([text])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("remove spleen", "a label"),
        ("remove background", "a label"),
        ("shrink liver_tumour 9mm", "nothing of 'liver tumour' would be left"),
        ("volume liver_tumour 0ml", "must be at least one voxel"),
        ("fibrosis 10%", "fibrosis needs labels of lungs"),
    ],
)
def test_an_edit_that_cannot_be_done_is_one_clear_error(edit: str, said: str) -> None:
    with pytest.raises(FibldmError, match=said):
        drawn(read_edits([edit])[0])


def test_a_label_that_the_mask_lacks_cannot_be_edited() -> None:
    with pytest.raises(FibldmError, match="this one has no 'liver tumour'"):
        drawn(Remove("liver tumour"), Volume(np.full((5, 5, 5), LIVER, np.uint8), AFFINE))
