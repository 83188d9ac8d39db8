# SPDX-License-Identifier: Apache-2.0
"""Figures side by side: a bar to the median, p10 to p90, and every sample as a dot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from pw_bench.report import svg
from pw_bench.report.findings import faults, label_of, parts
from pw_bench.report.units import Scale, percent, quantity, scale_of, ticks
from pw_bench.results import Figure, Result

HEIGHT = 30.0  # pixels of a bar's row
ALIKE = 50  # times as large: up to here all values of a group have one unit and its decimals
FAR = 2  # times the largest sample: rejected ones beyond are drawn at the edge
MANY = 12  # bars, above which the groups are folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One figure, drawn."""

    name: str
    label: str | None  # how its clip differs from the others'
    faults: tuple[str, ...]
    value: str
    spread: str
    rate: str  # achieved, and its share of a ceiling; of kernels their table says it
    plot: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Figures of one measure on one scale."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    axis: Markup


def groups(result: Result) -> list[Group]:
    """All figures of a result; cold, warm and memories apart, operations and sizes apart."""
    apart: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in result.figures:
        before, _, measure = parts(figure.name)
        apart.setdefault((before, measure, figure.unit), []).append(figure)
    return [_group(result, *key, figures) for key, figures in apart.items()]


def legend(figures: Iterable[Figure]) -> str:
    """What the marks mean, of those that are there."""
    said = "Bar to the median; thick line p10 to p90; dots every sample, first one on top."
    if any(one.rejected for one in figures):
        said += " Rings: samples of a first round that was unstable, so all were taken again;"
        said += " at the right edge, those beyond it."
    return said


def _group(result: Result, before: str, measure: str, unit: str, figures: list[Figure]) -> Group:
    values = [value for one in figures for value in one.samples]
    rejected = [value for one in figures for value in one.rejected]
    edge = max(values) * FAR
    scale = scale_of(unit, values)
    top = 1.03 * max([*values, *(one for one in rejected if one <= edge)]) or 1.0
    medians = [one.median for one in figures]
    alike = max(medians) <= ALIKE * min(medians)
    scales = [scale if alike else scale_of(unit, one.samples) for one in figures]
    said = ", ".join(one for one in (before.replace("/", ", "), measure) if one) or "Figures"
    marks = ticks(top / scale.factor)
    places = [(one * scale.factor / top, f"{one:,g}") for one in marks]
    return Group(
        title=said,
        unit=scale.unit,
        bars=tuple(_bar(result, *one, top, said) for one in zip(figures, scales, strict=True)),
        axis=svg.axis(places, f"0 to {scale(top)}"),
    )


def _bar(result: Result, figure: Figure, scale: Scale, top: float, title: str) -> Bar:
    low, high = figure.spread
    name = parts(figure.name)[1]
    count = len(figure.samples)
    samples = f"{count} samples" if count != 1 else "1 sample"
    says = f"{title}, {name}: median {scale(figure.median)}, {samples}"
    plot = svg.picture(HEIGHT, says)
    svg.rect(plot, "bar weak" if faults(figure) else "bar", (0, figure.median / top), (5, 25))
    svg.line(plot, "spread", (low / top, high / top), (15, 15))
    svg.line(plot, "median", (figure.median / top,) * 2, (3, 27))
    for kind, taken in (("rejected", figure.rejected), ("sample", figure.samples)):
        for i, value in enumerate(taken):
            y = 6 + 18 * (i + 0.5) / len(taken)
            svg.dot(plot, kind, value / top, y, f"{value:.12g} {figure.unit}", 2.2)
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
    said = []
    if figure.flops is not None and figure.median:
        said.append(quantity("FLOP/s", figure.flops / figure.median))
    if figure.of_ceiling is not None:
        said.append(f"{percent(figure.of_ceiling)} of ceiling")
    return ", ".join(said)
