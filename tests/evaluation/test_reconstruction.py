"""What an autoencoder loses: closed forms, torchmetrics on the same arrays, and a run's own autoencoder."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation import reconstruction
from fibldm.evaluation.cases import Evaluated, Sample
from fibldm.evaluation.faithfulness import foreground
from fibldm.evaluation.reconstruction import Reconstructor, image_quality, measure_reconstruction
from fibldm.evaluation.results import Section, record
from fibldm.evaluation.spectrum import radial_spectrum, spectrum_distance
from fibldm.files import read_json, write_json
from fibldm.runs import StageFolder
from fibldm.volumes.datalist import SPLITS
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.pictures import Pair

SHAPE = (26, 20, 17)
EVERYWHERE = {"": np.ones(SHAPE, dtype=bool)}
SENTENCE = r"SSIM needs at least 11 voxels along each axis; got \(26, 20, 10\)"
Image = NDArray[np.float32]


class Pass:
    """Stands in for an autoencoder: a function of the image."""

    fingerprint = "a" * 64

    def __init__(self, change: Callable[[Image], Image]) -> None:
        self.change = change

    def __call__(self, image: Image) -> Image:
        return self.change(image).astype(np.float32)


class Thresholds:
    """Finds lung where a chest phantom is dark, and nothing else."""

    fingerprint = "t" * 64

    def segment(self, image: Image) -> NDArray[np.uint8]:
        return ((image < -0.4) & (image > -0.98)).astype(np.uint8)


def texture(seed: int, sigma: float = 1.0) -> Image:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), sigma)
    return np.clip(smooth / np.abs(smooth).max(), -1, 1).astype(np.float32)


@pytest.fixture
def evaluated(tiny_run: Path, phantom_work: Path, tmp_path: Path) -> Evaluated:
    """Five scans of four patients, all of them in the test split, and a run to write to."""
    run, work = tmp_path / "run", tmp_path / "work"
    shutil.copytree(tiny_run, run)
    opened = Evaluated.open(run, phantom_work)
    shutil.copytree(phantom_work, work)
    content = read_json(work / "datalist.json")
    entries = [entry for split in SPLITS for entry in content[split]]
    first = {entry["subject"]: entry for entry in reversed(entries)}
    entries = [*list(first.values())[:4], next(entry for entry in entries if entry not in first.values())]
    write_json(work / "datalist.json", content | {"training": [], "validation": [], "test": entries})
    return replace(opened, work=work)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """What was to be drawn; drawing itself is slow and has tests of its own."""
    pairs: list[Pair] = []

    def draw(path: Path, rows: list[Pair]) -> None:
        pairs.extend(rows)
        path.touch()

    monkeypatch.setattr(reconstruction, "write_comparison", draw)
    return pairs


def measured(evaluated: Evaluated, change: Callable[[Image], Image]) -> Section:
    return measure_reconstruction(evaluated, Thresholds(), Pass(change), pictures=evaluated.folder)  # type: ignore[arg-type]


def value(section: Section, name: str) -> float:
    found = section.figures[name].value
    assert found is not None
    return found


@pytest.mark.parametrize("offset", [0.5, -0.125])
def test_a_constant_offset_by_hand(offset: float) -> None:
    """MSE is the square of the offset; SSIM of flat images is that of their means alone, with C1 = (0.01 * 2)^2."""
    flat = np.full(SHAPE, 0.25, dtype=np.float32)
    quality = image_quality(flat, flat + np.float32(offset), EVERYWHERE, unit=500)
    assert quality["psnr"] == pytest.approx(20 * np.log10(2 / abs(offset)))
    assert quality["mae"] == pytest.approx(500 * abs(offset))
    other = 0.25 + offset
    assert quality["ssim"] == pytest.approx((2 * 0.25 * other + 4e-4) / (0.25**2 + other**2 + 4e-4))


def test_the_same_image_has_no_error_and_a_finite_psnr() -> None:
    assert image_quality(texture(0), texture(0), EVERYWHERE) == {"psnr": 100, "ssim": pytest.approx(1), "mae": 0}


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_are_those_of_torchmetrics(seed: int) -> None:
    """Away from the border, where the two continue the images differently."""
    real, made = texture(seed), texture(seed, sigma=1.3)
    pair = [torch.from_numpy(image)[None, None].double() for image in (made, real)]
    _, ssim = structural_similarity_index_measure(*pair, data_range=2.0, sigma=1.5, return_full_image=True)
    psnr = peak_signal_noise_ratio(*pair, data_range=2.0)
    core = np.zeros(SHAPE, dtype=bool)
    core[5:-5, 5:-5, 5:-5] = True
    quality = image_quality(real, made, EVERYWHERE | {"/core": core})
    assert quality["psnr"] == pytest.approx(float(psnr), rel=1e-6)
    assert quality["ssim/core"] == pytest.approx(float(ssim[0, 0][torch.from_numpy(core)].mean()), abs=1e-6)
    assert quality["ssim/core"] < 0.99


def test_each_region_answers_for_itself() -> None:
    region = np.zeros(SHAPE, dtype=bool)
    region[3:6, 4:9, 5:11] = True
    real = texture(3)
    made = np.where(region, real + 0.2, real).astype(np.float32)
    quality = image_quality(real, made, EVERYWHERE | {"/in": region, "/out": ~region})
    assert quality["mae/in"] == pytest.approx(0.2)
    assert quality["mae/out"] == 0
    assert quality["mae"] == pytest.approx(0.2 * region.mean())
    assert quality["ssim/in"] < quality["ssim"] < quality["ssim/out"]


def test_the_stronger_the_blur_the_worse() -> None:
    real = texture(4)
    blurred = [ndimage.gaussian_filter(real, sigma) for sigma in (0, 0.5, 1, 2)]
    quality = [image_quality(real, made, EVERYWHERE) for made in blurred]
    for name, sign in (("psnr", -1), ("ssim", -1), ("mae", 1)):
        assert all(sign * np.diff([row[name] for row in quality]) > 0)


def test_images_thinner_than_the_window_of_ssim_are_refused() -> None:
    with pytest.raises(FibldmError, match=SENTENCE):
        image_quality(texture(0)[..., :10], texture(0)[..., :10], {})


def test_the_reconstructor_is_the_autoencoder_of_the_run(tiny_run: Path) -> None:
    reconstructor = Reconstructor.from_run(tiny_run)
    stage = StageFolder(tiny_run, "autoencoder")
    assert reconstructor.fingerprint == stage.require()["weights"]
    image = np.random.default_rng(0).uniform(-1, 1, size=(16, 24, 32)).astype(np.float32)
    before = image.copy()
    with torch.no_grad():
        autoencoder = stage.trained()
        wanted = autoencoder.decode(autoencoder.encode(torch.from_numpy(image)[None, None]).mean)[0, 0].clamp(-1, 1)
    made = reconstructor(image)
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-6)
    np.testing.assert_array_equal(image, before)
    assert (made.dtype, made.shape) == (np.float32, image.shape)
    with pytest.raises(FibldmError, match=r"volume size \(15, 24, 32\) must be divisible by"):
        reconstructor(image[:15])


def test_an_autoencoder_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="stage 'autoencoder' of .* must be finished first; it was never started"):
        Reconstructor.from_run(tmp_path)


def test_a_perfect_autoencoder_loses_nothing(evaluated: Evaluated) -> None:
    section = measured(evaluated, lambda image: image)
    names = foreground(evaluated).values()
    for name, wanted in (("psnr", 100), ("ssim", 1), ("mae", 0), ("dice_change", 0)):
        assert value(section, name) == pytest.approx(wanted)
        assert section.figures[name].real_vs_real is None
        assert {f"{name}/{label}" for label in names} <= set(section.figures)
    assert value(section, "spectrum") == 0
    assert value(section, "ms_ssim") == pytest.approx(1)
    spectra: dict[str, list[NDArray[np.float64]]] = {}
    for case in evaluated.real():
        spectrum = radial_spectrum(evaluated.read(case).image, evaluated.grid.spacing)
        spectra.setdefault(case.subject, []).append(spectrum)
    patients = np.stack([np.mean(rows, axis=0) for rows in spectra.values()])
    assert section.figures["spectrum"].n == len(patients) == 4
    halves = spectrum_distance(patients[::2], patients[1::2])
    assert section.figures["spectrum"].real_vs_real == pytest.approx(halves)
    written = read_json(record(evaluated.folder, "reconstruction", section))["reconstruction"]
    assert written["picture"] == "reconstruction.png"
    assert len(written["cases"]) == 5


def test_an_offset_is_told_in_hu_and_padding_does_not_count(evaluated: Evaluated) -> None:
    """Reconstructions end 0.25 above the image, and far off in the padding."""
    valid = {evaluated.read(case).image.tobytes(): evaluated.read(case).valid for case in evaluated.real()}
    assert not all(inside.all() for inside in valid.values())
    offset = np.float32(0.25)

    def change(image: Image) -> Image:
        return np.where(valid[image.tobytes()], image + offset, 5)

    section = measured(evaluated, change)
    hu = (evaluated.intensity.high - evaluated.intensity.low) / 2
    assert section.facts["units"]["mae"] == "HU"
    for name in ("", *(f"/{label}" for label in foreground(evaluated).values())):
        assert value(section, f"mae{name}") == pytest.approx(0.25 * hu, rel=1e-5)
        assert value(section, f"psnr{name}") == pytest.approx(20 * np.log10(8), rel=1e-5)
    arbitrary = replace(evaluated, intensity=Intensity("percentile", lower=0, upper=100, output_low=0, output_high=9))
    section = measured(arbitrary, lambda image: np.where(image < 0.5, image + offset, image - offset))
    assert section.facts["units"]["mae"] == "of [-1, 1]"
    assert value(section, "mae") == pytest.approx(0.25, rel=1e-5)


class Differences:
    """In place of `PlaneDistance`: the mean difference."""

    fingerprint = "differences"
    facts = {"network": "none"}

    def names(self, shape: tuple[int, ...]) -> list[str]:
        return ["lpips", "lpips/axial"]

    def __call__(self, real: Sample, made: Image) -> NDArray[np.float64]:
        return np.full(2, np.abs(real.image - made).mean(), dtype=np.float64)


def test_lpips_is_that_of_a_scan_and_its_reconstruction(evaluated: Evaluated) -> None:
    given: dict[str, Any] = {"segmenter": Thresholds(), "planes": Differences(), "pictures": evaluated.folder}
    halved: Any = Pass(lambda image: image / 2)
    section = measure_reconstruction(evaluated, reconstructor=halved, **given)
    for case, row in zip(evaluated.real("test"), section.cases, strict=True):
        sample = evaluated.read(case)
        apart = np.abs(sample.image - np.where(sample.valid, sample.image / 2, sample.image)).mean()
        assert row["lpips"] == row["lpips/axial"] == pytest.approx(apart)
    assert section.figures["lpips"].n == 4 and section.facts["lpips"] == Differences.facts
    other: Any = Pass(lambda image: image)
    other.fingerprint = "b" * 64
    assert value(measure_reconstruction(evaluated, reconstructor=other, **given), "lpips") == 0
    assert len(list(evaluated.folder.glob("cache/lpips-*/*.npy"))) == 2 * 5
    assert "lpips" not in measured(evaluated, lambda image: image).figures


def test_blur_costs_detail_and_labels(evaluated: Evaluated) -> None:
    sections = [measured(evaluated, lambda image, s=s: ndimage.gaussian_filter(image, s)) for s in (0.4, 1)]  # type: ignore[misc]
    for name, sign in (("psnr", -1), ("mae", 1), ("ms_ssim", -1), ("spectrum", 1), ("dice_change/right lung", -1)):
        values = [value(section, name) for section in sections]
        assert all(sign * np.diff(values) > 0), (name, values)


def test_figures_of_a_flat_reconstruction_by_counting(evaluated: Evaluated) -> None:
    """Everything becomes lung: of the right lung's mask all is found, and all that is known besides."""
    hu = (evaluated.intensity.high - evaluated.intensity.low) / 2
    section = measured(evaluated, lambda image: np.full_like(image, -0.7))
    for case, row in zip(evaluated.real("test"), section.cases, strict=True):
        sample = evaluated.read(case)
        wanted, known = sample.labels == 1, sample.labels != UNKNOWN_LABEL
        before = (Thresholds().segment(sample.image) == 1) & known
        change = 2 * wanted.sum() / (wanted.sum() + known.sum())
        change -= 2 * (before & wanted).sum() / (before.sum() + wanted.sum())
        assert row["dice_change/right lung"] == pytest.approx(change)
        assert row["dice_change/left lung"] == 0
        error = np.abs(sample.image + 0.7)
        assert row["mae"] == pytest.approx(hu * error[sample.valid].mean(), rel=1e-5)
        assert row["mae/left lung"] == pytest.approx(hu * error[sample.labels == 2].mean(), rel=1e-5)


def test_the_worst_cases_are_drawn(evaluated: Evaluated, drawn: list[Pair]) -> None:
    offsets = dict(zip((evaluated.key(case) for case in evaluated.real()), (0.1, 0.5, 0.2, 0.4, 0.3), strict=True))
    images = {evaluated.read(case).image.tobytes(): offsets[evaluated.key(case)] for case in evaluated.real()}
    section = measured(evaluated, lambda image: image + np.float32(images[image.tobytes()]))
    names = [case.name for case in evaluated.real()]
    hu = (evaluated.intensity.high - evaluated.intensity.low) / 2
    wanted = [(1, 0.5), (3, 0.4), (4, 0.3), (2, 0.2)]
    assert [pair.title for pair in drawn] == [f"{names[n]}: MAE {offset * hu:.3g} HU" for n, offset in wanted]
    sample = evaluated.read(evaluated.real()[1])
    np.testing.assert_array_equal(drawn[0].left, sample.image)
    np.testing.assert_allclose(drawn[0].right, sample.image + 0.5 * sample.valid, atol=1e-6)
    assert drawn[0].names == ("real", "reconstruction")
    assert (evaluated.folder / section.facts["picture"]).exists()
