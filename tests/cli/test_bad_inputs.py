"""Every input of the corpus ends in its named error or its right volume."""

import errno
import os
import re
import signal
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel
import numpy as np
import pytest
from bad_input_corpus import CORPUS
from bad_inputs import Input, image, make_sound, nifti, write
from processes import finish, start

from fibldm.cli import run
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json

SECONDS = 20


class Hang(BaseException):
    """The preparation took too long; no ``except Exception`` or ``OSError`` may take it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its hash; of links, pipes and folders only that they are there."""
    return {str(path): hash_file(path) if path.is_file() else "" for path in folder.rglob("*")}


def spoiled(entry: Input, folder: Path) -> Path:
    root = make_sound(folder / "data")
    entry.spoil(root)
    return root


def settings_of(entry: Input) -> PrepareSettings:
    return PrepareSettings(**{"modality": "ct", **entry.settings})


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len({entry.name for entry in CORPUS}) == len(CORPUS) >= 180


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: entry.name)
def test_input(entry: Input, tmp_path: Path) -> None:
    root, work = spoiled(entry, tmp_path), tmp_path / "work"
    before = snapshot(root)
    with time_limit(SECONDS):
        if entry.error:
            refused(entry, root, work)
        else:
            read(entry, root, work)
    assert snapshot(root) == before


def refused(entry: Input, root: Path, work: Path) -> None:
    with pytest.raises(FibldmError) as caught:
        prepare(root / entry.source, work, settings_of(entry), progress=False)
    assert re.search(entry.error, str(caught.value)), str(caught.value)
    assert {path.name for path in work.glob("*")} <= {"report.json", ".preparing"}
    assert not (work / "report.json").exists() or not read_json(work / "report.json")["ok"]


def read(entry: Input, root: Path, work: Path) -> None:
    report = prepare(root / entry.source, work, settings_of(entry), progress=False)
    written = read_json(work / "report.json")
    assert written["ok"] and set(written["cases"]) == {path.name[:-7] for path in (work / "images").iterdir()}
    (name,) = (name for name in written["cases"] if is_expected(work / f"images/{name}.nii.gz", entry))
    labels = work / f"labels/{name}.nii.gz"
    assert labels.exists() == (entry.label is not None)
    if entry.label is not None:
        np.testing.assert_array_equal(np.asanyarray(nibabel.load(labels).dataobj), entry.label)
    said = [*(f"{finding['message']}" for finding in written["findings"]), *written["notes"]]
    assert any(re.search(entry.finding, text) for text in said) if entry.finding else not report.findings


def is_expected(file: Path, entry: Input) -> bool:
    image, (voxels, affine) = nibabel.load(file), entry.image
    return np.array_equal(np.asanyarray(image.dataobj), voxels) and np.allclose(image.affine, affine, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    """gzip-cut-in-the-voxels sheared nan half-a-voxel-away pipe newline-in-a-name loop-of-folders quotes-unbalanced
    nul-bytes patient-in-two-splits dicom-tilted mat-of-two-variables""".split(),
)
def test_input_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one paragraph, or 0."""
    (entry,) = (entry for entry in CORPUS if entry.name == name)
    source, work = spoiled(entry, tmp_path) / entry.source, tmp_path / "work"
    steps = [str(value) for value in ("--spacing", *entry.settings["spacing"])] if entry.settings else []
    with time_limit(SECONDS):
        code = run(["prepare", str(source), "--out", str(work), "--modality", "ct", "--workers", "1", *steps])
    said = capsys.readouterr()
    assert code == (2 if entry.error else 0)
    assert "Traceback" not in said.err and (work / "datalist.json").exists() == (code == 0)
    if entry.error:
        assert said.out == "" and said.err.startswith("fibldm: ") and "\n\n" not in said.err
        assert re.search(entry.error, said.err), said.err


def test_a_header_that_asks_for_terabytes_takes_no_memory(tmp_path: Path) -> None:
    (entry,) = (entry for entry in CORPUS if entry.name == "huge-dimensions")
    root = spoiled(entry, tmp_path)
    tracemalloc.start()
    with pytest.raises(FibldmError, match="54000000000352 bytes"):
        prepare(root, tmp_path / "work", settings_of(entry), progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# Files and folders without permission, as another user where this one may do everything

NOBODY = 65534


def prepare_unprivileged(pairs: list[tuple[Path, Path]]) -> None:
    """The first once before, for all that is imported on the way, while the interpreter's own files can be read."""
    prepare_all(pairs[:1])
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    prepare_all(pairs[1:])


