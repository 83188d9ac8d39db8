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
NEAR_X, NEAR_Y = 0.05, 16.0  # share of the width, pixels: closer points share a label
LEFT = 0.02  # share of the width before the smallest intensity


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The picture and the key to its numbers."""

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
        """Return the share of the width."""
        along = (math.log10(intensity) - self.low_x) / (self.high_x - self.low_x)
        return LEFT + (1 - LEFT) * along

    def y(self, rate: float) -> float:
        """Return pixels from the top."""
        return FLOOR * (1 - (math.log10(rate) - self.low_y) / (self.high_y - self.low_y))


def roofline(result: Result) -> Roofline | None:
    """Return the roofline; None without ceilings, or where no figure has FLOP and byte counts.

    Every operation has one number.
    """
    counted = [f for f in result.figures if f.flops and f.bytes and f.median]
    copy = result.ceilings.copy.rate if result.ceilings else 0.0
    if not counted or not copy:
        return None
    operations = {row.figure: row.op for row in result.kernels}
    numbers: dict[str, int] = {}
    names = [operations.get(figure.name, figure.name) for figure in counted]
    for name in names:
        numbers.setdefault(name, len(numbers) + 1)
    roofs = _flat_roofs(result)
    frame = _frame(roofs, copy, counted)
    plot = svg.picture(HEIGHT, "Roofline: FLOP per byte against FLOP/s, both logarithmic")
    _grid(plot, frame)
    _draw_roofs(plot, frame, roofs, copy)
    points = sorted(zip([numbers[name] for name in names], counted, strict=True), key=_by_number)
    _points(plot, frame, points)
    flat = [f"{name} {quantity('FLOP/s', rate)}" for name, rate in roofs.items()]
    columns = ("no.", "figure", "FLOP/B", "achieved", "of ceiling", "remarks")
    rows = tuple(_row(*point) for point in points)
    return Roofline(
        plot=svg.finished(plot),
        roofs=f"flat, {', '.join(flat)}; sloping, copy {quantity('B/s', copy)}",
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
    """Draw the points; close ones share a label, since their numbers would overlap."""
    close: dict[tuple[float, float], set[int]] = {}
    for number, figure in points:
        x, y = frame.x(_intensity(figure)), frame.y(_rate(figure))
        rate = quantity("FLOP/s", _rate(figure))
        title = f"{figure.name}: {rate} at {_intensity(figure):.3g} FLOP/B"
        svg.dot(plot, "rejected" if faults(figure) else "point", x, y, title, 3.5)
        near = (at for at in close if abs(at[0] - x) < NEAR_X and abs(at[1] - y) < NEAR_Y)
        close.setdefault(next(near, (x, y)), set()).add(number)
    for (x, y), numbers in close.items():
        label = ", ".join(str(number) for number in sorted(numbers))
        anchor, shift = ("end", -8.0) if x > 0.85 else ("start", 8.0)
        svg.text(plot, label, x, y + 4, anchor, shift)


def _intensity(figure: Figure) -> float:
    return (figure.flops or 0) / (figure.bytes or 1)


def _rate(figure: Figure) -> float:
    return (figure.flops or 0) / figure.median


def _frame(roofs: dict[str, float], copy: float, counted: list[Figure]) -> _Frame:
    ridge = max(roofs.values()) / copy
    intensities = [*(_intensity(figure) for figure in counted), ridge]
    rates = [*(_rate(figure) for figure in counted), *roofs.values()]
    return _Frame(
        low_x=math.floor(math.log10(min(intensities)) - 0.2),
        high_x=math.ceil(math.log10(max(intensities)) + 0.2),
        low_y=math.floor(math.log10(min(rates)) - 0.1),
        high_y=math.ceil(math.log10(max(rates)) + 0.1),
    )


def _grid(plot: Element, frame: _Frame) -> None:
    for power in range(int(frame.low_x), int(frame.high_x) + 1):
        x = frame.x(10.0**power)
        svg.line(plot, "grid", (x, x), (0, FLOOR))
        last = power == int(frame.high_x)
        label = f"{10.0**power:g}" + (" FLOP/B" if last else "")
        svg.text(plot, label, x, FLOOR + 18, "end" if last else "middle")
    for power in range(int(frame.low_y), int(frame.high_y) + 1):
        y = frame.y(10.0**power)
        svg.line(plot, "grid", (LEFT, 1), (y, y))
        if power > frame.low_y:
            scale = scale_of("FLOP/s", [10.0**power])
            svg.text(plot, f"{10.0**power / scale.factor:g} {scale.unit}", LEFT, y + 14, "start")


def _flat_roofs(result: Result) -> dict[str, float]:
    """Return the rates of arithmetic by name, the highest first."""
    rates = {name: ceiling.rate for name, ceiling in ceilings(result).items() if name != "copy"}
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def _draw_roofs(plot: Element, frame: _Frame, roofs: dict[str, float], copy: float) -> None:
    """Draw the slope of the copy, and a flat roof for each kind of arithmetic."""
    top = max(roofs.values())
    start = max(10.0**frame.low_x, 10.0**frame.low_y / copy)
    ends = (frame.x(start), frame.x(top / copy))
    title = f"copy {quantity('B/s', copy)}"
    svg.line(plot, "roof", ends, (frame.y(start * copy), frame.y(top)), title)
    for name, rate in roofs.items():
        title = f"{name} {quantity('FLOP/s', rate)}"
        svg.line(plot, "roof", (frame.x(rate / copy), 1), (frame.y(rate),) * 2, title)
