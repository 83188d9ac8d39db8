# SPDX-License-Identifier: Apache-2.0
"""One process of a program: started, sampled, and its clips accounted for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from pw_bench.e2e.worker import MAIN, ClipRecord, Task
from pw_bench.measure.memory_sampler import MemorySampler, between
from pw_bench.measure.nvml import Nvml
from pw_bench.result_sections import Clip
from pw_engines.child import child_environment
from pw_runtime.system.trace import Span

_TASK, _RECORD = TypeAdapter(Task), TypeAdapter(ClipRecord)


class ProgramFailed(Exception):
    """A program ended without the requested clips; the message has its last lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRun:
    """Clips and facts of one process of a program; the first clip is the cold one."""

    clips: tuple[Clip, ...]
    fallbacks: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0


def run_process(task: Task, environment: Mapping[str, str], nvml: Nvml | None) -> ProcessRun:
    """Run a process of a program and sample its memory. Raises ProgramFailed."""
    for old in task.folder.iterdir():
        old.unlink()
    # The same for all: spinning threads make every program slower wherever others run too.
    settings = child_environment({"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **environment})
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "pw_bench.e2e.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=settings,
        encoding="utf-8",
        errors="replace",
    )
    try:
        with MemorySampler(child.pid, nvml) as sampler:
            out, errors = child.communicate(_TASK.dump_json(task).decode())
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode != 0:
        raise ProgramFailed(failure_reason(child.returncode, errors))
    return read_records(task, out, sampler, started)


def read_records(task: Task, out: str, sampler: MemorySampler, started: float) -> ProcessRun:
    """Parse the stdout of a worker whose process was started at `started`."""
    records = [_RECORD.validate_json(line) for line in out.splitlines()]
    first = records[0]
    return ProcessRun(
        clips=tuple(
            clip_of(task.program, record, sampler, None if i else started)
            for i, record in enumerate(records)
        ),
        fallbacks=tuple(text for record in records for text in record.facts.fallbacks),
        engines=first.facts.engines,
        operations=first.facts.operations,
        threads=first.threads,
    )


def failure_reason(code: int, errors: str) -> str:
    """Return why a process ended: its last line and the lines indented below it, as in our errors.

    A process that was killed writes no reason; the signal is named instead.
    """
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    lines = errors.rstrip().splitlines() or [f"exit code {code}"]
    first = max((i for i, line in enumerate(lines) if line[:1].strip()), default=0)
    return "; ".join(line.strip() for line in lines[first:])


def clip_of(
    program: str, record: ClipRecord, sampler: MemorySampler, started: float | None
) -> Clip:
    """Combine a clip's record with the samples from outside.

    Args:
        program: name.
        record: of the process itself.
        sampler: of its memory.
        started: when the process was started, for its first clip; None for later ones.
    """
    spans = record.spans
    start, end = record.start, record.end
    if started is not None:
        start = started
        process = Span(name="process start", start=started, end=record.start, depth=0, thread=MAIN)
        spans = (process, *spans)
    wall = end - start
    unattributed = wall - covered_seconds(spans)
    host = between(sampler.host, start, end)
    # Sampled too, since our runtime resets the process's own peak when its first stage begins.
    peaks = record.peaks | {"rss": max([record.peaks["rss"], *(size for _, size in host)])}
    for counter, samples in (("pss", sampler.pss), ("nvml", sampler.device)):
        sizes = [size for _, size in between(samples, start, end)]
        peaks |= {counter: max(sizes)} if sizes else {}
    return Clip(
        side=program,
        start="warm" if started is None else "cold",
        wall=wall,
        spans=tuple(replace(s, start=s.start - start, end=s.end - start) for s in spans),
        unattributed=unattributed,
        unattributed_shares=(unattributed / wall,),
        host=host,
        device=between(sampler.device, start, end),
        peaks=peaks,
        predicted=record.facts.predicted,
        measured=record.facts.measured,
        joules=record.joules,
        disk_bytes=record.disk_bytes,
    )


def covered_seconds(spans: Iterable[Span]) -> float:
    """Return the seconds in which the main thread was in a span."""
    return sum(span.end - span.start for span in spans if span.depth == 0 and span.thread == MAIN)
