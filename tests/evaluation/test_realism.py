"""Realism of sets of volumes: worse volumes must come out worse, and scans against scans best: E8."""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.evaluation import realism
from fibldm.evaluation.cases import Case, Evaluated, Sample
from fibldm.evaluation.realism import Arrays, frechet_by_plane, measure_realism, standardised
from fibldm.evaluation.results import Section
from fibldm.evaluation.sets import choose_sets
from fibldm.files import hash_value
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import write_labels, write_synthetic
from fibldm.workers import Engine, Processes

GRID = ModelGrid((1.5, 2.0, 2.5), (24, 20, 18))
LABELS = {0: "background", 1: "organ", 4: "lesion"}
NETWORK_FREE = ("kid/radiomics", "mmd/radiomics")
EVERY = (*NETWORK_FREE, "kid/segmenter", "mmd/segmenter")

FRECHET = ("frechet/radiomics", "frechet/segmenter")
PLANES = tuple(f"frechet/segmenter/{plane}" for plane in ("sagittal", "coronal", "axial"))
SHARES = tuple(f"{name}/{of}" for name in ("precision", "recall", "coverage") for of in ("radiomics", "segmenter"))
DENSITIES = ("density/radiomics", "density/segmenter")

Spoil = Callable[[Sample], Sample]


class BlockMeans:
    """In place of a network: of four blocks, the mean and how much neighbours differ."""

    fingerprint = "blocks"

    def features(self, image: np.ndarray) -> np.ndarray:
        blocks = [part for half in np.split(image, 2) for part in np.split(half, 2, axis=1)]
        return np.array(
            [value for part in blocks for value in (part.mean(), np.abs(np.diff(part)).mean())], dtype=np.float32
        )

    def described(self, image: np.ndarray) -> np.ndarray:
        rows = [[-1, *self.features(image)]]
        for axis in range(3):
            for slab in np.array_split(np.moveaxis(image, axis, 0), 6):
                rows.append([axis, *self.features(np.moveaxis(slab, 0, 2))])
        return np.array(rows, dtype=np.float32)


@dataclass
class Patients:
    """In place of `Evaluated`: two ellipsoids with texture per patient; ``read`` gives what a test put there."""

    folder: Path
    labels: dict[int, str] = field(default_factory=lambda: LABELS)
    grid: ModelGrid = GRID
    samples: dict[str, Sample] = field(default_factory=dict)
    reads: int = 0
    engine: Engine = Processes()

    def real(self, *splits: str) -> list[Case]:
        cases = [case(f"p{i:02d}", "training" if i < 20 else "test") for i in range(30)]
        return [one for one in cases if not splits or one.split in splits]

    def read(self, case: Case) -> Sample:
        self.reads += 1
        return self.sample(case)

    def sample(self, case: Case) -> Sample:
        return self.samples[case.name] if case.name in self.samples else scan(int(case.subject[1:]))

    def key(self, case: Case) -> str:
        sample = self.sample(case)
        return hashlib.sha256(sample.image.tobytes() + sample.labels.tobytes()).hexdigest()

    def spoiled(self, spoil: Spoil) -> list[Case]:
        """Synthetic volumes from the masks of the test patients: their own scans, made worse."""
        made = []
        for real in self.real("test"):
            name = f"{real.name}_000"
            self.samples[name] = spoil(self.read(real))
            made.append(replace(real, name=name, label=Path(f"masks/{real.name}.nii.gz")))
        return made


def case(name: str, split: str | None) -> Case:
    return Case(name, name, split, Path(f"{name}.nii.gz"), Path(f"{name}.nii.gz"))


