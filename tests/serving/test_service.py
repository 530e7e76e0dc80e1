"""A service: what it took on is made once, whatever happens in between."""

import errno
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.serving import Job, Service, State
from fibldm.synthesis import Job as Volume
from fibldm.synthesis import Output, SamplingSettings, SynthesisSettings, Synthesizer, synthesize_files
from fibldm.volumes.writer import sidecar

QUICK = SynthesisSettings(SamplingSettings(steps=1), allow_extrapolation=True)
MASK = "mask.nii.gz"


class Never:
    """Stands for `Ending`: nobody asks to end."""

    asked: int | None = None


@pytest.fixture(scope="module")
def synthesizer(tiny_bundle: Path) -> Synthesizer:
    return Synthesizer.from_bundle(tiny_bundle)


@pytest.fixture
def serve(synthesizer: Synthesizer, tmp_path: Path) -> Callable[..., Service]:
    def made(**options: Any) -> Service:
        return Service(Output(synthesizer, tmp_path, QUICK), tmp_path / "service", **options)

    return made


def send(service: Service, mask: Path, **asked: Any) -> Job:
    with service.incoming() as folder:
        shutil.copy(mask, folder / MASK)
        return service.submit(folder, asked)


def work(service: Service) -> None:
    service.run(Never(), until_idle=True)  # type: ignore[arg-type]


def now(service: Service, job: Job) -> Job:
    found = service.store.get(job.id)
    assert found is not None
    return found


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    labels = np.zeros((20, 22, 18), dtype=np.uint8)
    labels[2:15, 5:17, 11:18], labels[3:14, 6:15, 2:9] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([10.0, 10.0, 10.0, 1.0])), tmp_path / MASK)
    return tmp_path / MASK


def test_volumes_are_those_of_synthesize(
    serve: Callable[..., Service], mask: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    with serve() as service:
        job = send(service, mask, count=2, seed=3)
        assert job.state is State.WAITING and send(service, mask, count=2, seed=3).id == job.id
        other = send(service, mask, count=2, seed=4)
        work(service)
        done = now(service, job)
        assert done.state is State.DONE and done.made == 2 and now(service, other).state is State.DONE
        assert done.outcome is not None and done.outcome["left_out"] == 0
        volumes = [service.results(job) / name for name in done.outcome["outputs"]]
        assert list((service.folder / "spool").iterdir()) == []
    renamed = Path(shutil.copy(mask, tmp_path / f"{hash_file(mask)[:16]}.nii.gz"))
    settings = SamplingSettings(steps=1, seed=3)
    wanted = synthesize_files(
        *(None, [renamed], tmp_path / "out"),
        **{"count": 2, "settings": settings, "allow_extrapolation": True, "bundle": tiny_bundle, "device": "cpu"},
    )
    assert [hash_file(volume) for volume in volumes] == [hash_file(volume) for volume in wanted]
    assert MASK not in "".join(file.read_text() for file in service.results(job).rglob("*.json"))


def test_a_request_that_is_refused_is_never_taken_on(serve: Callable[..., Service], mask: Path) -> None:
    with serve(most=3) as service:
        for asked, message in (
            ({"count": 4}, "at most 3 volumes; got 4"),
            ({"steps": 0}, "steps must be at least 1"),
            ({"template": "/etc"}, "what a request asks for must be one of"),
            ({"covariates": {"age": 3}}, "age"),
        ):
            with pytest.raises(FibldmError, match=message):
                send(service, mask, **asked)
        assert service.store.jobs() == [] and list((service.folder / "spool").iterdir()) == []


def test_what_is_no_mask_is_refused_and_the_next_one_made(serve: Callable[..., Service], mask: Path) -> None:
    with serve() as service:
        with service.incoming() as folder:
            (folder / "report.txt").write_text("no mask")
            wrong = service.submit(folder)
        right = send(service, mask)
        work(service)
        refused = now(service, wrong)
        assert refused.state is State.REFUSED and refused.outcome is not None
        assert "an item must hold a mask" in refused.outcome["message"]
        assert now(service, right).state is State.DONE
        assert list((service.folder / "spool").iterdir()) == []


@pytest.mark.parametrize("moment", ["half written", "before it is done"])
def test_a_kill_loses_nothing_and_makes_nothing_twice(
    serve: Callable[..., Service], mask: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As after a kill, nothing that tidies up has run; the next service goes on."""

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, serve() as service:
        job = send(service, mask)
        if moment == "half written":
            patch.setattr("fibldm.serving.making.publish", killed)
            patch.setattr("fibldm.serving.making.shutil.rmtree", lambda *_, **__: None)
        else:
            patch.setattr(service.store, "finish", killed)
        with pytest.raises(Killed):
            work(service)
        before = {file: file.stat().st_mtime_ns for file in service.results(job).rglob("*.nii.gz")}
        assert bool(before) == (moment == "before it is done")
    with serve() as service:
        work(service)
        done = now(service, job)
        assert (done.state, done.tries) == (State.DONE, 2)
        files = {file: file.stat().st_mtime_ns for file in service.results(job).rglob("*.nii.gz")}
        assert files and before.items() <= files.items()
        assert not list((service.folder / ".working").glob("*"))


def test_what_ended_three_services_is_refused(serve: Callable[..., Service], mask: Path) -> None:
    with serve() as service:
        job = send(service, mask)
        for _ in range(3):
            service.store.take()
            service.store.give_back()
        service.store.take()
    with serve() as service:
        refused = now(service, job)
        assert refused.state is State.REFUSED and refused.outcome is not None
        assert "must not end its service" in refused.outcome["message"]


def test_what_came_but_was_not_acknowledged_is_gone(serve: Callable[..., Service], mask: Path) -> None:
    """The service was killed between the folder and the job: whoever sent it was told nothing, and sends it again."""
    with serve() as service:
        job = send(service, mask)
        service.store.forget(job.id)
    with serve() as service:
        assert list((service.folder / "spool").iterdir()) == []
        assert send(service, mask).id == job.id
        work(service)
        assert now(service, job).state is State.DONE


def test_a_full_disk_is_no_fault_of_the_request(
    serve: Callable[..., Service], mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Output, jobs: list[Volume]) -> list[Path]:
        raise FibldmError("cannot write it", "free some space") from OSError(errno.ENOSPC, "No space left on device")

    with serve() as service:
        job = send(service, mask)
        with monkeypatch.context() as patch:
            patch.setattr(Output, "write", full)
            with pytest.raises(FibldmError, match="cannot write it"):
                work(service)
        assert now(service, job).state is State.WAITING
        work(service)
        assert now(service, job).state is State.DONE


def test_results_are_kept_as_long_as_asked(serve: Callable[..., Service], mask: Path) -> None:
    with serve(keep=0.0) as service:
        job = send(service, mask)
        work(service)
        done = now(service, job)
        assert done.outcome is not None and read_json(sidecar(service.results(job) / done.outcome["outputs"][0]))
        ending = Never()
        timer = threading.Timer(0.5, setattr, (ending, "asked", signal.SIGTERM))
        timer.start()
        service.run(ending)  # type: ignore[arg-type]
        assert service.store.get(job.id) is None and not service.results(job).exists()


def test_two_services_do_not_share_a_folder(serve: Callable[..., Service]) -> None:
    with serve(), pytest.raises(FibldmError, match="must be written by one process at a time"), serve():
        pass
