# SPDX-License-Identifier: Apache-2.0
"""One clip, drawn: its spans, the time of each step, memory on the same time axis."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pw_bench.report import svg
from pw_bench.report.spans import SHORT, Row, covered, gaps, main_thread, rows
from pw_bench.report.tables import Table
from pw_bench.report.units import Scale, percent, quantity, scale_of, ticks
from pw_bench.result_sections import Clip

BAR, STEPS, MEMORY = 18.0, 56.0, 84.0  # heights in pixels
POINTS = 400  # of a memory curve: with more, minimum and maximum of each stretch are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A row of the drawing: text on the left, plot, text on the right."""

    name: str
    level: int = 0
    note: str = ""
    plot: Markup
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The section of one clip."""

    title: str
    wall: str
    reconciled: str  # how main thread and unattributed time add up to the wall time
    lanes: tuple[Lane, ...]
    others: tuple[Lane, ...]  # other threads
    memory: tuple[Lane, ...]
    steps: tuple[Lane, ...]
    seconds: tuple[tuple[str, str], ...]  # stage, its steps' seconds
    axis: Markup
    unit: str  # of the axis
    short: Table | None


def drawing(clip: Clip, title: str) -> Drawing:
    """Draw a clip."""
    scale = scale_of("s", [clip.wall, clip.wall / 10])
    all_rows = rows(clip.spans)
    main = main_thread(clip.spans)
    long = [row for row in all_rows if row.seconds >= SHORT * clip.wall]
    short = [row for row in all_rows if row not in long]
    lanes = [_lane(row, clip.wall, scale) for row in long if row.thread == main]
    others = [_lane(row, clip.wall, scale) for row in long if row.thread != main]
    steps = [row for row in all_rows if row.numbered and row.path[-1] == "step"]
    marks = ticks(clip.wall / scale.factor)
    return Drawing(
        title=title,
        wall=scale(clip.wall),
        reconciled=_reconciled(clip, main, scale),
        lanes=(*lanes, _unattributed(clip, main, scale)),
        others=tuple(others),
        memory=tuple(_memory(clip)),
        steps=tuple(_steps(row) for row in steps),
        seconds=tuple((_stage(row), _seconds(row)) for row in steps),
        axis=svg.axis(
            [(mark * scale.factor / clip.wall, f"{mark:g}") for mark in marks],
            f"0 to {scale(clip.wall)}",
        ),
        unit=scale.unit,
        short=_short_spans(short, clip.wall),
    )


def _plot_spans(row: Row, wall: float, css_class: str) -> Markup:
    title = f"{row.name}: {quantity('s', row.seconds)}"
    plot = svg.picture(BAR, title)
    for start, end in covered(row.spans):
        svg.rect(plot, css_class, (start / wall, end / wall), (3, 15), title)
    if len(row.spans) > 1:
        for span in row.spans:
            svg.line(plot, "cut", (span.start / wall,) * 2, (0, 3))
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
    own = [span for span in clip.spans if span.thread == main]
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
    own = [span for span in clip.spans if span.thread == main]
    within = sum(end - start for start, end in covered(own))
    total = within + clip.unattributed
    text = (
        f"Spans of the main thread {scale(within)} + unattributed {scale(clip.unattributed)} "
        f"= {scale(total)} of {scale(clip.wall)} wall time"
    )
    away = abs(total - clip.wall) / clip.wall
    text += "." if away <= 0.01 else f": they do not add up, by {percent(away)}."
    shares = clip.unattributed_shares
    if len(shares) < 2:
        return text
    ends = f"{percent(min(shares))} to {percent(max(shares))}"
    return f"{text} This is the run of median time; unattributed in all {len(shares)}: {ends}."


def _short_spans(rows: Sequence[Row], wall: float) -> Table | None:
    if not rows:
        return None
    scale = scale_of("s", [row.seconds for row in rows])
    return Table(
        columns=("span", "thread", "times", scale.unit, "of the wall time"),
        numbers=(2, 3, 4),
        rows=tuple(
            (
                " / ".join(row.path),
                row.thread,
                str(len(row.spans)),
                scale.number(row.seconds),
                f"{100 * row.seconds / wall:.2f} %",
            )
            for row in rows
        ),
    )


def _stage(row: Row) -> str:
    return " / ".join(row.path[:-1]) or row.thread


def _seconds(row: Row) -> str:
    seconds = [span.end - span.start for span in row.spans]
    scale = scale_of("s", seconds)
    return f"{', '.join(scale.number(value) for value in seconds)} {scale.unit}"


def _steps(row: Row) -> Lane:
    """Draw a column for each step of a denoising stage."""
    times = [span.end - span.start for span in row.spans]
    scale, top, count = scale_of("s", times), max(times) or 1.0, len(times)
    median = statistics.median(times)
    plot = svg.picture(STEPS, f"{_stage(row)}: seconds of each of {count} steps")
    width = 0.8 if count > 8 else 0.95
    for i, (span, seconds) in enumerate(zip(row.spans, times, strict=True)):
        y = STEPS - 2 - (STEPS - 6) * seconds / top
        title = f"{span.name}: {scale(seconds)}"
        svg.rect(plot, "span level1", (i / count, (i + width) / count), (y, STEPS - 2), title)
    y = STEPS - 2 - (STEPS - 6) * median / top
    svg.line(plot, "median", (0, 1), (y, y))
    return Lane(
        name=_stage(row),
        note=f"{count} steps, in order; line: median",
        plot=svg.finished(plot),
        value=scale(median),
        detail=f"{scale.number(min(times))} to {scale.number(max(times))}",
    )


def _memory(clip: Clip) -> list[Lane]:
    """Draw memory of host and GPU; the plan's prediction is dashed during its stage."""
    curves = (("host", "resident, of the process", clip.host), ("device", "by NVML", clip.device))
    lanes = []
    for place, source, samples in curves:
        if not samples:
            continue
        planned = {stage: sizes[place] for stage, sizes in clip.predicted.items() if place in sizes}
        peak = max(value for _, value in samples)
        scale, top = scale_of("B", [peak]), 1.08 * max(peak, *planned.values(), 1)
        plot = svg.picture(MEMORY, f"{place} memory over time, at most {scale(peak)}")
        svg.curve(plot, "curve", _thinned(samples, clip.wall, top), MEMORY)
        for stage, size in planned.items():
            y = MEMORY * (1 - size / top)
            start, end = _interval_of(clip, stage)
            title = f"plan: {stage} {scale(size)}"
            svg.line(plot, "planned", (start / clip.wall, end / clip.wall), (y, y), title)
        dashed = ", ".join(f"{stage} {scale(size)}" for stage, size in planned.items())
        svg.line(plot, "grid", (0, 1), (MEMORY, MEMORY))
        lanes.append(
            Lane(
                name=f"{place} memory",
                note=f"{source}; dashed, as planned: {dashed}" if dashed else source,
                plot=svg.finished(plot),
                value=scale(peak),
                detail="at most",
            )
        )
    return lanes


def _interval_of(clip: Clip, stage: str) -> tuple[float, float]:
    """Return the time from first to last span of a stage; the whole run where it has none."""
    spans = [span for span in clip.spans if span.name.partition(" ")[0] == stage]
    if not spans:
        return 0.0, clip.wall
    return min(span.start for span in spans), max(span.end for span in spans)


def _thinned(
    samples: Sequence[tuple[float, int]], wall: float, top: float
) -> list[tuple[float, float]]:
    """Keep the minimum and maximum of each stretch, as shares of wall time and height."""
    stretch = max(1, -(-2 * len(samples) // POINTS))
    kept: list[tuple[float, int]] = []
    for i in range(0, len(samples), stretch):
        window = samples[i : i + stretch]
        kept += sorted({min(window, key=lambda s: s[1]), max(window, key=lambda s: s[1])})
    return [(min(1.0, time / wall), size / top) for time, size in kept]