@functools.cache
def scan(patient: int) -> Sample:
    rng = np.random.default_rng([5, patient])
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in GRID.size), indexing="ij")
    dx, dy, dz = rng.normal(0, 1, size=3)
    labels = np.zeros(GRID.size, dtype=np.uint8)
    labels[((x - dx) / 9) ** 2 + ((y - dy) / 6) ** 2 + ((z - dz) / 6) ** 2 < 1] = 1
    labels[((x - dx - 3) / 3) ** 2 + ((y - dy) / 2) ** 2 + ((z - dz) / 3) ** 2 < 1] = 4
    image = np.select([labels == 1, labels == 4], [rng.normal(-0.2, 0.02), rng.normal(0.5, 0.03)], -0.9)
    image = image + 0.5 * ndimage.gaussian_filter(rng.normal(size=GRID.size), 0.8) * (labels > 0)
    valid = np.ones(GRID.size, dtype=bool)
    return Sample(image.astype(np.float32), labels, valid, GRID.spacing)


def unchanged(sample: Sample) -> Sample:
    return sample


def blurred(width: float) -> Spoil:
    return lambda sample: sample._replace(image=ndimage.gaussian_filter(sample.image, width))


def noisy(width: float) -> Spoil:
    noise = np.random.default_rng(3).normal(size=GRID.size).astype(np.float32)
    return lambda sample: sample._replace(image=sample.image + np.float32(width) * noise)


def shifted(voxels: int) -> Spoil:
    return lambda sample: sample._replace(labels=np.roll(sample.labels, voxels, axis=0))


def permuted(share: float) -> Spoil:
    """Organ and lesion swapped in the lower part of the volume."""

    def spoil(sample: Sample) -> Sample:
        labels = sample.labels.copy()
        lower = labels[..., : round(share * GRID.size[2])]
        lower[...] = np.select([lower == 1, lower == 4], [4, 1], 0)
        return sample._replace(labels=labels)

    return spoil


def measured(folder: Path, spoil: Spoil) -> Section:
    patients = Patients(folder)
    return measure_realism(patients, patients.spoiled(spoil), BlockMeans())


@pytest.fixture(scope="module", autouse=True)
def few_pairs():
    """MS-SSIM takes most of the time, and ten pairs say what forty-five do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realism, "_PAIRS", 10)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The features of the scans are computed once for all tests."""
    return tmp_path_factory.mktemp("realism")


@pytest.fixture(scope="module")
def best(folder) -> Section:
    return measured(folder, unchanged)


@pytest.mark.parametrize(
    ("spoil", "severities", "names"),
    [
        (blurred, (0.4, 0.8, 1.6), (*EVERY, *PLANES, "spectrum")),
        (noisy, (0.05, 0.1, 0.2), (*EVERY, *PLANES, "spectrum")),
        (shifted, (1, 2, 4), NETWORK_FREE),
        (permuted, (0.3, 0.6, 1.0), NETWORK_FREE),
    ],
    ids=["blur", "noise", "shifted masks", "permuted labels"],
)
def test_worse_volumes_are_further_from_the_scans(folder, best, spoil, severities, names):
    sections = [best, *(measured(folder, spoil(severity)) for severity in severities)]
    for name in names:
        values = [section.figures[name].value for section in sections]
        assert values == sorted(values) and len(set(values)) == len(values), (name, values)
        assert {section.figures[name].real_vs_real for section in sections} == {best.figures[name].real_vs_real}


def test_the_scans_themselves_give_exactly_what_scans_give(best):
    for name, figure in best.figures.items():
        assert figure.value == figure.real_vs_real, name


def test_every_figure_has_its_parts_in_the_order_of_importance(best):
    among = [*SHARES[:4], *DENSITIES, *SHARES[4:]]
    assert list(best.figures) == [*(EVERY[i] for i in (0, 2, 1, 3)), *FRECHET, *among, *PLANES, "spectrum", "ms_ssim"]
    for name, figure in best.figures.items():
        assert figure.n == 10
        if name in SHARES:
            assert 0 <= figure.value <= 1
        elif name in DENSITIES:
            assert 0 <= figure.value <= 2
        elif name not in FRECHET:
            assert figure.low < figure.value < figure.high, name
    for name, features in zip(FRECHET, (27, 8), strict=True):
        assert best.facts["extractors"][name.split("/")[1]]["features"] == features
    assert best.figures["frechet/radiomics"].to_dict() == {
        **dict.fromkeys(("value", "low", "high", "real_vs_real")),
        "n": 10,
        "note": "too few to say: 10 patients for 27 features",
    }
    assert best.figures["frechet/segmenter"].value >= 0


