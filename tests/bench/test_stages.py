# SPDX-License-Identifier: Apache-2.0
"""`pw bench stages`: clips that fell back, signals, and the arithmetic of approximations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pw_bench.e2e import stages
from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.e2e.programs import CONTENDERS
from pw_bench.e2e.stages import MinimumWork, Series, minimum_work, time_stages
from pw_bench.results import Skipped
from pw_export.wan22_configs import NETWORKS
from pw_runtime.cli.main import Terminated
from pw_runtime.presets import PRESETS
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from pw_runtime.types import RunOptions
from tests.bench.programs import NO_JOB
from tests.bench.small_results import CEILINGS


class Program:
    """Replaces `RuntimeProgram`: its second clip falls back, its fourth one is interrupted."""

    def __init__(self, signal: BaseException) -> None:
        self.clips, self.signal = 0, signal

    def clip(self, job: Job, video: Path) -> ClipFacts:
        self.clips += 1
        if self.clips == 4:
            raise self.signal
        with span("text"):
            pass
        fallbacks = ("out of memory",) if self.clips == 2 else ()
        return ClipFacts(
            fallbacks=fallbacks,
            peaks={"device": 10 * self.clips},
            engines={"draft": "tensorrt"},
            operations={"attention": "cudnn"},
        )


def measured(
    monkeypatch: pytest.MonkeyPatch, clips: int, signal: BaseException | None = None
) -> Series:
    ours = replace(CONTENDERS["ours"], make=lambda: Program(signal or KeyboardInterrupt()))
    monkeypatch.setattr(stages, "CONTENDERS", {"ours": ours})
    monkeypatch.setattr(stages, "minimum_work", lambda *_: {})
    series = time_stages(NO_JOB, clips, CEILINGS, Reporter(quiet=True))
    _, memory = series.figures
    assert (memory.name, memory.unit, memory.samples) == ("GPU memory", "B", (20.0, 30.0))
    return series


def test_figures_of_clips_that_fell_back_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    series = measured(monkeypatch, 2)
    assert series.figures[0].fell_back == ("out of memory",)
    assert len(series.figures[0].samples) == 2
    assert series.interruption.skipped("") == []


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), Terminated(15)])
def test_clips_before_a_signal_count_and_the_file_says_so(
    monkeypatch: pytest.MonkeyPatch, signal: BaseException
) -> None:
    series = measured(monkeypatch, 9, signal)
    assert len(series.figures[0].samples) == 2
    expected = [Skipped(part="the remaining clips", reason="interrupted")]
    assert series.interruption.skipped("the remaining clips") == expected
    assert series.interruption.cause is signal


def test_the_implementations_that_ran_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = measured(monkeypatch, 2).facts
    assert (facts.engines, facts.operations) == ({"draft": "tensorrt"}, {"attention": "cudnn"})


def work_of(**options: Any) -> dict[str, MinimumWork]:
    return minimum_work(NETWORKS, PRESETS["2k"], CEILINGS, RunOptions(**options))


def test_sparse_attention_is_held_against_its_own_arithmetic() -> None:
    exact, sparse = work_of(), work_of(sparse_attention=0.5)
    assert sparse["draft step"] == exact["draft step"]
    assert sparse["highres step"].flops < 0.8 * exact["highres step"].flops


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"step_cache": 0.1}, {"draft step"}),
        ({"guidance_reuse": 1}, {"highres step"}),
        ({"linear": "int8"}, {"draft step", "highres step"}),
    ],
)
def test_steps_that_do_less_have_no_share_of_a_ceiling(
    options: dict[str, Any], missing: set[str]
) -> None:
    assert work_of().keys() - work_of(**options).keys() == missing
