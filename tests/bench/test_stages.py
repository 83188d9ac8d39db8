# SPDX-License-Identifier: Apache-2.0
"""`pw bench stages`: clips that fell back, and Ctrl-C."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pw_bench.e2e import stages
from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.e2e.programs import CONTENDERS
from pw_bench.e2e.stages import time_stages
from pw_bench.results import Figure, Skipped
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from tests.bench.programs import NO_JOB
from tests.bench.small_results import CEILINGS


class Program:
    """Replaces `RuntimeProgram`: its second clip falls back, its fourth one is interrupted."""

    def __init__(self) -> None:
        self.clips = 0

    def clip(self, job: Job, video: Path) -> ClipFacts:
        self.clips += 1
        if self.clips == 4:
            raise KeyboardInterrupt
        with span("text"):
            pass
        fallbacks = ("out of memory",) if self.clips == 2 else ()
        return ClipFacts(fallbacks=fallbacks, peaks={"device": 10 * self.clips})


def measured(monkeypatch: pytest.MonkeyPatch, clips: int, skipped: list[Skipped]) -> Figure:
    ours = replace(CONTENDERS["ours"], make=Program)
    monkeypatch.setattr(stages, "CONTENDERS", {"ours": ours})
    monkeypatch.setattr(stages, "minimum_work", lambda *_: {})
    figure, memory = time_stages(NO_JOB, clips, CEILINGS, Reporter(quiet=True), skipped)
    assert (memory.name, memory.unit, memory.samples) == ("GPU memory", "B", (20.0, 30.0))
    return figure


def test_figures_of_clips_that_fell_back_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[Skipped] = []
    figure = measured(monkeypatch, 2, skipped)
    assert figure.fell_back == ("out of memory",)
    assert len(figure.samples) == 2
    assert skipped == []


def test_clips_before_ctrl_c_count_and_the_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[Skipped] = []
    assert len(measured(monkeypatch, 9, skipped).samples) == 2
    assert skipped == [Skipped(part="the remaining clips", reason="interrupted")]
