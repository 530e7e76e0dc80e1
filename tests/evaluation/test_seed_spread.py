"""The spread of volumes of one mask: a map on the grid of the mask, in its units, and its size in each label."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.seed_spread import deviation, measure_spread
from fibldm.files import read_json, write_json
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import write_labels, write_nifti, write_synthetic

SHAPE = (7, 9, 5)
AFFINE = np.array([[0.0, -1.6, 0, 30], [1.5, 0, 0, -20], [0, 0, -2.5, 7], [0, 0, 0, 1]])  # axes A, L, I
NAMES = {0: "background", 1: "organ", 4: "lesion"}
SEEDS = 4


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """Test cases a and b; the latter is of the same patient as c."""
    work, entries = tmp_path / "work", []
    for name, subject in (("a", "p1"), ("b", "p2"), ("c", "p2")):
        write_nifti(work / f"images/{name}.nii.gz", np.zeros(SHAPE, np.float32), AFFINE)
        write_labels(work / f"labels/{name}.nii.gz", Volume(labels_of(name), AFFINE))
        files = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        entries.append({"case": name, "subject": subject, **files})
    write_json(work / "datalist.json", {"training": [], "validation": [], "test": entries, "content": "c"})
    intensity = Intensity("percentile", output_low=0.0, output_high=1000.0)
    return Evaluated(tmp_path / "run", work, ModelGrid((2.0, 2.0, 3.0), (8, 8, 8)), intensity, NAMES, ("MR",))


def labels_of(name: str) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:5, 2:8, 1:4] = 1
    labels[2:4, 3:6, 1:4] = {"a": 4, "b": 4, "c": 1}[name]
    labels[6] = 255
    return labels


def volumes_of(name: str, width: float) -> np.ndarray:
    """Wider where the label is 4, much wider where it is unknown."""
    labels = labels_of(name)
    factor = np.select([labels == 4, labels == 255], [3.0, 100.0], 1.0)
    noise = np.random.default_rng([ord(name), 5]).normal(size=(SEEDS, *SHAPE))
    return (500 + width * factor * noise).astype(np.float32)


def write(folder: Path, name: str, volumes: np.ndarray) -> None:
    for number, volume in enumerate(volumes):
        write_synthetic(folder / f"{name}_{number:03d}.nii.gz", Volume(volume, AFFINE), {})
    write_labels(folder / "masks" / f"{name}.nii.gz", Volume(labels_of(name), AFFINE))


def test_deviation_is_that_of_numpy() -> None:
    arrays = np.random.default_rng(1).normal(1e4, 3, size=(5, 4, 3))
    assert deviation(iter(arrays)) == pytest.approx(arrays.std(axis=0, ddof=1))
    assert (deviation([arrays[0]] * 2) == 0).all()


def test_the_map_is_the_deviation_on_the_grid_of_the_mask_and_says_what_it_is(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    volumes = volumes_of("a", 20.0)
    write(tmp_path / "out", "a", volumes)
    section = measure_spread(evaluated, evaluated.synthetic(tmp_path / "out"))
    file = evaluated.run_dir / section.facts["maps"]["a"]
    assert file == evaluated.folder / "spread" / "a.nii.gz"
    image = nibabel.Nifti1Image.from_filename(file)
    expected = volumes.astype(np.float64).std(axis=0, ddof=1)
    assert np.asarray(image.dataobj) == pytest.approx(expected, rel=1e-5)
    assert np.allclose(image.affine, AFFINE) and image.get_data_dtype() == np.float32
    assert image.header["descrip"].item().startswith(b"SYNTHETIC, DERIVED: standard deviation")
    facts = read_json(file.with_name("a.json"))
    assert facts["synthetic"] is True and facts["derived"] == "standard deviation between synthetic volumes of one mask"
    assert facts["volumes"] == [f"a_{number:03d}" for number in range(SEEDS)] and facts["units"] == "arbitrary"
    labels = labels_of("a")
    for name, where in {"organ": labels == 1, "lesion": labels == 4, "whole": labels != 255}.items():
        figure = section.figures[f"spread/{name}"]
        assert figure.value == pytest.approx(np.sqrt(np.square(expected[where]).mean()), rel=1e-6)
        assert (figure.n, figure.real_vs_real, figure.note) == (1, None, "too few to say")
    assert section.notes[0].startswith("Real patients have no such spread")
    assert section.facts["units"] == {"spread": "arbitrary"}


def test_a_patient_counts_once_and_masks_of_one_volume_are_left_out(evaluated: Evaluated, tmp_path: Path) -> None:
    for name, width in (("a", 10.0), ("b", 20.0), ("c", 40.0)):
        write(tmp_path / "out", name, volumes_of(name, width))
    write_synthetic(tmp_path / "out" / "single_000.nii.gz", Volume(volumes_of("a", 1.0)[0], AFFINE), {})
    write_labels(tmp_path / "out" / "masks" / "single.nii.gz", Volume(labels_of("a"), AFFINE))
    section = measure_spread(evaluated, evaluated.synthetic(tmp_path / "out"))
    own = {row["case"]: row["spread/organ"] for row in section.cases}
    assert own.keys() == {"a", "b", "c"} and section.notes[1] == "1 masks with one volume only were left out."
    figure = section.figures["spread/organ"]
    assert figure.n == 2 and figure.value == pytest.approx((own["a"] + (own["b"] + own["c"]) / 2) / 2)
    assert section.figures["spread/lesion"].n == 2


def test_each_channel_has_its_own(evaluated: Evaluated, tmp_path: Path) -> None:
    volumes = volumes_of("a", 20.0)
    for number, volume in enumerate(volumes):
        pair = [Volume(volume, AFFINE), Volume(3 * volume, AFFINE)]
        write_synthetic(tmp_path / "out" / f"a_{number:03d}.nii.gz", pair, {})
    write_labels(tmp_path / "out" / "masks" / "a.nii.gz", Volume(labels_of("a"), AFFINE))
    two = replace(evaluated, channels=("T1", "T2"))
    section = measure_spread(two, two.synthetic(tmp_path / "out"))
    one, other = (section.figures[f"spread/{channel}/organ"].value for channel in two.channels)
    assert one is not None and other == pytest.approx(3 * one)
    image = nibabel.Nifti1Image.from_filename(two.folder / "spread" / "a.nii.gz")
    assert np.asarray(image.dataobj)[..., 1] == pytest.approx(3 * volumes.std(axis=0, ddof=1), rel=1e-4)


def test_a_spread_needs_several_volumes_of_a_mask_on_its_grid(evaluated: Evaluated, tmp_path: Path) -> None:
    write(tmp_path / "one", "a", volumes_of("a", 1.0)[:1])
    with pytest.raises(FibldmError, match="at least 2 volumes of one mask; each of these 1 has one; .*--count 8"):
        measure_spread(evaluated, evaluated.synthetic(tmp_path / "one"))
    write(tmp_path / "two", "a", volumes_of("a", 1.0)[:2])
    moved = AFFINE + np.array([[0, 0, 0, 1.0], *np.zeros((3, 4))])
    write_synthetic(tmp_path / "two" / "a_001.nii.gz", Volume(volumes_of("a", 1.0)[1], moved), {})
    with pytest.raises(FibldmError, match=r"a_001.nii.gz must lie on the grid of its mask"):
        measure_spread(evaluated, evaluated.synthetic(tmp_path / "two"))
