# SPDX-License-Identifier: Apache-2.0
"""Figures under the measured ceilings: FLOP per byte against FLOP/s, both logarithmic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from markupsafe import Markup

from pw_bench.report import svg
from pw_bench.report.findings import ceilings, faults
from pw_bench.report.tables import Table
from pw_bench.report.units import percent, quantity, scale_of
from pw_bench.results import Figure, Result

HEIGHT, FLOOR = 380.0, 352.0  # pixels: of the picture, and down to the x axis
NEAR_X, NEAR_Y = 0.05, 16.0  # share of the width, pixels: between points that share a number
LEFT = 0.02  # share of the width before the smallest intensity


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The picture, and what its numbers mean."""

    plot: Markup
    roofs: str  # names and rates
    names: str  # of the numbers
    points: Table
    left_out: int  # figures without FLOP or byte counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Ends of both axes, as powers of ten."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, intensity: float) -> float:
        """Share of the width."""
        along = (math.log10(intensity) - self.low_x) / (self.high_x - self.low_x)
        return LEFT + (1 - LEFT) * along

    def y(self, rate: float) -> float:
        """Pixels from above."""
        return FLOOR * (1 - (math.log10(rate) - self.low_y) / (self.high_y - self.low_y))


def roofline(result: Result) -> Roofline | None:
    """None where nothing has FLOP and byte counts. One number for each operation."""
    counted = [one for one in result.figures if one.flops and one.bytes and one.median]
    if not counted:
        return None
    operations = {row.figure: row.op for row in result.kernels}
    numbers: dict[str, int] = {}
    for one in counted:
        numbers.setdefault(operations.get(one.name, one.name), len(numbers) + 1)
    frame = _frame(result, counted)
    plot = svg.picture(HEIGHT, "Roofline: FLOP per byte against FLOP/s, both logarithmic")
    _grid(plot, frame)
    _roofs(plot, frame, result)
    names = [operations.get(one.name, one.name) for one in counted]
    points = sorted(zip([numbers[name] for name in names], counted, strict=True), key=_by_number)
    _points(plot, frame, points)
    kinds = [f"{name} {quantity('FLOP/s', one)}" for name, one in _flat(result).items()]
    copy = quantity("B/s", result.ceilings.copy.rate)
    columns = ("no.", "figure", "FLOP/B", "achieved", "of ceiling", "remarks")
    rows = tuple(_row(*point) for point in points)
    return Roofline(
        plot=svg.finished(plot),
        roofs=f"flat, {', '.join(kinds)}; sloping, copy {copy}",
        names=", ".join(f"{number} {name}" for name, number in numbers.items()),
        points=Table(columns=columns, numbers=(0, 2, 3, 4), rows=rows),
        left_out=len(result.figures) - len(counted),
    )


def _by_number(point: tuple[int, Figure]) -> int:
    return point[0]


def _row(number: int, figure: Figure) -> tuple[str, ...]:
    intensity = _intensity(figure)
    return (
        str(number),
        figure.name,
        f"{intensity:,.0f}" if intensity >= 100 else f"{intensity:.3g}",
        quantity("FLOP/s", _rate(figure)),
        "" if figure.of_ceiling is None else percent(figure.of_ceiling),
        "; ".join(faults(figure)),
    )


def _points(plot: Element, frame: _Frame, points: list[tuple[int, Figure]]) -> None:
    """Points that are close share their numbers, which would lie on one another."""
    close: dict[tuple[float, float], set[int]] = {}
    for number, one in points:
        x, y = frame.x(_intensity(one)), frame.y(_rate(one))
        says = f"{one.name}: {quantity('FLOP/s', _rate(one))} at {_intensity(one):.3g} FLOP/B"
        svg.dot(plot, "rejected" if faults(one) else "point", x, y, says, 3.5)
        near = (at for at in close if abs(at[0] - x) < NEAR_X and abs(at[1] - y) < NEAR_Y)
        close.setdefault(next(near, (x, y)), set()).add(number)
    for (x, y), numbers in close.items():
        words = ", ".join(str(one) for one in sorted(numbers))
        anchor, aside = ("end", -8.0) if x > 0.85 else ("start", 8.0)
        svg.text(plot, words, x, y + 4, anchor, aside)


def _intensity(figure: Figure) -> float:
    return (figure.flops or 0) / (figure.bytes or 1)


def _rate(figure: Figure) -> float:
    return (figure.flops or 0) / figure.median


def _frame(result: Result, counted: list[Figure]) -> _Frame:
    roofs = [*_flat(result).values()]
    ridge = max(roofs) / result.ceilings.copy.rate
    across = [*(_intensity(one) for one in counted), ridge]
    up = [*(_rate(one) for one in counted), *roofs]
    return _Frame(
        low_x=math.floor(math.log10(min(across)) - 0.2),
        high_x=math.ceil(math.log10(max(across)) + 0.2),
        low_y=math.floor(math.log10(min(up)) - 0.1),
        high_y=math.ceil(math.log10(max(up)) + 0.1),
    )


def _grid(plot: Element, frame: _Frame) -> None:
    for power in range(int(frame.low_x), int(frame.high_x) + 1):
        x = frame.x(10.0**power)
        svg.line(plot, "grid", (x, x), (0, FLOOR))
        last = power == int(frame.high_x)
        words = f"{10.0**power:g}" + (" FLOP/B" if last else "")
        svg.text(plot, words, x, FLOOR + 18, "end" if last else "middle")
    for power in range(int(frame.low_y), int(frame.high_y) + 1):
        y = frame.y(10.0**power)
        svg.line(plot, "grid", (LEFT, 1), (y, y))
        if power > frame.low_y:
            scale = scale_of("FLOP/s", [10.0**power])
            svg.text(plot, f"{10.0**power / scale.factor:g} {scale.unit}", LEFT, y + 14, "start")


def _flat(result: Result) -> dict[str, float]:
    """Roofs by kind of arithmetic, the highest first."""
    kinds = {name: one.rate for name, one in ceilings(result).items() if name != "copy"}
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1]))


def _roofs(plot: Element, frame: _Frame, result: Result) -> None:
    """The slope of the copy, and a flat roof for each kind of arithmetic."""
    kinds, bandwidth = _flat(result), result.ceilings.copy.rate
    most = max(kinds.values())
    start = max(10.0**frame.low_x, 10.0**frame.low_y / bandwidth)
    ends = (frame.x(start), frame.x(most / bandwidth))
    says = f"copy {quantity('B/s', bandwidth)}"
    svg.line(plot, "roof", ends, (frame.y(start * bandwidth), frame.y(most)), says)
    for name, one in kinds.items():
        says = f"{name} {quantity('FLOP/s', one)}"
        svg.line(plot, "roof", (frame.x(one / bandwidth), 1), (frame.y(one),) * 2, says)
