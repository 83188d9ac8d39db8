# SPDX-License-Identifier: Apache-2.0
"""A prompt is in one pair of hands at a time, comes back when they fail, and ends in one way."""

from __future__ import annotations

import threading
from pathlib import Path

from pw_runtime.fleet.work_queue import MAX_DEATHS, WorkQueue
from pw_runtime.types import Prompt

VIDEO = Path("clip.mp4")


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"text {i}", id=str(i), position=i + 1) for i in range(count))


def ids(batch: tuple[Prompt, ...]) -> list[str]:
    return [prompt.id for prompt in batch]


def queue_of(count: int, *workers: str, batch: int = 2) -> WorkQueue:
    work = WorkQueue(prompts(count), batch)
    for worker in workers:
        work.enter(worker)
    return work


def test_batches_are_handed_out_in_order_and_keep_their_positions() -> None:
    work = queue_of(3, "a", "b")
    first, second = work.take("a"), work.take("b")
    assert (ids(first), ids(second)) == (["0", "1"], ["2"])
    assert [prompt.position for prompt in first + second] == [1, 2, 3]


def test_what_a_dead_worker_had_comes_back_first_and_one_by_one() -> None:
    work = queue_of(5, "a", "b")
    work.take("a")
    work.leave("a", "gone")
    assert ids(work.take("b")) == ["0"]
    work.made("b", "0", VIDEO)
    assert ids(work.take("b")) == ["1"]
    work.made("b", "1", VIDEO)
    assert ids(work.take("b")) == ["2", "3"]


def test_what_a_dead_worker_had_finished_does_not_come_back() -> None:
    work = queue_of(2, "a", "b")
    work.take("a")
    work.made("a", "0", VIDEO)
    work.leave("a", "gone")
    assert ids(work.take("b")) == ["1"]
    assert not work.holds("a", "1")
    assert work.holds("b", "1")


def test_a_prompt_over_which_workers_die_ends_as_failed_and_says_so() -> None:
    work = queue_of(1)
    for death in range(MAX_DEATHS):
        work.enter("a")
        assert ids(work.take("a")) == ["0"]
        ended = work.leave("a", f"signal 9, death {death}")
        assert ended == (("0",) if death == MAX_DEATHS - 1 else ())
    error = work.outcomes()["0"].error
    assert error == "3 workers died while they made it, the last one: signal 9, death 2"
    assert work.wait(0)


def test_a_machine_that_kills_its_workers_is_not_held_against_the_prompt() -> None:
    work = queue_of(2, "a", "b", batch=1)
    work.take("a")
    work.leave("a", "gone")
    work.enter("a")
    assert ids(work.take("a")) == ["1"]
    assert ids(work.take("b")) == ["0"]


def test_a_prompt_that_all_present_workers_have_tried_goes_to_any_of_them() -> None:
    work = queue_of(1, "a", "b")
    for worker in ("a", "b"):
        assert ids(work.take(worker)) == ["0"]
        work.leave(worker, "gone")
        work.enter(worker)
    assert ids(work.take("a")) == ["0"]


def test_a_failed_prompt_is_tried_once_more_and_by_another_worker() -> None:
    work = queue_of(2, "a", "b", batch=1)
    work.take("a")
    assert not work.failed("a", "0", "a broken GPU")
    assert ids(work.take("a")) == ["1"]
    work.made("a", "1", VIDEO)
    assert ids(work.take("b")) == ["0"]
    assert work.failed("b", "0", "no luck")
    assert work.outcomes()["0"].error == "no luck"


def test_a_worker_that_is_alone_tries_its_failed_prompt_again() -> None:
    work = queue_of(1, "a")
    work.take("a")
    work.failed("a", "0", "once")
    assert ids(work.take("a")) == ["0"]
    work.made("a", "0", VIDEO)
    assert work.outcomes()["0"].video == VIDEO


def test_a_worker_waits_while_others_may_still_hand_work_back() -> None:
    work, taken = queue_of(1, "a", "b"), []
    work.take("a")
    thread = threading.Thread(target=lambda: taken.append(work.take("b")))
    thread.start()
    work.leave("a", "gone")
    thread.join(10)
    assert [ids(batch) for batch in taken] == [["0"]]


def test_workers_are_released_when_the_last_prompt_is_over() -> None:
    work, taken = queue_of(1, "a", "b"), []
    work.take("a")
    thread = threading.Thread(target=lambda: taken.append(work.take("b")))
    thread.start()
    work.made("a", "0", VIDEO)
    thread.join(10)
    assert taken == [()]
    assert work.wait(0)


def test_draining_hands_out_nothing_more_and_is_over_when_the_running_ones_are() -> None:
    work = queue_of(4, "a", "b")
    work.take("a")
    work.drain()
    assert work.take("b") == ()
    assert not work.wait(0)
    work.made("a", "0", VIDEO)
    work.made("a", "1", VIDEO)
    assert work.wait(0)
    assert sorted(work.outcomes()) == ["0", "1"]


def test_work_that_is_handed_back_is_no_failure() -> None:
    work = queue_of(2, "a", "b")
    work.take("a")
    work.hand_back("a")
    assert ids(work.take("b")) == ["0", "1"]


def test_the_first_fatal_error_counts_and_ends_the_run() -> None:
    work, first = queue_of(2, "a"), ValueError("first")
    work.take("a")
    work.abort(first)
    work.abort(ValueError("second"))
    assert work.fatal is first
    assert work.wait(0)
    assert work.take("a") == ()
