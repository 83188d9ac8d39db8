# SPDX-License-Identifier: Apache-2.0
"""Figures side by side: a bar to the median, p10 to p90, and every sample as a dot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from pw_bench.report import svg
from pw_bench.report.findings import faults, label_of, split_name
from pw_bench.report.units import Scale, percent, quantity, scale_of, ticks
from pw_bench.results import Figure, Result

HEIGHT = 30.0  # pixels of a bar's row
SAME_SCALE = 50  # largest ratio of two medians in a group with one unit and number of decimals
EDGE = 2  # times the largest sample: rejected samples beyond are drawn at the edge
FOLD_FROM = 12  # bars, above which the groups are folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One figure, drawn."""

    name: str
    label: str | None  # how its clip differs from the others'
    faults: tuple[str, ...]
    value: str
    spread: str
    rate: str  # achieved, and its share of a ceiling; empty for kernels, whose table has it
    plot: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Figures of one measure on one scale."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    axis: Markup


def groups(result: Result) -> list[Group]:
    """Group all figures of a result by measure and unit, and by operation and size."""
    grouped: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in result.figures:
        group, _, measure = split_name(figure.name)
        grouped.setdefault((group, measure, figure.unit), []).append(figure)
    return [_group(result, *key, figures) for key, figures in grouped.items()]


def legend(figures: Iterable[Figure]) -> str:
    """Explain the marks that occur."""
    text = "Bar to the median; thick line p10 to p90; dots every sample, first one on top."
    if any(figure.rejected for figure in figures):
        text += " Rings: samples of a first, unstable series, after which all were measured again;"
        text += " those beyond the right edge are drawn at it."
    return text


def _group(result: Result, group: str, measure: str, unit: str, figures: list[Figure]) -> Group:
    values = [value for figure in figures for value in figure.samples]
    rejected = [value for figure in figures for value in figure.rejected]
    edge = max(values) * EDGE
    scale = scale_of(unit, values)
    top = 1.03 * max([*values, *(value for value in rejected if value <= edge)]) or 1.0
    medians = [figure.median for figure in figures]
    similar = max(medians) <= SAME_SCALE * min(medians)
    scales = [scale if similar else scale_of(unit, figure.samples) for figure in figures]
    title = ", ".join(part for part in (group.replace("/", ", "), measure) if part) or "Figures"
    marks = ticks(top / scale.factor)
    positions = [(mark * scale.factor / top, f"{mark:,g}") for mark in marks]
    return Group(
        title=title,
        unit=scale.unit,
        bars=tuple(_bar(result, *pair, top, title) for pair in zip(figures, scales, strict=True)),
        axis=svg.axis(positions, f"0 to {scale(top)}"),
    )


def _bar(result: Result, figure: Figure, scale: Scale, top: float, title: str) -> Bar:
    low, high = figure.spread
    name = split_name(figure.name)[1]
    count = len(figure.samples)
    samples = f"{count} samples" if count != 1 else "1 sample"
    description = f"{title}, {name}: median {scale(figure.median)}, {samples}"
    plot = svg.picture(HEIGHT, description)
    svg.rect(plot, "bar weak" if faults(figure) else "bar", (0, figure.median / top), (5, 25))
    svg.line(plot, "spread", (low / top, high / top), (15, 15))
    svg.line(plot, "median", (figure.median / top,) * 2, (3, 27))
    for css_class, values in (("rejected", figure.rejected), ("sample", figure.samples)):
        for i, value in enumerate(values):
            y = 6 + 18 * (i + 0.5) / len(values)
            svg.dot(plot, css_class, value / top, y, f"{value:.12g} {figure.unit}", 2.2)
    return Bar(
        name=name,
        label=label_of(result, name) if result.kind == "e2e" else None,
        faults=faults(figure),
        value=scale(figure.median),
        spread=f"{scale.number(low)} to {scale.number(high)}, {samples}",
        rate="" if result.kernels else _rate(figure),
        plot=svg.finished(plot),
    )


def _rate(figure: Figure) -> str:
    parts = []
    if figure.flops is not None and figure.median:
        parts.append(quantity("FLOP/s", figure.flops / figure.median))
    if figure.of_ceiling is not None:
        parts.append(f"{percent(figure.of_ceiling)} of ceiling")
    return ", ".join(parts)
