"""``fibldm audit``: copies of training scans are found however they were turned or retouched, and nothing else is."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import write_nifti
from numpy.typing import NDArray
from scipy import ndimage, stats

from fibldm.cli import run as cli
from fibldm.errors import FibldmError
from fibldm.evaluation.audit import scans_of_folder, scans_of_work
from fibldm.evaluation.audit.audit import NO_EVIDENCE, audit
from fibldm.evaluation.audit.calibration import Calibration, Share, closer_to_training
from fibldm.evaluation.audit.membership import denoising_error, told_apart
from fibldm.evaluation.measurements import evaluate
from fibldm.files import read_json, write_json
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.detail import cube_spacing
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.matching import Match, Matcher
from fibldm.volumes.writer import sidecar

Array = NDArray[np.float32]
SPACING = np.array([2.0, 2.0, 2.0])


def patient(number: int) -> Array:
    """What all have in common, and detail of one's own; sizes differ."""
    shape = (40 + number % 3, 36, 44 - number % 4)
    x, y, z = (np.linspace(-1, 1, length) for length in shape)
    body = (x[:, None, None] ** 2 + y[:, None] ** 2 + 0.5 * z**2 < 0.8).astype(np.float32)
    organ = ((x[:, None, None] - 0.3) ** 2 + y[:, None] ** 2 + z**2 < 0.1).astype(np.float32)
    own = ndimage.gaussian_filter(np.random.default_rng(number).normal(size=shape), 1.5)
    volume: Array = (ndimage.gaussian_filter(100 * body + 60 * organ, 1) + 400 * own * (body + 0.2)).astype(np.float32)
    return volume


def volume_of(array: Array, spacing: Any = SPACING) -> Volume:
    return Volume(array, np.diag([*spacing, 1.0]))


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    volumes = [volume_of(patient(number)) for number in range(10)]
    return Matcher.of(volumes, cube_spacing([volume.grid for volume in volumes]))


def looked_up(matcher: Matcher, array: Array) -> Match:
    return matcher.match(matcher.open(volume_of(np.ascontiguousarray(array))))


@pytest.fixture(scope="module")
def strangers(matcher: Matcher) -> float:
    """The largest similarity of patients who are not among the training scans."""
    return max(looked_up(matcher, patient(number)).similarity for number in range(100, 106))


def shifted(array: Array) -> Array:
    moved: Array = ndimage.shift(array, (4, -3, 2), order=0, mode="constant", cval=float(array.min()))
    return moved


def scaled(factor: float) -> Callable[[Array], Array]:
    return lambda array: np.asarray(ndimage.zoom(array, factor, order=1))


def brighter(array: Array) -> Array:
    low, high = np.percentile(array, (1, 99))
    return np.asarray(1000 * np.clip((array - low) / (high - low), 0, 1) ** 0.6, dtype=np.float32)


def noisy(array: Array) -> Array:
    spread = np.subtract(*np.percentile(array, (99, 1)))
    return np.asarray(array + np.random.default_rng(0).normal(0, 0.02 * spread, array.shape), dtype=np.float32)


def blurred(array: Array) -> Array:
    return np.asarray(ndimage.gaussian_filter(array, 1.0))


