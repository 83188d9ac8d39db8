# SPDX-License-Identifier: Apache-2.0
"""The processes of one clip: started together, sampled, their records put together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pw_bench.e2e.process import failure_reason
from pw_bench.measure.memory_sampler import MemorySampler
from pw_bench.ranks.program import RankRecord, RankTask
from pw_engines.child import child_environment
from pw_runtime.errors import BadResult
from pw_runtime.system.trace import Span

TICK: Final = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
# Stage -> the spans in which it computes, and in which its weights are loaded.
SPANS: Final[Mapping[str, tuple[str, str]]] = {
    "draft": ("draft", "load draft"),
    "highres": ("highres", "load highres"),
    "decode": ("write", "load vae"),  # the decode is inside, beside the encoder
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A way to make a clip.

    Attributes:
        processes: number of them; on a GPU machine each has its GPU.
        threads: of each process on a CPU; None on GPUs.
        divide_weights: each keeps a share of the transformer's weights.
    """

    processes: int
    threads: int | None
    divide_weights: bool = False

    @property
    def name(self) -> str:
        """Name in figures."""
        count, threads = self.processes, self.threads
        if threads is None:
            name = f"{count} GPU{'s' * (count > 1)}"
        else:
            name = f"{count} x {threads} thread{'s' * (threads > 1)}"
        return f"{name}, weights divided" if self.divide_weights else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A stage of one clip, or all of it.

    Attributes:
        seconds: wall time; of a stage without loading its network.
        cpu_seconds: CPU time of all processes in these seconds.
        memory: peak bytes of each process by rank, of a stage with loading: resident memory, of the
            whole clip on GPUs that of PyTorch's allocator.
    """

    seconds: float
    cpu_seconds: float
    memory: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksClip:
    """One clip: its stages and "clip", the whole; and what the processes say of themselves."""

    samples: Mapping[str, Sample]
    records: tuple[RankRecord, ...]

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that all ranks sent, by kind."""
        kinds = {kind for record in self.records for kind in record.sent}
        return {kind: sum(r.sent.get(kind, 0) for r in self.records) for kind in sorted(kinds)}


def make_clip(task: RankTask, setup: Setup) -> RanksClip:
    """Make a clip by the processes of a setup. Raises BadResult where one of them fails."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    text = TypeAdapter(RankTask).dump_json(task).decode()
    children: list[subprocess.Popen[str]] = []
    samplers: list[MemorySampler] = []
    outputs = []
    logs = [task.folder / f"rank {rank}.txt" for rank in range(setup.processes)]
    with ExitStack() as stack:
        started = time.perf_counter()
        for rank, log in enumerate(logs):
            child = subprocess.Popen(
                [sys.executable, "-m", "pw_bench.ranks.program"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(log.open("w", encoding="utf-8")),
                env=child_environment(_environment(setup, rank, store.port)),
                encoding="utf-8",
            )
            children.append(child)
            stack.callback(_end, child)
            samplers.append(stack.enter_context(MemorySampler(child.pid, None)))
        for child in children:
            assert child.stdin is not None
            with child.stdin as stdin:
                stdin.write(text)
        for child in children:
            assert child.stdout is not None
            outputs.append(child.stdout.read())  # until it ends
        codes = [child.wait() for child in children]
        seconds = time.perf_counter() - started
    for code, log in zip(codes, logs, strict=True):
        if code != 0:
            reason = failure_reason(code, log.read_text(encoding="utf-8", errors="replace"))
            raise BadResult(f"{setup.name}: the clip could not be made", got=reason)
    records = tuple(TypeAdapter(RankRecord).validate_json(output) for output in outputs)
    return RanksClip(samples=samples_of(records, samplers, seconds), records=records)


def _environment(setup: Setup, rank: int, port: int) -> dict[str, str]:
    """Return the variables that `pw generate --processes` sets, and the number of threads."""
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(setup.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if setup.threads is not None:
        ours["OMP_NUM_THREADS"] = str(setup.threads)
    return {"OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", **os.environ, **ours}


def _end(child: subprocess.Popen[str]) -> None:
    """End a process that is left: another one failed, or the measurement was interrupted."""
    if child.poll() is None:
        child.kill()
        child.wait()


def samples_of(
    records: tuple[RankRecord, ...], samplers: list[MemorySampler], seconds: float
) -> dict[str, Sample]:
    """Return the stages of a clip and the whole, from records and samples in the order of ranks.

    Args:
        records: of the processes; the first has the spans.
        samplers: of the processes.
        seconds: from the start of the processes to the end of the last.
    """
    samples = {}
    for stage, (computes, loads) in SPANS.items():
        spans = [span for span in records[0].spans if span.name == computes]
        if not spans:
            continue  # no high-res stage
        loading = [span for span in records[0].spans if span.name == loads]
        begin = min(span.start for span in (*loading, *spans))
        end = max(span.end for span in spans)
        samples[stage] = Sample(
            seconds=sum(span.end - span.start for span in spans),
            cpu_seconds=max(TICK, sum(_cpu_seconds(sampler, spans) for sampler in samplers)),
            memory=tuple(_largest(sampler.host, begin, end) for sampler in samplers),
        )
    samples["clip"] = Sample(
        seconds=seconds,
        cpu_seconds=sum(record.cpu_seconds for record in records),
        memory=tuple(
            record.peaks["device"]
            if "device" in record.peaks
            else max(record.peaks["host"], *(size for _, size in sampler.host))
            for record, sampler in zip(records, samplers, strict=True)
        ),
    )
    return samples


def _cpu_seconds(sampler: MemorySampler, spans: list[Span]) -> float:
    """Return the CPU time of a process inside spans, to a sampling interval at their ends."""

    def at(when: float) -> float:
        return max((cpu for time_, cpu in sampler.cpu if time_ <= when), default=0.0)

    return sum(at(span.end) - at(span.start) for span in spans)


def _largest(samples: list[tuple[float, int]], start: float, end: float) -> int:
    """Return the largest size within [start, end], and the one before; 0 without samples."""
    before = [size for when, size in samples if when < start][-1:]
    return max([*before, *(size for when, size in samples if start <= when <= end)], default=0)
