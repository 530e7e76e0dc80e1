"""The watch folder: masks that arrive become synthetic series, once each, whatever happens in between."""

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import BIRTH_DATE, PLANTED, complete, expected, write_segmentation, write_series
from processes import start

from fibldm.cli import run as run_command
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.serving import Ending, Watcher, items
from fibldm.serving.folders import hand_over, own_folder, publish
from fibldm.serving.items import aliased_scans, hashes_of, without_scans
from fibldm.synthesis import Job, Output, SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import read_mask

ROOT = Path(__file__).parents[2]
QUICK = SamplingSettings(steps=1)
SHAPE = (18, 22, 20)
GRID = {"spacing": (10.0, 10.0, 10.0), "origin": (-95.0, -110.0, -600.0)}
OPTIONS = ("--once", "--json", "--interval", "0.01", "--steps", "1", "--allow-extrapolation", "--device", "cpu")

INTERRUPTED = {
    "ok": False,
    "error": {"message": "interrupted", "remedy": "run the same command again to go on"},
}

Watch = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def synthesizer(tiny_bundle: Path) -> Synthesizer:
    return Synthesizer.from_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT of a planted patient, ``ct/``, and a segmentation on all of its slices, ``seg.dcm``; read only."""
    folder = tmp_path_factory.mktemp("study")
    files = write_series(folder / "ct", np.zeros(SHAPE, dtype=np.int16), change=complete, **GRID)  # type: ignore[arg-type]
    series = [pydicom.dcmread(file) for file in files]
    write_segmentation(folder / "seg.dcm", series, labels(), names=("left lung", "right lung"), omit_empty_frames=False)
    return folder


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def watch(tiny_bundle: Path, inbox: Path, outbox: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Watch]:
    """Runs the command with ``--once`` and more options; gives its exit code and a line of JSON for every item."""

    def run(*options: str | Path) -> tuple[int, list[dict[str, Any]]]:
        folders = ("--bundle", tiny_bundle, "--inbox", inbox, "--outbox", outbox)
        code = run_command(["watch", *(str(part) for part in (*folders, *OPTIONS, *options))])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        if code in (0, 130):
            told = [line["ok"] for line in lines[:-1]]
            counts = {"ok": True, "items": sum(told), "refused": len(told) - sum(told)}
            assert lines.pop() == (counts if code == 0 else INTERRUPTED)
        return code, lines

    yield run
    assert not list((inbox / ".claimed").glob("*")) and not list((outbox / ".working").glob("*"))


class Visits:
    """Stands for `Ending`: instead of waiting, it does what the test says, and then asks to end."""

    def __init__(self, *visits: Callable[[], object]) -> None:
        self.asked: int | None = None
        self._visits = list(visits)

    def wait(self, seconds: float) -> None:
        if self._visits:
            self._visits.pop(0)()
        else:
            self.asked = signal.SIGTERM


def nothing() -> None:
    pass


def labels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``(slice, row, column)`` without any symmetry."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[2:15, 5:17, 11:18], array[3:14, 6:15, 2:9] = 1, 2
    return array


def write_mask(path: Path, *, last: int = 2) -> Path:
    array = labels().transpose(2, 1, 0).copy()
    array[0, 0, 0] = last
    nibabel.save(nibabel.Nifti1Image(array, np.diag([10.0, 10.0, 10.0, 1.0])), path)
    return path


def watcher(inbox: Path, outbox: Path, synthesizer: Synthesizer) -> Watcher:
    return Watcher(inbox, outbox, Output(synthesizer, outbox, SynthesisSettings(QUICK, allow_extrapolation=True)))


def texts_and_names(folder: Path) -> str:
    files = list(folder.rglob("*"))
    return " ".join([*map(str, files), *(file.read_bytes().decode("latin-1") for file in files if file.is_file())])


# --- what comes out


def test_a_segmentation_becomes_a_series(
    watch: Watch, inbox: Path, outbox: Path, study: Path, synthesizer: Synthesizer, caplog: pytest.LogCaptureFixture
) -> None:
    """On the segmentation's grid as highdicom reads it; nothing of the patient is in it, or said."""
    content = (study / "seg.dcm").read_bytes().replace(BIRTH_DATE.encode(), b"Paula   ")  # libraries like to warn of it
    segmentation = inbox.parent / "seg.dcm"
    for file in (segmentation, inbox / "Planted^Paula.dcm"):
        file.write_bytes(content)
    name = hash_file(segmentation)[:16]
    code, reports = watch()
    series = outbox / "synthetic" / name / f"{name}_000"
    assert (code, reports) == (0, [{"ok": True, "item": name, "outputs": [str(series)], "left_out": 0}])
    slices = [pydicom.dcmread(file) for file in sorted(series.iterdir())]
    read = highdicom.get_volume_from_series(slices)
    turned = Volume(read.array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ read.affine).canonical()
    wanted, affine = expected(labels(), **GRID)  # type: ignore[arg-type]
    assert turned.array.shape == wanted.shape
    np.testing.assert_allclose(turned.affine, affine, atol=1e-4)
    made = synthesizer(read_mask(segmentation, synthesizer.names), name=name, settings=QUICK, allow_extrapolation=True)
    np.testing.assert_array_equal(turned.array, made.volume.canonical().array)
    assert slices[0].SyntheticData == "YES"
    assert hash_file(outbox / "done" / name / "Planted^Paula.dcm") == hash_file(segmentation)
    told = texts_and_names(outbox / "synthetic") + (outbox / "request.json").read_text() + caplog.text
    assert not [word for word in (*PLANTED, "Planted", "Paula") if word in told]
    assert f"{name}: 1 volume, " in caplog.text
    assert not [item for item in inbox.iterdir() if item.name != ".claimed"]


