# SPDX-License-Identifier: Apache-2.0
"""The queue on the disk: jobs and their states in SQLite, every change in a transaction.

One process writes. Its write-ahead log is synced at every commit, so that a job which was accepted
is there after a kill and after a power cut. Jobs are ordered by `seq`, never by a clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError

from pw_runtime.errors import BadRequest

FORMAT: Final = 2  # PRAGMA user_version; 1 had no pictures
MOST_KNOWN: Final = 256  # jobs that are answered without a look at the disk
MOST_REMOVED: Final = 10_000  # jobs whose place is remembered for pages behind them
NOTHING: Final = frozenset[str]()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it was asked for; complete, whatever the server offers later."""

    id: str
    client: str
    prompt: str
    negative: str
    seed: int
    preset_name: str
    preset: dict[str, Any]  # all its numbers
    draft_only: bool
    draft_id: str | None
    draft_ready: bool
    priority: int
    siblings: list[str]
    key: str | None  # Idempotency-Key
    fingerprint: str  # of the request
    picture: str | None  # SHA-256 of that in the folder, from which the clip starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A job and its state."""

    seq: int
    status: str  # queued, in_progress, completed, failed
    created_at: int  # seconds since 1970, like the others
    started_at: int | None
    completed_at: int | None
    deaths: int  # of workers in this job, and refusals of its files by a disk with room
    error_code: str | None
    error_message: str | None
    bytes: int  # of its files, when it has ended
    removing: bool


class KeyReused(Exception):
    """An Idempotency-Key was used with another request."""


class QueueFull(Exception):
    """There is no room in the queue: `whose` says in whose part."""

    def __init__(self, whose: str, limit: int) -> None:
        super().__init__(f"{whose}: {limit} jobs")
        self.whose, self.limit = whose, limit


