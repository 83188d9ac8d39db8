# SPDX-License-Identifier: Apache-2.0
"""Build the engines of a model: each segment once, checked against PyTorch before it is stored."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal

import torch

from pw_engines import (
    EngineError,
    EngineStore,
    Parity,
    StoreError,
    aoti,
    check_parity,
    openvino,
    require_parity,
    tensorrt,
)
from pw_engines.child import end_with_parent
from pw_engines.store import Entry
from pw_engines.tensorrt import rtx, torch_tensorrt
from pw_export.build_jobs import Job
from pw_export.onnx_export import export_segment
from pw_runtime.execution.compilers import COMPILERS
from pw_runtime.execution.decoder_segments import source_digest as decoder_source_digest
from pw_runtime.execution.transformer_segments import Segment, source_digest
from pw_runtime.system.places import require_temporary_room

POLL: Final = 0.1  # seconds between looks whether a build has ended
# Free bytes that a build needs for temporary files: AOTInductor's precompiled headers were 290 MB.
ROOM: Final = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Built:
    """Result of a job."""

    job: Job
    seconds: float  # 0 if another process had just built the engine
    parity: tuple[Parity, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """News of a build in progress: a line for the user, or the phase that it has come to."""

    kind: Literal["line", "phase"]
    text: str


OnEvent = Callable[[Job, Event], None]


def run_jobs(
    jobs: list[Job],
    workers: int,
    on_built: Callable[[Built], None],
    on_event: OnEvent = lambda job, event: None,
) -> list[Built]:
    """Build each job in a separate process, so that one that is killed fails alone.

    An interruption stops the running builds, which leave no files. So does a disk for temporary
    files without room, where every build would fail.

    Args:
        jobs: to build.
        workers: most processes at a time.
        on_built: called with each result.
        on_event: called with the news of running builds, from threads of theirs.

    Raises BadRequest where there is no room for temporary files.
    """
    _require_room(jobs)
    results: list[Built] = []
    pool = ThreadPoolExecutor(workers)
    futures = [pool.submit(_with_room, job, on_event) for job in jobs]
    try:
        for future in as_completed(futures):
            results.append(future.result())
            if results[-1].error is not None:
                _require_room(jobs)
            on_built(results[-1])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        while running := [future for future in futures if not future.done()]:
            for child in multiprocessing.active_children():
                child.kill()
            wait(running, timeout=0.1)  # one may just be starting its process
        pool.shutdown()
        for store in {job.store for job in jobs}:
            EngineStore(store).remove_leftovers()
        raise
    pool.shutdown()
    return results


def _with_room(job: Job, on_event: OnEvent) -> Built:
    """Build a job in a separate process. Raises BadRequest where there is no room by now."""
    _require_room([job])
    return _in_own_process(job, on_event)


def _require_room(jobs: Iterable[Job]) -> None:
    """Raise BadRequest where AOTInductor has no room for its temporary files."""
    if any(job.compiler == "aoti" for job in jobs):
        require_temporary_room(ROOM, "building engines")


def _in_own_process(job: Job, on_event: OnEvent) -> Built:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    receiving, sending = context.Pipe(duplex=False)
    start = (os.getpid(), sending)
    with receiving, ProcessPoolExecutor(1, context, _start_worker, start) as process:
        try:
            on_event(job, Event("phase", "starting"))
            result = process.submit(_build_and_tell, job)
            sending.close()  # the process has its own: where it is killed, receiving ends
            with suppress(EOFError):
                while not result.done() or receiving.poll():
                    if receiving.poll(POLL):
                        on_event(job, receiving.recv())
            return result.result()
        except BrokenProcessPool:
            reason = "its process was killed, perhaps out of memory; --jobs 1 needs less"
        except Exception as error:  # compilers may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Built(job, 0.0, error=reason)


_news: list[Connection] = []  # of a process that builds: where its events go


def _build_and_tell(job: Job) -> Built:
    return build(job, _news[0].send)


def _start_worker(parent: int, sending: Connection) -> None:
    """Prepare a process that builds: Ctrl-C reaches it too, and its parent ends it."""
    _news.append(sending)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # compilers below still end
    end_with_parent(parent)


def build(job: Job, tell: Callable[[Event], None] = lambda event: None) -> Built:
    """Build one engine, compare it with its segment, and store it if the results agree.

    `tell` is called with what happens meanwhile.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # from PyTorch, about its own code
    store, device = EngineStore(job.store), torch.device(job.device)
    compiler = COMPILERS[job.compiler]
    start = time.monotonic()
    try:
        with store.locked(job.key):
            if store.find(job.key).path is not None:
                return Built(job, 0.0)
            segment = job.source.segments(compiler, device)[job.segment]
            if segment.spec != job.key.spec:
                raise EngineError(
                    f"{job.segment} has changed since this build began, in its sources or its "
                    "weights: run `pw build` again"
                )
            with torch.inference_mode(), store.publishing(job.key, compiler.file) as path:
                _compile(job, segment, path, device, tell)
                parity = _check(job, segment, path, device)
    except (EngineError, StoreError) as error:
        return Built(job, time.monotonic() - start, error=str(error))
    return Built(job, time.monotonic() - start, tuple(parity))