def test_facts_say_who_was_compared_by_what(best):
    facts = json.loads(json.dumps(best.to_dict(), allow_nan=False))
    assert facts["patients"] == 10 and facts["compared_with"] == "scans of the same masks"
    assert facts["real"] == [f"p{i}" for i in range(20, 30)]
    assert len(set(facts["reference"])) == 10 and max(facts["reference"]) < "p20"
    assert facts["ms_ssim"] == {"scales": 2, "pairs": 10}
    assert facts["extractors"]["segmenter"] == {"hash": "blocks", "features": 8}
    assert len(facts["extractors"]["radiomics"]["hash"]) == 64
    assert [row["case"] for row in facts["cases"]] == [f"p{i}_000" for i in range(20, 30)]
    assert facts["notes"] == [] and facts["units"] == {"spectrum": "dB"}


def test_volumes_that_are_all_alike_show_in_ms_ssim(folder, best):
    section = measured(folder, lambda sample: sample._replace(image=scan(20).image))
    assert section.figures["ms_ssim"].value == pytest.approx(1)
    assert section.figures["ms_ssim"].real_vs_real == best.figures["ms_ssim"].real_vs_real < 0.9


def test_features_are_computed_once(tmp_path):
    patients = Patients(tmp_path)
    synthetic = patients.spoiled(unchanged)
    reads = []
    for _ in range(2):
        before = patients.reads
        first = measure_realism(patients, synthetic, BlockMeans())
        reads.append(patients.reads - before)
    pairs = 2 * 2 * first.facts["ms_ssim"]["pairs"]
    assert reads == [3 * 20 + pairs, pairs]  # the synthetic volumes are the scans of their masks
    assert len(list(tmp_path.glob("cache/radiomics-*/*.npy"))) == 20


class Differences:
    """In place of `PlaneDistance`: how far volumes are apart, and the same by sagittal slices."""

    fingerprint = "differences"
    facts = {"network": "none"}
    computed = 0

    def names(self, shape: tuple[int, ...]) -> list[str]:
        return ["lpips", "lpips/sagittal"]

    def __call__(self, real: Sample, made: np.ndarray) -> np.ndarray:
        self.computed += 1
        apart = np.abs(real.image - made)
        return np.array([apart.mean(), apart.mean(axis=(1, 2)).max()])


def test_lpips_is_that_of_a_volume_from_the_scan_of_its_mask_beside_other_patients(tmp_path):
    patients, planes = Patients(tmp_path), Differences()
    synthetic = patients.spoiled(blurred(0.5))
    section = measure_realism(patients, synthetic, BlockMeans(), planes=planes)
    assert planes.computed == 20 and section.facts["lpips"] == planes.facts
    expected = [planes(scan(i), patients.samples[f"p{i}_000"].image) for i in range(20, 30)]
    real = [
        planes(scan(int(one[1:])), scan(int(other[1:])).image)
        for one, other in zip(section.facts["real"], section.facts["reference"], strict=True)
    ]
    for plane, name in enumerate(planes.names(GRID.size)):
        figure = section.figures[name]
        assert figure.value == pytest.approx(np.mean(expected, axis=0)[plane]) and figure.n == 10
        assert figure.real_vs_real == pytest.approx(np.mean(real, axis=0)[plane])
        assert figure.low < figure.value < figure.high
    before = planes.computed
    assert measure_realism(patients, synthetic, BlockMeans(), planes=planes) == section
    assert planes.computed == before
    assert "lpips" not in measure_realism(patients, synthetic, BlockMeans()).figures


