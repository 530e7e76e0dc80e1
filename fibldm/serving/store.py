"""Jobs of a service in one SQLite file: what was taken on is done once, whatever is killed in between.

A write is on the disk when its method returns (write-ahead log, synchronised at every commit; https://sqlite.org/wal.html).
The file must lie on a disk of this machine. Times are seconds since 1970.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    outcome TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    made INTEGER NOT NULL DEFAULT 0,
    submitted REAL NOT NULL,
    changed REAL NOT NULL
)
"""
_VERSION = 1


class State(StrEnum):
    """Of a job: it waits, is in hand, is done, or is refused."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"


@dataclass(frozen=True)
class Job:
    """A job as it is now.

    Attributes:
        id: what two jobs of the same content share.
        state: of the job.
        request: what is asked.
        outcome: of a job that is done what came of it, of one that is refused ``message`` and ``remedy``; else None.
        tries: how often it was taken in hand.
        made: volumes that are made, of one in hand.
        submitted: when it came.
        changed: when its state changed last.
    """

    id: str
    state: State
    request: Mapping[str, Any]
    outcome: Mapping[str, Any] | None
    tries: int
    made: int
    submitted: float
    changed: float


class JobStore:
    """Jobs in the order in which they came; threads may share it, and other processes may read it.

    Args:
        file: is made where it is not there.

    Raises:
        FibldmError: the file is no store of jobs, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.RLock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise FibldmError(
                    f"{file} must be a store of version {_VERSION}; it has version {version}",
                    "use the FibLDM that made it, or another folder",
                )
            self._connection.execute(_TABLE)
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise FibldmError(f"{file} must be a store of jobs; {error}", "choose another folder") from error

    def close(self) -> None:
        """Nothing can be asked of it any more."""
        self._connection.close()

    def submit(self, id: str, request: Mapping[str, Any]) -> Job:
        """Take on a job, unless one of the same content is there, which is given back; one that was refused waits anew.

        Args:
            id: tells the content; not empty.
            request: what is asked; plain values.
        """
        now = time.time()
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO jobs (id, state, request, submitted, changed) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET state = excluded.state, outcome = NULL, tries = 0, changed = ?"
                f" WHERE state = '{State.REFUSED}'",
                (id, State.WAITING, json.dumps(request), now, now, now),
            )
            return _job(cursor.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone())

    def take(self) -> Job | None:
        """The job that has waited longest, which is in hand from now on; None where none waits."""
        with self._transaction() as cursor:
            row = cursor.execute(
                "UPDATE jobs SET state = ?, tries = tries + 1, made = 0, changed = ? WHERE number ="
                " (SELECT min(number) FROM jobs WHERE state = ?) RETURNING *",
                (State.RUNNING, time.time(), State.WAITING),
            ).fetchone()
        return None if row is None else _job(row)

    def tell(self, id: str, made: int) -> None:
        """How many volumes of a job in hand are made."""
        with self._transaction() as cursor:
            cursor.execute("UPDATE jobs SET made = ? WHERE id = ?", (made, id))

    def finish(self, id: str, outcome: Mapping[str, Any]) -> None:
        """A job is done."""
        self._end(id, State.DONE, outcome)

    def refuse(self, id: str, error: FibldmError) -> None:
        """A job is refused."""
        self._end(id, State.REFUSED, {"message": error.message, "remedy": error.remedy})

    def give_back(self, id: str | None = None) -> list[Job]:
        """Jobs in hand wait again: one of them, or, when a service begins, all that the one before left behind."""
        with self._transaction() as cursor:
            rows = cursor.execute(
                "UPDATE jobs SET state = ?, changed = ? WHERE state = ? AND (?4 IS NULL OR id = ?4) RETURNING *",
                (State.WAITING, time.time(), State.RUNNING, id),
            ).fetchall()
        return [_job(row) for row in rows]

    def get(self, id: str) -> Job | None:
        """A job by its content."""
        with self._lock:
            row = self._connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return None if row is None else _job(row)

    def jobs(self, *states: State) -> list[Job]:
        """Jobs in these states, or in any, in the order in which they came."""
        wanted = states or tuple(State)
        marks = ", ".join("?" * len(wanted))
        with self._lock:
            query = f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY number"
            return [_job(row) for row in self._connection.execute(query, wanted)]

    def forget(self, id: str) -> None:
        """There is no such job any more."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM jobs WHERE id = ?", (id,))

    def discard(self, id: str) -> bool:
        """Forget a job, unless it is in hand or not there; whether it was forgotten."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM jobs WHERE id = ? AND state != ?", (id, State.RUNNING))
            return cursor.rowcount > 0

    def _end(self, id: str, state: State, outcome: Mapping[str, Any]) -> None:
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE jobs SET state = ?, outcome = ?, changed = ? WHERE id = ?",
                (state, json.dumps(outcome), time.time(), id),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        with self._lock:
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")


def _job(row: sqlite3.Row) -> Job:
    outcome = None if row["outcome"] is None else json.loads(row["outcome"])
    return Job(
        id=row["id"],
        state=State(row["state"]),
        request=json.loads(row["request"]),
        outcome=outcome,
        tries=row["tries"],
        made=row["made"],
        submitted=row["submitted"],
        changed=row["changed"],
    )
