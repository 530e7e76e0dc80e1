"""A segmenter with planted weaknesses is found out, and one without is not."""

import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.stress import StressSettings, read_sweeps, stress
from fibldm.stress.images import Blur, Contrast, Noise, changed
from fibldm.stress.page import write_page
from fibldm.stress.segmenter import Segmenter
from fibldm.stress.trial import Trial
from fibldm.stress.weaknesses import FEWEST
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import volume_stem, write_synthetic

HU = {0: -1000, 1: 50, 2: 130}  # of background, liver and tumour

# Threshold and largest parts; sees no tumour below 3 ml where it has a blind spot, and nothing in noise above 60 HU.
PROGRAM = """
import sys
from pathlib import Path
import nibabel, numpy as np
from scipy import ndimage
images, masks, blind = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
for file in images.glob("*.nii.gz"):
    image = nibabel.load(file)
    voxels = np.asarray(image.dataobj, dtype=np.float64)
    noise = np.std(voxels[:4, :4, :4])
    smooth = ndimage.gaussian_filter(voxels, 1.0) if noise > 5 else voxels
    labels = (smooth > -475).astype(np.uint8) + (smooth > 90)
    ml = np.prod(image.header.get_zooms()[:3]) / 1000
    parts, count = ndimage.label(labels == 2)
    for part in range(1, count + 1):
        if (parts == part).sum() * ml < blind:
            labels[parts == part] = 1
    if blind and noise > 60:
        labels[:] = 0
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), image.affine), masks / file.name)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Eight patients with a liver and a tumour of 8 to 9 ml, prepared."""
    from fibldm.datasets.preparation import prepare
    from fibldm.datasets.settings import PrepareSettings

    folder = tmp_path_factory.mktemp("stress")
    source = folder / "source"
    for number in range(8):
        labels = np.zeros((40, 40, 32), np.uint8)
        labels[5:35, 5:35, 4:28] = 1
        centre = np.array([15 + number % 3, 20, 14 + number % 2])[:, None, None, None]
        labels[((np.indices(labels.shape) - centre) ** 2).sum(0) <= (4.3 + 0.05 * number) ** 2] = 2
        for part, array in (("images", _painted(labels, number)), ("labels", labels)):
            (source / part).mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(array, np.diag([3.0, 3, 3, 1]))
            nibabel.save(image, source / part / f"p{number}.nii.gz")
    settings = PrepareSettings(modality="ct", window=(-200, 300), labels={1: "liver", 2: "tumour"})
    prepare(source, folder / "work", settings)
    return folder / "work"


def _painted(labels: np.ndarray, seed: int) -> np.ndarray:
    values = np.vectorize(HU.get)(labels)
    return np.rint(values + np.random.default_rng(seed).normal(0, 4, labels.shape)).astype(np.int16)


def generator(masks: Sequence[Path], folder: Path) -> list[Path]:
    files = []
    for mask in masks:
        files.append(folder / f"{volume_stem(mask)}_000.nii.gz")
        if not files[-1].exists():
            volume = read_volume(mask)
            write_synthetic(files[-1], Volume(_painted(volume.array, 7), volume.affine), {"mask": mask.name})
    return files


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("program") / "segment.py"
    file.write_text(PROGRAM, encoding="utf-8")
    return file


SWEEPS = ("volume tumour: 1ml 4ml 7ml", "noise: 10 30 90", "contrast tumour: -10 10")


def tried(out: Path, work: Path, program: Path, blind: float) -> Trial:
    command = f"{sys.executable} {program} {{images}} {{masks}} {blind}"
    settings = StressSettings(SWEEPS, split="training", cases=4, allow_extrapolation=True)
    return stress(out, work, Segmenter(command), generator, settings)


@pytest.fixture(scope="module")
def blind(tmp_path_factory, work: Path, program: Path) -> tuple[Path, Trial]:
    out = tmp_path_factory.mktemp("blind")
    return out, tried(out, work, program, 3.0)


def test_planted_weaknesses_are_named_and_nothing_else(blind: tuple[Path, Trial]) -> None:
    weak = {(one.sweep, one.step, one.label) for one in blind[1].weaknesses}
    assert weak == {("volume tumour", "1ml", 2), ("noise", "90", 1), ("noise", "90", 2)}


def test_a_segmenter_without_weaknesses_has_none(tmp_path: Path, work: Path, program: Path) -> None:
    assert not [one for one in tried(tmp_path, work, program, 0.0).weaknesses if one.step != "90"]


def test_real_scans_are_laid_beside_by_their_own_value_and_changed_alike(blind: tuple[Path, Trial]) -> None:
    real = [row for row in blind[1].measured if row.kind == "real"]
    assert {row.step for row in real if row.sweep == "volume tumour"} == {"7ml"}
    assert {row.step for row in real if row.sweep == "noise"} == {"10", "30", "90"}
    assert max(row.dice for row in real if row.sweep == "noise" and row.step == "90") == 0


def test_every_volume_stays_with_its_mask_and_what_was_found(blind: tuple[Path, Trial]) -> None:
    out, _ = blind
    rows = [row for row in read_json(out / "stress.json")["volumes"] if row["kind"] == "synthetic"]
    assert {row["sweep"] for row in rows} == {"", "volume tumour", "noise", "contrast tumour"}
    for row in rows:
        assert all((out / row[key]).is_file() for key in ("image", "mask", "found"))
    small = next(row for row in rows if row["step"] == "1ml")
    assert (read_volume(out / small["mask"]).array == 2).sum() * 0.027 == pytest.approx(1, abs=0.03)


