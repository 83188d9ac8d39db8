# SPDX-License-Identifier: Apache-2.0
"""Measure built engines of a CPU beside their segments, and note the figures in the store."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Final

import torch

from pw_engines import (
    Engine,
    EngineError,
    EngineSpec,
    EngineStore,
    Speed,
    StoreError,
    measure_speed,
)
from pw_engines.child import end_with_parent
from pw_engines.engine import tolerance_of
from pw_export.build_jobs import Job
from pw_runtime.execution.compilers import COMPILERS
from pw_runtime.execution.engine_records import tokens_per_call

# Tokens of a call where no preset says how many a clip has.
TOKENS: Final[tuple[int, ...]] = (64, 512, 4096)


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine's speed at one size, or why it was removed from the store or not measured."""

    job: Job
    speed: Speed | None = None
    error: str | None = None
    removed: bool = False


def measure_jobs(jobs: Iterable[Job], tokens: Sequence[int]) -> Iterator[Measured]:
    """Measure the engines of some jobs that are in the store, one call at a time.

    They run in a process of its own, with the threads that PyTorch takes by itself. Engines of one
    segment are measured in turns, so that their figures compare; those that are known, on as many
    threads, are not measured again. One that does not compute what its segment does at this size is
    removed.

    Args:
        jobs: built.
        tokens: of clips; calls take equal parts of them.
    """
    by_spec: dict[EngineSpec, list[Job]] = {}
    for job in jobs:
        by_spec.setdefault(job.key.spec, []).append(job)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(1, context, end_with_parent, (os.getpid(),)) as process:
        try:
            for spec, group in by_spec.items():
                for size in sizes_of(spec, tokens):
                    try:
                        yield from process.submit(_measure, group, size).result()
                    except BrokenProcessPool:
                        reason = "its process was killed, perhaps out of memory: not measured"
                        yield from (Measured(job, error=reason) for job in group)
                        return
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def sizes_of(spec: EngineSpec, tokens: Sequence[int]) -> list[int]:
    """Return the tokens of a call for clips of so many tokens; 0 for a segment without tokens."""
    limit = dict(spec.limits).get("tokens")
    return sorted({tokens_per_call(count, limit) if limit else 0 for count in tokens})


def _measure(jobs: list[Job], size: int) -> list[Measured]:
    """Measure engines of one segment at one size, unless that is known for all of them."""
    wanted = (size, torch.get_num_threads())
    store, device = EngineStore(jobs[0].store), torch.device(jobs[0].device)
    found = [(job, store.find(job.key)) for job in jobs]
    known = {
        job: next((speed for speed in file.speeds if speed.conditions == wanted), None)
        for job, file in found
    }
    if all(known.values()):
        return [Measured(job, speed) for job, speed in known.items()]
    # One that was wrong at another size is removed by now.
    gone = [job for job, file in found if file.path is None]
    results = [Measured(job, error="not measured: it is not in the store") for job in gone]
    left = [(job, file.path) for job, file in found if file.path is not None]
    if not left:
        return results
    compiler = COMPILERS[jobs[0].compiler]
    segment = jobs[0].source.segments(compiler, None)[jobs[0].segment]
    try:
        engines: dict[str, Engine] = {
            job.compiler: COMPILERS[job.compiler].load(segment.spec, path, device)
            for job, path in left
        }
        with torch.inference_mode():
            speeds = measure_speed(engines, segment.module, size, device)
    except (EngineError, OSError) as error:
        reason = (
            f"an engine is gone or unreadable: {error}" if isinstance(error, OSError) else error
        )
        return results + [Measured(job, error=f"not measured: {reason}") for job, _ in left]
    return results + [_recorded(store, Measured(job, speeds[job.compiler])) for job, _ in left]


def _recorded(store: EngineStore, measured: Measured) -> Measured:
    """Note a measurement in the store, or remove an engine that computes something else."""
    speed, key = measured.speed, measured.job.key
    assert speed is not None
    try:
        if speed.error <= tolerance_of(key.spec):
            store.record(key, speed)
            return measured
        store.remove(key.folder)
    except StoreError as error:
        return replace(measured, error=str(error))
    return replace(
        measured,
        removed=True,
        error=f"removed: with {speed.tokens} tokens it is {speed.error:.1e} from its segment "
        f"(relative L2), more than {tolerance_of(key.spec):.1e}",
    )
