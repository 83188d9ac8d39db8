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
    """Spans of one name at one position in a thread.

    Attributes:
        thread: that all of them belong to.
        path: names of the enclosing spans, outermost first, then their own; without numbers.
        spans: in order of time.
    """

    thread: str
    path: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        """Name with the number of spans."""
        many = len(self.spans) > 1 or _NUMBERED.fullmatch(self.spans[0].name)
        return f"{self.path[-1]} × {len(self.spans)}" if many else self.path[-1]

    @property
    def level(self) -> int:
        """Number of rows that enclose this one."""
        return len(self.path) - 1

    @property
    def seconds(self) -> float:
        """Seconds of all spans."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def numbered(self) -> bool:
        """True for steps, which are counted in their names."""
        return _NUMBERED.fullmatch(self.spans[0].name) is not None


def rows(spans: Sequence[Span]) -> list[Row]:
    """Return all rows, those of the main thread first, each below the row that encloses it.

    A span is enclosed by the last earlier span of its thread that is less deep and not yet over:
    a thread that was started inside a span counts its depth from there.
    """
    by_path: dict[tuple[str, tuple[str, ...]], list[Span]] = {}
    open_: dict[str, list[tuple[Span, tuple[str, ...]]]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.depth)):
        stack = open_.setdefault(span.thread, [])
        while stack and (stack[-1][0].depth >= span.depth or stack[-1][0].end <= span.start):
            stack.pop()
        numbered = _NUMBERED.fullmatch(span.name)
        path = (*(stack[-1][1] if stack else ()), numbered[1] if numbered else span.name)
        stack.append((span, path))
        by_path.setdefault((span.thread, path), []).append(span)

    def position(key: tuple[str, tuple[str, ...]]) -> tuple[object, ...]:
        thread, path = key
        enclosing = [path[: i + 1] for i in range(len(path))]
        starts = tuple((by_path[thread, p][0].start, p[-1]) for p in enclosing)
        return thread != main_thread(spans), thread, starts

    return [
        Row(thread=thread, path=path, spans=tuple(by_path[thread, path]))
        for thread, path in sorted(by_path, key=position)
    ]


def main_thread(spans: Sequence[Span]) -> str:
    """Return the thread whose spans make up the wall time."""
    if not spans or any(span.thread == MAIN for span in spans):
        return MAIN
    return min(spans, key=lambda span: span.start).thread


def covered(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Return the disjoint intervals in which any of the spans was going on."""
    intervals: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if intervals and start <= intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(end, intervals[-1][1]))
        else:
            intervals.append((start, end))
    return intervals


def gaps(spans: Sequence[Span], wall: float) -> list[tuple[float, float]]:
    """Return the intervals between 0 and `wall` in which none of the spans was going on."""
    ends, intervals = 0.0, []
    for start, end in [*covered(spans), (wall, wall)]:
        if start > ends:
            intervals.append((ends, min(start, wall)))
        ends = max(ends, end)
    return intervals