_METADATA = MetaData()
JOBS = Table(
    "jobs",
    _METADATA,
    Column("seq", Integer, primary_key=True),
    Column("id", String, unique=True, nullable=False),
    Column("client", String, nullable=False),
    Column("prompt", String, nullable=False),
    Column("negative", String, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("preset_name", String, nullable=False),
    Column("preset", JSON, nullable=False),
    Column("draft_only", Boolean, nullable=False),
    Column("draft_id", String),
    Column("draft_ready", Boolean, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("siblings", JSON, nullable=False),
    Column("key", String),
    Column("fingerprint", String, nullable=False),
    Column("picture", String),
    Column("status", String, nullable=False, default="queued"),
    Column("created_at", Integer, nullable=False),
    Column("started_at", Integer),
    Column("completed_at", Integer),
    Column("deaths", Integer, nullable=False, default=0),
    Column("error_code", String),
    Column("error_message", String),
    Column("bytes", Integer, nullable=False, default=0),
    Column("removing", Boolean, nullable=False, default=False),
    Index("by_status", "status", "priority", "seq"),
    Index("by_key", "client", "key"),
    sqlite_autoincrement=True,
)
_C = JOBS.c
_NEXT = (_C.priority.desc(), _C.seq)  # order in which queued jobs run


class Store:
    """Jobs in the database of a folder. Any thread may call any method."""

    def __init__(self, path: Path) -> None:
        """Open the database, or create it. Raises BadRequest where it is unusable."""
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        event.listen(self._engine, "connect", _configure)
        self._writing = threading.Lock()
        self._known: dict[str, Job] = {}  # read since the last change: clients ask again and again
        self._changes, self._knowing = 0, threading.Lock()
        self._removed: dict[str, int] = {}  # seq by id, the last ones
        try:
            with self._engine.begin() as connection:
                found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if found not in (0, 1, FORMAT):
                    raise BadRequest(
                        f"{path} is the queue of another version",
                        got=f"format {found}",
                        wanted=f"format {FORMAT}",
                        do="choose another --root, or move that folder away",
                    )
                if found == 1:
                    connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN picture VARCHAR")
                _METADATA.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
        except DatabaseError as error:
            raise BadRequest(
                f"the queue {path} cannot be used",
                got=error.orig,
                do="choose another --root; or restore the file, or move it away",
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # ---- reading

    def get(self, job_id: str) -> Job | None:
        """Return a job; None where there is none, or it is being removed."""
        with self._knowing:
            known, seen = self._known.get(job_id), self._changes
        if known is not None:
            return known
        found = self._select(select(JOBS).where(_C.id == job_id, ~_C.removing))
        if not found:
            return None
        with self._knowing:
            if seen == self._changes:  # else the row may be of before a change
                if len(self._known) >= MOST_KNOWN:
                    self._known.clear()
                self._known[job_id] = found[0]
        return found[0]

    def place(self, job_id: str) -> int | None:
        """Return the seq of a job, also of one that was removed lately: a page may begin there."""
        job = self.get(job_id)
        return self._removed.get(job_id) if job is None else job.seq

    def page(self, *, after: int | None, limit: int, newest_first: bool) -> list[Job]:
        """Return up to `limit` jobs in order, those behind the one with the seq `after`."""
        query = select(JOBS).where(~_C.removing).limit(limit)
        query = query.order_by(_C.seq.desc() if newest_first else _C.seq)
        if after is not None:
            query = query.where(_C.seq < after if newest_first else _C.seq > after)
        return self._select(query)

    def with_status(self, *statuses: str) -> list[Job]:
        """Return all jobs in these states, the oldest first."""
        query = select(JOBS).where(_C.status.in_(statuses), ~_C.removing).order_by(_C.seq)
        return self._select(query)

    def ids(self) -> set[str]:
        """Return the ids of all jobs, also of those that are being removed."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(_C.id)).scalars())

    def being_removed(self) -> list[Job]:
        """Return the jobs whose files are to be removed."""
        return self._select(select(JOBS).where(_C.removing))

    def repeated(self, client: str, key: str | None, fingerprint: str) -> list[Job]:
        """Return the jobs that a client's request got which was made before with the same key.

        Raises KeyReused: the key was used with another request.
        """
        with self._engine.connect() as connection:
            return _repeated(connection, client, key, fingerprint)

    def position(self, job: Job) -> int | None:
        """Return the number of queued jobs that run before a queued one."""
        if job.status != "queued":
            return None
        before = (_C.priority > job.priority) | ((_C.priority == job.priority) & (_C.seq < job.seq))
        query = select(func.count()).where(_C.status == "queued", ~_C.removing, before)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def positions(self) -> dict[str, int]:
        """Return the position of every queued job."""
        query = select(_C.id).where(_C.status == "queued", ~_C.removing).order_by(*_NEXT)
        with self._engine.connect() as connection:
            return {job_id: i for i, job_id in enumerate(connection.execute(query).scalars())}

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        query = select(_C.status, func.count()).where(~_C.removing).group_by(_C.status)
        with self._engine.connect() as connection:
            return {status: count for status, count in connection.execute(query)}

    # ---- writing

    def add(self, jobs: Sequence[NewJob], *, most: int, most_of_client: int) -> list[Job]:
        """Queue jobs of one client, all or none.

        A request that was made before, with the same key, gets the jobs it got then.

        Raises:
            QueueFull: there would be more waiting jobs than `most`, or than `most_of_client`.
            KeyReused: the key was used with another request.
        """
        first = jobs[0]
        with self._transaction() as connection:
            if known := _repeated(connection, first.client, first.key, first.fingerprint):
                return known
            waiting = select(func.count()).where(_C.status == "queued", ~_C.removing)
            if connection.execute(waiting).scalar_one() + len(jobs) > most:
                raise QueueFull("of all clients", most)
            own = waiting.where(_C.client == first.client)
            if connection.execute(own).scalar_one() + len(jobs) > most_of_client:
                raise QueueFull("of this client", most_of_client)
            now = int(time.time())
            added = [asdict(job) | {"created_at": now} for job in jobs]
            connection.execute(insert(JOBS), added)
            ids = [job.id for job in jobs]
            query = select(JOBS).where(_C.id.in_(ids)).order_by(_C.seq)
            return [_job(row) for row in connection.execute(query)]

    def claim(self, *, no_clips: Set[str] = NOTHING, no_drafts: Set[str] = NOTHING) -> Job | None:
        """Take the next queued job: it is then in progress. None where none waits.

        Jobs that end with a clip of a preset in `no_clips` wait on, as do those that end with a
        draft of one in `no_drafts`.
        """
        with self._transaction() as connection:
            left = _C.preset_name.in_(no_clips) & ~_C.draft_only
            left |= _C.preset_name.in_(no_drafts) & _C.draft_only
            query = select(_C.id).where(_C.status == "queued", ~_C.removing, ~left)
            query = query.order_by(*_NEXT)
            job_id = connection.execute(query.limit(1)).scalar_one_or_none()
            if job_id is None:
                return None
            started = func.coalesce(_C.started_at, int(time.time()))
            return _changed(connection, job_id, status="in_progress", started_at=started)

    def requeue(self, job_id: str, *, counted: bool = False) -> Job | None:
        """Let a job that was in progress wait again; `counted` as an attempt that has failed."""
        with self._transaction() as connection:
            deaths = _C.deaths + int(counted)
            return _changed(connection, job_id, status="queued", deaths=deaths)

    def drafted(self, job_id: str, *, ready: bool = True) -> Job | None:
        """Note that a job's draft can be seen, or no longer."""
        with self._transaction() as connection:
            return _changed(connection, job_id, draft_ready=ready)

    def end(
        self, job_id: str, *, code: str | None = None, message: str | None = None, size: int = 0
    ) -> Job | None:
        """Complete a job; with a code and a message it has failed. `size`: bytes of its files."""
        with self._transaction() as connection:
            return _changed(
                connection,
                job_id,
                status="completed" if code is None else "failed",
                completed_at=int(time.time()),
                error_code=code,
                error_message=message,
                bytes=size,
            )

    def end_queued(self, job_id: str, *, code: str, message: str) -> bool:
        """Let a job that waits fail. False where it does not wait."""
        with self._transaction() as connection:
            query = select(_C.id).where(_C.id == job_id, _C.status == "queued", ~_C.removing)
            if connection.execute(query).scalar_one_or_none() is None:
                return False
            reason = {"error_code": code, "error_message": message}
            _changed(connection, job_id, status="failed", completed_at=int(time.time()), **reason)
            return True

    def remove(self, job_id: str) -> bool:
        """Hide a job, whose files are removed next. False where there is none."""
        with self._transaction() as connection:
            hide = update(JOBS).where(_C.id == job_id, ~_C.removing).values(removing=True)
            seq = connection.execute(hide.returning(_C.seq)).scalar_one_or_none()
            if seq is None:
                return False
            if len(self._removed) >= MOST_REMOVED:
                self._removed.pop(next(iter(self._removed)))
            self._removed[job_id] = seq
            return True

    def forget(self, job_id: str) -> None:
        """Drop the record of a job whose files are gone."""
        with self._transaction() as connection:
            connection.execute(JOBS.delete().where(_C.id == job_id))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._writing:
            try:
                with self._engine.begin() as connection:
                    yield connection
            finally:
                with self._knowing:
                    self._changes += 1
                    self._known.clear()

    def _select(self, query: Any) -> list[Job]:
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]


def _changed(connection: Connection, job_id: str, **values: Any) -> Job | None:
    """Change a job, and return it; None where it is gone or being removed."""
    query = update(JOBS).where(_C.id == job_id, ~_C.removing).values(**values).returning(JOBS)
    row = connection.execute(query).one_or_none()
    return None if row is None else _job(row)


def _repeated(connection: Connection, client: str, key: str | None, fingerprint: str) -> list[Job]:
    """Return the jobs of an earlier request with this key. Raises KeyReused."""
    if key is None:
        return []
    same = (_C.client == client, _C.key == key, ~_C.removing)
    rows = connection.execute(select(JOBS).where(*same).order_by(_C.seq)).all()
    if rows and rows[0].fingerprint != fingerprint:
        raise KeyReused(key)
    return [_job(row) for row in rows]


def _job(row: Any) -> Job:
    return Job(**row._mapping)


def _configure(connection: Any, record: Any) -> None:
    """Set up a connection to the database."""
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {setting}")
