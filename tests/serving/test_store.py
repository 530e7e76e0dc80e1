"""Jobs in a file: in order, once each, and still there after a kill."""

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fibldm.errors import FibldmError
from fibldm.serving.store import JobStore, State

KILLED = """
import os, signal, sys
from pathlib import Path
from fibldm.serving.store import JobStore
store = JobStore(Path(sys.argv[1]))
store.submit("a", {"seed": 1})
store.submit("b", {})
store.take()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "service" / "jobs.sqlite")
    yield opened
    opened.close()


def test_jobs_are_taken_in_the_order_in_which_they_came(store: JobStore) -> None:
    for name in ("b", "c", "a"):
        assert store.submit(name, {"seed": ord(name)}).state is State.WAITING
    taken = [store.take() for _ in range(4)]
    assert [job and (job.id, job.state, job.tries, job.request["seed"]) for job in taken] == [
        *((name, State.RUNNING, 1, ord(name)) for name in "bca"),
        None,
    ]


def test_the_same_content_is_one_job_and_what_was_refused_may_come_again(store: JobStore) -> None:
    store.submit("a", {"seed": 1})
    assert store.take() is not None
    assert store.submit("a", {"seed": 1}).state is State.RUNNING
    store.finish("a", {"outputs": ["x"]})
    done = store.submit("a", {"seed": 1})
    assert (done.state, done.outcome, store.take()) == (State.DONE, {"outputs": ["x"]}, None)
    store.submit("b", {})
    store.take()
    store.refuse("b", FibldmError("no mask", "send one"))
    refused = store.get("b")
    assert refused is not None and refused.outcome == {"message": "no mask", "remedy": "send one"}
    again = store.submit("b", {})
    assert (again.state, again.outcome, again.tries) == (State.WAITING, None, 0)
    assert [job.id for job in store.jobs(State.DONE)] == ["a"] and len(store.jobs()) == 2


def test_a_killed_service_leaves_its_jobs(tmp_path: Path) -> None:
    """Written by a process that is gone: one had been in hand, one waited."""
    file = tmp_path / "jobs.sqlite"
    code = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=os.environ, check=False).returncode
    assert code == -9
    store = JobStore(file)
    assert [(job.id, job.state) for job in store.jobs()] == [("a", State.RUNNING), ("b", State.WAITING)]
    assert [job.id for job in store.give_back()] == ["a"]
    again = store.take()
    assert again is not None and (again.id, again.tries, again.request) == ("a", 2, {"seed": 1})
    store.close()


def test_threads_take_every_job_once(store: JobStore) -> None:
    for number in range(60):
        store.submit(f"{number}", {})
    taken: list[str] = []

    def work() -> None:
        while (job := store.take()) is not None:
            store.tell(job.id, 1)
            taken.append(job.id)
            store.finish(job.id, {})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(taken, key=int) == [f"{number}" for number in range(60)]
    assert all(job.state is State.DONE and job.made == 1 for job in store.jobs())


def test_what_is_forgotten_is_gone(store: JobStore) -> None:
    store.submit("a", {})
    store.forget("a")
    assert store.get("a") is None and store.jobs() == []


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite"
    file.write_text("no database " * 99)
    with pytest.raises(FibldmError, match="must be a store of jobs"):
        JobStore(file)
    newer = tmp_path / "newer.sqlite"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FibldmError, match="must be a store of version 1; it has version 99"):
        JobStore(newer)
