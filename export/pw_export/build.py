# SPDX-License-Identifier: Apache-2.0
"""Build the engines of a model: each segment once, checked against itself before it may be used."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from pw_engines import (
    Backend,
    EngineError,
    EngineKey,
    EngineStore,
    Parity,
    StoreError,
    aoti,
    check_parity,
    require_parity,
    tensorrt,
)
from pw_engines.store import Entry
from pw_export.onnx_export import export_segment
from pw_runtime.engines import COMPILERS, key_of
from pw_runtime.errors import BadRequest
from pw_runtime.segments import segments_of, source_digest
from pw_runtime.types import DitConfig, Precision


@dataclass(frozen=True, slots=True)
class Job:
    """One engine to build, as a worker process can be told."""

    network: DitConfig
    precision: Precision
    chunk: int
    segment: str
    backend: Backend
    device: str
    store: Path
    key: EngineKey
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a job."""

    job: Job
    seconds: float  # 0 where another process had just built it
    parity: tuple[Parity, ...] = ()
    error: str | None = None


def pick_backend(wanted: str, device: torch.device) -> Backend:
    """The backend to build for: the best that can build here, or the one asked for.

    Raises BadRequest with the reason where it cannot.
    """
    builders: dict[Backend, Callable[[torch.device], str | None]] = {
        "tensorrt": tensorrt.unavailable,
        "aoti": aoti.unavailable,
    }
    reasons = {name: check(device) for name, check in builders.items()}
    for name, reason in reasons.items():
        if wanted in ("auto", name) and reason is None:
            return name
    raise BadRequest(
        f"engines cannot be built by {wanted} on {device}",
        got="; ".join(r for name, r in reasons.items() if r and wanted in ("auto", name)),
        do="mend what is said, or generate without engines",
    )


def jobs_for(
    networks: Iterable[DitConfig],
    precision: Precision,
    chunk: int,
    backend: Backend,
    device: torch.device,
    store: EngineStore,
) -> tuple[list[Job], list[Job]]:
    """Engines to build, and those that the store has already; each once for all networks."""
    missing: dict[str, Job] = {}
    fresh: dict[str, Job] = {}
    for network in networks:
        for name, segment in segments_of(network, precision, chunk).items():
            key = key_of(segment, backend, device)
            job = Job(network, precision, chunk, name, backend, str(device), store.root, key)
            found = store.find(key)
            (missing if found.path is None else fresh)[key.digest] = job
    return list(missing.values()), list(fresh.values())


def run_jobs(jobs: list[Job], workers: int, on_built: Callable[[Built], None]) -> list[Built]:
    """Build, each job in a process of its own: one that is killed fails alone.

    When interrupted, what is being built is stopped and leaves nothing.
    """
    results: list[Built] = []
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(_in_own_process, job) for job in jobs]
        for future in as_completed(waiting):
            results.append(future.result())
            on_built(results[-1])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()
        pool.shutdown()
        for store in {job.store for job in jobs}:
            EngineStore(store).remove_leftovers()
        raise
    pool.shutdown()
    return results


def _in_own_process(job: Job) -> Built:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(1, mp_context=context) as one:
        try:
            return one.submit(build, job).result()
        except BrokenProcessPool:
            reason = "its process was killed: was there enough memory? --jobs 1 takes less"
        except Exception as error:  # of any library that took part
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Built(job, 0.0, error=reason)


def build(job: Job) -> Built:
    """Build one engine, compare it with its segment, publish it.

    An engine that does not compute what its segment does is not published.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about itself
    store, device = EngineStore(job.store), torch.device(job.device)
    segment = segments_of(job.network, job.precision, job.chunk)[job.segment]
    compiler = COMPILERS[job.backend]
    start = time.monotonic()
    try:
        with store.locked(job.key):
            if store.find(job.key).path is not None:
                return Built(job, 0.0)
            with torch.inference_mode(), store.publishing(job.key, compiler.file) as path:
                if job.backend == "tensorrt":
                    cache = job.store / "timing.cache"
                    model = export_segment(segment)
                    say = (lambda text: None) if job.quiet else print
                    tensorrt.build(segment.spec, model, path, device, timing_cache=cache, say=say)
                else:
                    aoti.build(segment.spec, segment.module, path, device)
                engine = compiler.load(segment.spec, path, device)
                parity = check_parity(engine, segment.module, device)
                require_parity(job.segment, parity)
    except (EngineError, StoreError) as error:
        return Built(job, time.monotonic() - start, error=str(error))
    return Built(job, time.monotonic() - start, tuple(parity))


def unusable(entry: Entry) -> str | None:
    """Why no run of this version on this machine takes an engine of the store; None if one may."""
    try:
        sources, platform = entry.key["spec"]["sources"], dict(entry.key["platform"])
        compiler = COMPILERS[entry.key["backend"]]
    except (KeyError, TypeError, ValueError):
        return "its key is not one of this version"
    if sources != source_digest():
        return "made from other sources of the networks"
    device = torch.device("cuda" if "gpu" in platform else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return "for a GPU, and there is none"
    reason = compiler.unavailable(device)
    if reason is None and dict(compiler.platform(device)) != platform:
        reason = f"for another machine or other versions: {platform}"
    return reason
