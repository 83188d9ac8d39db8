# SPDX-License-Identifier: Apache-2.0
"""Engines are timed in turns, on a clock of the test's, and the store keeps the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pw_engines import EngineStore, Speed, StoreError, measure_speed
from pw_engines.eager import EagerEngine
from pw_engines.speed import MOST_SECONDS, ROUNDS
from tests.engines.faulty import FaultyEngine
from tests.engines.small import LIMIT, Mix, key, put, spec

CPU = torch.device("cpu")
SPEED = Speed(tokens=16, threads=2, seconds=0.5, eager=1.0, error=1e-7)


class Clock:
    """Time that passes while engines run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Taking:
    """The segment, which takes some seconds of the clock for each call in turn."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.engine, self.clock, self.seconds = EagerEngine(spec(), Mix()), clock, list(seconds)
        self.spec, self.calls = spec(), 0
        self.backend, self.padded, self.granularity, self.scratch = "aoti", False, 1, 0

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.engine.run(inputs, outputs)
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


def test_the_fastest_call_after_the_first_counts() -> None:
    clock = Clock()
    slow, fast = Taking(clock, 0.1, 9.0, 3.0, 5.0), Taking(clock, 0.1, 2.0, 1.0, 4.0)
    speeds = measure_speed({"slow": slow, "fast": fast}, Mix(), 16, CPU, clock=clock)
    assert (speeds["slow"].seconds, speeds["fast"].seconds) == (3.0, 1.0)
    assert speeds["slow"].eager == speeds["fast"].eager  # one series
    assert slow.calls == fast.calls == 1 + ROUNDS
    assert speeds["fast"].error == 0.0
    assert speeds["fast"].tokens == 16


def test_calls_that_take_minutes_are_timed_once() -> None:
    clock = Clock()
    engine = Taking(clock, MOST_SECONDS)
    measure_speed({"aoti": engine}, Mix(), 16, CPU, clock=clock)
    assert engine.calls == 2


def test_a_size_above_the_limit_is_the_limit() -> None:
    clock = Clock()
    speeds = measure_speed({"aoti": Taking(clock, 1.0)}, Mix(), 10**6, CPU, clock=clock)
    assert speeds["aoti"].tokens == LIMIT


def test_an_engine_that_computes_nonsense_has_no_small_error() -> None:
    clock = Clock()
    faulty = FaultyEngine(spec(), Mix(), fault="nan", at=2)
    turns = {"slow": Taking(clock, MOST_SECONDS), "nan": faulty}
    assert math.isnan(measure_speed(turns, Mix(), 16, CPU, clock=clock)["nan"].error)


def test_nonsense_in_another_output_than_the_first_is_no_small_error() -> None:
    """Seen: max() of a number and NaN was the number."""

    class SecondIsNan(Taking):
        def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
            super().run(inputs, outputs)
            outputs[1].fill_(math.nan)

    clock = Clock()
    speeds = measure_speed({"nan": SecondIsNan(clock, 1.0)}, Mix(), 16, CPU, clock=clock)
    assert math.isnan(speeds["nan"].error)


def test_the_store_keeps_one_speed_per_size_and_number_of_threads(store: EngineStore) -> None:
    put(store)
    assert store.find(key()).speeds == ()
    other = Speed(tokens=2, threads=2, seconds=2.0, eager=1.0, error=0.0)
    alone = replace(SPEED, threads=1)
    for speed in (SPEED, other, alone, SPEED):
        store.record(key(), speed)
    assert store.find(key()).speeds == (other, alone, SPEED)
    assert store.find(key()).state == "fresh"
    (entry,) = store.entries(verify=True)
    assert entry.speeds == (other, alone, SPEED)
    assert (SPEED.ratio, other.ratio) == (2.0, 0.5)


def test_an_engine_that_is_not_there_has_no_speed(store: EngineStore) -> None:
    with pytest.raises(StoreError, match="it has no manifest"):
        store.record(key(), SPEED)
    assert store.find(key()).state == "missing"


@pytest.mark.parametrize(
    "speeds",
    [
        7,
        [7],
        [{}],
        [{"tokens": 1}],
        [{"tokens": 1, "threads": 1, "seconds": 0, "eager": 1, "error": 0}],
        [{"tokens": 1, "threads": 1, "seconds": "1", "eager": 1, "error": 0}],
        [{"tokens": 1, "threads": 1, "seconds": 1, "eager": math.nan, "error": 0}],
    ],
)
def test_speeds_that_cannot_be_are_damage(store: EngineStore, speeds: object) -> None:
    manifest = put(store) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"speeds": speeds}))
    lookup = store.find(key())
    assert lookup.state == "damaged"
    assert "its manifest has no usable speeds" in lookup.reason


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> EngineStore:
    return EngineStore(tmp_path_factory.mktemp("store") / "engines")