def test_the_order_of_the_volumes_does_not_matter(folder, best):
    patients = Patients(folder)
    section = measure_realism(patients, patients.spoiled(unchanged)[::-1], BlockMeans())
    assert section == best


def test_a_patient_counts_once_and_is_compared_with_the_scan_of_its_mask():
    real = [*Patients(Path()).real(), replace(case("a_ses-2", "test"), subject="p20")]
    volumes = [
        replace(case("a_ses-2_001", "test"), subject="p20", label=Path("masks/a_ses-2.nii.gz")),
        replace(case("a_ses-2_000", "test"), subject="p20", label=Path("masks/a_ses-2.nii.gz")),
        replace(case("p03_000", "training"), subject="p03", label=Path("masks/p03.nii.gz")),
    ]
    sets = choose_sets(real, volumes)
    assert [one.name for one in sets.synthetic] == ["a_ses-2_000", "p03_000"]
    assert [one.name for one in sets.real] == ["a_ses-2", "p03"] and sets.paired
    assert len(sets.reference) == 2 and not {"p03", "p20"} & {one.subject for one in sets.reference}


def test_sets_are_as_large_as_the_smallest_and_the_rest_is_named(tmp_path):
    patients = Patients(tmp_path)
    volumes = [replace(case(f"p{i:02d}_000", "x"), subject=f"p{i:02d}", label=Path(f"p{i:02d}.nii")) for i in range(26)]
    sets = choose_sets(patients.real(), volumes)
    assert {len(part) for part in sets[:3]} == {4}
    assert [one.name for one in sets.real] == [one.subject for one in sets.synthetic]
    assert {one.subject for one in sets.reference} == {"p26", "p27", "p28", "p29"}
    patients.samples |= {volume.name: scan(3) for volume in volumes}
    section = measure_realism(patients, volumes, BlockMeans())
    assert section.notes == ["Synthetic volumes of 22 patients were left out: sets are as large as the smallest."]
    assert section.figures["kid/radiomics"].note == "too few to say"


def test_who_is_compared_does_not_depend_on_pseudonyms(tmp_path):
    patients = Patients(tmp_path)
    real, volumes = patients.real(), patients.spoiled(unchanged)
    others = {one.subject: f"sub-{hash_value(one.subject)[:8]}" for one in real}
    sets, again = (
        choose_sets(*([replace(one, subject=names[one.subject]) for one in part] for part in (real, volumes)))
        for names in ({one: one for one in others}, others)
    )
    assert len(sets.reference) < 20  # there was a choice
    assert [[one.name for one in part] for part in again[:3]] == [[one.name for one in part] for part in sets[:3]]


def test_masks_of_nobody_are_compared_with_test_scans(tmp_path):
    patients = Patients(tmp_path)
    volumes = [replace(case(f"q{i}_000", None), subject=f"q{i}", label=Path(f"q{i}.nii")) for i in range(3)]
    patients.samples |= {volume.name: scan(3) for volume in volumes}
    section = measure_realism(patients, volumes, BlockMeans())
    assert section.facts["compared_with"] == "scans of test patients"
    assert len(section.facts["real"]) == 3 and min(section.facts["real"]) >= "p20" > max(section.facts["reference"])
    assert section.notes == ["The masks are of nobody in the work folder: real_vs_real is of scans with other masks."]


def test_too_few_patients_and_missing_masks_are_refused(tmp_path):
    patients = Patients(tmp_path)
    volumes = patients.spoiled(unchanged)
    needed = "at least two patients, scans of their masks (or of the test split) and scans of two other patients; got "
    with pytest.raises(FibldmError, match=re.escape(needed + "1, 1 and 29; synthesize from masks of more patients")):
        measure_realism(patients, volumes[:1], BlockMeans())
    with pytest.raises(FibldmError, match=re.escape(needed + "10, 10 and 1;")):
        choose_sets(patients.real("test") + patients.real("training")[:1], volumes)
    without = [replace(volumes[0], label=None), *volumes[1:]]
    with pytest.raises(FibldmError, match="realism needs the mask of every volume; p20_000 came without"):
        measure_realism(patients, without, BlockMeans())


