# SPDX-License-Identifier: Apache-2.0
"""Timing of a run: sums by stage for receipts, single spans for a trace.

`span` and `observe` mark where something happens; they do nothing until a `Trace` records.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from pw_runtime.system.atomic_files import write_text

LOG: Final = logging.getLogger("pw_runtime")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A timed block. Start and end are seconds of `time.perf_counter`."""

    name: str
    start: float
    end: float
    depth: int  # number of enclosing spans in its thread
    thread: str


@dataclass(slots=True)
class Trace:
    """The spans of a run, in the order in which they ended.

    In the thread that made the trace, a span waits for the device at both ends and is an NVTX
    range.

    Attributes:
        device: the device that the run computes on.
        on_tensor: called with the name and the tensor of every `observe`.
    """

    device: torch.device
    on_tensor: Callable[[str, Tensor], None] | None = None
    spans: list[Span] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the spans of the block, and of threads that run in a copy of its context."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the time spent inside the block, also when it fails."""
        gpu = self.device.type == "cuda" and threading.get_ident() == self._thread
        depth = _depth.get()
        inner = _depth.set(depth + 1)
        start = now(self.device if gpu else None)
        if gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if gpu:
                torch.cuda.nvtx.range_pop()
            end = now(self.device if gpu else None)
            _depth.reset(inner)
            thread = threading.current_thread().name
            self.spans.append(Span(name=name, start=start, end=end, depth=depth, thread=thread))

    def write(self, path: Path) -> None:
        """Write the spans as Chrome trace events, for Perfetto. Raises WriteFailed."""
        first = min((span.start for span in self.spans), default=0.0)
        threads = sorted({span.thread for span in self.spans})
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": name}}
            for i, name in enumerate(threads)
        ]
        for span in sorted(self.spans, key=lambda span: (span.start, span.depth)):
            microseconds = {"ts": (span.start - first) * 1e6, "dur": (span.end - span.start) * 1e6}
            lane = {"pid": 0, "tid": threads.index(span.thread)}
            events.append({"ph": "X", "name": span.name, **lane, **microseconds})
        content = {"traceEvents": events, "displayTimeUnit": "ms"}
        path.parent.mkdir(parents=True, exist_ok=True)  # a failure here would hide the run's own
        write_text(path, json.dumps(content, indent=1) + "\n")


_recording: ContextVar[Trace | None] = ContextVar("recording", default=None)
_depth: ContextVar[int] = ContextVar("depth", default=0)


def span(name: str) -> AbstractContextManager[None]:
    """Time a block under this name, if a trace records."""
    trace = _recording.get()
    return nullcontext() if trace is None else trace.span(name)


def observe(name: str, x: Tensor) -> None:
    """Pass a tensor to the trace's observer, which must not modify it, nor keep it uncloned."""
    trace = _recording.get()
    if trace is not None and trace.on_tensor is not None:
        trace.on_tensor(name, x)


def now(device: torch.device | None) -> float:
    """Return the time in seconds, after all work queued on a GPU is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Sums wall-clock seconds by stage; waits for the device before reading the clock.

    The time of an inner stage does not count towards the outer one. Every stage is also a span.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inside = 0.0  # seconds of the stages that the current one contains

    @contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Count the time inside the block, also when it fails; `what` extends the span's name."""
        before, self._inside = self._inside, 0.0
        start, label = now(self._device), f"{name} {what}".rstrip()
        try:
            with span(label):
                yield
        finally:
            total = now(self._device) - start
            self.seconds[name] = self.seconds.get(name, 0.0) + total - self._inside
            LOG.debug("%s took %.4f s", label, total)
            self._inside = before + total

    def time_items(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Count the time spent making items, not the time spent using them."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item  # while the next item is made, this one must be free