CHANGES: dict[str, list[Callable[[Array], Array]]] = {
    "mirrored": [lambda array: array[::-1]],
    "turned": [lambda array: np.rot90(array, 1, (0, 2))],
    "moved": [shifted],
    "smaller": [scaled(0.9)],
    "larger": [scaled(1.08)],
    "brighter": [brighter],
    "inverted": [np.negative],
    "blurred": [blurred],
    "mirrored and noisy": [lambda array: array[:, ::-1], noisy],
    "turned and scaled": [lambda array: np.rot90(array, 1, (0, 1)), scaled(0.95)],
    "moved and blurred": [shifted, blurred],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_however_it_was_changed(matcher: Matcher, strangers: float, change: str) -> None:
    array = patient(7)
    for step in CHANGES[change]:
        array = step(array)
    match = looked_up(matcher, array)
    assert match.scan == 7
    assert match.similarity > 1 - (1 - strangers) / 2


def test_a_scan_is_itself_and_strangers_are_not(matcher: Matcher, strangers: float) -> None:
    match = looked_up(matcher, patient(3))
    assert match.scan == 3 and match.similarity == pytest.approx(1, abs=1e-4)
    assert str(match.transform) == "none"
    assert strangers < 0.8


def test_a_transform_is_said_in_words(matcher: Matcher) -> None:
    turned = np.rot90(patient(5), 1, (0, 1))[..., ::-1]
    said = str(looked_up(matcher, -turned).transform)
    assert "axes ARS" in said and "mirrored along" in said and "inverted" in said


def test_a_constant_volume_is_refused(matcher: Matcher) -> None:
    with pytest.raises(FibldmError, match="must not be constant"):
        matcher.open(volume_of(np.full((20, 20, 20), 7.0, np.float32)))


def test_a_share_has_the_exact_interval() -> None:
    """Of none in n it ends at 1 - 0.025^(1/n), Clopper & Pearson 1934."""
    share = Share(0, 20).to_dict()
    assert share["low"] == 0 and share["high"] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert Share(0, 0).to_dict()["value"] is None


@pytest.mark.parametrize(("count", "of"), [(1, 7), (3, 30), (29, 30), (50, 200)])
def test_the_interval_of_a_share_is_that_of_beta_quantiles(count: int, of: int) -> None:
    """Clopper & Pearson 1934 by its other closed form, and as scipy computes it."""
    share = Share(count, of).to_dict()
    assert share["low"] == pytest.approx(stats.beta.ppf(0.025, count, of - count + 1))
    assert share["high"] == pytest.approx(stats.beta.ppf(0.975, count + 1, of - count))
    interval = stats.binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    assert (share["low"], share["high"]) == pytest.approx((interval.low, interval.high))


def test_the_threshold_is_half_as_far_as_the_closest_of_half_of_the_patients() -> None:
    similarities = {f"p{number}_{scan}": 0.1 * number + 0.01 * scan for number in range(8) for scan in range(2)}
    calibration = Calibration.of(similarities, {name: name[:2] for name in similarities})
    closest = max(similarities[name] for name in calibration.calibrated_on)
    assert calibration.threshold == pytest.approx(1 - (1 - closest) / 2)
    halves = [{name[:2] for name in names} for names in (calibration.calibrated_on, calibration.tried_on)]
    assert len(halves[0]) == len(halves[1]) == 4 and not halves[0] & halves[1]
    assert calibration.false.count == sum(similarities[name] > calibration.threshold for name in calibration.tried_on)


@pytest.mark.parametrize(("training", "held_out"), [(7, 3), (3, 5), (4, 4)])
def test_closer_to_training_counts_all_ways_to_draw_as_many(training: int, held_out: int) -> None:
    random = np.random.default_rng(training)
    train, other = random.random(training), random.random(held_out)
    few = min(training, held_out)
    ways = [
        max(a) > max(b) for a in itertools.combinations(train, few) for b in itertools.combinations(other, few)
    ]  # the smaller set has one way only
    assert closer_to_training(list(train), list(other)) == pytest.approx(np.mean(ways))


def test_told_apart_is_the_area_under_the_curve_with_the_interval_of_delong() -> None:
    random = np.random.default_rng(0)
    train, other = random.normal(-0.5, 1, 60), random.normal(0, 1, 40)
    told = told_apart(list(train), list(other))
    wins = stats.mannwhitneyu(other, train).statistic / (60 * 40)
    assert told["auc"] == pytest.approx(wins)
    drawn = [told_apart(list(random.normal(-0.5, 1, 60)), list(random.normal(0, 1, 40)))["auc"] for _ in range(400)]
    assert told["high"] - told["low"] == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.15)
    assert told_apart([0.0, 0.1], [1.0, 2.0]) | {"training": 2} == {
        "auc": 1.0, "low": 1.0, "high": 1.0, "tpr_at_1_percent_fpr": 1.0, "training": 2, "held_out": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("training", "held_out", "steps"), [(90, 250, 0), (40, 300, 8), (30, 60, 5)])
