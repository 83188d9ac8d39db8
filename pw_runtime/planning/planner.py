# SPDX-License-Identifier: Apache-2.0
"""Fit a run into a memory budget, stage by stage, before anything is loaded.

The first candidate of each stage that fits is chosen. When a stage runs out of memory all the same,
it retries with a smaller candidate (oom_fallback.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pw_runtime.errors import BadRequest
from pw_runtime.planning.candidates import Candidate, Candidates, Choice
from pw_runtime.types import Budget, Place, RunPlan, StageMemory, StageName, TransformerPlan

GIB = 2**30
_Ways = Sequence[Candidate[Any]]  # to run a stage


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


def _decision(options: _Ways, budget: Budget) -> str:
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


def _require_fit(stages: Sequence[_Ways], budget: Budget) -> None:
    """Raise BadRequest where a stage has no candidate that fits."""
    failing = [
        options for options in stages if not any(fits(option.memory, budget) for option in options)
    ]
    if not failing:
        return
    names = ", ".join(options[0].memory.stage for options in failing)
    ways = ["free memory", "name a larger budget", "choose a smaller preset or fewer frames"]
    ways += [first.advice for first, *_ in failing if first.advice]
    scratch = sum(item.bytes for item in failing[0][0].memory.items if item.kind == "scratch")
    engines = (
        f"; the engines keep {gib(scratch)} of scratch memory in all stages: --blocks segments, or "
        "engines for one --target, take less, --policy eager takes none"
    )
    need, what = _least_budget(stages, budget)
    raise BadRequest(
        f"this clip does not fit into memory (too large: {names})",
        got=budget_text(budget),
        wanted=f"{budget_text(need)}, the least {what} that is enough for this clip and model",
        do=f"{', '.join(ways[:-1])}, or {ways[-1]}{engines * (scratch > 0)}",
    )


def _least_budget(stages: Sequence[_Ways], budget: Budget) -> tuple[Budget, str]:
    """Return the nearest budget that is enough, and what of it is more than there is.

    With this GPU memory, if any host memory is enough beside it; else with more of the GPU's alone,
    or with the least of it and more host memory too, whichever is less in all.
    """
    given = budget.device or 0
    device = max(min(way.memory.required("device") for way in options) for options in stages)
    host = _least(stages, "host", "device", max(given, device))
    assert host is not None, "a way of every stage takes no more"
    if device <= given:
        return replace(budget, host=host), "host memory"
    alone = _least(stages, "device", "host", budget.host)
    if alone is not None and alone <= device + max(0, host - budget.host):
        return replace(budget, device=alone), "GPU memory"
    return replace(budget, device=device, host=host), "memory"


def _least(stages: Sequence[_Ways], place: Place, other: Place, limit: int) -> int | None:
    """Return the least bytes of a place that are enough beside `limit` of the other, if any are."""
    needs = [
        [way.memory.required(place) for way in options if way.memory.required(other) <= limit]
        for options in stages
    ]
    return max(map(min, needs)) if all(needs) else None


def budget_text(budget: Budget) -> str:
    """Describe a budget."""
    host = f"{gib(budget.host)} of host memory"
    return host if budget.device is None else f"{gib(budget.device)} of GPU memory, {host}"


def gib(size: int) -> str:
    """Format bytes in GiB, rounded up to a tenth; in MiB below one."""
    if size < GIB:
        return f"{-(-size // 2**20)} MiB"
    return f"{-(-size * 10 // GIB) / 10:.1f} GiB"
