# SPDX-License-Identifier: Apache-2.0
"""One clip, drawn: where its time went, the time of each step, memory on the same time axis."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pw_bench.report import svg
from pw_bench.report.spans import SHORT, Row, covered, gaps, main_thread, rows
from pw_bench.report.tables import Table
from pw_bench.report.units import Scale, percent, quantity, scale_of, ticks
from pw_bench.results import Clip

BAR, STEPS, MEMORY = 18.0, 56.0, 84.0  # heights in pixels
POINTS = 400  # of a memory curve: of more, the least and the most of each stretch are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A row of the drawing: words left, plot, words right."""

    name: str
    level: int = 0
    note: str = ""
    plot: Markup
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A clip's section."""

    title: str
    wall: str
    reconciled: str  # how the main thread and what is unattributed add up to the wall time
    lanes: tuple[Lane, ...]
    others: tuple[Lane, ...]  # other threads
    memory: tuple[Lane, ...]
    steps: tuple[Lane, ...]
    seconds: tuple[tuple[str, str], ...]  # stage, its steps' seconds
    axis: Markup
    unit: str  # of the axis
    short: Table | None


def drawing(clip: Clip, title: str) -> Drawing:
    """Everything that a clip shows."""
    scale = scale_of("s", [clip.wall, clip.wall / 10])
    all_rows = rows(clip.spans)
    main = main_thread(clip.spans)
    shown = [one for one in all_rows if one.seconds >= SHORT * clip.wall]
    lanes = [_lane(one, clip.wall, scale) for one in shown if one.thread == main]
    others = [_lane(one, clip.wall, scale) for one in shown if one.thread != main]
    steps = [one for one in all_rows if one.numbered and one.path[-1] == "step"]
    marks = ticks(clip.wall / scale.factor)
    return Drawing(
        title=title,
        wall=scale(clip.wall),
        reconciled=_reconciled(clip, main, scale),
        lanes=(*lanes, _unattributed(clip, main, scale)),
        others=tuple(others),
        memory=tuple(_memory(clip)),
        steps=tuple(_steps(one) for one in steps),
        seconds=tuple((_stage(one), _seconds(one)) for one in steps),
        axis=svg.axis(
            [(one * scale.factor / clip.wall, f"{one:g}") for one in marks],
            f"0 to {scale(clip.wall)}",
        ),
        unit=scale.unit,
        short=_short([one for one in all_rows if one not in shown], clip.wall),
    )


def _plot_spans(row: Row, wall: float, kind: str) -> Markup:
    says = f"{row.name}: {quantity('s', row.seconds)}"
    plot = svg.picture(BAR, says)
    for start, end in covered(row.spans):
        svg.rect(plot, kind, (start / wall, end / wall), (3, 15), says)
    if len(row.spans) > 1:
        for one in row.spans:
            svg.line(plot, "cut", (one.start / wall,) * 2, (0, 3))
    return svg.finished(plot)


def _lane(row: Row, wall: float, scale: Scale) -> Lane:
    other = "" if row.thread == "MainThread" else " other"
    return Lane(
        name=row.name,
        level=row.level,
        note=row.thread if other else "",
        plot=_plot_spans(row, wall, f"span level{min(row.level, 2)}{other}"),
        value=scale(row.seconds),
        detail=percent(row.seconds / wall),
    )


def _unattributed(clip: Clip, main: str, scale: Scale) -> Lane:
    own = [one for one in clip.spans if one.thread == main]
    value = scale(clip.unattributed)
    plot = svg.picture(BAR, f"in no span: {value}")
    for start, end in gaps(own, clip.wall):
        svg.rect(plot, "span gap", (start / clip.wall, end / clip.wall), (3, 15), "in no span")
    return Lane(
        name="unattributed",
        note="in no span of the main thread",
        plot=svg.finished(plot),
        value=value,
        detail=percent(clip.unattributed / clip.wall),
    )


def _reconciled(clip: Clip, main: str, scale: Scale) -> str:
    within = sum(end - start for start, end in covered([s for s in clip.spans if s.thread == main]))
    total = within + clip.unattributed
    said = (
        f"Spans of the main thread {scale(within)} + unattributed {scale(clip.unattributed)} "
        f"= {scale(total)} of {scale(clip.wall)} wall time"
    )
    away = abs(total - clip.wall) / clip.wall
    said += "." if away <= 0.01 else f": they do not add up, by {percent(away)}."
    shares = clip.unattributed_shares
    if len(shares) < 2:
        return said
    ends = f"{percent(min(shares))} to {percent(max(shares))}"
    return f"{said} This is the run of median time; unattributed in all {len(shares)}: {ends}."


