# SPDX-License-Identifier: Apache-2.0
"""Fit a run into a memory budget, stage by stage, before anything is loaded.

The first candidate of each stage that fits is chosen. When a stage runs out of memory all the same,
it retries with a smaller candidate (oom_fallback.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pw_runtime.errors import BadRequest
from pw_runtime.planning.candidates import Candidate, Candidates, Choice
from pw_runtime.types import Budget, Place, RunPlan, StageMemory, StageName, TransformerPlan

GIB = 2**30
_BF16_ON_A_CPU = " (far slower on a CPU without AVX-512 BF16 or AMX: `pw doctor` says which it has)"


def make_plan(stages: Candidates, budget: Budget) -> RunPlan:
    """Choose each stage's first candidate that fits the budget.

    Raises BadRequest where a stage has none, with the nearest budget that would do.
    """
    _require_fit([*stages.values()], budget)
    chosen = {stage: _first(options, budget) for stage, options in stages.items()}
    return plan_of(budget, chosen, [_decision(options, budget) for options in stages.values()])


def plan_of(
    budget: Budget, chosen: Mapping[str, Candidate[Any]], decisions: Sequence[str]
) -> RunPlan:
    """Return the plan with one chosen candidate for each stage."""
    transformers = {
        name: option.choice for name, option in chosen.items() if name in ("draft", "highres")
    }
    return RunPlan(
        budget=budget,
        text=chosen["text"].choice if "text" in chosen else None,
        encode=chosen["encode"].choice if "encode" in chosen else None,
        transformers=cast(dict[StageName, TransformerPlan], transformers),
        decode=chosen["decode"].choice,
        stages=tuple(option.memory for option in chosen.values()),
        decisions=tuple(decisions),
    )


def fits(memory: StageMemory, budget: Budget) -> bool:
    """Tell whether a stage stays within a budget."""
    device = memory.required("device") <= (budget.device or 0)
    return memory.required("host") <= budget.host and device


def _first(options: Sequence[Candidate[Choice]], budget: Budget) -> Candidate[Choice]:
    return next(option for option in options if fits(option.memory, budget))


def _decision(options: Sequence[Candidate[Any]], budget: Budget) -> str:
    """Describe a stage's chosen candidate, and why the fastest one was not chosen."""
    chosen = _first(options, budget)
    place: Place = "host" if budget.device is None else "device"
    text = f"{chosen.memory.stage}: {chosen.name}, {gib(chosen.memory.required(place))}"
    if chosen is options[0]:
        return text
    fastest = options[0].memory
    over: Place = "host" if fastest.required("host") > budget.host else "device"
    where = "host memory" if over == "host" else "GPU memory"
    return f"{text}; {options[0].name} would take {gib(fastest.required(over))} of {where}"


def _require_fit(stages: Sequence[Sequence[Candidate[Any]]], budget: Budget) -> None:
    """Raise BadRequest where a stage has no candidate that fits."""
    failing = [
        options for options in stages if not any(fits(option.memory, budget) for option in options)
    ]
    if not failing:
        return
    least = [
        min(options, key=lambda option: _utilisation(option.memory, budget)).memory
        for options in stages
    ]
    device = max(memory.required("device") for memory in least)
    need = Budget(
        host=max(budget.host, *(memory.required("host") for memory in least)),
        device=None if budget.device is None else max(budget.device, device),
    )
    names = ", ".join(options[0].memory.stage for options in failing)
    scratch = sum(item.bytes for item in failing[0][0].memory.items if item.kind == "scratch")
    engines = (
        f"; the engines keep {gib(scratch)} of scratch memory in all stages: --blocks segments, or "
        "engines for one --target, take less, --policy eager takes none"
    )
    raise BadRequest(
        f"this clip does not fit into memory (too large: {names})",
        got=budget_text(budget),
        wanted=f"{budget_text(need)}, the least that is enough for this clip and model",
        do="free memory, name a larger budget, choose a smaller preset or fewer frames, or add "
        f"--vae-precision bf16 for the decode{_BF16_ON_A_CPU * (budget.device is None)}"
        f"{engines * (scratch > 0)}",
    )


def _utilisation(memory: StageMemory, budget: Budget) -> float:
    """Return how many times the budget a stage takes."""
    host = memory.required("host") / max(1, budget.host)
    if budget.device is None:
        return host
    return max(host, memory.required("device") / max(1, budget.device))


def budget_text(budget: Budget) -> str:
    """Describe a budget."""
    host = f"{gib(budget.host)} of host memory"
    return host if budget.device is None else f"{gib(budget.device)} of GPU memory, {host}"


def gib(size: int) -> str:
    """Format bytes in GiB, rounded up to a tenth; in MiB below one."""
    if size < GIB:
        return f"{-(-size // 2**20)} MiB"
    return f"{-(-size * 10 // GIB) / 10:.1f} GiB"