def test_told_apart_agrees_with_scikit_learn(training: int, held_out: int, steps: int) -> None:
    """With ties, where values are rounded to a few steps."""
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(training)
    train, other = random.normal(-1.5, 1, training), random.normal(0, 1, held_out)
    if steps:
        train, other = (np.round(values * steps) / steps for values in (train, other))
    told = told_apart(list(train), list(other))
    labels, scores = np.repeat([1, 0], [training, held_out]), -np.concatenate([train, other])
    assert told["auc"] == pytest.approx(metrics.roc_auc_score(labels, scores))
    false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert told["tpr_at_1_percent_fpr"] == pytest.approx(true[false <= 0.01].max())


def test_the_interval_of_told_apart_covers_the_truth() -> None:
    """Of normal values a distance d apart the area is Phi(d / sqrt 2)."""
    random, truth = np.random.default_rng(1), stats.norm.cdf(1 / np.sqrt(2))
    covered = []
    for _ in range(400):
        told = told_apart(list(random.normal(-1, 1, 50)), list(random.normal(0, 1, 30)))
        covered.append(told["low"] <= truth <= told["high"])
    assert 0.91 < np.mean(covered) < 0.98


def test_the_variance_of_told_apart_is_that_of_placements() -> None:
    """DeLong et al. 1988, equations 4 and 5, one placement at a time."""
    train, other = [0.1, 0.4, 0.35, 0.8], [0.3, 0.4, 0.9]
    of_train = [sum((t < o) + 0.5 * (t == o) for o in other) / 3 for t in train]
    of_other = [sum((t < o) + 0.5 * (t == o) for t in train) / 4 for o in other]
    area = sum(of_train) / 4
    variance = sum((v - area) ** 2 for v in of_train) / 3 / 4 + sum((v - area) ** 2 for v in of_other) / 2 / 3
    told = told_apart(train, other)
    assert told["low"] == pytest.approx(max(0, area - 1.959964 * np.sqrt(variance)), abs=1e-6)
    assert told["auc"] == pytest.approx(area)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and held-out scans, and of three synthetic volumes one a mirrored copy."""
    root = tmp_path_factory.mktemp("audit")
    sets = {"train": range(5), "holdout": range(20, 24), "synthetic": range(50, 52)}
    for name, numbers in sets.items():
        for number in numbers:
            write_nifti(root / name / f"p{number}.nii.gz", patient(number), np.diag([*SPACING, 1]))
    write_nifti(root / "synthetic" / "copy.nii.gz", blurred(patient(4)[:, ::-1]), np.diag([*SPACING, 1]))
    return root


def test_the_command_names_copies_and_goes_on_with_what_it_found(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [part for name in ("train", "holdout", "synthetic") for part in (f"--{name}", str(folders / name))]
    out = folders / "out"
    assert cli(["audit", *sets, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "1 of 3 volumes are copies of training scans" in said and "copy.nii.gz of p4.nii.gz" in said
    result = read_json(out / "audit.json")
    assert result["memorised_patients"] == ["p4"] and result["copy_rate"]["value"] == pytest.approx(1 / 3)
    (copy,) = result["copies"]
    assert copy["score"] > result["threshold"] and "mirrored along" in copy["transform"]
    assert result["membership"].startswith("membership not measured")
    assert result["held_out_named"]["count"] == 0
    assert (out / "closest.png").stat().st_size > 10_000
    monkeypatch.setattr(Matcher, "match", None)
    (folders / "synthetic" / "copy.nii.gz").unlink()
    assert cli(["audit", *sets, "--out", str(out)]) == 0
    assert read_json(out / "audit.json")["verdict"] == NO_EVIDENCE


def test_the_error_of_the_weights_is_the_same_for_the_same_scan(tiny_run: Path, phantom_work: Path) -> None:
    """And another one for another scan, whether its mask is known or not."""
    synthesizer = Synthesizer.from_run(tiny_run)
    entry = load_datalist(phantom_work, "test")[0]
    scan, mask = read_volume(entry["image"]), read_volume(entry["label"])
    other = replace(scan, array=scan.array[::-1].copy())
    for shown in (mask, None):
        errors = [denoising_error(synthesizer, image, shown, "a") for image in (scan, scan, other)]
        assert errors[0] == errors[1] != errors[2]
        assert np.isfinite(errors).all()


def test_without_scans_held_out_an_audit_says_that_it_is_not_possible(folders: Path, tmp_path: Path) -> None:
    sets = [scans_of_folder(folders / name, "scans") for name in ("train", "holdout", "synthetic")]
    result = audit(sets[0], sets[1][:3], sets[2], tmp_path)
    assert result["verdict"].startswith("audit not possible") and result["copy_rate"] is None


def test_a_scan_in_two_sets_is_refused(folders: Path, tmp_path: Path) -> None:
    sets = [scans_of_folder(folders / name, "scans") for name in ("train", "holdout", "synthetic")]
    with pytest.raises(FibldmError, match=r"must be of training or held out; p2.nii.gz is both"):
        audit(sets[0], [*sets[1], sets[0][2]], sets[2], tmp_path)


@pytest.mark.slow
def test_the_audit_of_a_run_is_recorded_with_its_figures(mostly_held_out: Path, tiny_run: Path, tmp_path: Path) -> None:
    """Whose copies synthesis then draws again, as the audit is of its data."""
    run, data = tmp_path / "run", read_json(mostly_held_out / "datalist.json")["content"]
    (run / "latents").mkdir(parents=True)
    for part in [*tiny_run.iterdir(), *(tiny_run / "latents").iterdir()]:
        if part.name not in ("latents", "evaluation", "latents.json"):
            (run / part.relative_to(tiny_run)).symlink_to(part)
    write_json(run / "latents" / "latents.json", read_json(tiny_run / "latents" / "latents.json") | {"data": data})
    masks = [entry["label"] for entry in load_datalist(mostly_held_out, "test")]
    drawn = {"settings": SamplingSettings(steps=1), "allow_extrapolation": True, "device": "cpu"}
    synthesize_files(run, masks, tmp_path / "out", **drawn)
    evaluate(["audit"], run_dir=run, work=mostly_held_out, synthetic=tmp_path / "out", device="cpu")
    section = read_json(run / "evaluation" / "metrics.json")["audit"]
    assert section["figures"]["copy_rate"]["n"] == 3 and section["figures"]["copy_rate"]["value"] == 0
    assert 0 <= section["figures"]["membership_auc"]["value"] <= 1 and section["verdict"] == NO_EVIDENCE
    assert section["notes"][0] == "No evidence of copying at this threshold."
    assert (run / "evaluation" / section["picture"]).stat().st_size > 10_000
    assert section["of"] == {"data": data, "weights": section["drawn"]["weights"]}
    audited = run / "evaluation" / "audit"
    (made,) = synthesize_files(run, masks[:1], tmp_path / "again", **drawn, reject_copies=audited)
    assert read_json(sidecar(made))["check"]["copies"]["threshold"] == section["threshold"]
    with pytest.raises(FibldmError, match="weights are audited on the data that they were trained on"):
        scans = [scans_of_work(mostly_held_out, *splits) for splits in (["training"], ["test"], ["validation"])]
        audit(*scans, tmp_path / "other", synthesizer=Synthesizer.from_run(tiny_run), data=data)