def _short(short: Sequence[Row], wall: float) -> Table | None:
    if not short:
        return None
    scale = scale_of("s", [one.seconds for one in short])
    return Table(
        columns=("span", "thread", "times", scale.unit, "of the wall time"),
        numbers=(2, 3, 4),
        rows=tuple(
            (
                " / ".join(one.path),
                one.thread,
                str(len(one.spans)),
                scale.number(one.seconds),
                f"{100 * one.seconds / wall:.2f} %",
            )
            for one in short
        ),
    )


def _stage(row: Row) -> str:
    return " / ".join(row.path[:-1]) or row.thread


def _seconds(row: Row) -> str:
    taken = [one.end - one.start for one in row.spans]
    scale = scale_of("s", taken)
    return f"{', '.join(scale.number(one) for one in taken)} {scale.unit}"


def _steps(row: Row) -> Lane:
    """A column for each step of a denoising stage."""
    taken = [one.end - one.start for one in row.spans]
    scale, top, count = scale_of("s", taken), max(taken) or 1.0, len(taken)
    middle = statistics.median(taken)
    plot = svg.picture(STEPS, f"{_stage(row)}: seconds of each of {count} steps")
    room = 0.8 if count > 8 else 0.95
    for i, (one, seconds) in enumerate(zip(row.spans, taken, strict=True)):
        y = STEPS - 2 - (STEPS - 6) * seconds / top
        says = f"{one.name}: {scale(seconds)}"
        svg.rect(plot, "span level1", (i / count, (i + room) / count), (y, STEPS - 2), says)
    y = STEPS - 2 - (STEPS - 6) * middle / top
    svg.line(plot, "median", (0, 1), (y, y))
    return Lane(
        name=_stage(row),
        note=f"{count} steps, in order; line: median",
        plot=svg.finished(plot),
        value=scale(middle),
        detail=f"{scale.number(min(taken))} to {scale.number(max(taken))}",
    )


def _memory(clip: Clip) -> list[Lane]:
    """Curves of host and GPU; the plan's prediction is dashed where the stage went on."""
    places = (("host", "resident, of the process", clip.host), ("device", "by NVML", clip.device))
    found = []
    for place, what, samples in places:
        planned = {stage: by[place] for stage, by in clip.predicted.items() if place in by}
        if not samples:
            continue
        most = max(value for _, value in samples)
        scale, top = scale_of("B", [most]), 1.08 * max(most, *planned.values(), 1)
        plot = svg.picture(MEMORY, f"{place} memory over time, at most {scale(most)}")
        svg.curve(plot, "curve", _thinned(samples, clip.wall, top), MEMORY)
        for stage, size in planned.items():
            y = MEMORY * (1 - size / top)
            start, end = _when(clip, stage)
            says = f"plan: {stage} {scale(size)}"
            svg.line(plot, "planned", (start / clip.wall, end / clip.wall), (y, y), says)
        dashed = ", ".join(f"{stage} {scale(size)}" for stage, size in planned.items())
        svg.line(plot, "grid", (0, 1), (MEMORY, MEMORY))
        found.append(
            Lane(
                name=f"{place} memory",
                note=f"{what}; dashed, as planned: {dashed}" if dashed else what,
                plot=svg.finished(plot),
                value=scale(most),
                detail="at most",
            )
        )
    return found


def _when(clip: Clip, stage: str) -> tuple[float, float]:
    """From the first to the last span of a stage; the whole run where it has none."""
    named = [one for one in clip.spans if one.name.partition(" ")[0] == stage]
    if not named:
        return 0.0, clip.wall
    return min(one.start for one in named), max(one.end for one in named)


def _thinned(
    samples: Sequence[tuple[float, int]], wall: float, top: float
) -> list[tuple[float, float]]:
    stretch = max(1, -(-2 * len(samples) // POINTS))
    kept: list[tuple[float, int]] = []
    for i in range(0, len(samples), stretch):
        part = samples[i : i + stretch]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return [(min(1.0, time / wall), size / top) for time, size in kept]
