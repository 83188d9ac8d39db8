# SPDX-License-Identifier: Apache-2.0
"""Build the engines of a model: each segment once, checked against PyTorch before it is stored."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal, Protocol

import torch

from pw_engines import (
    EngineError,
    EngineKey,
    EngineStore,
    FrontEnd,
    Parity,
    Platform,
    StoreError,
    aoti,
    check_parity,
    require_parity,
    tensorrt,
)
from pw_engines.child import end_with_parent
from pw_engines.store import Entry
from pw_engines.tensorrt import rtx, torch_tensorrt
from pw_export.linear_formats import able, require_buildable
from pw_export.onnx_export import export_segment
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.loader import load_decoder
from pw_runtime.errors import BadRequest
from pw_runtime.execution.decoder_lookup import decoder_segments
from pw_runtime.execution.decoder_segments import source_digest as decoder_source_digest
from pw_runtime.execution.engine_lookup import (
    COMPILERS,
    Compiler,
    CompilerName,
    in_order,
    keys_of,
)
from pw_runtime.execution.transformer_segments import Segment, segments_of, source_digest
from pw_runtime.system.places import require_temporary_room
from pw_runtime.types import Blocks, DitConfig, LinearFormat, Precision, Preset

POLL: Final = 0.1  # seconds between looks whether a build has ended
# Free bytes that a build needs for temporary files: AOTInductor's precompiled headers were 290 MB.
ROOM: Final = 512 * 2**20

Builders = dict[CompilerName, Callable[[torch.device], str | None]]


class Source(Protocol):
    """A network whose segments are built; can be sent to a worker process."""

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments by name for the engines of a compiler.

        Weights that become part of them are loaded to `device`; without a device, segments can be
        looked up in the store but not built.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """A transformer, for any checkpoint of its config.

    Engines with attention inside take `tokens`, those of a preset's clip.
    """

    config: DitConfig
    precision: Precision
    chunk: int
    blocks: Blocks = "segments"
    tokens: int = 0
    linear: LinearFormat = "exact"

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments; compiler and device do not matter, as weights are inputs."""
        return segments_of(
            self.config,
            self.precision,
            self.chunk,
            self.linear,
            blocks=self.blocks,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class DecoderSource:
    """The decoder of a bundle, for the final resolution of a preset."""

    bundle: Path
    preset: Preset

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Return the segments; see `Source`. Raises BadWeights."""
        bundle = open_bundle(self.bundle)
        baked = (
            load_decoder(bundle, device) if compiler.bakes_weights and device is not None else None
        )
        return decoder_segments(bundle, self.preset, compiler, baked)


@dataclass(frozen=True, slots=True)
class Job:
    """An engine to build; can be sent to a worker process."""

    source: Source
    segment: str
    compiler: CompilerName
    device: str
    store: Path
    key: EngineKey


@dataclass(frozen=True, slots=True)
class Built:
    """Result of a job."""

    job: Job
    seconds: float  # 0 if another process had just built the engine
    parity: tuple[Parity, ...] = ()
    error: str | None = None


def pick_compiler(backend: str, frontend: FrontEnd | None, device: torch.device) -> CompilerName:
    """Choose a compiler: the best that is available, or the requested one.

    Args:
        backend: "tensorrt", "tensorrt-rtx", "aoti" or "auto".
        frontend: front end of TensorRT, which it implies; None: ONNX if TensorRT is used.
        device: device to build for.

    Raises BadRequest with the reason if the compiler is not available.
    """
    if frontend is not None and backend == "aoti":
        raise BadRequest(
            "--frontend is an option of TensorRT",
            got=f"--frontend {frontend} with --backend aoti",
            do="omit one of them",
        )
    if frontend is not None:
        backend = "tensorrt"
    by_torch: Builders = {"torch-tensorrt": torch_tensorrt.unavailable}
    others: Builders = {
        "tensorrt": tensorrt.unavailable,
        # By itself only for a GPU that is here; for another one it must be asked for.
        "tensorrt-rtx": rtx.cannot_run if backend == "auto" else rtx.cannot_build_for,
        "aoti": aoti.unavailable,
    }
    builders = by_torch if frontend == "torch-tensorrt" else others
    reasons = {
        name: builders[name](device)
        for name in in_order(device)
        if name in builders and backend in ("auto", COMPILERS[name].backend)
    }
    for name, reason in reasons.items():
        if reason is None:
            return name
    where = "the CPU" if device.type == "cpu" else str(device)
    raise BadRequest(
        f"no engines can be built for {where}" + (f" by {backend}" * (backend != "auto")),
        got="; ".join(filter(None, reasons.values())),
        do="mend what is said above, or generate without engines, which needs no `pw build`",
    )


def require_attention_compiler(blocks: Blocks, name: CompilerName, preset: Preset | None) -> None:
    """Raise BadRequest where engines with attention inside cannot be built by a compiler.

    Their size is that of a preset's clips.
    """
    if blocks == "segments":
        return
    if name != "tensorrt-rtx":
        raise BadRequest(
            f"--blocks {blocks} is for TensorRT for RTX, which has kernels for attention this long",
            got=f"the compiler {name}",
            do="add --backend tensorrt-rtx, or leave --blocks out",
        )
    if preset is None:
        raise BadRequest(
            f"--blocks {blocks} makes engines that take all tokens of a clip at once",
            got="no preset to count them by",
            do="add --preset",
        )


def platform_for(
    name: CompilerName,
    device: torch.device,
    targets: Sequence[str] = (),
    linear: LinearFormat = "exact",
) -> Platform:
    """Return what to build engines for: the device, or GPU architectures that are named.

    Raises BadRequest for targets that the compiler does not have, and where the compiler or a GPU
    does not have the format of linear layers.
    """
    platform = _platform_for(name, device, targets, linear)
    require_buildable(linear, name, platform)
    return platform


def _platform_for(
    name: CompilerName, device: torch.device, targets: Sequence[str], linear: LinearFormat
) -> Platform:
    if name != "tensorrt-rtx":
        if targets:
            raise BadRequest(
                "--target is an option of TensorRT for RTX",
                got=f"--target {' --target '.join(targets)} with the compiler {name}",
                do="add --backend tensorrt-rtx, or leave --target out",
            )
        return COMPILERS[name].platforms(device)[0]
    default = rtx.default_targets(device)
    named = tuple(dict.fromkeys(targets)) or able(linear, default) or default
    if reason := rtx.cannot_build(named):
        raise BadRequest("engines cannot be built for these targets", got=reason)
    return rtx.target_platform(named)


def jobs_for(
    sources: Iterable[Source],
    name: CompilerName,
    device: torch.device,
    store: EngineStore,
    platform: Platform,
) -> tuple[list[Job], list[Job]]:
    """Return the engines to build and those already in the store, each once for all sources.

    `platform` is what they are built for: that of the device, or one with targets.
    """
    missing: dict[str, Job] = {}
    stored: dict[str, Job] = {}
    for source in sources:
        for segment_name, segment in source.segments(COMPILERS[name], None).items():
            (key,) = keys_of(segment, name, [platform])
            job = Job(source, segment_name, name, str(device), store.root, key)
            (missing if store.find(key).path is None else stored)[key.digest] = job
    return list(missing.values()), list(stored.values())


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
    device = torch.device("cuda" if "gpu" in platform else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return "built for a GPU, and none is available"
    reason = compiler.unavailable(device)
    if reason is None and platform not in map(dict, compiler.platforms(device)):
        reason = f"built for another machine or other versions: {platform}"
    return reason


def _unusable_rtx(platform: dict[str, str]) -> str | None:
    """Return why plans for named targets are of no use anywhere; None if they are."""
    targets = platform["targets"].split()
    reason = rtx.cannot_build(targets)
    if reason is None and dict(rtx.target_platform(targets)) != platform:
        reason = f"built by other versions: {platform}"
    return reason