def _check(job: Job, segment: Segment, path: Path, device: torch.device) -> list[Parity]:
    """Compare an engine with its segment; one for other GPUs is checked at its first run there.

    Raises EngineError where it does not compute the same.
    """
    compiler = COMPILERS[job.compiler]
    if job.key.platform not in compiler.platforms(device):
        return []
    engine = compiler.load(segment.spec, path, device)
    parity = check_parity(engine, segment.module, device)
    require_parity(job.segment, parity)
    return parity


def _compile(
    job: Job, segment: Segment, path: Path, device: torch.device, tell: Callable[[Event], None]
) -> None:
    """Compile a segment to a file. Raises EngineError."""

    def say(text: str) -> None:
        tell(Event("line", text))

    def on_phase(name: str) -> None:
        tell(Event("phase", name))

    on_phase("compiling" if job.compiler == "aoti" else "exporting")
    if job.compiler == "tensorrt":
        cache = job.store / "timing.cache"
        model = export_segment(segment)
        tensorrt.build(segment.spec, model, path, device, timing_cache=cache, say=say)
    elif job.compiler == "tensorrt-rtx":
        model = export_segment(segment, varying=bool(segment.spec.limits))
        rtx.build(segment.spec, model, path, rtx.targets_of(job.key.platform), say, on_phase)
    elif job.compiler == "torch-tensorrt":
        torch_tensorrt.build(segment.spec, segment.module, path, device, say=say)
    elif job.compiler == "openvino":
        model = export_segment(segment, varying=bool(segment.spec.limits))
        openvino.build(segment.spec, model, path)
    else:
        aoti.build(segment.spec, segment.module, path, device)


def unusable(entry: Entry) -> str | None:
    """Return why this version cannot use a stored engine on this machine; None if it can."""
    try:
        sources, platform = entry.key["spec"]["sources"], dict(entry.key["platform"])
        built_by = (entry.key["backend"], dict(entry.key["options"]))
        compiler = next(c for c in COMPILERS.values() if (c.backend, dict(c.options)) == built_by)
    except (KeyError, TypeError, ValueError, StopIteration):
        return "its key is of another version"
    if sources not in (source_digest(), decoder_source_digest()):
        return "built from other sources of the networks"
    if compiler.backend == "tensorrt-rtx":
        return _unusable_rtx(platform)
    devices = [torch.device("cpu")]
    if "gpu" in platform:
        if not torch.cuda.is_available():
            return "built for a GPU, and none is available"
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reason = compiler.unavailable(devices[0])
    here = (facts for device in devices for facts in compiler.platforms(device))
    if reason is None and platform not in map(dict, here):
        reason = f"built for another machine or other versions: {platform}"
    return reason


def _unusable_rtx(platform: dict[str, str]) -> str | None:
    """Return why plans for named targets are of no use anywhere; None if they are."""
    targets = platform["targets"].split()
    reason = rtx.cannot_build(targets)
    if reason is None and dict(rtx.target_platform(targets)) != platform:
        reason = f"built by other versions: {platform}"
    return reason
