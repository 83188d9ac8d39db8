# SPDX-License-Identifier: Apache-2.0
"""A producer and a consumer thread: order, queue length, and the end of either."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from pw_runtime.system.overlap import QUEUED, overlap

LONG = 60.0  # seconds: only a broken test waits that long


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_items_arrive_in_order_and_all() -> None:
    got: list[int] = []
    overlap(range(100), got.extend)
    assert got == list(range(100))


def test_the_next_item_is_produced_while_the_first_is_consumed() -> None:
    """Each thread waits for the other in turn: a single thread would never finish."""
    second_made, first_taken = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert first_taken.wait(LONG)
        second_made.set()
        yield 2

    def work(taken: Iterator[int]) -> None:
        assert next(taken) == 1
        first_taken.set()
        assert second_made.wait(LONG)
        assert list(taken) == [2]

    overlap(items(), work)


def test_at_most_three_items_are_alive() -> None:
    class Thing:
        pass

    alive: weakref.WeakSet[Thing] = weakref.WeakSet()
    most = []
    may_go_on = threading.Semaphore(0)

    def items() -> Iterator[Thing]:
        for count in range(12):
            if count == QUEUED:
                may_go_on.release()  # as many as can be produced while the first is in work
            thing = Thing()
            alive.add(thing)
            most.append(len(alive))
            yield thing
            del thing

    def work(taken: Iterator[Thing]) -> None:
        for count, thing in enumerate(taken):
            if count == 0:
                assert may_go_on.acquire(timeout=LONG)
            del thing

    overlap(items(), work)
    assert max(most) == QUEUED + 1
    assert len(alive) == 0


def test_nothing_is_produced_before_it_is_requested() -> None:
    def items() -> Iterator[int]:
        raise AssertionError("an item was asked for")
        yield

    def work(taken: Iterator[int]) -> None:
        raise OSError("cannot begin")

    with pytest.raises(OSError, match="cannot begin"):
        overlap(items(), work)


def test_an_error_of_the_work_stops_the_making() -> None:
    produced = []
    error = ValueError("encoder")

    def items() -> Iterator[int]:
        for i in range(1000):
            produced.append(i)
            yield i

    def work(taken: Iterator[int]) -> None:
        next(taken)
        raise error

    with pytest.raises(ValueError, match="encoder") as caught:
        overlap(items(), work)
    assert caught.value is error
    assert len(produced) <= QUEUED + 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("decode")])
def test_an_error_of_the_making_unwinds_the_work(error: BaseException) -> None:
    ended = []

    def items() -> Iterator[int]:
        yield 1
        raise error

    def work(taken: Iterator[int]) -> None:
        try:
            for _ in taken:
                pass
            ended.append("as if complete")
        finally:
            ended.append("unwound")

    with pytest.raises(type(error)) as caught:
        overlap(items(), work)
    assert caught.value is error
    assert ended == ["unwound"]


def test_what_failed_holds_no_memory() -> None:
    """Seen: an error and its stack frame kept each other alive, and with them a whole decode."""

    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def items(mine: Held) -> Iterator[Held]:
        yield mine
        yield mine

    def fails(taken: Iterator[Held]) -> None:
        next(taken)
        raise OSError("disk full")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(OSError, match="disk full") as caught:
            overlap(items(held), fails)
        del held, caught
        assert gone() is None
    finally:
        gc.enable()
