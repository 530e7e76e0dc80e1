"""Masks without images: their shapes and topology by closed form, and what is said of masks that were drawn."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.mask_shapes import centred, describe, pairwise_dice
from fibldm.evaluation.masks import masks_of, measure_masks
from fibldm.volumes.grid import ModelGrid
from fibldm.volumes.intensity import Intensity

NAMES = {0: "background", 1: "organ", 4: "lesion"}
SPACING = (1.0, 2.0, 2.5)


def places(shape, spacing) -> np.ndarray:
    """mm of each voxel from the middle, ``(3, X, Y, Z)``."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def test_a_ball_has_the_figures_of_a_ball() -> None:
    shape = (60, 30, 24)
    labels = (np.linalg.norm(places(shape, SPACING), axis=0) < 20).astype(np.uint8)
    found = describe(labels, SPACING, NAMES)
    volume, surface = 4 / 3 * np.pi * 20**3, 4 * np.pi * 20**2
    assert found["volume_ml/organ"] == pytest.approx(volume / 1000, rel=0.02)
    assert found["surface_mm2/organ"] == pytest.approx(surface * 1.1, rel=0.05)  # of voxels' steps
    assert found["sphericity/organ"] == pytest.approx(0.9, abs=0.05)
    assert found["elongation/organ"] == pytest.approx(1, abs=0.03) == found["flatness/organ"]
    assert [found[f"extent_{axis}_mm/organ"] for axis in "xyz"] == [40, 40, 40]
    assert [found[f"offset_{axis}_mm/organ"] for axis in "xyz"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [found[f"{name}/organ"] for name in ("components", "cavities", "handles")] == [1, 0, 0]
    assert not any(value for name, value in found.items() if "lesion" in name)


def test_components_cavities_and_handles_are_counted() -> None:
    labels = np.zeros((24, 24, 24), dtype=np.uint8)
    labels[2:9, 2:9, 2:5] = 1
    labels[4:7, 4:7, 2:5] = 0  # a ring: one handle
    labels[12:19, 12:19, 12:19] = 1
    labels[15, 15, 15] = 4  # a cavity of the organ, filled by a lesion
    labels[22, 22, 22] = UNKNOWN_LABEL
    found = describe(labels, (1, 1, 1), NAMES)
    assert [found[f"{name}/organ"] for name in ("components", "cavities", "handles")] == [2, 1, 1]
    assert [found[f"{name}/lesion"] for name in ("components", "cavities", "handles")] == [1, 0, 0]
    assert found["contact_mm2/organ+lesion"] == 6


def test_contact_is_the_area_of_shared_faces() -> None:
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    labels[2:4, 1:4, 1:5] = 1
    labels[4:6, 1:4, 1:5] = 4
    labels[2:4, 4, 1] = 4
    found = describe(labels, SPACING, NAMES)
    assert found["contact_mm2/organ+lesion"] == 3 * 4 * (2.0 * 2.5) + 2 * (1.0 * 2.5)
    assert found["offset_x_mm/organ"] < 0 < found["offset_x_mm/lesion"]


def test_dice_is_that_of_masks_moved_to_one_middle() -> None:
    one, other = (np.zeros((12, 12, 12), dtype=np.uint8) for _ in range(2))
    one[1:5, 2:4, 3:6], other[6:10, 7:9, 2:5] = 1, 1
    moved = np.stack([centred(part, (12, 12, 12)) for part in (one, other)])
    assert pairwise_dice(moved, moved, [1, 4]).tolist() == [[1, 1], [1, 1]]
    half = moved[:1].copy()
    half[0][half[0] > 0] = np.where(np.arange(24) < 12, 1, 4)
    assert pairwise_dice(half, moved[:1], [1, 4])[0, 0] == pytest.approx((2 * 12 / 36 + 0) / 2)
    empty = np.zeros_like(moved)
    assert pairwise_dice(empty, moved, [1]).max() == 0 and pairwise_dice(empty, empty, [1]).min() == 1


def egg(random: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """An organ of a random shape with a lesion at its end."""
    x, y, z = places((32, 32, 32), (2, 2, 2))
    a, b, c = random.uniform(14, 26, 3) * scale
    turn = random.uniform(-0.4, 0.4)
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    labels = ((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1).astype(np.uint8)
    labels[(labels > 0) & (x > a * random.uniform(0.2, 0.7))] = 4
    return labels


def write(path: Path, labels: np.ndarray, asked: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    if asked is not None:
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps({"volumes_ml": {"asked": asked}}))
    return path


def ml(labels: np.ndarray, value: int) -> float:
    return float((labels == value).sum()) * 8 / 1000


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A work folder of eggs, and an empty run."""
    work, random = tmp_path_factory.mktemp("eggs"), np.random.default_rng(1)
    entries: dict[str, list] = {}
    for split, count in (("training", 16), ("validation", 1), ("test", 10)):
        entries[split] = []
        for place in range(count):
            file = write(work / "labels" / f"{split}{place}.nii.gz", egg(random))
            name = f"{split}{place}"
            entries[split].append({"image": str(file), "label": str(file), "case": name, "subject": name})
    content = {"labels": {str(value): name for value, name in NAMES.items()}, "channels": ["ct"], "modality": "ct"}
    (work / "datalist.json").write_text(json.dumps({**content, **entries, "content": "c"}))
    grid = ModelGrid((2.0, 2.0, 2.0), (32, 32, 32))
    return Evaluated(work / "run", work, grid, Intensity("window"), NAMES)


def test_masks_of_the_same_kind_are_as_near_as_real_ones_and_others_are_not(evaluated, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for place in range(10):
        write(tmp_path / "same" / f"mask_{place:03d}.nii.gz", egg(random))
        torn = egg(random, 0.6)
        torn[::5] = 0
        torn[torn == 4] = 1
        write(tmp_path / "other" / f"mask_{place:03d}.nii.gz", torn)
    same, other = (measure_masks(evaluated, masks_of(tmp_path / name)) for name in ("same", "other"))
    kid = same.figures["kid/shapes"]
    assert kid.low <= 0.2 and kid.n == 10 and abs(kid.value - kid.real_vs_real) < 0.5
    assert other.figures["kid/shapes"].low > kid.high
    assert other.figures["volume_distance_ml/organ"].low > same.figures["volume_distance_ml/organ"].value
    assert same.figures["components/organ"].value == 1 == other.figures["components/organ"].real_vs_real
    assert other.figures["components/organ"].low > 2
    assert other.figures["absent/lesion"].value == 1 and same.figures["absent/lesion"].value == 0
    assert other.figures["contact_mm2/organ+lesion"].value == 0 < same.figures["contact_mm2/organ+lesion"].low
    assert same.figures["named"].value == 0 and not same.notes
    assert "asked_volume_r/organ" not in same.figures


def test_copies_are_named_wherever_they_lie(evaluated: Evaluated, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for place in range(5):
        write(tmp_path / f"mask_{place:03d}.nii.gz", egg(random))
    known = nibabel.load(evaluated.real("training")[2].label).get_fdata().astype(np.uint8)
    moved = ndimage.shift(known, (2, -1, 1), order=0)
    moved[tuple(np.argwhere(moved == 1)[0])] = 4
    write(tmp_path / "mask_005.nii.gz", moved)
    found = measure_masks(evaluated, masks_of(tmp_path))
    assert [case["case"] for case in found.cases if case["named"]] == ["mask_005"]
    assert found.cases[5]["nearest_training"] == "training2" and found.cases[5]["nearest_training_dice"] > 0.98
    assert found.figures["named"].value == pytest.approx(1 / 6)
    assert found.notes == ["Copies of training masks are 1 of 6 masks: mask_005 (of training2)."]


def test_asked_volumes_are_compared_with_those_that_came(evaluated: Evaluated, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    for place in range(9):
        labels = egg(random)
        asked = {"lesion": ml(labels, 4) * 1.25, "organ": random.uniform(1, 9)}
        write(tmp_path / f"mask_{place:03d}.nii.gz", labels, asked)
    found = measure_masks(evaluated, masks_of(tmp_path))
    assert found.figures["asked_volume_r/lesion"].value == pytest.approx(1)
    assert found.figures["asked_volume_error/lesion"].value == pytest.approx(0.2)
    assert found.figures["asked_volume_r/organ"].value < 0.9
    assert "Volumes were asked of 9 of 9 masks" in found.notes[0]


def test_what_cannot_be_measured_is_refused_or_said(evaluated: Evaluated, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="must hold masks"):
        masks_of(tmp_path)
    random = np.random.default_rng(5)
    first = write(tmp_path / "mask_000.nii.gz", egg(random))
    with pytest.raises(FibldmError, match="got 1 masks, 16 and 10"):
        measure_masks(evaluated, masks_of(tmp_path))
    shutil.copy(first, tmp_path / "mask_001.nii.gz")
    part = egg(random)
    part[:3] = UNKNOWN_LABEL
    write(tmp_path / "mask_002.nii.gz", part)
    assert measure_masks(evaluated, masks_of(tmp_path)).notes == ["1 mask with unknown voxels left out."]
    write(tmp_path / "mask_002.nii.gz", egg(random) * 3)
    with pytest.raises(FibldmError, match=r"must hold labels of the run \(0, 1, 4\); it holds \[3, 12\]"):
        measure_masks(evaluated, masks_of(tmp_path))
