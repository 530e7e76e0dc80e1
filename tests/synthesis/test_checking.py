"""Volumes outside of the ranges of training are drawn again, or left out by name."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fibldm.cli import run as cli
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.synthesis import (
    OutsideRanges,
    SamplingSettings,
    SynthesisRequest,
    SynthesisSettings,
    Synthesizer,
    synthesize_files,
)
from fibldm.synthesis.checking import Rejected, seed_of_draw, summary
from fibldm.synthesis.evaluator import SynthesisEvaluator, mask_items
from fibldm.volumes.detail import cube_spacing
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.gate import GATE, WHOLE, Gate, write_gate
from fibldm.volumes.known_scans import AUDIT, TRAINING, KnownScans
from fibldm.volumes.matching import METHOD, Matcher
from fibldm.volumes.writer import sidecar

QUICK = SamplingSettings(steps=1)
ANY = (-1e6, 1e6)


def gate(low: float, high: float) -> Gate:
    return Gate({"CT": {WHOLE: {"median": ANY, "sharpness": (low, high)}}}, 7, {})


@pytest.fixture(scope="module")
def synthesizer(tiny_run: Path) -> Synthesizer:
    return replace(Synthesizer.from_run(tiny_run), gate=gate(*ANY))


@pytest.fixture(scope="module")
def requests(mask_file: Path) -> list[SynthesisRequest]:
    mask = read_volume(str(mask_file))
    return [SynthesisRequest(mask, "a", number) for number in range(3)]


@pytest.fixture(scope="module")
def sharpness_of(synthesizer: Synthesizer, requests: list[SynthesisRequest]) -> Callable[[int, int], float]:
    """What is measured of a volume by its number and draw."""

    def sharpness(number: int, draw: int) -> float:
        settings = replace(QUICK, seed=seed_of_draw(QUICK.seed, draw))
        (made,) = synthesizer.batch([requests[number]], settings=settings, check=0)
        measured: float = made.provenance["check"]["measured"]["volume"]["sharpness"][0]
        return measured

    return sharpness


def test_what_lies_within_is_the_volume_that_is_made_without_check(
    synthesizer: Synthesizer, requests: list[SynthesisRequest]
) -> None:
    plain = synthesizer.batch(requests, settings=QUICK)
    for one, other in zip(plain, synthesizer.batch(requests, settings=QUICK, check=3), strict=True):
        assert np.array_equal(one.volume.array, other.volume.array)
        told = other.provenance["check"]
        assert {**one.provenance, "check": told} == other.provenance
        assert (told["most"], told["draws"], told["seed"], told["outside"], told["patients"]) == (3, 1, 0, [], 7)
        value, low, high = told["measured"]["volume"]["median"]
        assert (low, high) == ANY and value == pytest.approx(np.median(one.volume.array), abs=60)  # of the model grid


def test_one_outside_is_drawn_again_with_a_seed_that_is_told(
    synthesizer: Synthesizer, requests: list[SynthesisRequest], sharpness_of: Callable[[int, int], float]
) -> None:
    """Asked for with that seed it is the same, in any batch; the seed that was asked for stays in the sidecar."""
    first, second = (sharpness_of(0, draw) for draw in range(2))
    between = (first + second) / 2
    strict = replace(synthesizer, gate=gate(between, 1e6) if second > first else gate(0, between))
    (alone,) = strict.batch(requests[:1], settings=QUICK, check=3)
    told = alone.provenance["check"]
    assert (told["draws"], told["seed"], alone.provenance["sampling"]["seed"]) == (2, seed_of_draw(0, 1), 0)
    assert len(told["outside"]) == 1 and told["outside"][0][0].startswith("volume sharpness ")
    (again,) = synthesizer.batch(requests[:1], settings=replace(QUICK, seed=told["seed"]))
    assert np.array_equal(again.volume.array, alone.volume.array)
    prepared = [strict.prepare(request) for request in requests]
    together = strict.attempt(prepared, settings=QUICK, check=3)[0]
    assert not isinstance(together, Rejected) and together.provenance["check"]["draws"] == 2
    assert np.abs(together.volume.array - alone.volume.array.astype(float)).max() <= 1  # but for rounding


def test_one_that_never_fits_is_not_given(synthesizer: Synthesizer, requests: list[SynthesisRequest]) -> None:
    never = replace(synthesizer, gate=gate(1e5, 1e6))
    with pytest.raises(
        OutsideRanges, match=r"of 2 draws each: 1 volume .*\n  a_000: volume sharpness .*1e\+05"
    ) as raised:
        never(requests[0].mask, name="a", settings=QUICK, check=1)
    assert [len(volume.findings) for volume in raised.value.rejected] == [2]


def test_values_that_are_not_finite_are_never_given(
    synthesizer: Synthesizer, requests: list[SynthesisRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def broken(self: Synthesizer, prepared: Any, settings: SamplingSettings) -> list[Any]:
        drawn.append(settings.seed)
        return [np.full((1, *part.grid.shape), np.nan, dtype=np.float32) for part in prepared]

    monkeypatch.setattr(Synthesizer, "decoded", broken)
    with pytest.raises(OutsideRanges, match="a_000: not finite in .* voxels"):
        synthesizer.batch(requests[:1], settings=QUICK, check=2)
    assert drawn == [seed_of_draw(0, draw) for draw in range(3)] and len(set(drawn)) == 3


@pytest.fixture
def strict_run(
    tiny_run: Path, tmp_path: Path, sharpness_of: Callable[[int, int], float]
) -> Callable[[float, float], Path]:
    """Gives the run ranges of its own; all else is shared."""

    def made(low: float, high: float) -> Path:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        (run / "latents").mkdir(parents=True)
        for part in tiny_run.iterdir():
            if part.name != "latents":
                (run / part.name).symlink_to(part)
        for part in (tiny_run / "latents").iterdir():
            if part.name != GATE:
                (run / "latents" / part.name).symlink_to(part)
        write_gate(run, read_json(run / "latents" / "latents.json"), gate(low, high))
        return run

    return made


def test_volumes_left_out_are_named_the_others_kept_and_the_exit_code_is_2(
    strict_run: Callable[[float, float], Path],
    mask_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same command goes on: what passed is kept, and is kept with a higher number, too."""
    out = tmp_path / "out"
    run = strict_run(*ANY)
    drawn = synthesize_files(run, [mask_file], tmp_path / "all", settings=QUICK, count=3, check=0, device="cpu")
    sharp = [read_json(sidecar(path))["check"]["measured"]["volume"]["sharpness"][0] for path in drawn]
    worst = int(np.argmin(sharp))
    run = strict_run((sorted(sharp)[0] + sorted(sharp)[1]) / 2, 1e6)
    words = ["--run", str(run), "--masks", str(mask_file), "--out", str(out), "--steps", "1", "--count", "3"]
    caplog.set_level(logging.INFO, "fibldm")
    assert cli(["synthesize", *words, "--device", "cpu", "--check", "0"]) == 2
    said = capsys.readouterr().err
    left_out = drawn[worst].name
    assert f"\n  {left_out.removesuffix('.nii.gz')}: volume sharpness" in said
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert there.keys() == {path.name for path in drawn} - {left_out}
    assert "check: 2 of 3 volumes in the ranges of training, 0 of them drawn again; 1 left out" in caplog.text
    code = cli(["synthesize", *words, "--device", "cpu", "--check", "8"])
    later = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert there.items() <= later.items() and (code == 0) == (left_out in later)
    with pytest.raises(FibldmError, match="was made from another mask, run or settings"):
        synthesize_files(run, [mask_file], out, settings=QUICK, count=3, device="cpu")


