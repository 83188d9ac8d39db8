# SPDX-License-Identifier: Apache-2.0
"""Times of functions: warmed up, interleaved with their rivals, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pw_bench.results import Figure

FLUSHED_BYTES = 256 * 2**20  # written between samples: more than any L2 cache holds
FLUSHES = 16  # one takes 65 us on an H200: about a millisecond, longer than any launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Amount of measuring: candidates take turns (A B A B ...) for `rounds` rounds."""

    warmup_seconds: float
    rounds: int
    samples_per_round: int


QUICK = Protocol(warmup_seconds=0.0, rounds=3, samples_per_round=1)
FULL = Protocol(warmup_seconds=0.3, rounds=4, samples_per_round=5)


def time_all(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, protocol: Protocol
) -> dict[str, Figure]:
    """Time candidates in turns, so that a drift of the clocks affects all of them.

    Where one is unstable, all are measured once more and the first samples are kept as rejected.
    """
    first = _take_turns(candidates, device, protocol)
    if protocol is QUICK or all(figure.stable for figure in first.values()):
        return first
    second = _take_turns(candidates, device, protocol)
    return {name: replace(figure, rejected=first[name].samples) for name, figure in second.items()}


def _take_turns(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, protocol: Protocol
) -> dict[str, Figure]:
    sample = _gpu_sample if device.type == "cuda" else _cpu_sample
    for run in candidates.values():
        until = time.monotonic() + protocol.warmup_seconds
        run()
        while time.monotonic() < until:
            sample(run, device)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(protocol.rounds):
        for name, run in candidates.items():
            samples[name] += [sample(run, device) for _ in range(protocol.samples_per_round)]
    return {
        name: Figure(name=name, unit="s", samples=tuple(seconds))
        for name, seconds in samples.items()
    }


def _cpu_sample(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_sample(run: Callable[[], object], device: torch.device) -> float:
    """Return seconds by the GPU's clock, with a cold L2 cache.

    The GPU still writes when the host has launched all of `run`, so that no launch is counted.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    for _ in range(FLUSHES):
        flushed.fill_(1)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
