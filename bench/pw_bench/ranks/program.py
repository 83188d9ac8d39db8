# SPDX-License-Identifier: Apache-2.0
"""One process of those that make a clip together: `python -m pw_bench.ranks.program`.

It does what `pw generate` does on a rank, or alone, and records what no receipt has: its peak
memory, its CPU time, what it sent. It reads a `RankTask` as JSON on stdin and writes a `RankRecord`
as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter

from pw_bench.e2e.job import Job
from pw_bench.e2e.runtime_program import facts_of, operations_in
from pw_bench.e2e.synthetic import IN_MEMORY, synthetic_bundle
from pw_engines.child import end_with_parent
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.errors import BadResult, PixelWizardError
from pw_runtime.job.take_part import take_part
from pw_runtime.pipeline import generate
from pw_runtime.system.machine import peak_memory
from pw_runtime.system.progress import Reporter
from pw_runtime.system.rank_meeting import Place, place_from_environment
from pw_runtime.system.ranks import Ranks, broken
from pw_runtime.system.trace import Span, Trace
from pw_runtime.types import AttentionKernel, Prompt, Request, RunOptions

CLIP: Final = "clip"  # name of the files that rank 0 makes


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """The work of all processes of a clip.

    Attributes:
        job: the clip; its device is "cpu" or "cuda", of which each process takes its own.
        folder: for the video, its receipt and its latents.
        divide_weights: among the processes, as with `--dit_fsdp`.
        chunk: most tokens in a call, as of `--chunk`.
        attention: as of `--attention`; None: what is fastest on a GPU is measured where nobody has.
    """

    job: Job
    folder: Path
    divide_weights: bool
    chunk: int
    attention: AttentionKernel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """A process as it saw itself at its end.

    Attributes:
        spans: of rank 0, in seconds of `time.perf_counter`, which all processes of a machine share.
        peaks: bytes by place: "host" since the process began, "device" by PyTorch's allocator.
        cpu_seconds: of all threads, since the process began.
        sent: bytes to other ranks, by kind.
        decisions: of the plan; of rank 0.
        fallbacks: what ran otherwise than planned; of rank 0.
        engines: network -> backend and start of the digest of its key; of rank 0.
        operations: operation -> implementation, outside engines; of rank 0.
    """

    spans: tuple[Span, ...]
    peaks: Mapping[str, int]
    cpu_seconds: float
    sent: Mapping[str, int] = field(default_factory=dict)
    decisions: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)


def make_part(task: RankTask, place: Place | None) -> RankRecord:
    """Make a clip alone, or this rank's part of it. Raises BadResult where it fails."""
    request = _request(task, place)
    device = request.device
    trace, sent = Trace(device), dict[str, int]()
    first = place is None or place.rank == 0
    with trace.recording() if first else nullcontext():
        bundle = _bundle(task, place)
        if place is None:
            _generate(request, bundle, None)
        else:
            take_part(
                place,
                lambda: (request, bundle),
                _generate,
                say=Reporter(quiet=True).say,
                ended=lambda ranks: sent.update(ranks.sent),
            )
    cpu_seconds = time.process_time()
    if not first:
        return RankRecord(spans=(), peaks=peak_memory(device), cpu_seconds=cpu_seconds, sent=sent)
    receipt = json.loads((task.folder / f"{CLIP}.json").read_text(encoding="utf-8"))
    facts = facts_of(receipt, operations_in(receipt, request.options))
    earlier = facts.peaks  # the counters began again at each stage
    return RankRecord(
        spans=tuple(trace.spans),
        peaks={at: max(size, earlier.get(at, 0)) for at, size in peak_memory(device).items()},
        cpu_seconds=cpu_seconds,
        sent=sent,
        decisions=tuple(receipt["plan"]["decisions"]),
        fallbacks=facts.fallbacks,
        engines=facts.engines,
        operations=facts.operations,
    )


def _request(task: RankTask, place: Place | None) -> Request:
    job, device = task.job, torch.device(task.job.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0 if place is None else place.local)
    options = RunOptions(
        codec=job.codec,
        precision=job.precision,
        policy="eager",
        device=str(device),
        chunk=task.chunk,
        attention=task.attention,
        save_latents=True,
    )
    return Request(
        prompts=(Prompt(id=CLIP, text=job.prompt, position=1),),
        preset=job.preset,
        out=task.folder,
        negative=job.negative,
        noise=job.noise,
        options=options,
        divide_weights=task.divide_weights,
    )


def _bundle(task: RankTask, place: Place | None) -> Bundle:
    size = task.job.in_memory
    if size is None:
        return open_bundle(task.job.bundle)
    folder = task.folder / f"rank {0 if place is None else place.rank}"
    return synthetic_bundle(folder, IN_MEMORY[size])


def _generate(request: Request, bundle: Bundle, ranks: Ranks | None) -> None:
    (outcome,) = generate(request, bundle, Reporter(quiet=True), ranks)
    if outcome.error is not None:
        raise BadResult("the clip failed", got=outcome.error)


def main() -> None:
    """Be the child of `processes.make_clip`."""
    end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)  # what the run prints goes to stderr
        task = TypeAdapter(RankTask).validate_json(sys.stdin.read())
        try:
            record = make_part(task, place_from_environment())
        except PixelWizardError as error:
            print(error, file=sys.stderr, flush=True)
            if broken():  # libraries wait for a rank that is gone
                os._exit(1)
            sys.exit(1)
        print(TypeAdapter(RankRecord).dump_json(record).decode(), file=stdout, flush=True)


if __name__ == "__main__":
    main()
