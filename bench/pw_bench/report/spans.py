# SPDX-License-Identifier: Apache-2.0
"""Spans of a clip as rows of a waterfall: repeated ones folded into one row, short ones apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pw_runtime.system.trace import Span

MAIN = "MainThread"
SHORT = 0.005  # share of the wall time below which a row is only listed
_NUMBERED = re.compile(r"(.*\D) \d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Spans of one name in one place of a thread.

    Attributes:
        thread: they all belong to.
        path: names of the spans around them, outermost first, then their own; without numbers.
        spans: one after the other.
    """

    thread: str
    path: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        """With how many there are."""
        many = len(self.spans) > 1 or _NUMBERED.fullmatch(self.spans[0].name)
        return f"{self.path[-1]} × {len(self.spans)}" if many else self.path[-1]

    @property
    def level(self) -> int:
        """How many rows it lies in."""
        return len(self.path) - 1

    @property
    def seconds(self) -> float:
        """Of all its spans."""
        return sum(one.end - one.start for one in self.spans)

    @property
    def numbered(self) -> bool:
        """Whether its spans are steps, counted in their names."""
        return _NUMBERED.fullmatch(self.spans[0].name) is not None


def rows(spans: Sequence[Span]) -> list[Row]:
    """All rows, those of the main thread first, each below the one that it lies in.

    A span lies in the one before it of its thread that is less deep and not over: a thread that
    was started inside a span counts its depth from there.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Span]] = {}
    open_: dict[str, list[tuple[Span, tuple[str, ...]]]] = {}
    for one in sorted(spans, key=lambda span: (span.start, span.depth)):
        stack = open_.setdefault(one.thread, [])
        while stack and (stack[-1][0].depth >= one.depth or stack[-1][0].end <= one.start):
            stack.pop()
        numbered = _NUMBERED.fullmatch(one.name)
        path = (*(stack[-1][1] if stack else ()), numbered[1] if numbered else one.name)
        stack.append((one, path))
        found.setdefault((one.thread, path), []).append(one)

    def place(key: tuple[str, tuple[str, ...]]) -> tuple[object, ...]:
        thread, path = key
        above = [path[: i + 1] for i in range(len(path))]
        starts = tuple((found[thread, one][0].start, one[-1]) for one in above)
        return thread != main_thread(spans), thread, starts

    return [
        Row(thread=thread, path=path, spans=tuple(found[thread, path]))
        for thread, path in sorted(found, key=place)
    ]


def main_thread(spans: Sequence[Span]) -> str:
    """The thread whose spans the wall time is made of."""
    if not spans or any(one.thread == MAIN for one in spans):
        return MAIN
    return min(spans, key=lambda span: span.start).thread


def covered(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """When any of them was going on, as times from and to, apart from one another."""
    together: list[tuple[float, float]] = []
    for start, end in sorted((one.start, one.end) for one in spans):
        if together and start <= together[-1][1]:
            together[-1] = (together[-1][0], max(end, together[-1][1]))
        else:
            together.append((start, end))
    return together


def gaps(spans: Sequence[Span], wall: float) -> list[tuple[float, float]]:
    """When none of them was going on, between 0 and `wall`."""
    ends, found = 0.0, []
    for start, end in [*covered(spans), (wall, wall)]:
        if start > ends:
            found.append((ends, min(start, wall)))
        ends = max(ends, end)
    return found
