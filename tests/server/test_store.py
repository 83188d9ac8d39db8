# SPDX-License-Identifier: Apache-2.0
"""The queue on the disk, by itself: what is read is what was written last, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pw_runtime.server.store import Job, Store
from tests.server.test_limits import new_job


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "queue.sqlite")
    yield made
    made.close()


def add(store: Store, number: int) -> Job:
    return store.add([new_job(number)], most=99, most_of_client=99)[0]


def test_every_change_is_read_at_once(store: Store) -> None:
    job = add(store, 1)
    assert store.get(job.id) == job
    claimed = store.claim()
    assert claimed is not None
    assert store.get(job.id) == claimed
    assert claimed.status == "in_progress"
    assert store.drafted(job.id) == store.get(job.id)
    assert store.requeue(job.id, counted=True) == store.get(job.id)
    ended = store.end(job.id, code="cancelled", message="by request", size=5)
    assert store.get(job.id) == ended
    assert store.remove(job.id)
    assert store.get(job.id) is None
    assert not store.remove(job.id)
    assert store.end(job.id) is None
    assert [other.id for other in store.being_removed()] == [job.id]
    store.forget(job.id)
    assert store.being_removed() == []


def test_the_place_of_a_removed_job_is_remembered(store: Store) -> None:
    jobs = [add(store, number) for number in range(3)]
    store.remove(jobs[1].id)
    store.forget(jobs[1].id)
    assert store.place(jobs[1].id) == jobs[1].seq
    assert store.place(jobs[2].id) == jobs[2].seq
    assert store.place("video_" + "f" * 32) is None


def test_threads_that_claim_get_a_job_each(store: Store) -> None:
    for number in range(20):
        add(store, number)
    claimed: list[str] = []

    def claim() -> None:
        while (job := store.claim()) is not None:
            assert store.get(job.id) == job
            claimed.append(job.id)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [new_job(number).id for number in range(20)]


def test_a_job_that_does_not_wait_is_not_ended_as_if_it_did(store: Store) -> None:
    job = add(store, 1)
    store.claim()
    assert not store.end_queued(job.id, code="cancelled", message="")
    store.requeue(job.id)
    assert store.end_queued(job.id, code="cancelled", message="")
    found = store.get(job.id)
    assert found is not None
    assert (found.status, found.error_code) == ("failed", "cancelled")