def prepare_all(pairs: list[tuple[Path, Path]]) -> None:
    for source, work in pairs:
        print(run(["prepare", str(source), "--out", str(work), "--modality", "ct", "--workers", "1"]))


@pytest.mark.slow
def test_files_and_folders_without_permission() -> None:
    """An unreadable file, label and folder, and a place for the work folder that cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "works").mkdir()
        (root / "works").chmod(0o777)
        barred = ("images/bad.nii.gz", "labels/bad.nii.gz", "labels", ".")
        for number, path in enumerate(barred):
            (make_sound(root / f"data{number}") / path).chmod(0)
        pairs = [(root / f"data{number}", root / f"works/{number}") for number in range(len(barred))]
        (root / "barred").mkdir(mode=0o555)
        pairs.append((make_sound(root / "sound"), root / "barred/new/work"))
        before = (make_sound(root / "before"), root / "before-work")
        log = root / "log.txt"
        finish(start(log, prepare_unprivileged, [before, *pairs]), log=log)
        told = log.read_text()
        for path in [*(root / f"data{n}" / path for n, path in enumerate(barred)), root / "barred"]:
            path.chmod(0o755)
    assert [line for line in told.splitlines() if line.isdigit()] == ["0", *["2"] * 5], told
    assert "Traceback" not in told
    for said in ("image: a file must be readable; Permission", "label: a file must be readable; Permission"):
        assert said in told
    assert re.search("data2 must be readable; Permission denied; check the permissions", told)
    assert re.search("data3' is not readable", told)
    assert "cannot write" in told and "Permission denied; check the folder" in told


# A preparation that is stopped half-way


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, error: BaseException) -> None:
    """Raise ``error`` at call number ``count`` of a function, counted from 0."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(10**6))

    def function(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == count:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, function)


def grown(root: Path) -> Path:
    write(root / "images/new.nii.gz", nifti(image(9)))
    return root


CT = PrepareSettings(modality="ct")


@pytest.mark.parametrize("count", [0, 1, 4, 9, 14, 16])
def test_a_full_disk_leaves_the_earlier_work_folder(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key, the first image, a label, a record, the last ones and the report cannot be written; H13."""
    root, work = make_sound(tmp_path / "data"), tmp_path / "work"
    prepare(root, work, CT, progress=False)
    before = snapshot(work)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        stop_at(patch, os, "fsync", count, full)
        with pytest.raises(FibldmError, match="cannot write .*: No space left on device; check the free disk space"):
            prepare(grown(root), work, CT, restart=True, progress=False)
    assert {path: value for path, value in snapshot(work).items() if ".preparing" not in path} == before
    assert not list(tmp_path.rglob(".writing-*"))
    assert prepare(root, work, CT, restart=True, progress=False).counts["training"] == 3


@pytest.mark.parametrize("count", [0, 1, 4, 9, 12, 14])
def test_an_interrupted_preparation_goes_on(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the keyboard interrupts it; the folder is that of an uninterrupted one."""
    root, work = make_sound(tmp_path / "data"), tmp_path / "work"
    with monkeypatch.context() as patch:
        stop_at(patch, os, "fsync", count, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(root, work, CT, progress=False)
    assert {path.name for path in work.glob("*")} <= {".preparing"}
    assert not list(tmp_path.rglob(".writing-*"))
    prepare(root, work, CT, progress=False)
    prepare(root, tmp_path / "other", CT, progress=False)
    contents = [read_json(folder / "datalist.json")["content"] for folder in (work, tmp_path / "other")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("restart", [False, True])
def test_an_interruption_while_the_work_folder_is_put_together(
    restart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every move of the last step: the folder is not taken for a whole one, and the next run goes on."""
    root = make_sound(tmp_path / "data")
    for count in range(5):
        work = tmp_path / f"work{count}"
        if restart:
            prepare(root, work, CT, progress=False)
        with monkeypatch.context() as patch:
            stop_at(patch, Path, "rename", count, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prepare(root, work, CT, restart=restart, progress=False)
        assert not (work / "report.json").exists()
        prepare(root, work, CT, restart=restart, progress=False)
        assert len(list((work / "images").iterdir())) == 4