def test_the_engine_keeps_the_others_and_ends_with_the_error(
    synthesizer: Synthesizer, mask_file: Path, tmp_path: Path, sharpness_of: Callable[[int, int], float]
) -> None:
    wide, other = (tmp_path / name for name in ("wide", "other"))
    engine = SynthesisEvaluator(synthesizer, mask_items([mask_file], 2), wide, inferer=QUICK, check=0)
    engine.run()
    sharp = [read_json(file)["check"]["measured"]["volume"]["sharpness"][0] for file in sorted(wide.glob("*.json"))]
    strict = replace(synthesizer, gate=gate(sum(sharp) / 2, 1e6))
    engine = SynthesisEvaluator(strict, mask_items([mask_file], 2), other, inferer=QUICK, check=0)
    with pytest.raises(OutsideRanges, match="1 volume"):
        engine.run()
    assert len(list(other.glob("*.nii.gz"))) == 1


def test_without_ranges_a_check_is_refused_and_nothing_else_changes(
    tiny_run: Path, tiny_bundle: Path, mask_file: Path, tmp_path: Path
) -> None:
    """Of a run and a bundle of before."""
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    generator = read_json(bundle / "configs" / "generator.json")
    assert generator.pop("gate")["patients"] >= 2
    write_json(bundle / "configs" / "generator.json", generator)
    (run / "latents").mkdir(parents=True)
    for part in [*tiny_run.iterdir(), *(tiny_run / "latents").iterdir()]:
        place = run / part.relative_to(tiny_run)
        if part.name not in ("latents", GATE):
            place.symlink_to(part)
    mask = read_volume(str(mask_file))
    for old, new in (
        (Synthesizer.from_run(run), Synthesizer.from_run(tiny_run)),
        (Synthesizer.from_bundle(bundle, trust=True), Synthesizer.from_bundle(tiny_bundle)),
    ):
        assert old.gate is None and new.gate is not None
        assert np.array_equal(old(mask, settings=QUICK).volume.array, new(mask, settings=QUICK).volume.array)
        with pytest.raises(FibldmError, match="this generator has none; run `fibldm encode` again"):
            old(mask, settings=QUICK, check=3)
    with pytest.raises(FibldmError, match="this generator has none"):
        synthesize_files(run, [mask_file], tmp_path / "out", settings=QUICK, check=3, device="cpu")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_the_summary_counts_what_was_outside() -> None:
    findings = [["volume median 3 (training 1 to 2)"], ["volume median 4 (training 1 to 2)", "not finite in 7 voxels"]]
    told = [{"check": {"outside": findings}}, {"check": {"outside": []}}, {}]
    assert summary(told, [Rejected("c_000", findings[:1])]) == (
        "check: 2 of 3 volumes in the ranges of training, 1 of them drawn again; 1 left out; refused were: "
        "volume median 3, not finite 1"
    )
    assert summary(told[1:2], []) == "check: 1 of 1 volume in the ranges of training, 0 of them drawn again"