@pytest.mark.parametrize("suffix", [".nhdr", ".nrrd", ".mhd", ".mha"])
def test_a_header_that_leads_out_of_its_item_is_refused(tmp_path: Path, suffix: str) -> None:
    """Its voxels would be those of any file of this machine."""
    header = "ElementDataFile = {}\n" if suffix.startswith(".m") else "NRRD0004\ndata file: {}\n\n"
    item = tmp_path / "item"
    item.mkdir()
    for place, inside in ((tmp_path / "secret", False), (Path("../secret"), False), (Path("voxels.raw"), True)):
        (item / f"mask{suffix}").write_text(header.format(place))
        if inside:
            assert hashes_of(item)
        else:
            with pytest.raises(FibldmError, match="voxels of an item must lie in it"):
                hashes_of(item)


def test_nifti_gives_what_synthesize_gives(watch: Watch, inbox: Path, outbox: Path, tiny_bundle: Path) -> None:
    """For a file of that name."""
    file = write_mask(inbox / "a.nii.gz")
    name = hash_file(file)[:16]
    renamed = Path(shutil.copy(file, inbox.parent / f"{name}.nii.gz"))
    code, reports = watch("--format", "nifti", "--count", "2", "--seed", "3")
    place = outbox / "synthetic" / name
    assert code == 0 and reports[0]["outputs"] == [str(place / f"{name}_00{number}.nii.gz") for number in (0, 1)]
    settings = SamplingSettings(steps=1, seed=3)
    made = synthesize_files(
        *(None, [renamed], inbox.parent / "out"),
        count=2,
        settings=settings,
        allow_extrapolation=True,
        bundle=tiny_bundle,
        device="cpu",
    )
    assert [hash_file(place / file.name) for file in made] == [hash_file(file) for file in made]


def test_a_folder_is_one_item(watch: Watch, inbox: Path, outbox: Path, study: Path) -> None:
    """Its segmentations, with or without a suffix, and its NIfTI are masks; the rest of a study is left alone."""
    shutil.copytree(study / "ct", inbox / "exam" / "ct")
    shutil.copy(study / "seg.dcm", inbox / "exam" / "1.2.840.113619")
    write_mask(inbox / "exam" / "other.NII.GZ")
    (inbox / "exam" / ".other.nii.gz").write_text("attributes")
    code, reports = watch("--template", study / "ct")
    assert code == 0 and len(reports) == 1
    # the NIfTI mask lies elsewhere than the template
    assert "the mask must lie on the grid of the template series" in reports[0]["error"]["message"]
    assert (outbox / "refused" / reports[0]["item"] / "exam" / "1.2.840.113619").is_file()
    assert not (outbox / "synthetic").exists()
    (outbox / "refused" / reports[0]["item"] / "exam" / "other.NII.GZ").unlink()
    shutil.move(outbox / "refused" / reports[0]["item"] / "exam", inbox)
    code, reports = watch("--template", study / "ct")
    (series,) = reports[0]["outputs"]
    assert reports[0]["left_out"] == SHAPE[0] + 1  # the series, and a hidden file
    assert Path(series).name == f"{hash_file(study / 'seg.dcm')[:16]}_000"
    assert pydicom.dcmread(Path(series) / "0001.dcm").KVP == 120
    assert len(list((outbox / "done" / reports[0]["item"] / "exam" / "ct").iterdir())) == SHAPE[0]


