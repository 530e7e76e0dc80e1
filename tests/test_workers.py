"""Engines: the same results in the same order whoever works, and what a lost worker was at is done again.

Processes are those that users get, which begin anew; other tests fork them, see ``processes.py``.
"""

import logging
import multiprocessing
import operator
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fibldm.cluster import Cluster
from fibldm.errors import FibldmError
from fibldm.workers import Engine, Processes, Work, engine_of

_logger = logging.getLogger("fibldm")


@pytest.fixture(autouse=True)
def begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.workers.get_context", multiprocessing.get_context)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A scheduler with two workers in processes of their own, without a page."""
    from distributed import LocalCluster

    # Dask's own warnings and logs are no findings about FibLDM
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with LocalCluster(**options) as made:
        yield Cluster(made.scheduler_address)


@pytest.fixture(params=["here", "processes", "cluster"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return {"here": lambda: Processes(1), "processes": lambda: Processes(2)}.get(
        request.param, lambda: request.getfixturevalue("cluster")
    )()


@dataclass(frozen=True)
class Kit:
    """Notes each process that opens it."""

    notes: Path

    def __call__(self) -> Path:
        (self.notes / f"opened-{os.getpid()}").touch(exist_ok=False)
        return self.notes


def note(notes: Path, number: int) -> int:
    _logger.info("item %d", number)
    (notes / f"item-{number}").touch()
    return number**2


def end_once(notes: Path, number: int, culprit: int) -> int:
    """Ends its process where it is the culprit, the first time."""
    with (notes / f"begun-{number}").open("a") as stream:
        stream.write("x")
    if number == culprit and (notes / f"begun-{number}").stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> None:
    raise FibldmError(f"item {number} is refused", "leave it out")


def test_results_come_in_the_order_of_the_items(engine: Engine) -> None:
    items = [(number, 2) for number in range(5)]
    assert list(engine.each(Work(operator.pow), items, iter)) == [0, 1, 4, 9, 16]
    assert list(engine.each(Work(operator.pow), [], iter)) == []


def test_a_kit_is_opened_once_in_a_process_and_the_log_is_that_of_one_process(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(note, Kit(tmp_path), folder=tmp_path)
    with caplog.at_level(logging.INFO, "fibldm"):
        assert list(engine.each(work, [(number,) for number in range(6)], iter)) == [0, 1, 4, 9, 16, 25]
    said = [message for name, _, message in caplog.record_tuples if name == "fibldm"]
    assert said == [f"item {number}" for number in range(6)]
    names = {file.name for file in tmp_path.iterdir()}
    opened = {name for name in names if name.startswith("opened-")}
    assert names - opened == {f"item-{number}" for number in range(6)}  # and nothing of the engine's own is left
    assert 1 <= len(opened) <= 2
    assert (f"opened-{os.getpid()}" in opened) == engine.here


def test_what_a_worker_refuses_is_told_as_it_is(engine: Engine) -> None:
    with pytest.raises(FibldmError, match="item 3 is refused; leave it out"):
        list(engine.each(Work(refuse), [(3,), (3,)], iter))


@pytest.mark.parametrize("kind", ["processes", "cluster"])
def test_what_a_lost_worker_was_at_is_done_again(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Processes(2) if kind == "processes" else request.getfixturevalue("cluster")
    work = Work(end_once, partial(Path, tmp_path), folder=tmp_path)
    assert list(engine.each(work, [(number, 3) for number in range(8)], iter)) == list(range(8))
    begun = {number: (tmp_path / f"begun-{number}").stat().st_size for number in range(8)}
    assert begun[3] == 2
    # a neighbour may have been at work in the pool that broke; what was done before is never begun again
    assert sum(begun.values()) <= 8 + 2 and (kind == "cluster" or begun[0] == begun[1] == 1)


def test_an_item_that_ends_every_process_is_given_up() -> None:
    with pytest.raises(FibldmError, match="that computed was killed 2 times, likely for memory; use fewer --workers"):
        list(Processes(2).each(Work(os._exit, what="computed"), [(1,), (1,), (1,)], iter))


def test_workers_that_do_not_see_the_folder_are_refused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they would write what nobody finds; here the file in it goes before they come to look."""
    monkeypatch.setattr("fibldm.cluster.atomic_path", lambda file: FileElsewhere(tmp_path / "elsewhere"))
    with pytest.raises(FibldmError, match=f"workers must see {re.escape(str(tmp_path))} as the command does"):
        list(cluster.each(Work(operator.pow, folder=tmp_path), [(1, 2)], iter))


def test_workers_of_another_version_are_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.cluster.__version__", "0.0.1")
    with pytest.raises(FibldmError, match=r"the same FibLDM as the command, 0\.0\.1; .* install the same everywhere"):
        list(cluster.each(Work(operator.pow), [(1, 2)], iter))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers": 0}, "`workers` must be at least 1; got 0"),
        ({"workers": 2, "cluster": "tcp://10.0.0.1:8786"}, "got `workers` and `cluster`; give one of them"),
    ],
)
def test_engines_that_cannot_be_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        engine_of(**asked)  # type: ignore[arg-type]


def test_a_scheduler_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.cluster._PATIENCE", 0.3)
    with pytest.raises(FibldmError, match=r"a scheduler of Dask must answer at tcp://127\.0\.0\.1:1; "):
        list(Cluster("tcp://127.0.0.1:1").each(Work(operator.pow), [(1, 2)], iter))
    assert engine_of(3) == Processes(3) and engine_of(default=2) == Processes(2)


@dataclass(frozen=True)
class FileElsewhere:
    """Takes the place of the path that a file is written to."""

    file: Path

    def __enter__(self) -> Path:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.unlink()
