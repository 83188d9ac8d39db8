# SPDX-License-Identifier: Apache-2.0
"""The text of a plan, for users."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from pw_runtime.execution.sparse_stage import kept_fraction, sparse_approximation
from pw_runtime.models.quantized_linear import approximation
from pw_runtime.planning.candidates import transformer_candidates
from pw_runtime.planning.decode_choices import decode_traffic
from pw_runtime.planning.exactness import approximations
from pw_runtime.planning.planner import budget_text, fits, gib
from pw_runtime.planning.stage_times import seconds_by_stage
from pw_runtime.planning.time_estimate import Rates
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import Blocks, Budget, MemoryItem, Place, RunPlan


def plan_report(work: Workload, plan: RunPlan, rates: Rates | None, *, verbose: bool) -> str:
    """Describe what each stage takes at its peak, how it runs and why.

    Args:
        work: what was planned.
        plan: of `make_plan`.
        rates: of the machine, for times; None: no times.
        verbose: list everything that is in memory at each peak.
    """
    return "\n".join(_lines(work, plan, rates, verbose))


def division_report(
    divisions: Mapping[Blocks, Workload | str], budget: Budget, chosen: Blocks
) -> Iterator[str]:
    """Describe how each division of a block among engines fits into a budget.

    Args:
        divisions: the workload with the engines of each, or what is missing.
        budget: of a GPU.
        chosen: the division of the plan.
    """
    default = "the default, as no GPU has compared them" if chosen == "segments" else "asked for"
    for blocks, work in divisions.items():
        if isinstance(work, str):
            text = f"not built ({work})"
        else:
            peaks = []
            for stage in work.stages:
                options = [way.memory for way in transformer_candidates(work, stage, gpu=True)]
                peaks.append(next((way for way in options if fits(way, budget)), options[-1]))
            peak = max(memory.required("device") for memory in peaks)
            fit = "fits" if all(fits(memory, budget) for memory in peaks) else "does not fit"
            text = f"{gib(peak)} of GPU memory, {gib(work.held_scratch)} of it scratch: {fit}"
        yield f"blocks as {blocks}: {text}" + f"; chosen, {default}" * (blocks == chosen)


def _lines(work: Workload, plan: RunPlan, rates: Rates | None, verbose: bool) -> Iterator[str]:
    gpu = plan.budget.device is not None
    yield from head_lines(work)
    yield f"budget: {budget_text(plan.budget)}"
    yield ""
    times = {} if rates is None else seconds_by_stage(work, plan, rates)
    columns = ["stage", *(["GPU"] if gpu else []), "host", *(["per clip"] if times else [])]
    yield row(columns)
    for memory in plan.stages:
        peaks = [gib(memory.peak(place)) for place in places(gpu=gpu)]
        time = [time_text(times.get(memory.stage))] if times else []
        yield row([memory.stage, *peaks, *time])
    most = [gib(max(memory.peak(place) for memory in plan.stages)) for place in places(gpu=gpu)]
    yield row(["peak", *most, *([time_text(sum(times.values()))] if times else [])])
    yield ""
    yield from plan.decisions
    yield from tail_lines(work, plan)
    if rates is not None:
        cached = "; the draft's before what --step-cache saves"
        more = cached if work.options.step_cache is not None else ""
        yield f"times: {rates.source}; without loading and encoding{more}"
    for memory in plan.stages if verbose else ():
        yield f"\n{memory.stage}: at its peak"
        yield from item_lines(memory.items, gpu=gpu)


def head_lines(work: Workload) -> Iterator[str]:
    """Describe the clip and how it is approximated."""
    last, video = list(work.stages.values())[-1], work.preset.video
    yield f"{video.frames} frames of {last.width}x{last.height}, {work.options.compute_precision}"
    for text in approximations(work.options):
        yield f"approximate: {text}"
    if work.options.linear != "exact":
        for name, config in work.transformers.items():
            yield f"{name}: {approximation(config.num_layers, work.options.linear)}"
    for name, stage in work.stages.items():
        if (keep := kept_fraction(work.options, name)) is not None:
            yield f"{name}: {sparse_approximation(keep, stage.tokens(video))}"


def tail_lines(work: Workload, plan: RunPlan) -> Iterator[str]:
    """Describe what crosses to the host, and what is on the disk."""
    if plan.budget.device is not None and (copied := decode_traffic(work, plan.decode)):
        yield f"decode: {gib(copied)} cross between host and GPU in each clip"
    yield f"disk: {_mib(latent_bytes(work))} for a clip's latents until its video is complete"
    if stored := plan.decode.store_bytes:
        yield f"disk: {_mib(stored)} for the finished tiles of the clip that is decoded"


def latent_bytes(work: Workload) -> int:
    """Return the bytes of the latents and the noise of one clip."""
    shapes = [latent_shape(stage, work.preset.video) for stage in work.stages.values()]
    return sum(2 * 4 * math.prod(shape) for shape in shapes)


def item_lines(items: Iterable[MemoryItem], *, gpu: bool) -> Iterator[str]:
    """List what is in memory."""
    for item in items:
        where = f"{'GPU' if item.place == 'device' else 'host':<5}" if gpu else ""
        yield f"  {_mib(item.bytes):>12}  {where}{item.name}"


def places(*, gpu: bool) -> tuple[Place, ...]:
    """Return the places where a run has memory."""
    return ("device", "host") if gpu else ("host",)


def row(cells: Iterable[str]) -> str:
    """Format a row of a table."""
    first, *others = cells
    return f"{first:<10}" + "".join(f"{cell:>12}" for cell in others)


def time_text(seconds: float | None) -> str:
    """Format seconds, long ones in minutes."""
    if seconds is None:
        return "-"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