def test_masks_of_itk_are_taken_with_their_voxels_apart(watch: Watch, inbox: Path, outbox: Path) -> None:
    """Two detached headers alike, whose voxels differ, are two masks."""
    (inbox / "exam").mkdir()
    for name, last in (("a", 1), ("b", 2)):
        image = SimpleITK.ReadImage(str(write_mask(inbox.parent / f"{name}.nii", last=last)))
        SimpleITK.WriteImage(image, str(inbox / "exam" / f"{name}.mhd"))
        header = inbox / "exam" / f"{name}.mhd"
        (inbox / "exam" / name).mkdir()
        header.write_text(header.read_text().replace(f"{name}.raw", "v.raw"))
        header.rename(inbox / "exam" / name / "Paula.MHD")
        (inbox / "exam" / f"{name}.raw").rename(inbox / "exam" / name / "v.raw")
    code, reports = watch("--format", "nifti")
    assert code == 0 and reports[0]["ok"] and reports[0]["left_out"] == 0
    masks = [nibabel.load(file).get_fdata() for file in (outbox / "synthetic").glob("*/masks/*.nii.gz")]
    assert sorted(mask[0, 0, 0] for mask in masks) == [1, 2] and len(reports[0]["outputs"]) == 2


# --- bad items


def text(path: Path) -> None:
    path.with_suffix(".txt").write_text("no mask")


def damaged(path: Path) -> None:
    path.with_suffix(".dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))


def fractions(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 8), 0.5, dtype=np.float32), np.eye(4)), path.with_suffix(".nii"))


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def folder_of_a_link(path: Path) -> None:
    path.mkdir()
    (path / "in").symlink_to("/etc", target_is_directory=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (text, "an item must hold a mask: NIfTI, NRRD, MetaImage or DICOM segmentation; it does not"),
        (damaged, "must be a readable DICOM file"),
        (fractions, "a mask must hold whole numbers"),
        (link, "an item must be a file or a folder of files; it is or holds a link or a device"),
        (folder_of_a_link, "an item must be a file or a folder of files; it is or holds a link or a device"),
    ],
)
def test_a_bad_item_is_refused_and_the_next_one_done(
    watch: Watch, inbox: Path, outbox: Path, bad: Callable[[Path], None], message: str
) -> None:
    bad(inbox / "a")
    (item,) = inbox.iterdir()
    write_mask(inbox / "b.nii.gz")
    code, reports = watch("--format", "nifti")
    assert code == 0 and [report["ok"] for report in reports] == [False, True]
    refused = reports[0]
    assert message in refused["error"]["message"] and refused["error"]["remedy"]
    assert read_json(outbox / "refused" / f"{refused['item']}.json") == refused
    assert os.path.lexists(outbox / "refused" / refused["item"] / item.name)
    assert [folder.name for folder in (outbox / "synthetic").iterdir()] == [reports[1]["item"]]


def test_a_scan_that_is_asked_for_lies_in_the_item(inbox: Path) -> None:
    """Called by its content; it is no mask; paths that lead out of the item are refused, and not repeated."""
    item = inbox / "item"
    (item / "series").mkdir(parents=True)
    scan, mask = write_mask(item / "Paula.NII.GZ"), write_mask(item / "mask.nii.gz", last=1)
    hashes = hashes_of(item)
    with aliased_scans(item, {"image": "Paula.NII.GZ"}) as opened:
        assert opened["image"].name == hash_file(scan)[:16] == opened["image"].sha256[:16]
        assert opened["image"].grid.shape == SHAPE[::-1]
        assert "Paula" not in repr(opened)
    assert list(without_scans(item, hashes, {"image": "Paula.NII.GZ"})) == [mask]
    write_mask(inbox / "other.nii.gz")
    wrong = (
        "../other.nii.gz",
        str(inbox / "other.nii.gz"),
        ".",
        "absent.nii.gz",
        "series",
        "Paula " * 99,
        3,
        [str(scan)],
    )
    for path in wrong:
        with pytest.raises(FibldmError) as refused, aliased_scans(item, {"image": path}):
            pass
        assert refused.value.message == (
            "image must name a file of the item, or a folder in it with one series; it does not"
        )


