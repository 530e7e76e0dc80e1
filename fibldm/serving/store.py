"""Jobs of a service in one SQLite file: what was taken on is done once, whatever is killed in between.

A write is on the disk when its method returns (write-ahead log, synchronised at every commit; https://sqlite.org/wal.html).
The file must lie on a disk of this machine. Times are seconds since 1970.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
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
_DELIVERIES = """
CREATE TABLE IF NOT EXISTS deliveries (
    job TEXT NOT NULL,
    peer TEXT NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0,
    refused TEXT NOT NULL DEFAULT '[]',
    tries INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL DEFAULT 0,
    ended INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, peer)
)
"""
_VERSION = 1


class State(StrEnum):
    """Of a job: it waits for what it refers to, waits for its turn, is in hand, is done, or is refused."""

    HELD = "held"
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


@dataclass(frozen=True)
class Delivery:
    """Results of a job that a peer is to get, object by object in a fixed order.

    Attributes:
        job: its id.
        peer: who gets them.
        settled: of how many objects the peer has said that it has them, or that it will not take them.
        refused: what it does not take, in words.
        tries: how often sending broke off since an object was settled.
        ended: nothing is left to send.
    """

    job: str
    peer: str
    settled: int
    refused: tuple[str, ...]
    tries: int
    ended: bool


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
            self._connection.execute(_DELIVERIES)
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise FibldmError(f"{file} must be a store of jobs; {error}", "choose another folder") from error

    def close(self) -> None:
        """Nothing can be asked of it any more."""
        self._connection.close()

    def submit(self, id: str, request: Mapping[str, Any], *, held: bool = False) -> Job:
        """Take on a job, unless one of the same content is there, which is given back; one that was refused waits anew.

        Args:
            id: tells the content; not empty.
            request: what is asked; plain values.
            held: it is not to be taken before `release`.
        """
        now = time.time()
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO jobs (id, state, request, submitted, changed) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET state = excluded.state, outcome = NULL, tries = 0, changed = ?"
                f" WHERE state = '{State.REFUSED}'",
                (id, State.HELD if held else State.WAITING, json.dumps(request), now, now, now),
            )
            return _job(cursor.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone())

    def release(self, id: str) -> None:
        """A job that was held waits for its turn."""
        with self._transaction() as cursor:
            query = "UPDATE jobs SET state = ?, changed = ? WHERE id = ? AND state = ?"
            cursor.execute(query, (State.WAITING, time.time(), id, State.HELD))

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
        """There is no such job any more, nor anything of it to deliver."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM jobs WHERE id = ?", (id,))
            cursor.execute("DELETE FROM deliveries WHERE job = ?", (id,))

    def owe(self, id: str, peers: Iterable[str]) -> None:
        """Peers are to get the results of a job, once each."""
        with self._transaction() as cursor:
            rows = [(id, peer) for peer in peers]
            cursor.executemany("INSERT INTO deliveries (job, peer) VALUES (?, ?) ON CONFLICT DO NOTHING", rows)

    def due(self) -> list[Delivery]:
        """What of jobs that are done is to be sent now, in the order in which the jobs came."""
        return self._deliveries(
            "jobs.state = ? AND NOT deliveries.ended AND deliveries.due <= ?", State.DONE, time.time()
        )

    def deliveries(self, id: str) -> list[Delivery]:
        """Of a job, to all peers."""
        return self._deliveries("jobs.id = ?", id)

    def settle(self, id: str, peer: str, refused: str | None = None) -> None:
        """A peer has one more object of a job, or does not take it, for the reason given."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE deliveries SET settled = settled + 1, tries = 0,"
                " refused = CASE WHEN ?1 IS NULL THEN refused ELSE json_insert(refused, '$[#]', ?1) END"
                " WHERE job = ?2 AND peer = ?3",
                (refused, id, peer),
            )

    def postpone(self, id: str, peer: str, seconds: float) -> None:
        """Sending to a peer broke off, and is tried again later."""
        with self._transaction() as cursor:
            query = "UPDATE deliveries SET tries = tries + 1, due = ? WHERE job = ? AND peer = ?"
            cursor.execute(query, (time.time() + seconds, id, peer))

    def delivered(self, id: str, peer: str, told: Mapping[str, Any]) -> None:
        """Nothing is left to send to a peer; what came of it becomes part of the job's outcome."""
        with self._transaction() as cursor:
            cursor.execute("UPDATE deliveries SET ended = 1 WHERE job = ? AND peer = ?", (id, peer))
            row = cursor.execute("SELECT outcome FROM jobs WHERE id = ?", (id,)).fetchone()
            outcome = json.loads(row["outcome"])
            outcome["deliveries"] = {**outcome.get("deliveries", {}), peer: told}
            cursor.execute("UPDATE jobs SET outcome = ? WHERE id = ?", (json.dumps(outcome), id))

    def _deliveries(self, condition: str, *values: Any) -> list[Delivery]:
        query = (
            f"SELECT deliveries.* FROM deliveries JOIN jobs ON jobs.id = job WHERE {condition} ORDER BY number, peer"
        )
        with self._lock:
            rows = self._connection.execute(query, values).fetchall()
        return [
            Delivery(
                job=row["job"],
                peer=row["peer"],
                settled=row["settled"],
                refused=tuple(json.loads(row["refused"])),
                tries=row["tries"],
                ended=bool(row["ended"]),
            )
            for row in rows
        ]

    def discard(self, id: str) -> bool:
        """Forget a job, unless it is in hand or not there; whether it was forgotten."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM jobs WHERE id = ? AND state != ?", (id, State.RUNNING))
            if gone := cursor.rowcount > 0:
                cursor.execute("DELETE FROM deliveries WHERE job = ?", (id,))
            return gone

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