def test_a_check_is_at_least_0() -> None:
    with pytest.raises(FibldmError, match="check must be at least 0; got -1"):
        SynthesisSettings.of(check=-1)


@pytest.fixture(scope="module")
def known_scans(synthesizer: Synthesizer, requests: list[SynthesisRequest]) -> KnownScans:
    """Training scans of which one is what the generator draws first for the first mask."""
    settings = replace(QUICK, seed=5)
    drawn = synthesizer.batch(requests[:1], settings=QUICK) + synthesizer.batch(requests[1:], settings=settings)
    volumes = [made.volume for made in drawn]
    matcher = Matcher.of(volumes, cube_spacing([volume.grid for volume in volumes]))
    return KnownScans(matcher, 0.999, synthesizer.data, None)


def write_audit(folder: Path, known: KnownScans, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    known.matcher.write(folder / TRAINING)
    facts = {"method": METHOD, "scans": known.matcher.fingerprint}
    of = {"data": known.data, "weights": known.weights}
    write_json(folder / AUDIT, {"threshold": known.threshold, "of": of, "facts": facts, "verdict": "none"} | changes)
    return folder


def test_a_copy_is_drawn_again_by_every_door_and_the_sidecar_tells_no_scan(
    synthesizer: Synthesizer,
    known_scans: KnownScans,
    requests: list[SynthesisRequest],
    tiny_run: Path,
    mask_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, other = synthesizer.batch([requests[0], requests[1]], settings=QUICK, reject_copies=known_scans)
    told = made.provenance["check"]
    assert (told["most"], told["draws"], told["seed"]) == (10, 2, seed_of_draw(0, 1))
    assert told["outside"] == [["a copy of a training scan in its detail (similarity 1.000, threshold 0.999)"]]
    assert told["copies"]["similarity"] < 0.999 == told["copies"]["threshold"] and told["copies"]["training_scans"] == 3
    assert other.provenance["check"]["draws"] == 1
    audit = write_audit(tmp_path / "audit", known_scans)
    mask = tmp_path / "a.nii.gz"
    shutil.copy(mask_file, mask)
    words = ["--run", str(tiny_run), "--masks", str(mask), "--out", str(tmp_path / "out"), "--steps", "1"]
    caplog.set_level(logging.INFO, "fibldm")
    assert cli(["synthesize", *words, "--device", "cpu", "--reject-copies", str(audit)]) == 0
    written = read_json(sidecar(tmp_path / "out" / "a_000.nii.gz"))["check"]
    assert written == {**told, "copies": {**told["copies"], "similarity": written["copies"]["similarity"]}}
    assert (
        "check: 1 of 1 volume no copy of a training scan at the threshold of the audit, 1 of them drawn again; refused "
        "were: a copy of a training scan 1" in caplog.text
    )
    assert np.array_equal(read_volume(tmp_path / "out" / "a_000.nii.gz").array, made.volume.array)
    engine = SynthesisEvaluator(
        synthesizer, mask_items([mask], 1), tmp_path / "other", inferer=QUICK, check=0, reject_copies=str(audit)
    )
    with pytest.raises(OutsideRanges, match="intensities must lie .*, and volumes must be no copies of training scans"):
        engine.run()
    assert not list((tmp_path / "other").glob("*.nii.gz"))


def test_an_audit_of_other_scans_is_refused(
    synthesizer: Synthesizer, known_scans: KnownScans, requests: list[SynthesisRequest]
) -> None:
    weights = str(synthesizer.source["weights"])
    for fitting in (replace(known_scans, weights="x"), replace(known_scans, data="x", weights=weights)):
        fitting.require(data=synthesizer.data, weights=weights)
    with pytest.raises(FibldmError, match="must be of the data or of the weights of this generator; it is of data x"):
        synthesizer.batch(requests[:1], settings=QUICK, reject_copies=replace(known_scans, data="x"))
    with pytest.raises(FibldmError, match="data unknown and not unknown"):
        replace(known_scans, data=None).require(data=None, weights=weights)


def test_what_is_read_of_an_audit_is_what_was_compared(known_scans: KnownScans, tmp_path: Path) -> None:
    read = KnownScans.read(write_audit(tmp_path / "audit", known_scans))
    assert read.fingerprint == known_scans.fingerprint
    assert np.array_equal(read.matcher.common, known_scans.matcher.common)
    for changes, message in (
        ({"threshold": None, "verdict": "audit not possible"}, "found a threshold; it says: audit not possible"),
        ({"facts": {"method": METHOD - 1}}, "must be an audit by this version"),
        ({"facts": {"method": METHOD, "scans": "other"}}, "must be of one audit"),
    ):
        with pytest.raises(FibldmError, match=message):
            KnownScans.read(write_audit(tmp_path / message[:9].strip(), known_scans, **changes))
    (tmp_path / "audit" / TRAINING).write_bytes(b"PK")
    with pytest.raises(FibldmError, match="must be as `fibldm audit` wrote it"):
        KnownScans.read(tmp_path / "audit")
