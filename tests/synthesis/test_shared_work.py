"""Synthesis on engines: the bytes of one process whoever draws; what is there is kept, what is refused told at once."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.synthesis import SamplingSettings, synthesize_files
from fibldm.synthesis.outputs import Output

WAY: dict[str, Any] = {"settings": SamplingSettings(steps=1), "device": "cpu", "allow_extrapolation": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A scheduler with two workers in this process; those in processes of their own are tested apart."""
    from distributed import LocalCluster

    options = {"n_workers": 2, "processes": False, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with LocalCluster(threads_per_worker=1, **options) as made:
        yield made.scheduler_address


@pytest.fixture(scope="module")
def masks(phantom_work: Path) -> list[Path]:
    return sorted((phantom_work / "labels").iterdir())[:3]


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hash_file(file) for file in folder.rglob("*") if file.is_file()}


def test_engines_write_the_bytes_of_one_process(
    tiny_bundle: Path, masks: list[Path], cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {}
    for name, engine in {"one": {}, "processes": {"workers": 2}, "cluster": {"cluster": cluster}}.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "fibldm"):
            out = tmp_path / name
            paths = synthesize_files(None, masks, out, bundle=tiny_bundle, count=3, batch_size=2, **WAY, **engine)
        assert [path.name for path in paths] == [f"{path.name[:-7]}_{k:03d}.nii.gz" for path in masks for k in range(3)]
        said[name] = [text.replace(str(out), "") for source, _, text in caplog.record_tuples if source == "fibldm"]
    one = content(tmp_path / "one")
    assert len(one) == 3 * 3 * 2 + 3  # volumes, sidecars, masks; no lock, nothing of an engine
    assert content(tmp_path / "processes") == one
    assert content(tmp_path / "cluster") == one
    assert said["processes"] == said["cluster"] == said["one"]


def test_what_is_there_is_kept_and_the_rest_is_made(
    tiny_bundle: Path, masks: list[Path], cluster: str, tmp_path: Path
) -> None:
    synthesize_files(None, masks, tmp_path, bundle=tiny_bundle, cluster=cluster, **WAY)
    before = content(tmp_path)
    lost, kept, _ = sorted(tmp_path.glob("*.nii.gz"))
    lost.unlink()
    os.utime(kept, (1, 1))
    synthesize_files(None, masks, tmp_path, bundle=tiny_bundle, cluster=cluster, **WAY)
    assert content(tmp_path) == before
    assert kept.stat().st_mtime == 1


def test_a_batch_that_was_cut_off_ends_with_the_same_bytes(
    tiny_bundle: Path, masks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that is lost has written one of two volumes; whoever has the batch next draws both again."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    synthesize_files(None, masks[:1], whole, bundle=tiny_bundle, count=2, batch_size=2, **WAY)
    write, attempt = Output._write, Output.attempt

    def lost(self: Output, job: Any, *rest: Any) -> None:
        if job.number == 1:
            raise RuntimeError("lost")
        write(self, job, *rest)

    def again(self: Output, jobs: Any) -> Any:
        monkeypatch.setattr(Output, "_write", lost)
        with pytest.raises(RuntimeError):
            attempt(self, jobs)
        monkeypatch.setattr(Output, "_write", write)
        assert len(list(cut.glob("*.nii.gz"))) == 1
        return attempt(self, jobs)

    monkeypatch.setattr(Output, "attempt", again)
    synthesize_files(None, masks[:1], cut, bundle=tiny_bundle, count=2, batch_size=2, **WAY)
    assert content(cut) == content(whole)


def test_masks_that_are_refused_are_told_together_before_any_is_drawn(
    tiny_bundle: Path, masks: list[Path], cluster: str, tmp_path: Path
) -> None:
    told = []
    for engine in ({}, {"cluster": cluster}):
        bad = tmp_path / "bad.nii.gz"
        bad.write_bytes(b"no image")
        worse = tmp_path / "worse.nii.gz"
        worse.write_bytes(b"nor this")
        with pytest.raises(FibldmError, match="2 of 5 masks are refused, nothing was made") as raised:
            synthesize_files(None, [*masks, bad, worse], tmp_path / "out", bundle=tiny_bundle, **WAY, **engine)
        told.append(str(raised.value))
        assert not (tmp_path / "out").exists()
    assert told[0] == told[1]