def test_the_frechet_distance_of_a_plane_is_that_of_its_slabs() -> None:
    """Slabs of scans are at -1 and 1, hence at -asinh(1) and asinh(1); volumes' are moved by a known way."""
    across = np.repeat([-1, 0, 1, 2], [1, 4, 2, 6])
    ones = np.where(np.arange(len(across)) % 2, 1.0, -1.0)  # as many of each in every plane
    scans = np.stack([np.stack([across, ones], axis=-1)] * 9)
    moved = scans.copy()
    for axis, way in ((0, 0.5), (1, 0.0), (2, 2.0)):
        moved[:, across == axis, 1] = np.sinh(way + np.arcsinh(ones[across == axis]))
    figures = frechet_by_plane(Arrays(moved, scans, scans), (8, 8, 8))
    assert list(figures) == list(PLANES)
    assert [figure.value for figure in figures.values()] == pytest.approx([0.25, 0.0, 4.0], abs=1e-9)
    for figure in figures.values():
        assert figure.n == 9 and figure.real_vs_real == pytest.approx(0, abs=1e-9)
        assert [figure.low, figure.high] == pytest.approx([figure.value] * 2, abs=1e-9), "patients are alike"
    assert list(frechet_by_plane(Arrays(moved, scans, scans), (8, 8, 1))) == [PLANES[2]]
    wide = np.concatenate([scans, np.zeros((9, len(across), 20))], axis=-1)
    figures = frechet_by_plane(Arrays(wide, wide, wide), (8, 8, 8))
    assert figures[PLANES[1]].note == "too few to say: 18 slabs of 9 patients for 21 features"
    assert figures[PLANES[1]].value is None and figures[PLANES[0]].value == 0


def test_features_are_scaled_by_all_scans_and_what_is_lacking_is_their_mean():
    synthetic = np.array([[5.0, 3.0, np.nan], [np.nan, 3.0, 1.0]])
    real, reference = np.array([[1.0, 7.0, np.nan]] * 2), np.array([[3.0, 7.0, np.nan], [np.nan, 7.0, np.nan]])
    scaled = standardised(Arrays(synthetic, real, reference))
    mean, std = 5 / 3, np.std([1, 1, 3])
    assert np.sinh(scaled.synthetic) == pytest.approx(np.array([[(5 - mean) / std, -4.0, 0.0], [0.0, -4.0, 1.0]]))
    assert np.sinh(scaled.reference) == pytest.approx(np.array([[(3 - mean) / std, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_volumes_on_disk_are_measured_on_the_grid_of_the_run(tmp_path, phantom_work):
    """Blurred phantoms written as `fibldm synthesize` writes them, with the masks of two patients."""
    intensity = Intensity.from_dict(json.loads((phantom_work / "intensity.json").read_text()))
    names = {0: "background", 1: "right lung", 2: "left lung", 3: "airways"}
    evaluated = Evaluated(tmp_path / "run", phantom_work, ModelGrid((10.0,) * 3, (32, 32, 24)), intensity, names)
    for real in evaluated.real("training")[:2]:
        image, mask = read_volume(str(real.image)), read_volume(str(real.label))
        smooth = ndimage.gaussian_filter(image.array.astype(np.float32), 2).astype(np.int16)
        write_synthetic(tmp_path / "out" / f"{real.name}_000.nii.gz", Volume(smooth, image.affine), {})
        write_labels(tmp_path / "out" / "masks" / f"{real.name}.nii.gz", mask)
    section = measure_realism(evaluated, evaluated.synthetic(tmp_path / "out"), BlockMeans())
    assert section.facts["patients"] == 2 and section.facts["extractors"]["radiomics"]["features"] == 4 * 9
    for name in ("kid/radiomics", "spectrum"):
        assert section.figures[name].value > section.figures[name].real_vs_real
    json.dumps(section.to_dict(), allow_nan=False)
