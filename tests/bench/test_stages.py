# SPDX-License-Identifier: Apache-2.0
"""`pw bench stages`: what becomes of clips that did not go as asked, and of Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import pytest

from pw_bench.e2e import stages
from pw_bench.e2e.job import Job
from pw_bench.e2e.stages import measure_stages
from pw_bench.results import Figure, Skipped
from pw_runtime.presets import PRESETS
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from tests.bench.results_made import result

JOB = Job(
    checkpoint=Path(), bundle=Path(), prompt="a", negative="", preset=PRESETS["nano"],
    noise=Path(), device="cpu", precision="fp32", codec="h264", in_memory=True,
)  # fmt: skip


class Program:
    """Stands for `Ours`: its second clip falls back, its fourth one is interrupted."""

    def __init__(self, policy: str) -> None:
        self.made = 0
        self.fell_back: tuple[str, ...] = ()

    def clip(self, job: Job, video: Path) -> None:
        self.made += 1
        if self.made == 4:
            raise KeyboardInterrupt
        self.fell_back = ("memory ran out",) if self.made == 2 else ()
        with span("text"):
            pass


def measured(monkeypatch: pytest.MonkeyPatch, clips: int, skipped: list[Skipped]) -> Figure:
    monkeypatch.setattr(stages, "Ours", Program)
    monkeypatch.setattr(stages, "arithmetic", lambda *_: {})
    found = measure_stages(JOB, clips, result().ceilings, Reporter(quiet=True), skipped)
    (figure,) = found
    return figure


def test_figures_of_clips_that_fell_back_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[Skipped] = []
    figure = measured(monkeypatch, 2, skipped)
    assert figure.fell_back == ("memory ran out",)
    assert len(figure.samples) == 2
    assert skipped == []


def test_clips_before_ctrl_c_count_and_the_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[Skipped] = []
    assert len(measured(monkeypatch, 9, skipped).samples) == 2
    assert skipped == [Skipped(part="the remaining clips", reason="interrupted")]
