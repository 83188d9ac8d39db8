# SPDX-License-Identifier: Apache-2.0
"""Numbers as text: always with a unit, and the same unit within one chart or column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# From the largest down: the first step that the largest value reaches applies, else the last.
_STEPS: Final = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "J": ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")),
    "B/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One unit and one number of decimals for values shown together."""

    factor: float
    unit: str
    decimals: int

    def number(self, value: float) -> str:
        """Format without the unit, which stands once above or after."""
        return f"{value / self.factor:,.{self.decimals}f}"

    def __call__(self, value: float) -> str:
        """Format with the unit."""
        return f"{self.number(value)} {self.unit}"


def scale_of(unit: str, values: Iterable[float]) -> Scale:
    """Return the scale whose unit suits the largest value, and decimals the smallest but zero.

    Args:
        unit: unit of the values: "s", "B", "J", "FLOP/s" or "B/s".
        values: values shown together.
    """
    sizes = sorted(abs(value) for value in values if value)
    steps = _STEPS[unit]
    factor, name = next((step for step in steps if sizes and sizes[-1] >= step[0]), steps[-1])
    least = sizes[0] / factor if sizes else 1.0
    digits = 2 - math.floor(math.log10(least))  # three significant digits
    return Scale(factor=factor, unit=name, decimals=min(4, max(0, digits)))


def quantity(unit: str, value: float) -> str:
    """Format one value by itself."""
    return scale_of(unit, [value])(value)


def percent(share: float) -> str:
    """Format a share of one in percent, with a decimal below 100 %."""
    return f"{100 * share:.1f} %" if abs(share) < 0.9995 else f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    """Format a speed-up."""
    return f"{ratio:.2f} x"


def small(value: float) -> str:
    """Format an error: two digits and the power of ten."""
    return "0" if value == 0 else f"{value:.1e}"


def cosine(value: float) -> str:
    """Format a cosine; near one as one minus the difference."""
    return f"1 - {1 - value:.1e}" if 0 < 1 - value < 1e-3 else f"{value:.4g}"


def ticks(top: float, most: int = 5) -> list[float]:
    """Return round numbers from zero to `top`, at most `most` of them besides zero."""
    if top <= 0:
        return [0.0]
    rough = top / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
    return [i * step for i in range(int(top / step + 1e-9) + 1)]
