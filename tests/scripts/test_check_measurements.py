"""The degradations do what they say, and the command runs end to end on a tiny run."""

import shutil
from types import ModuleType

import numpy as np
import pytest
from builders import script

from fibldm.evaluation.cases import Sample
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.files import read_json


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("check_measurements", monkeypatch)


@pytest.fixture
def sample() -> Sample:
    labels = np.zeros((8, 6, 5), dtype=np.uint8)
    labels[1:3], labels[3:4, :2], labels[6:, 3:] = 2, 5, 7
    image = np.random.default_rng(1).uniform(-0.5, 0.5, labels.shape).astype(np.float32)
    return Sample(image, labels, np.ones(labels.shape, dtype=bool), (1.0, 2.0, 3.0))


def test_masks_move_by_whole_voxels(checks, sample):
    moved = checks.shift_mask(sample, 2)
    assert np.array_equal(moved.labels[2:], sample.labels[:-2])
    assert moved.image is sample.image


def test_labels_change_their_names_but_not_their_places(checks, sample):
    permuted = checks.permute_labels(sample, 2)
    assert np.array_equal(permuted.labels == 5, sample.labels == 2)
    assert np.array_equal(permuted.labels == 2, sample.labels == 5)
    assert np.array_equal(permuted.labels == 7, sample.labels == 7)
    assert np.array_equal(checks.permute_labels(sample, 6).labels == 5, sample.labels == 2)


def test_noise_is_as_strong_as_it_says_and_blur_keeps_the_mean(checks, sample):
    assert np.std(checks.noise(sample, 0.1).image - sample.image) == pytest.approx(0.1, rel=0.1)
    blurred = checks.blur(sample, 1)
    assert blurred.image.std() < 0.6 * sample.image.std()
    assert blurred.image.mean() == pytest.approx(sample.image.mean(), abs=0.02)


@pytest.mark.slow
def test_the_command_measures_every_strength(checks, tmp_path, tiny_run, phantom_work, capsys, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    few = dict(list(checks.DEGRADATIONS.items())[2:])
    monkeypatch.setattr(checks, "DEGRADATIONS", few)
    # realism needs more patients than this run has
    distances = {name: Estimate(1.0, None, None, 1, 0.5) for name in checks.WORSE if name not in ("dice", "hd95")}
    monkeypatch.setattr(checks, "measure_realism", lambda *_: Section(distances))
    settings = ["--set", "steps=2", "--set", "segmenter_channels=[4, 8, 8]", "--out", str(tmp_path / "made.json")]
    checks.main(["--data", str(phantom_work), "--run", str(run), *settings])
    assert capsys.readouterr().out.count("only ever worse") == 2
    made = read_json(tmp_path / "made.json")
    assert {name: list(rows) for name, rows in made.items()} == {name: [str(s) for s in few[name][1]] for name in few}
