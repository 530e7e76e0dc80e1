"""One process at a time: who holds a lock is named, and nobody who was killed keeps one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyStage

from fibldm import locks
from fibldm.datasets.preparation import prepare
from fibldm.datasets.slices import write_slices
from fibldm.errors import FibldmError
from fibldm.evaluation.results import Section, record
from fibldm.locks import alone, beside
from fibldm.runs import StageFolder
from fibldm.synthesis import SamplingSettings, synthesize_files

HOLD = """
import os, sys, time
from pathlib import Path
from fibldm.locks import alone
with alone(Path(sys.argv[1]), "it", ""):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.1, "SILENCE": 1.0, "_SETTLE": 0.05}.items():
        monkeypatch.setattr(locks, name, seconds)


def lock(file: Path, **options: Any) -> Any:
    return alone(file, "the folder", "wait", **options)


def holder_elsewhere(file: Path) -> None:
    content = {"host": "node7", "pid": 41, "since": "2026-01-02 03:04:05+00:00", "machine": "another"}
    file.write_text(json.dumps(content))


def kept_fresh(file: Path) -> threading.Event:
    """As a holder on another machine does it; until the event is set."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.1):
            os.utime(file)

    threading.Thread(target=renew, daemon=True).start()
    return done


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".lock"
    with lock(file):
        wanted = f"the folder must be written by one process at a time; process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(FibldmError, match=f"{wanted} has held it since 20.*; wait"), lock(file):
            pytest.fail("two hold it")
        assert file.exists()
    assert not file.parent.exists()
    with lock(file):
        pass


def test_a_lock_is_released_by_an_error_and_what_was_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".lock"
    with pytest.raises(ValueError, match="broken"), lock(file):
        (file.parent / "kept").touch()
        raise ValueError("broken")
    assert [path.name for path in file.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child that lives on"])
def test_a_killed_process_keeps_no_lock(tmp_path: Path, forked: bool) -> None:
    file = tmp_path / ".lock"
    options = ["fork"] if forked else []
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(file), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(FibldmError, match=f"process {process.pid} on "), lock(file):
            pass
        process.kill()
    assert file.exists()
    with lock(file, patience=30):  # the forked child may not have got to letting go of it yet
        pass
    os.killpg(process.pid, signal.SIGKILL) if forked else None


def test_only_one_holds_it_however_many_take_turns(tmp_path: Path) -> None:
    """A lock that is removed when it is released is the one that the next process opens."""
    inside, most, count = 0, 0, 0

    def take_turns() -> None:
        nonlocal inside, most, count
        for _ in range(10):
            with lock(tmp_path / ".lock", patience=60):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                count, inside = count + 1, inside - 1

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 40)


def test_a_holder_on_another_machine_counts_while_it_gives_signs(tmp_path: Path) -> None:
    """Where flock knows the processes of one machine only, as on some shared file systems."""
    file = tmp_path / ".lock"
    holder_elsewhere(file)
    done = kept_fresh(file)
    try:
        with pytest.raises(FibldmError, match="process 41 on node7 has held it since 2026-01-02"), lock(file):
            pass
    finally:
        done.set()
    began = time.monotonic()
    with lock(file):
        assert 0.9 < time.monotonic() - began < 5
    holder_elsewhere(file)
    os.utime(file, (0, time.time() - 3600))
    began = time.monotonic()
    with lock(file):  # nobody was there for an hour
        assert time.monotonic() - began < 0.5


def test_without_flock_signs_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    file = tmp_path / ".lock"
    with lock(file), pytest.raises(FibldmError, match=f"process {os.getpid()} on"), lock(file):
        pass
    assert not file.exists()
    holder_elsewhere(file)
    with lock(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_what_cannot_be_written_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is done may be looked at in a folder that is read only."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "there.lock").touch()
    monkeypatch.setattr(os, "open", refuse)
    with lock(tmp_path / ".lock"):
        pass
    with pytest.raises(FibldmError, match="cannot write .*: Read-only file system"), lock(tmp_path / "there.lock"):
        pass


# --- who takes one


def test_a_work_folder_is_prepared_by_one_process_at_a_time(phantom_work: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with alone(beside(work), "it", ""), pytest.raises(FibldmError, match="work must be written by one process at a ti"):
        prepare(phantom_work.parent / "source", work, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_slices_are_written_by_one_process_at_a_time(phantom_work: Path, tmp_path: Path) -> None:
    out = tmp_path / "slices"
    with alone(beside(out), "it", ""), pytest.raises(FibldmError, match="slices must be written by one process at a "):
        write_slices(phantom_work, out, every=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["autoencoder", "latents"])
def test_a_stage_is_written_by_one_process_at_a_time(tiny_stage: TinyStage, tmp_path: Path, stage: str) -> None:
    message = f"run/{stage} must be written by one process at a time; process .*; wait .*, or use another run folder"
    with StageFolder(tmp_path / "run", stage).alone(), pytest.raises(FibldmError, match=message):
        tiny_stage(stage, tmp_path / "run").run()
    assert list(tmp_path.iterdir()) == []


def test_processes_that_share_the_work_hold_a_part_each(
    tiny_run: Path, phantom_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = sorted((phantom_work / "labels").glob("*.nii.gz"))[:1]
    settings = SamplingSettings(steps=1)
    with alone(tmp_path / ".synthesize.lock", "it", ""):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert synthesize_files(tiny_run, masks, tmp_path, count=1, settings=settings) == []
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(FibldmError, match="written by one process at a time.*by RANK and WORLD_SIZE"):
            synthesize_files(tiny_run, masks, tmp_path, count=1, settings=settings)


def test_measurements_at_the_same_time_are_all_recorded(tmp_path: Path) -> None:
    names = [f"part {number}" for number in range(8)]
    threads = [threading.Thread(target=record, args=(tmp_path, name, Section({}))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == {"fibldm", *names}
