# SPDX-License-Identifier: Apache-2.0
"""The progress of a run never falls, ends at 1, and its time left follows what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from pw_runtime.planning.candidates import candidates
from pw_runtime.planning.planner import GIB, make_plan
from pw_runtime.planning.stage_times import expected_seconds, seconds_by_stage
from pw_runtime.system.progress import Progress
from pw_runtime.system.run_progress import RunProgress
from pw_runtime.types import Budget
from tests.planning.test_planner import work_for

STAGES = {"text": 0.1, "draft": 10.0, "highres": 30.0, "decode": 20.0}


@dataclass
class Watched:
    """A run whose clock is moved by hand, and all that it told."""

    now: float = 0.0
    told: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = RunProgress(self.told.append, lambda: self.now)

    @property
    def last(self) -> Progress:
        return self.told[-1]

    def compute(self, key: str, stage: str, seconds: float, total: int = 10) -> None:
        """Run a clip through a stage in steps of equal time."""
        self.run.enter(key, stage, total)
        self.run.begin()
        self.steps(total, seconds / total)
        self.run.finish()

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.now += seconds
            self.run.advance()

    def fractions_never_fall(self) -> bool:
        return all(a.fraction <= b.fraction for a, b in pairwise(self.told))


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_two_clips_reach_one_stage_by_stage(watched: Watched) -> None:
    for key in ("a", "b"):
        watched.run.expect(key, f"clip {key}", STAGES)
    for stage, seconds in STAGES.items():
        for key in ("a", "b"):
            watched.compute(key, stage, 3 * seconds)  # three times as slow as planned
    assert watched.fractions_never_fall()
    assert (watched.last.fraction, watched.last.seconds_left) == (1.0, 0.0)
    assert (watched.last.clip, watched.last.stage) == ("clip b", "decode")
    halfway = next(p for p in watched.told if p.stage == "highres" and p.done == p.total)
    assert halfway.fraction == pytest.approx((0.2 + 20 + 30) / 120.2)
    assert halfway.seconds_left == pytest.approx(3 * (30 + 40))


def test_the_time_left_is_unknown_until_something_was_measured(watched: Watched) -> None:
    watched.run.expect("a", "a", STAGES)
    watched.run.enter("a", "text")
    assert watched.last.seconds_left is None
    watched.run.begin()
    watched.now += 0.9
    watched.run.finish()
    assert watched.last.seconds_left is None
    watched.compute("a", "draft", 20.0)
    assert watched.last.seconds_left == pytest.approx(50 * 20.9 / 10.1)


def test_each_stage_has_its_own_pace(watched: Watched) -> None:
    watched.run.expect("a", "a", STAGES)
    watched.run.expect("b", "b", STAGES)
    for key in ("a", "b"):
        watched.compute(key, "draft", 10.0)  # as planned
    watched.compute("a", "highres", 300.0)  # ten times as slow
    left = watched.last.seconds_left
    assert left == pytest.approx(300 + 40 * 320 / 50)  # the decode like the rest, until measured
    watched.compute("b", "highres", 300.0)
    watched.compute("a", "decode", 20.0)
    assert watched.last.seconds_left == pytest.approx(20)


def test_a_stage_that_runs_out_of_memory_begins_again_at_its_new_pace(watched: Watched) -> None:
    watched.run.expect("a", "a", {"draft": 10.0, "decode": 10.0})
    watched.run.enter("a", "draft", 10)
    watched.run.begin()
    watched.steps(8, 1.0)
    before = watched.last
    watched.run.begin()
    assert watched.last.fraction == before.fraction == pytest.approx(0.4)
    assert watched.last.done == 0
    watched.steps(5, 4.0)
    assert watched.last.fraction == before.fraction
    assert watched.last.seconds_left == pytest.approx(20 + 40)
    watched.steps(5, 4.0)
    watched.run.finish()
    watched.compute("a", "decode", 10.0)
    assert watched.fractions_never_fall()
    assert watched.last.fraction == 1.0


def test_stages_that_another_run_has_computed_are_left_out(watched: Watched) -> None:
    watched.run.expect("a", "a", STAGES)
    watched.compute("a", "highres", 60.0)  # text and draft are there
    assert watched.last.fraction == pytest.approx(30 / 50)
    assert watched.last.seconds_left == pytest.approx(40)


def test_steps_that_another_run_has_computed_say_nothing_about_the_pace(watched: Watched) -> None:
    watched.run.expect("a", "a", {"highres": 30.0})
    watched.run.enter("a", "highres", 10)
    watched.run.begin()
    watched.run.skip(5)
    assert watched.last.fraction == pytest.approx(0.5)
    watched.steps(1, 6.0)
    assert watched.last.seconds_left == pytest.approx(24)


def test_a_clip_that_fails_is_not_waited_for(watched: Watched) -> None:
    for key in ("a", "b"):
        watched.run.expect(key, key, {"draft": 10.0, "decode": 10.0})
    watched.run.enter("a", "draft", 10)
    watched.run.begin()
    watched.steps(5, 1.0)
    watched.run.drop("a")
    assert watched.last.fraction == pytest.approx(5 / 25)
    assert watched.last.seconds_left == pytest.approx(20)
    watched.compute("b", "draft", 10.0)
    watched.run.drop("b")
    assert watched.last.fraction == 1.0
    assert watched.fractions_never_fall()


@pytest.mark.parametrize("preset", ["2k", "4k"])
def test_expected_seconds_divide_a_clip_as_the_plan_does(preset: str) -> None:
    work = work_for(preset)
    plan = make_plan(candidates(work, gpu=True), Budget(host=64 * GIB, device=80 * GIB))
    ours, planned = expected_seconds(work, plan), seconds_by_stage(work, plan, work.rates)
    assert list(ours) == ["text", *planned]
    assert ours["text"] < 0.01 * sum(planned.values())
    for stage, seconds in planned.items():
        assert ours[stage] == pytest.approx(seconds, rel=0.1), stage
