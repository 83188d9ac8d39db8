# SPDX-License-Identifier: Apache-2.0
"""A plan as data, for programs: docs/json.md describes the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pw_runtime.planning.decode_choices import decode_traffic
from pw_runtime.planning.exactness import approximations
from pw_runtime.planning.report import latent_bytes
from pw_runtime.planning.stage_times import seconds_by_stage
from pw_runtime.planning.time_estimate import Rates
from pw_runtime.planning.workload import Workload
from pw_runtime.types import MemoryItem, RunPlan, StageMemory


def plan_document(
    work: Workload, plan: RunPlan, rates: Rates | None, *, verbose: bool
) -> dict[str, Any]:
    """Return what `plan_report` says, in bytes and seconds.

    Args:
        work: what was planned.
        plan: of `make_plan`.
        rates: of the machine, for times; None: no times.
        verbose: list everything that is in memory at each peak.
    """
    last, video, gpu = list(work.stages.values())[-1], work.preset.video, plan.budget.device
    times = {} if rates is None else seconds_by_stage(work, plan, rates)
    return {
        "clip": {"width": last.width, "height": last.height, **asdict(video)},
        "precision": work.options.compute_precision,
        "approximations": list(approximations(work.options)),
        "ranks": work.ranks,
        "budget": {"host": plan.budget.host, "device": gpu},
        "stages": [
            _stage(memory, times.get(memory.stage), on_gpu=gpu is not None, verbose=verbose)
            for memory in plan.stages
        ],
        "transformers": {name: asdict(chosen) for name, chosen in plan.transformers.items()},
        "decode": asdict(plan.decode),
        "copied_bytes": 0 if gpu is None else decode_traffic(work, plan.decode),
        "disk": {"latents": latent_bytes(work), "tiles": plan.decode.store_bytes},
        "seconds": sum(times.values()) if times else None,
        "times_from": None if rates is None else rates.source,
        "decisions": list(plan.decisions),
    }


def _stage(
    memory: StageMemory, seconds: float | None, *, on_gpu: bool, verbose: bool
) -> dict[str, Any]:
    """Describe a stage: the peaks of every rank, the first one's first."""
    content: dict[str, Any] = {
        "stage": memory.stage,
        "host": list(memory.of_ranks("host")),
        "device": list(memory.of_ranks("device")) if on_gpu else None,
        "seconds": seconds,
    }
    if verbose:
        content["items"] = [_items(items) for items in (memory.items, *memory.others)]
    return content


def _items(items: tuple[MemoryItem, ...]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]
