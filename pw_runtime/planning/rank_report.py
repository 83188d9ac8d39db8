# SPDX-License-Identifier: Apache-2.0
"""The text of a plan for several ranks: what each takes, who computes, what they send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pw_runtime.errors import BadRequest
from pw_runtime.planning.candidates import candidates, split_text, splits, variants
from pw_runtime.planning.planner import gib, make_plan
from pw_runtime.planning.report import (
    head_lines,
    item_lines,
    places,
    row,
    tail_lines,
    time_text,
)
from pw_runtime.planning.stage_times import (
    seconds_by_stage,
    traffic_of_decode,
    transformer_seconds,
    transformer_traffic,
)
from pw_runtime.planning.time_estimate import Rates
from pw_runtime.planning.transformer_memory import stage_slices
from pw_runtime.planning.workload import Workload
from pw_runtime.types import RunPlan, Split, StageName


def ranks_report(work: Workload, plan: RunPlan, rates: Rates | None, *, verbose: bool) -> str:
    """Describe what each rank takes in every stage, how the work is divided and why.

    Args:
        work: what was planned.
        plan: of `make_plan`.
        rates: of a device and of the link between two, for times; None: no times.
        verbose: list everything that is in memory at each peak.
    """
    return "\n".join(_lines(work, plan, rates, verbose))


def _lines(work: Workload, plan: RunPlan, rates: Rates | None, verbose: bool) -> Iterator[str]:
    gpu = plan.budget.device is not None
    yield from head_lines(work)
    host = f"{gib(plan.budget.host)} of host memory for all"
    if plan.budget.device is None:
        yield f"{work.ranks} processes on the CPU, {host}"
    else:
        yield f"{work.ranks} devices, each with {gib(plan.budget.device)} of GPU memory; {host}"
    yield ""
    yield from _table(work, plan, rates)
    yield ""
    yield from _traffic_table(work, plan)
    yield ""
    yield from plan.decisions
    for name in plan.transformers:
        yield from _reasons(work, plan, name, rates)
    yield from tail_lines(work, plan)
    if rates is not None and rates.link is not None:
        yield (
            f"times: {rates.source}, {rates.link / 1e9:.3g} GB/s from each device to the others "
            "and as much back, not overlapped with computation; without loading and encoding"
        )
    elif gpu:
        yield "times: only with --gpu, as the link between the devices is not measured"
    else:
        yield "times: none, as the processes share the cores of one machine"
    for memory in plan.stages if verbose else ():
        yield f"\n{memory.stage}: at its peak, rank 0"
        yield from item_lines(memory.items, gpu=gpu)
        largest = max(memory.others, key=lambda items: sum(item.bytes for item in items))
        yield f"{memory.stage}: at its peak, rank {1 + memory.others.index(largest)}"
        yield from item_lines(largest, gpu=gpu)


def _table(work: Workload, plan: RunPlan, rates: Rates | None) -> Iterator[str]:
    """List memory by stage, of the first rank and of that other one which takes the most; time."""
    shown = places(gpu=plan.budget.device is not None)
    names = {"device": "GPU", "host": "host"}
    heads = [head for place in shown for head in (f"{names[place]} rank 0", "others")]
    times = {} if rates is None else seconds_by_stage(work, plan, rates)
    alone = _seconds_alone(work, plan, rates)
    computing: dict[str, int] = {
        **{name: chosen.split.ranks for name, chosen in plan.transformers.items()},
        "decode": plan.decode.ranks,
    }
    timed = ["per clip", "one device", "speed-up"] if times else []
    yield row(["stage", "ranks", *heads, *timed])
    for memory in plan.stages:
        cells = [str(computing.get(memory.stage, 1))]
        for place in shown:
            first, *others = memory.of_ranks(place)
            cells += [gib(first), gib(max(others))]
        if times:
            cells += _times(times.get(memory.stage), alone.get(memory.stage))
        yield row([memory.stage, *cells])
    if times:
        total = sum(alone.values()) if alone else None
        yield row(["all", "", *("" for _ in heads), *_times(sum(times.values()), total)])


def _times(seconds: float | None, alone: float | None) -> list[str]:
    ratio = "-" if seconds is None or alone is None else f"{alone / seconds:.2f}x"
    return [time_text(seconds), time_text(alone), ratio]


def _seconds_alone(work: Workload, plan: RunPlan, rates: Rates | None) -> dict[str, float]:
    """Estimate the seconds on one such device, which may need another plan; {}: it cannot."""
    if rates is None:
        return {}
    one = replace(work, ranks=1)
    try:
        fitted = make_plan(candidates(one, gpu=plan.budget.device is not None), plan.budget)
    except BadRequest:
        return {}
    return seconds_by_stage(one, fitted, rates)


def _traffic_table(work: Workload, plan: RunPlan) -> Iterator[str]:
    """List what all ranks together send: in a step, and in the decode of a clip."""
    yield row(["sent", "exchanged", "weights", "latents", "pixels"])
    for name, chosen in plan.transformers.items():
        step = transformer_traffic(work, name, chosen)
        yield row([name, *map(gib, (step.exchange, step.weights, step.latents)), "-", "  a step"])
    clip = traffic_of_decode(work, plan.decode)
    sizes = (gib(clip.border * clip.borders), "-", gib(clip.latents), gib(clip.pixels))
    yield row(["decode", *sizes, "  a clip"])


def _reasons(work: Workload, plan: RunPlan, name: StageName, rates: Rates | None) -> Iterator[str]:
    """Give the reasons for the division of a stage, and for ranks that wait."""
    chosen, stage = plan.transformers[name], work.stages[name]
    if rates is not None:
        seconds: dict[Split, float] = {}
        for way in variants(work, name, chosen.weights):
            if way.chunk == chosen.chunk:  # of one division, that which shares comes first
                seconds.setdefault(way.split, transformer_seconds(work, name, way, rates))
        fastest_first = sorted(seconds.items(), key=lambda item: item[1])
        compared = ", ".join(f"{split_text(way)} {time_text(s)}" for way, s in fastest_first)
        yield f"{name}: modelled divisions: {compared}"
    waiting = work.ranks - chosen.split.ranks
    if not waiting:
        return
    text = f"{name}: {waiting} of {work.ranks} ranks wait"
    if work.options.blocks != "segments":
        yield f"{text}: engines of --blocks {work.options.blocks} run on one rank"
        return
    if chosen.split.ranks < max(split.ranks for split in splits(work, name)):
        yield f"{text}, as more do not fit into memory or are slower"
        return
    slices = len(stage_slices(stage, work.preset.video, chosen.chunk, padded=work.padded))
    yield (
        f"{text}: its {stage.tokens(work.preset.video)} tokens are {slices} "
        f"slice{'s' * (slices > 1)} of up to {chosen.chunk}; a smaller --chunk divides them "
        "further and changes the result by rounding"
    )