def test_an_item_that_cannot_be_read(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is not said; rights would not stop root."""

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(items, "hash_file", denied)
    with pytest.raises(FibldmError, match=r"^an item must be readable; Permission denied; check its permissions$"):
        hashes_of(write_mask(inbox / "Paula.nii.gz"))


def test_an_unexpected_error_refuses_its_item_only(
    watch: Watch, inbox: Path, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [hash_file(write_mask(inbox / f"{last}.nii.gz", last=last))[:16] for last in (1, 2)]
    whole = Output.write

    def failing(self: Output, jobs: list[Job]) -> list[Path]:
        if jobs[0].number == 1 and names[0] in jobs[0].name:
            raise MemoryError("too large")
        return whole(self, jobs)

    monkeypatch.setattr(Output, "write", failing)
    _, reports = watch("--format", "nifti", "--count", "2")
    assert [(report["ok"], report["item"]) for report in reports] == [(False, names[0]), (True, names[1])]
    assert reports[0]["error"]["message"] == "unexpected error: MemoryError: too large"
    assert [folder.name for folder in (outbox / "synthetic").iterdir()] == [names[1]], "half an item is none"
    monkeypatch.setattr(Output, "write", whole)
    shutil.move(outbox / "refused" / names[0] / "1.nii.gz", inbox)
    _, reports = watch("--format", "nifti", "--count", "2")
    assert reports[0]["ok"] and not (outbox / "refused" / f"{names[0]}.json").exists()


# --- arriving, sharing, going on


def test_what_is_still_written_waits(inbox: Path, outbox: Path, tmp_path: Path, synthesizer: Synthesizer) -> None:
    """Growing files, growing folders, and names with a dot; each is taken a look after it stood still."""
    whole = write_mask(tmp_path / "whole.nii.gz").read_bytes()
    (inbox / ".hidden.nii.gz").write_bytes(whole)
    (inbox / "folder").mkdir()
    (inbox / "file.nii.gz").write_bytes(whole[:20])
    before: list[int] = []
    reports: list[dict[str, Any]] = []

    def grow_file() -> None:
        (inbox / "file.nii.gz").write_bytes(whole)

    def grow_folder() -> None:
        before.append(len(reports))
        (inbox / "folder" / "other.nii.gz").write_bytes(write_mask(tmp_path / "other.nii.gz", last=1).read_bytes())

    def count() -> None:
        before.append(len(reports))

    visits = Visits(grow_file, grow_folder, count, count)
    for report in watcher(inbox, outbox, synthesizer).reports(0, visits):
        reports.append(report)
    assert before == [0, 1, 2] and all(report["ok"] for report in reports)
    assert sorted(item.name for item in inbox.iterdir()) == [".claimed", ".hidden.nii.gz"]


def test_once_ends_when_nothing_stands_still(inbox: Path, outbox: Path, synthesizer: Synthesizer) -> None:
    """What arrives in the meantime is taken as well; what is still written is not waited for."""
    write_mask(inbox / "a.nii.gz")

    def arrive() -> None:
        write_mask(inbox / "b.nii.gz", last=1)

    def grow() -> None:
        (inbox / "c.nii").write_bytes(b"c")

    visits = Visits(arrive, nothing, grow)
    reports = list(watcher(inbox, outbox, synthesizer).reports(0, visits, once=True))
    assert [report["ok"] for report in reports] == [True, True] and visits.asked is None
    assert [item.name for item in inbox.glob("[!.]*")] == ["c.nii"]


def test_two_watchers_share_an_inbox(inbox: Path, outbox: Path, synthesizer: Synthesizer) -> None:
    """Both see every item before either takes one; no item is taken twice."""
    names = [hash_file(write_mask(inbox / f"{last}.nii.gz", last=last))[:16] for last in range(6)]
    meeting = threading.Barrier(2, timeout=200)
    taken: list[list[dict[str, Any]]] = [[], []]

    def run(place: int) -> None:
        visits = Visits(meeting.wait, meeting.wait)
        for report in watcher(inbox, outbox, synthesizer).reports(0, visits):
            taken[place].append(report)

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert sorted(report["item"] for reports in taken for report in reports) == sorted(names)
    assert all(report["ok"] for reports in taken for report in reports)
    assert sorted(folder.name for folder in (outbox / "done").iterdir()) == sorted(names)


def test_the_same_content_at_once_is_made_by_both_and_kept_once(outbox: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "volume").write_text(name)
        publish(tmp_path / name, outbox / "synthetic" / "item")
    assert (outbox / "synthetic" / "item" / "volume").read_text() == "one"


def test_what_a_killed_watcher_had_in_hand_is_finished(inbox: Path, outbox: Path, synthesizer: Synthesizer) -> None:
    """Not while it lives: the lock says so, and ends with it."""
    claimed, working = inbox / ".claimed" / "dead", outbox / ".working" / "dead"
    locks = []
    for folder in (claimed, working):
        folder.mkdir(parents=True)
        locks.append((folder / ".lock").open("w"))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    (claimed / "1").mkdir()
    write_mask(claimed / "1" / "a.nii.gz")
    (working / "item").mkdir()
    (working / "item" / "half").mkdir()
    other = watcher(inbox, outbox, synthesizer)
    assert list(other.reports(0, Visits(nothing, nothing))) == [] and (working / "item" / "half").exists()
    for lock in locks:
        lock.close()
    (report,) = other.reports(0, Visits(nothing, nothing))
    assert report["ok"] and (outbox / "done" / report["item"] / "a.nii.gz").is_file()
    assert not claimed.exists() and not working.exists()


@pytest.mark.parametrize(("tries", "ok"), [(2, True), (3, False)])
def test_an_item_that_ends_its_watchers_is_refused_at_last(
    inbox: Path, outbox: Path, synthesizer: Synthesizer, tries: int, ok: bool
) -> None:
    """It must not stop those behind it for ever."""
    folder = inbox / ".claimed" / "dead" / str(tries)
    folder.mkdir(parents=True)
    write_mask(folder / "a.nii.gz")
    (report,) = watcher(inbox, outbox, synthesizer).reports(0, Visits(nothing))
    assert report["ok"] is ok
    assert ok or "3 watchers ended with this one in hand" in report["error"]["message"]
    assert list((outbox / ("done" if ok else "refused")).glob("*/a.nii.gz"))


def test_a_full_disk_ends_the_watcher_and_refuses_nothing(
    inbox: Path, outbox: Path, synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finishes what it had in hand, and knows of the try."""
    write_mask(inbox / "a.nii.gz")

    def full(self: Output, jobs: list[Job]) -> list[Path]:
        raise FibldmError("cannot write it", "free some space") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", full)
        with pytest.raises(FibldmError, match="cannot write it"):
            list(watcher(inbox, outbox, synthesizer).reports(0, Visits(nothing)))
    assert not (outbox / "refused").exists() and len(list((inbox / ".claimed").glob("*/1/a.nii.gz"))) == 1
    (report,) = watcher(inbox, outbox, synthesizer).reports(0, Visits(nothing))
    assert report["ok"]


def watch_slowly(*words: str) -> None:
    """The command, with time to be killed after every volume."""
    write = Output.write
    Output.write = lambda self, jobs: (write(self, jobs), time.sleep(0.4))[0]  # type: ignore[method-assign]
    run_command(["watch", *words])


@pytest.mark.slow
def test_killed_in_the_middle(watch: Watch, tiny_bundle: Path, inbox: Path, outbox: Path, tmp_path: Path) -> None:
    """By kill -9, while volumes are made; nothing of it shows until the next watcher has finished it."""
    name = hash_file(write_mask(inbox / "a.nii.gz"))[:16]
    folders = [
        "--bundle",
        tiny_bundle,
        "--inbox",
        inbox,
        "--outbox",
        outbox,
        *OPTIONS,
        "--format",
        "nifti",
        "--count",
        "4",
    ]
    process = start(tmp_path / "log.txt", watch_slowly, *map(str, folders))
    until = time.monotonic() + 600
    while not list((outbox / ".working").glob(f"*/{name}/*.nii.gz")) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((inbox / ".claimed").glob("*/1/a.nii.gz")) and not (outbox / "synthetic").exists()
    code, reports = watch("--format", "nifti", "--count", "4")
    assert code == 0 and len(reports) == 1 and all(Path(path).is_file() for path in reports[0]["outputs"])
    assert (outbox / "done" / name / "a.nii.gz").is_file()


def test_the_same_item_again_is_seen_to_be_done(watch: Watch, inbox: Path, outbox: Path) -> None:
    """Whatever it is called."""
    content = write_mask(inbox / "a.nii.gz").read_bytes()
    _, (first,) = watch("--format", "nifti")
    volume = Path(first["outputs"][0])
    written = volume.stat().st_mtime_ns
    for name in ("a.nii.gz", "b.nii.gz"):
        (inbox / name).write_bytes(content)
    _, again = watch("--format", "nifti")
    assert again == [first, first] and volume.stat().st_mtime_ns == written
    assert sorted(item.name for item in (outbox / "done" / first["item"]).iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_an_item_is_copied_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two volumes of a container; what a killed watcher had copied does not stand for the whole."""

    def across(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / "a").write_text("whole")
    (tmp_path / "done" / "exam").mkdir(parents=True)
    (tmp_path / "done" / "exam" / "a").write_text("ha")
    monkeypatch.setattr(os, "rename", across)
    hand_over(tmp_path / "exam", tmp_path / "done")
    assert (tmp_path / "done" / "exam" / "a").read_text() == "whole" and not (tmp_path / "exam").exists()


# --- beginning and ending


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_item_in_hand(
    watch: Watch, inbox: Path, outbox: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    for last in (1, 2):
        write_mask(inbox / f"{last}.nii.gz", last=last)
    whole = Output.write

    def interrupted(self: Output, jobs: list[Job]) -> list[Path]:
        os.kill(os.getpid(), number)
        return whole(self, jobs)

    monkeypatch.setattr(Output, "write", interrupted)
    before = signal.getsignal(number)
    left, reports = watch("--format", "nifti")
    assert left == code and [report["ok"] for report in reports] == [True]
    assert [item.name for item in inbox.glob("[!.]*")] == ["2.nii.gz"] and signal.getsignal(number) is before


def test_a_signal_ends_the_waiting_at_once() -> None:
    with Ending() as ending:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        ending.wait(30)
    assert ending.asked == signal.SIGTERM and time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bundle", "/absent"], "a bundle must be a folder or a zip archive; /absent is neither"),
        (["--inbox", "/absent"], "--inbox must be a folder; /absent is none"),
        (["--outbox", "INBOX/out"], "--outbox must not lie in the inbox"),
        (["--interval", "0"], "--interval must be above 0; got 0"),
        (["--count", "0"], "--count': Input should be greater than or equal to 1"),
        (["--format", "nifti", "--template", "x"], "format nifti takes no template"),
        (["--template", "/absent"], "a template must be a folder"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
    ],
)
def test_it_does_not_begin(watch: Watch, inbox: Path, options: list[str], message: str) -> None:
    write_mask(inbox / "a.nii.gz")
    code, reports = watch(*(option.replace("INBOX", str(inbox)) for option in options))
    assert code == 2 and message in reports[0]["error"]["message"]
    assert [item.name for item in inbox.iterdir()] == ["a.nii.gz"]


def test_an_outbox_is_of_one_bundle_and_one_choice_of_options(watch: Watch, inbox: Path, outbox: Path) -> None:
    assert watch("--format", "nifti") == (0, [])
    write_mask(inbox / "a.nii.gz")
    code, reports = watch("--format", "nifti", "--seed", "1")
    assert code == 2 and "must hold volumes of one bundle and one choice of options" in reports[0]["error"]["message"]
    assert (inbox / "a.nii.gz").exists()


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FibldmError, match="file must be writable; Not a directory; check its permissions"),
        own_folder(tmp_path / "file" / ".claimed"),
    ):
        pass
