# SPDX-License-Identifier: Apache-2.0
"""One process of a program: started, watched, and its clips accounted for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from pw_bench.e2e.worker import MAIN, Made, Task
from pw_bench.measure.memory_sampler import Watch, between
from pw_bench.measure.nvml import Nvml
from pw_bench.results import Clip
from pw_runtime.system.trace import Span

_TASK, _MADE = TypeAdapter(Task), TypeAdapter(Made)


class ProgramFailed(Exception):
    """A program ended without the clips it was asked for; its last words."""


@dataclass(slots=True)
class Samples:
    """What one program gave so far, cold and warm."""

    cold: list[Clip] = field(default_factory=list)
    warm: list[Clip] = field(default_factory=list)
    fell_back: set[str] = field(default_factory=set)
    engines: dict[str, str] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    threads: int = 0


def run_process(
    task: Task, environment: dict[str, str], nvml: Nvml | None, taken: Samples | None = None
) -> list[Clip]:
    """Run a process of a program and watch it. Raises ProgramFailed."""
    for old in task.folder.iterdir():
        old.unlink()
    # The same for all: with spinning threads every program is slower wherever others run too.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **environment}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "pw_bench.e2e.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=settings,
        text=True,
    )
    try:
        with Watch(child.pid, nvml) as watch:
            out, errors = child.communicate(_TASK.dump_json(task).decode())
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode != 0:
        raise ProgramFailed(last_words(child.returncode, errors))
    made = [_MADE.validate_json(line) for line in out.splitlines()]
    if taken is not None:
        taken.fell_back.update(text for one in made for text in one.fell_back)
        taken.engines, taken.threads = made[0].engines, made[0].threads
        taken.operations = made[0].operations
    return [account(task.side, one, watch, None if i else started) for i, one in enumerate(made)]


def last_words(code: int, errors: str) -> str:
    """Why a process ended: its last line and what is indented below it, as in our errors. One that
    was killed says nothing of it itself."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    lines = errors.rstrip().splitlines() or [f"exit code {code}"]
    first = max((i for i, line in enumerate(lines) if line[:1].strip()), default=0)
    return "; ".join(line.strip() for line in lines[first:])


def account(side: str, made: Made, watch: Watch, started: float | None) -> Clip:
    """One clip's account; `started` is when its process was, of the first one."""
    spans = made.spans
    start = made.start
    if started is not None:
        start = started
        process = Span(name="process start", start=started, end=made.start, depth=0, thread=MAIN)
        spans = (process, *spans)
    wall = made.end - start
    unattributed = wall - covered(spans)
    # Also before our runtime's first stage, when it starts the counter again.
    rss = [size for t, size in watch.host if start <= t <= made.end]
    pss = [size for t, size in watch.pss if start <= t <= made.end]
    nvml = [size for t, size in watch.device if start <= t <= made.end]
    return Clip(
        side=side,
        start="warm" if started is None else "cold",
        wall=wall,
        spans=tuple(replace(s, start=s.start - start, end=s.end - start) for s in spans),
        unattributed=unattributed,
        unattributed_shares=(unattributed / wall,),
        host=between(watch.host, start, made.end),
        device=between(watch.device, start, made.end),
        peaks=made.peaks
        | {"rss": max([made.peaks["rss"], *rss])}
        | ({"pss": max(pss)} if pss else {})
        | ({"nvml": max(nvml)} if nvml else {}),
        predicted=made.predicted,
        joules=made.joules,
        disk_bytes=made.disk_bytes,
    )


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which the main thread was in a span."""
    return sum(one.end - one.start for one in spans if one.depth == 0 and one.thread == MAIN)
