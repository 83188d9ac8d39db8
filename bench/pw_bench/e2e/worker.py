# SPDX-License-Identifier: Apache-2.0
"""The process in which a program makes clips for the end-to-end benchmark: `python -m` this.

It takes a `Task` as JSON on stdin and answers with one `Made` as JSON per line on stdout.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

MAIN: Final = "MainThread"
STARTED: Final = time.perf_counter()  # before anything large is imported

import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from pw_bench.e2e.job import Job  # noqa: E402
from pw_bench.e2e.programs import SIDES  # noqa: E402
from pw_bench.measure.nvml import Nvml  # noqa: E402
from pw_runtime.system.machine import peak_rss_bytes, reset_peak_rss  # noqa: E402
from pw_runtime.system.trace import Span, Trace  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process does."""

    side: str
    job: Job
    folder: Path  # for the videos
    clips: int  # the first is a cold start, the others are warm
    latents: Path | None = None  # keep the latent after every step there; not for timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One clip. Times are of `time.perf_counter`, which all processes of a machine share."""

    start: float  # of the clip; of the first one, when the process began to import
    end: float
    spans: tuple[Span, ...]
    peaks: dict[str, int]
    predicted: dict[str, dict[str, int]]
    fell_back: tuple[str, ...]
    engines: dict[str, str]
    operations: dict[str, str]
    joules: float | None
    disk_bytes: int | None
    threads: int


def make(task: Task, answers: TextIO) -> None:
    """Make the clips, telling of each as it is done."""
    answer = TypeAdapter(Made)
    device = torch.device(task.job.device)
    nvml = Nvml(device.index or 0) if device.type == "cuda" else None
    start, energy = STARTED, nvml.joules() if nvml else None
    program = SIDES[task.side].make()
    begun = [Span(name="imports", start=start, end=time.perf_counter(), depth=0, thread=MAIN)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # makes the context, which a span would wait for unseen
        now = time.perf_counter()
        begun += [Span(name="CUDA start", start=begun[0].end, end=now, depth=0, thread=MAIN)]
    for number in range(task.clips):
        kept: dict[str, Tensor] = {}
        trace = Trace(device, on_tensor=_keeper(kept) if task.latents else None)
        if number:
            reset_peak_rss()
            start, energy = time.perf_counter(), nvml.joules() if nvml else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        disk = _written()
        video = task.folder / f"{number}.{'mkv' if task.job.codec == 'ffv1' else 'mp4'}"
        with trace.recording():
            program.clip(task.job, video)
        end, used = time.perf_counter(), nvml.joules() if nvml else None
        receipt = getattr(program, "receipt", {})
        made = Made(
            start=start,
            end=end,
            spans=(*(() if number else begun), *trace.spans),
            peaks=_peaks(device, receipt),
            predicted=_predicted(receipt),
            fell_back=getattr(program, "fell_back", ()),
            engines={
                name: " ".join((one["backend"], one.get("digest", "")[:16])).strip()
                for name, one in receipt.get("engines", {}).items()
            },
            operations=getattr(program, "operations", {}),
            joules=None if used is None or energy is None else used - energy,
            disk_bytes=None if disk is None else _written_since(disk),
            threads=torch.get_num_threads(),
        )
        if task.latents is not None:
            save_file(kept, task.latents)
        print(answer.dump_json(made).decode(), file=answers, flush=True)


def _keeper(kept: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    counts: Counter[str] = Counter()

    def keep(name: str, x: Tensor) -> None:
        counts[name] += 1
        kept[f"{name} {counts[name]:03}"] = x.detach().float().cpu().clone()

    return keep


def _peaks(device: torch.device, receipt: dict[str, Any]) -> dict[str, int]:
    """Of the whole clip. Our runtime starts the counters again at each of its stages: what they
    give here is of the last one, and those of the others are in its receipt."""
    stages = receipt.get("peak_memory_bytes") or {}
    peaks = {"rss": max(peak_rss_bytes(), stages.get("host", 0))}
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        peaks["allocator"] = max(allocated, stages.get("device", 0))
        if not stages:
            peaks["reserved"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _predicted(receipt: dict[str, Any]) -> dict[str, dict[str, int]]:
    stages = (receipt.get("plan") or {}).get("stages", {})
    return {stage: dict(one["predicted"]) for stage, one in stages.items()}


def _written() -> int | None:
    """Bytes that this process has written to storage, as Linux counts them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def _written_since(before: int) -> int:
    after = _written()
    assert after is not None
    return after - before


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # what programs print goes to stderr
        make(TypeAdapter(Task).validate_json(sys.stdin.read()), stdout)
