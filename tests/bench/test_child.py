# SPDX-License-Identifier: Apache-2.0
"""The process that makes clips: what it tells of them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from pw_bench.e2e import worker
from pw_bench.e2e.job import Job
from pw_bench.e2e.process import account
from pw_bench.e2e.worker import Made, Task, make
from pw_bench.measure.memory_sampler import Watch
from pw_runtime.presets import PRESETS
from pw_runtime.system.machine import reset_peak_rss
from pw_runtime.system.trace import span

JOB = Job(
    checkpoint=Path(), bundle=Path(), prompt="a", negative="", preset=PRESETS["nano"],
    noise=Path(), device="cpu", precision="fp32", codec="h264",
)  # fmt: skip


class Staged:
    """Like our runtime it starts the peak again at every stage, and tells the highest of them."""

    def __init__(self) -> None:
        self.receipt: dict[str, Any] = {"peak_memory_bytes": {"host": 2**45}}

    def clip(self, job: Job, video: Path) -> None:
        with span("decode"):
            reset_peak_rss()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Made]:
    monkeypatch.setattr(worker, "SIDES", {"staged": SimpleNamespace(make=Staged)})
    answers = io.StringIO()
    make(Task(side="staged", job=JOB, folder=tmp_path, clips=2), answers)
    return [TypeAdapter(Made).validate_json(line) for line in answers.getvalue().splitlines()]


def test_the_peak_is_that_of_the_whole_clip_and_not_of_its_last_stage(made: list[Made]) -> None:
    assert [one.peaks["rss"] for one in made] == [2**45, 2**45]


def test_the_peak_is_no_less_than_what_was_seen_from_outside(made: list[Made]) -> None:
    watch = Watch(1, None)
    watch.host = [(made[0].start, 2**46), (made[1].end + 1, 2**47)]
    first, second = (account("staged", one, watch, None) for one in made)
    assert (first.peaks["rss"], second.peaks["rss"]) == (2**46, 2**45)


def test_imports_are_a_span_of_the_first_clip_alone(made: list[Made]) -> None:
    names = [[one.name for one in clip.spans] for clip in made]
    assert names == [["imports", "decode"], ["decode"]]
