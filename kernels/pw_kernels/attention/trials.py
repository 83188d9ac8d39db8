# SPDX-License-Identifier: Apache-2.0
"""Measure the implementations of attention on a GPU, to run the fastest one that is right.

Each gets random queries, keys and values of a run's heads. Its result is compared with fp64 at
sampled rows and computed twice; then all take turns. Queries beyond QUERIES would take longer and
tell nothing new: every implementation passes over all keys for each tile of queries.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from pw_kernels.attention import OP, attention, reference
from pw_kernels.attention.libraries import available
from pw_kernels.launcher import capability
from pw_kernels.op import Implementation, using

QUERIES: Final = 8192  # most that are timed
ROUNDS: Final = 5
SAMPLED: Final = 64  # rows that are compared with fp64
WORSE: Final = 1.25  # times the reference's error that is still right
CLOSE: Final = 1.02  # times the shortest time, within which the order of the candidates decides
NO_TIME: Final = "no time left to measure it"  # refusal of what was left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One implementation: its time, its error, or why it does not run."""

    implementation: Implementation
    seconds: float | None = None  # of a call; None where it was not timed
    error: float | None = None  # relative L2 of sampled rows, to fp64
    refused: str | None = None  # why it cannot be chosen

    @property
    def usable(self) -> bool:
        """Tell whether it may be chosen."""
        return self.refused is None and self.seconds is not None


def candidates(device: torch.device) -> tuple[Implementation, ...]:
    """Return what may run on a GPU, the reference first."""
    names = [name for name in OP.alternatives if name != "cpu" and available(name)]
    hopper = capability(device) == (9, 0)
    return ("reference", *(name for name in names if hopper or name != "gluon"))


def measure(
    device: torch.device,
    *,
    tokens: int,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 20.0,
    names: Sequence[Implementation] | None = None,
    timer: Callable[[Callable[[], object], torch.device], float] | None = None,
) -> tuple[Trial, ...]:
    """Check and time every implementation at a run's size.

    Args:
        device: the GPU.
        tokens: of a pass; all of them are keys.
        heads: of the network.
        width: of a head.
        dtype: of q, k and v.
        seconds: after which the remaining implementations are left out, but for the reference.
        names: to measure; None for all candidates.
        timer: returns the seconds of a call; None for the GPU's clock.

    Returns:
        One trial for each, in their order.
    """
    timer, end = timer or _gpu_seconds, time.monotonic() + seconds
    names = candidates(device) if names is None else names
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        shape = (count, heads, width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q, k, v = 2 * normal(min(tokens, QUERIES)), normal(tokens), normal(tokens)
    rows = torch.randint(0, len(q), (SAMPLED,), generator=generator, device=device)
    exact = _exact(q[rows], k, v)
    trials: dict[Implementation, Trial] = {}
    for name in names:
        if time.monotonic() > end and name != "reference":
            trials[name] = Trial(implementation=name, refused=NO_TIME)
            continue
        trials[name] = _checked(name, q, k, v, rows, exact, trials.get("reference"))
    times: dict[Implementation, list[float]] = {
        name: [] for name, trial in trials.items() if trial.refused is None
    }
    for number in range(ROUNDS):
        for name, samples in times.items():
            if number and time.monotonic() > end:
                break
            with using("reference", attention=name):
                samples.append(timer(lambda: attention(q, k, v), device))
    return tuple(
        replace(trial, seconds=statistics.median(times[name])) if times.get(name) else trial
        for name, trial in trials.items()
    )


def fastest(trials: Sequence[Trial]) -> Implementation:
    """Return the fastest one that is right; of those about as fast, the first.

    So the choice does not depend on noise, and neither do the bits of a clip.
    """
    usable = [trial for trial in trials if trial.usable]
    shortest = min((trial.seconds or 0.0 for trial in usable), default=0.0)
    close = (trial for trial in usable if (trial.seconds or 0.0) <= CLOSE * shortest)
    return next((trial.implementation for trial in close), "reference")


def _checked(
    name: Implementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    exact: Tensor,
    baseline: Trial | None,
) -> Trial:
    """Run an implementation twice, which also warms it up, and compare its results."""
    trial = Trial(implementation=name)
    try:
        with using("reference", attention=name):
            once, again = attention(q, k, v), attention(q, k, v)
    except Exception as error:  # Triton's are no RuntimeError; any means that it does not run here
        lines = str(error).splitlines() or [type(error).__name__]
        return replace(trial, refused=lines[0])
    if not torch.equal(once, again):
        return replace(trial, refused="two calls with the same input differ")
    found = float((once[rows].double() - exact).norm() / exact.norm())
    trial = replace(trial, error=found)
    allowed = None if baseline is None or baseline.error is None else WORSE * baseline.error
    if not math.isfinite(found):
        return replace(trial, refused="its result is not finite")
    if allowed is not None and found > allowed:
        return replace(trial, refused=f"its error is more than {WORSE} times the reference's")
    return trial


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention in fp64, head by head: the keys of one take a quarter of a GiB at 4K."""
    heads = [
        reference(q[:, n : n + 1].double(), k[:, n : n + 1].double(), v[:, n : n + 1].double())
        for n in range(q.shape[1])
    ]
    return torch.cat(heads, dim=1)


def _gpu_seconds(run: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3
