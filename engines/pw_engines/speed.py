# SPDX-License-Identifier: Apache-2.0
"""Engines timed beside their segment, in turns, and compared with it on the same data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pw_engines.eager import EagerEngine
from pw_engines.engine import Engine, SegmentFunction, random_inputs, relative_l2
from pw_engines.spec import DTYPES, EngineSpec

ROUNDS: Final = 3  # at least, unless they take
MOST_SECONDS: Final = 30.0
SECONDS: Final = 0.3  # per engine, after which no other round begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """An engine's fastest call beside that of its segment uncompiled, in one series.

    Attributes:
        tokens: in a call; 0 for a segment that takes none.
        threads: of PyTorch.
        seconds: of a call of the engine.
        eager: seconds of a call of the segment.
        error: largest relative L2 distance of an output from the segment's.
    """

    tokens: int
    threads: int
    seconds: float
    eager: float
    error: float

    @property
    def conditions(self) -> tuple[int, int]:
        """Tokens and threads: speeds of others say nothing about these."""
        return self.tokens, self.threads

    @property
    def ratio(self) -> float:
        """Ratio of the two times: above 1, the engine is faster."""
        return self.eager / self.seconds


def measure_speed(
    engines: Mapping[str, Engine],
    segment: SegmentFunction,
    tokens: int,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Time engines of one spec beside their segment, call by call in turns.

    The fastest call counts: what else runs on the machine only ever adds to a call.

    Args:
        engines: by name.
        segment: that they were built from.
        tokens: per call, at most the limit of the spec; ignored where it has none. Other named
            dimensions have their limits.
        device: where all run: a CPU, as calls are timed until they return.
        clock: seconds.
    """
    spec = next(iter(engines.values())).spec
    limits = dict(spec.limits)
    sizes = limits | ({"tokens": min(tokens, limits["tokens"])} if "tokens" in limits else {})
    inputs = random_inputs(spec, sizes, device, seed=0)
    calls: dict[str, Engine] = {"": EagerEngine(spec, segment), **engines}
    results = {name: _outputs(spec, sizes, device) for name in calls}
    best = dict.fromkeys(calls, float("inf"))
    for name, engine in calls.items():  # the first call prepares what later ones reuse
        engine.run(inputs, results[name])
    rounds, start = 0, clock()
    while (spent := clock() - start) < SECONDS * len(calls) or (
        rounds < ROUNDS and (spent < MOST_SECONDS or not rounds)
    ):
        for name, engine in calls.items():
            begin = clock()
            engine.run(inputs, results[name])
            best[name] = min(best[name], clock() - begin)
        rounds += 1
    return {
        name: Speed(
            tokens=sizes.get("tokens", 0),
            threads=torch.get_num_threads(),
            seconds=best[name],
            eager=best[""],
            error=_largest_error(results[name], results[""]),
        )
        for name in engines
    }


def _largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative L2 distance of an output, NaN if one of them is NaN."""
    errors = [relative_l2(*pair) for pair in zip(got, expected, strict=True)]
    # why not max(): it keeps a number that comes before NaN
    return torch.tensor(errors, dtype=torch.float64).max().item()


def _outputs(spec: EngineSpec, sizes: Mapping[str, int], device: torch.device) -> list[Tensor]:
    return [
        torch.full(tensor.sized(sizes), float("nan"), dtype=DTYPES[tensor.dtype], device=device)
        for tensor in spec.outputs
    ]