def test_a_second_run_segments_nothing_and_says_the_same(blind: tuple[Path, Trial], work: Path, program: Path) -> None:
    out, trial = blind
    before = {file: file.stat().st_mtime_ns for file in (out / "found").rglob("*.nii.gz")}
    again = tried(out, work, program, 3.0)
    assert before == {file: file.stat().st_mtime_ns for file in (out / "found").rglob("*.nii.gz")}
    assert again.weaknesses == trial.weaknesses
    with pytest.raises(FibldmError, match="holds the stress test of another segmenter"):
        tried(out, work, program, 2.0)


def test_the_page_names_weaknesses_and_shows_the_worst(blind: tuple[Path, Trial], tmp_path: Path) -> None:
    write_page(tmp_path / "stress.html", blind[1], "a threshold")
    html = (tmp_path / "stress.html").read_text(encoding="utf-8")
    assert "volume tumour: 1ml" in html and html.count("data:image/png;base64") == len(blind[1].weaknesses) >= FEWEST
    assert '<g class="synthetic">' in html and '<g class="real">' in html


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import sys; sys.exit('no weights')", "ended with exit code 1: no weights"),
        ("pass", "must write one mask of each image, NAME.nii.gz or NAME_\\*.nii.gz; of a it wrote 0"),
    ],
)
def test_a_segmenter_that_fails_is_one_clear_error(tmp_path: Path, body: str, said: str) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    segmenter = Segmenter(f'{sys.executable} -c "{body}" {{images}} {{masks}}')
    with pytest.raises(FibldmError, match=said):
        segmenter.segment([tmp_path / "a.nii.gz"], tmp_path / "found")
    assert not (tmp_path / "found").exists()


def test_images_have_the_names_that_a_segmenter_needs(tmp_path: Path) -> None:
    """As nnU-Net, which reads NAME_0000.nii.gz and writes NAME.nii.gz, and as MONAI, which writes NAME/NAME_trans."""
    nibabel.save(nibabel.Nifti1Image(np.full((4, 5, 6), 3, np.int16), np.diag([2.0, 2, 2, 1])), tmp_path / "a.nii.gz")
    body = (
        "import sys, shutil, pathlib; i, m = map(pathlib.Path, sys.argv[1:]); (m / 'a').mkdir(); "
        "shutil.copy(i / 'a_0000.nii.gz', m / 'a' / 'a_trans.nii.gz')"
    )
    segmenter = Segmenter(f'{sys.executable} -c "{body}" {{images}} {{masks}}', suffix="_0000")
    (mask,) = segmenter.segment([tmp_path / "a.nii.gz"], tmp_path / "found")
    assert mask == tmp_path / "found" / "a.nii.gz" and (read_volume(mask).array == 3).all()


ANATOMY = Anatomy(
    {0: "background", 1: "liver", 2: "tumour"}, {}, Envelope(((0.0, 1e3),) * 3, ((0.0, 1e3),) * 3, {}), None
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sharpen: 1 2", "a sweep"),
        ("noise 10 20", "is written noise: 10 20 40"),
        ("noise: 10 10", "each value once"),
        ("noise: -3", "a sweep of noise is written"),
        ("contrast: 20", "a sweep of contrast is written"),
        ("contrast spleen: 20", "a label"),
        ("volume tumour: much", "volume is written"),
    ],
)
def test_a_sweep_that_cannot_be_read_says_how_it_is_written(text: str, said: str) -> None:
    with pytest.raises(FibldmError, match=said):
        read_sweeps([text], ANATOMY, "ct")


def test_changes_of_an_image_have_the_size_that_was_asked_for() -> None:
    rng, grid = np.random.default_rng(0), np.diag([1.0, 1, 2, 1])
    image, mask = Volume(np.full((40, 40, 40), 100, np.int16), grid), np.zeros((40, 40, 40), np.uint8)
    mask[10:30, 10:30, 10:30] = 1
    noisy = changed(image, Volume(mask, grid), Noise(12.0, rician=False), rng).array
    assert noisy.dtype == np.int16 and noisy.std() == pytest.approx(12, rel=0.02)
    dark = changed(Volume(np.zeros((40, 40, 40)), grid), Volume(mask, grid), Noise(3.0, rician=True), rng).array
    assert dark.mean() == pytest.approx(3 * np.sqrt(np.pi / 2), rel=0.02)  # Rayleigh
    bright = changed(image, Volume(mask, grid), Contrast(1, 40), rng).array
    assert (bright[15:25, 15:25, 15:25] == 140).all() and (bright[:5] == 100).all()
    point = np.zeros((41, 41, 41))
    point[20, 20, 20] = 1
    spread = changed(Volume(point, grid), Volume(np.zeros_like(point, np.uint8), grid), Blur(6.0), rng).array
    assert spread[23, 20, 20] / spread[20, 20, 20] == pytest.approx(0.5, abs=0.02)
    assert ndimage.center_of_mass(spread) == pytest.approx((20, 20, 20))
