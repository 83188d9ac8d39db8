# SPDX-License-Identifier: Apache-2.0
"""Times of functions and of the machine's ceilings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from pw_bench.measure import peaks, timing
from pw_bench.measure.timing import QUICK, Protocol, time_all
from tests.bench import small_results

CPU = torch.device("cpu")


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = time_all(candidates, CPU, QUICK)
    assert order == ["a", "b"] * 4  # once to warm up, then three rounds
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_the_gpu_is_busy_for_longer_than_a_launch_before_a_sample_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen: one fill, of 65 us, so that samples had the host's time to launch a kernel."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    class Buffer:
        def fill_(self, value: int) -> None:
            order.append("fill")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())
    seconds = timing._gpu_sample(lambda: order.append("run"), CPU)
    assert seconds == 2e-3
    assert order == ["fill"] * timing.FLUSHES + ["event", "run", "event"]
    assert timing.FLUSHES * timing.FLUSHED_BYTES / 4.8e12 > 5e-4  # at an H200's peak rate


def test_memory_of_the_ceilings_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(peaks, "_measure", lambda *_: done.append("measured"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))
    peaks.measure_ceilings(torch.device("cuda"), QUICK)
    assert done == ["measured", "given back"]


def test_three_samples_close_together_are_stable() -> None:
    figure = partial(small_results.figure, "a")
    assert figure(1.0, 1.01, 1.02, 0.99).stable
    assert not figure(1.0, 1.5, 1.0, 0.8).stable
    assert not figure(1.0, 1.0).stable  # two samples prove nothing
    assert figure(3.0, 1.0, 2.0).median == 2.0
    assert figure(*range(11)).spread == (1.0, 9.0)
    assert replace(figure(1.0), counted=True).stable  # counted, not measured


def test_unstable_samples_are_measured_again_and_the_first_ones_kept(monkeypatch) -> None:
    seconds = iter([1.0, 2.0, 3.0, 4.0] + [5.0] * 4)
    monkeypatch.setattr(timing, "_cpu_sample", lambda run, device: next(seconds))
    protocol = Protocol(warmup_seconds=0.0, rounds=2, samples_per_round=2)
    figure = time_all({"a": lambda: None}, CPU, protocol)["a"]
    assert figure.rejected == (1.0, 2.0, 3.0, 4.0)
    assert figure.samples == (5.0,) * 4
