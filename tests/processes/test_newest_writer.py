# SPDX-License-Identifier: Apache-2.0
"""A thread that writes what is newest."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from pw_runtime.system.newest_writer import NewestWriter


@pytest.fixture
def writer() -> Iterator[NewestWriter]:
    made = NewestWriter()
    yield made
    made.close()


@pytest.fixture
def held(writer: NewestWriter) -> Iterator[threading.Event]:
    """A job that is in progress until this is set."""
    begun, free = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        free.wait(60)

    writer.put(job)
    assert begun.wait(60)
    yield free
    free.set()


def noting(done: list[int], number: int) -> Callable[[], None]:
    return lambda: done.append(number)


def test_of_the_jobs_that_wait_only_the_newest_runs(
    writer: NewestWriter, held: threading.Event
) -> None:
    done: list[int] = []
    for number in range(3):
        writer.put(noting(done, number))
    held.set()
    writer.wait()
    assert done == [2]


def test_a_dropped_job_never_runs(writer: NewestWriter, held: threading.Event) -> None:
    done: list[int] = []
    waiting = noting(done, 0)
    weakref.finalize(waiting, held.set)  # the one in progress ends once this one is dropped
    writer.put(waiting)
    del waiting
    writer.drop()
    writer.put(noting(done, 1))
    writer.close()
    assert done == [1]


def test_a_writer_that_had_nothing_to_do_ends_and_starts_no_thread() -> None:
    before = threading.active_count()
    writer = NewestWriter()
    writer.wait()
    writer.close()
    assert threading.active_count() == before


def test_after_a_job_that_fails_the_next_one_runs(
    writer: NewestWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(failed.exc_value))
    done: list[int] = []

    def job() -> None:
        raise RuntimeError("of no kind that was expected")

    writer.put(job)
    writer.wait()
    writer.put(noting(done, 1))
    writer.wait()
    assert done == [1]
    assert [str(error) for error in told] == ["of no kind that was expected"]
