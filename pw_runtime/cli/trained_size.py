# SPDX-License-Identifier: Apache-2.0
"""A warning where the built-in model is asked for pictures much larger than it has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pw_runtime.types import Request, StageConfig, StageName

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle


def beyond_training(request: Request, bundle: Bundle) -> str | None:
    """Return the warning, with the time that a clip would take, or None where there is none.

    Raises BadRequest where the clip does not fit into memory.
    """
    from pw_runtime.presets import PRESETS

    last = _last(request.stages)
    learned, largest = (_last(PRESETS[name].stages()) for name in ("nano", "nano-hd"))
    if _pixels(last) <= _pixels(largest):
        return None
    from pw_export.nano.train_draft import DIT

    if bundle.networks.draft.config != DIT:
        return None
    return (
        f"warning: the built-in model has learned {learned.width}x{learned.height}; a clip of "
        f"{last.width}x{last.height} takes about {_duration(request, bundle)} and shows little "
        "(--preset nano is its own)"
    )


def _last(stages: Mapping[StageName, StageConfig]) -> StageConfig:
    return list(stages.values())[-1]


def _pixels(stage: StageConfig) -> int:
    return stage.width * stage.height


def _duration(request: Request, bundle: Bundle) -> str:
    """Estimate the time of one clip on this machine."""
    from pw_runtime.planning.candidates import candidates
    from pw_runtime.planning.planner import make_plan
    from pw_runtime.planning.stage_times import seconds_by_stage
    from pw_runtime.planning.time_estimate import measure_rates
    from pw_runtime.planning.workload import budget_of, workload

    work = workload(bundle.networks, request.preset, request.options)
    budget = budget_of(request.device, request.gpu_memory, request.host_memory)
    plan = make_plan(candidates(work, gpu=budget.device is not None), budget)
    rates = measure_rates(request.device, request.options.compute_precision)
    minutes = sum(seconds_by_stage(work, plan, rates).values()) / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"
