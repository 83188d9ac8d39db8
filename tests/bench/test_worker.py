# SPDX-License-Identifier: Apache-2.0
"""The process that makes clips, and what its records become."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from pw_bench.e2e import worker
from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.e2e.process import clip_of, covered_seconds, failure_reason
from pw_bench.e2e.runtime_program import facts_of
from pw_bench.e2e.worker import ClipRecord, Task, make_clips
from pw_bench.measure.memory_sampler import MemorySampler
from pw_runtime.system.machine import reset_peak_rss
from pw_runtime.system.trace import span
from tests.bench import small_results
from tests.bench.programs import NO_JOB


class StagedProgram:
    """Resets the peak at every stage and states the highest one, as our runtime does."""

    def clip(self, job: Job, video: Path) -> ClipFacts:
        with span("decode"):
            reset_peak_rss()
        return ClipFacts(peaks={"host": 2**45})


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ClipRecord]:
    monkeypatch.setattr(worker, "CONTENDERS", {"ours": SimpleNamespace(make=StagedProgram)})
    stdout = io.StringIO()
    make_clips(Task(program="ours", job=NO_JOB, folder=tmp_path, clips=2), stdout)
    adapter = TypeAdapter(ClipRecord)
    return [adapter.validate_json(line) for line in stdout.getvalue().splitlines()]


def test_peak_is_that_of_the_whole_clip_not_of_its_last_stage(records: list[ClipRecord]) -> None:
    assert [record.peaks["rss"] for record in records] == [2**45, 2**45]


def test_peak_is_no_less_than_samples_from_outside(records: list[ClipRecord]) -> None:
    sampler = MemorySampler(1, None)
    sampler.host = [(records[0].start, 2**46), (records[1].end + 1, 2**47)]
    first, second = (clip_of("ours", record, sampler, None) for record in records)
    assert (first.peaks["rss"], second.peaks["rss"]) == (2**46, 2**45)


def test_imports_are_a_span_of_the_first_clip_only(records: list[ClipRecord]) -> None:
    names = [[span.name for span in record.spans] for record in records]
    assert names == [["imports", "decode"], ["decode"]]


def test_only_fallbacks_of_a_receipt_count_as_fallbacks() -> None:
    receipt = {"notices": ["draft: text was cut", "out of memory"], "fallbacks": ["out of memory"]}
    assert facts_of(receipt, {}).fallbacks == ("out of memory",)
    assert facts_of({"notices": ["text was cut"]}, {}).fallbacks == ()


def test_facts_have_engines_and_memory_of_the_receipt() -> None:
    receipt = {
        "engines": {"draft": {"backend": "aoti", "digest": "0123456789abcdefgh"}},
        "peak_memory_bytes": {"host": 5},
        "plan": {"stages": {"draft": {"predicted": {"host": 3}, "measured": {"host": 4}},
                            "decode": {"predicted": {"host": 6}, "measured": None}}},
    }  # fmt: skip
    facts = facts_of(receipt, {"attention": "reference"})
    assert facts.engines == {"draft": "aoti 0123456789abcdef"}
    assert facts.peaks == {"host": 5}
    assert facts.predicted == {"draft": {"host": 3}, "decode": {"host": 6}}
    assert facts.measured == {"draft": {"host": 4}}


def test_failure_reason_is_the_whole_last_error_or_the_signal() -> None:
    assert failure_reason(1, "a warning\nValueError: no\n") == "ValueError: no"
    error = "Traceback:\n  File\nBadRequest: no model\n  got: a\n  do this: b\n"
    assert failure_reason(1, error) == "BadRequest: no model; got: a; do this: b"
    assert failure_reason(1, "") == "exit code 1"
    assert failure_reason(-9, "a warning\n").startswith("killed by SIGKILL")


def test_only_outer_spans_of_the_main_thread_cover_time() -> None:
    def one(start: float, end: float, depth: int = 0, thread: str = "MainThread"):
        return small_results.span("a", start, end, depth, thread)

    spans = [one(0, 2), one(1, 2, depth=1), one(5, 6), one(2, 5, thread="other")]
    assert covered_seconds(spans) == 3
