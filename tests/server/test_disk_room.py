# SPDX-License-Identifier: Apache-2.0
"""A disk that refuses the files of a job: the queue waits for room, and loses no job to it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pw_runtime.server.disk_room import ROOM
from pw_runtime.server.messages import Failed, Fit, Ready
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Job, Store
from pw_runtime.server.supervisor import MOST_ATTEMPTS, Supervisor
from tests.server.servers import PATIENCE
from tests.server.test_limits import new_job

REASON = "cannot write the latents"


class Disk:
    """A disk with as much room as a test says."""

    free = 0

    def usage(self, folder: Path) -> tuple[int, int, int]:
        return shutil._ntuple_diskusage(2**40, 2**40 - self.free, self.free)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(shutil, "disk_usage", made.usage)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "queue.sqlite")
    yield made
    made.close()


@pytest.fixture
def supervisor(tmp_path: Path, store: Store) -> Supervisor:
    """A supervisor of one worker that is ready, and has two jobs to be made."""
    settings = Settings(model=tmp_path, root=tmp_path, presets={}, backoff_seconds=0.001)
    made = Supervisor(settings, store, lambda text: None)
    fits = {"nano": Fit(fits=True, draft_fits=True)}
    made.workers[0].ready = Ready(device="cpu", bundle="", presets=fits, rss=0)
    store.add([new_job(1)], most=9, most_of_client=9)
    store.add([new_job(2)], most=9, most_of_client=9)
    return made


async def refuse_next(made: Supervisor) -> str:
    """Let the next job fail because its files are refused; return its id."""
    job = await made.next_job(made.workers[0])
    assert job is not None
    failed = Failed(job=job.id, code="write_failed", reason=REASON, rss=0, disk_full=True)
    await made.heard(job, failed, made.workers[0])
    return job.id


async def refuse_first(made: Supervisor, store: Store) -> Job:
    """Let the first job fail because its files are refused; return it as it then is."""
    assert await refuse_next(made) == new_job(1).id
    job = store.get(new_job(1).id)
    assert job is not None
    return job


async def look_for_room(made: Supervisor) -> None:
    """Return when the supervisor has found room."""
    made.changed.clear()
    watching = asyncio.create_task(made._room.watch())
    await asyncio.wait_for(made.changed.wait(), PATIENCE)
    watching.cancel()
    assert made.trouble is None


def test_without_room_every_job_waits_and_is_begun_when_there_is_some(
    supervisor: Supervisor, store: Store, disk: Disk
) -> None:
    """Seen: a full disk failed the whole queue, one job after the other."""

    async def run() -> None:
        for _ in range(MOST_ATTEMPTS + 1):  # no number of them is held against the job
            disk.free = 2**20
            assert await refuse_next(supervisor) == new_job(1).id
            assert store.counts() == {"queued": 2}
            assert "0.00 GiB are free" in (supervisor.trouble or "")
            assert await supervisor.next_job(supervisor.workers[0]) is None
            disk.free = 2**31
            await look_for_room(supervisor)

    asyncio.run(run())


def test_a_job_that_is_refused_again_and_again_with_room_fails_and_the_next_is_begun(
    supervisor: Supervisor, store: Store, disk: Disk
) -> None:
    disk.free = 2**40

    async def run() -> None:
        for attempt in range(1, MOST_ATTEMPTS + 1):
            job = await refuse_first(supervisor, store)
            assert job.status == ("failed" if attempt == MOST_ATTEMPTS else "queued")
            assert supervisor.trouble is not None  # until the next look: it is not tried at once
            await look_for_room(supervisor)
        assert (job.error_code, job.error_message) == ("write_failed", REASON)
        following = await supervisor.next_job(supervisor.workers[0])
        assert following is not None
        assert following.id == new_job(2).id

    asyncio.run(run())


def test_a_server_that_waits_for_room_stops_at_once(
    supervisor: Supervisor, disk: Disk, tmp_path: Path
) -> None:
    async def run() -> None:
        (tmp_path / "jobs").mkdir()
        supervisor.workers.clear()  # whose processes this is not about
        await supervisor.start()
        supervisor._room._pause = 1e6
        await supervisor._room.refused(0)
        await asyncio.wait_for(supervisor.stop(), PATIENCE)

    asyncio.run(run())


def test_what_an_unfinished_job_has_filled_the_disk_with_is_removed_and_counted(
    supervisor: Supervisor, store: Store, disk: Disk, tmp_path: Path
) -> None:
    """Else the queue would wait for ever for room that the job itself has."""
    disk.free = ROOM - 2**20
    final = tmp_path / "jobs" / new_job(1).id / "final"
    final.mkdir(parents=True)
    (final / "0.tiles").write_bytes(b"x" * 2**21)

    async def run() -> None:
        for attempt in range(1, MOST_ATTEMPTS + 1):
            job = await refuse_first(supervisor, store)
            assert job.status == ("failed" if attempt == MOST_ATTEMPTS else "queued")
            assert not final.exists()
            final.mkdir()
            (final / "0.tiles").write_bytes(b"x" * 2**21)
            disk.free = ROOM
            await look_for_room(supervisor)
            disk.free = ROOM - 2**20

    asyncio.run(run())


def test_a_job_whose_file_is_refused_for_another_reason_fails_and_nothing_waits(
    supervisor: Supervisor, store: Store, disk: Disk
) -> None:
    """An encoder that fails, on a disk that happens to have little room."""

    async def run() -> None:
        job = await supervisor.next_job(supervisor.workers[0])
        assert job is not None
        failed = Failed(job=job.id, code="write_failed", reason=REASON, rss=0)
        await supervisor.heard(job, failed, supervisor.workers[0])
        assert supervisor.trouble is None
        ended = store.get(job.id)
        assert ended is not None
        assert (ended.status, ended.error_code) == ("failed", "write_failed")

    asyncio.run(run())
