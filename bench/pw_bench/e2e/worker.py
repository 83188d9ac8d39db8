# SPDX-License-Identifier: Apache-2.0
"""The process in which a program makes clips: `python -m pw_bench.e2e.worker`.

It reads a `Task` as JSON on stdin and writes one `ClipRecord` as JSON per line on stdout.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

MAIN: Final = "MainThread"
STARTED: Final = time.perf_counter()  # before anything large is imported

import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from pw_bench.choices import ProgramName  # noqa: E402
from pw_bench.e2e.job import ClipFacts, Job  # noqa: E402
from pw_bench.e2e.programs import CONTENDERS  # noqa: E402
from pw_bench.measure.nvml import Nvml  # noqa: E402
from pw_engines.child import end_with_parent  # noqa: E402
from pw_runtime.system.machine import peak_rss_bytes, reset_peak_rss  # noqa: E402
from pw_runtime.system.trace import Span, Trace  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The work of one process."""

    program: ProgramName
    job: Job
    folder: Path  # for the videos
    clips: int  # the first is a cold start, the others are warm
    latents: Path | None = None  # file for the latent after every step; not for timing


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRecord:
    """One clip. Times are of `time.perf_counter`, which all processes of a machine share."""

    start: float  # of the clip; for the first one, when the process began to import
    end: float
    spans: tuple[Span, ...]
    peaks: dict[str, int]
    facts: ClipFacts
    joules: float | None
    disk_bytes: int | None
    threads: int


def make_clips(task: Task, stdout: TextIO) -> None:
    """Make the clips and write the record of each as soon as it is done."""
    adapter = TypeAdapter(ClipRecord)
    device = torch.device(task.job.device)
    nvml = Nvml(device.index or 0) if device.type == "cuda" else None
    start, energy = STARTED, nvml.joules() if nvml else None
    program = CONTENDERS[task.program].make()
    startup = [Span(name="imports", start=start, end=time.perf_counter(), depth=0, thread=MAIN)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # creates the context, which no span would show otherwise
        now = time.perf_counter()
        startup += [Span(name="CUDA start", start=startup[0].end, end=now, depth=0, thread=MAIN)]
    for number in range(task.clips):
        latents: dict[str, Tensor] = {}
        trace = Trace(device, on_tensor=_collect(latents) if task.latents else None)
        if number:
            reset_peak_rss()
            start, energy = time.perf_counter(), nvml.joules() if nvml else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        written = _bytes_written()
        video = task.folder / f"{number}.{'mkv' if task.job.codec == 'ffv1' else 'mp4'}"
        with trace.recording():
            facts = program.clip(task.job, video)
        end, energy_after = time.perf_counter(), nvml.joules() if nvml else None
        written_after = _bytes_written()
        record = ClipRecord(
            start=start,
            end=end,
            spans=(*(() if number else startup), *trace.spans),
            peaks=_peaks(device, facts),
            facts=facts,
            joules=None if energy is None or energy_after is None else energy_after - energy,
            disk_bytes=None
            if written is None or written_after is None
            else written_after - written,
            threads=torch.get_num_threads(),
        )
        if task.latents is not None:
            save_file(latents, task.latents)
        print(adapter.dump_json(record).decode(), file=stdout, flush=True)


def _collect(latents: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    counts: Counter[str] = Counter()

    def keep(name: str, x: Tensor) -> None:
        counts[name] += 1
        latents[f"{name} {counts[name]:03}"] = x.detach().float().cpu().clone()

    return keep


def _peaks(device: torch.device, facts: ClipFacts) -> dict[str, int]:
    """Return peak bytes of the whole clip by counter.

    A program that resets the counters at each of its stages states its highest peaks itself: what
    the counters give here is the last stage's.
    """
    peaks = {"rss": max(peak_rss_bytes(), facts.peaks.get("host", 0))}
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        peaks["allocator"] = max(allocated, facts.peaks.get("device", 0))
        if not facts.peaks:
            peaks["reserved"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _bytes_written() -> int | None:
    """Return the bytes that this process has written to storage, as counted by Linux."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


if __name__ == "__main__":
    end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)  # what programs print goes to stderr
        make_clips(TypeAdapter(Task).validate_json(sys.stdin.read()), stdout)
