# SPDX-License-Identifier: Apache-2.0
"""Event streams: every listener gets the newest state of what has changed, never a backlog."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fastapi.sse import format_sse_event

INTERVAL: Final = 0.25  # seconds between two events of one job
KEEP_ALIVE: Final = 15.0  # seconds
PING: Final = format_sse_event(event="ping", data_str="{}")


@dataclass(frozen=True, slots=True)
class _Told:
    """An event, and whether it is the last one of its job."""

    event: bytes
    last: bool


class _Listener:
    """One stream, and the newest event of each job that it has not been given."""

    def __init__(self, only: str | None) -> None:
        self.only = only
        self.pending: dict[str, _Told] = {}
        self.awake = asyncio.Event()


class Hub:
    """Sends jobs to those who listen. Used in the thread of the event loop alone."""

    def __init__(self, render: Callable[[str], tuple[str, bool] | None], most: int) -> None:
        """Take what turns an id into JSON, and whether that is its last state.

        Args:
            render: returns None where the job is gone.
            most: streams at a time.
        """
        self._render, self._most = render, most
        self._listeners: set[_Listener] = set()
        self._dirty: dict[str, None] = {}
        self._flushing: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._closed = False

    @property
    def is_full(self) -> bool:
        """True if there are as many streams as there may be."""
        return len(self._listeners) >= self._most

    def __len__(self) -> int:
        return len(self._listeners)

    def changed(self, job_id: str) -> None:
        """Send a job's state to all who listen, soon."""
        if not self._listeners:
            return
        self._dirty[job_id] = None
        if self._flushing is None:
            loop = asyncio.get_running_loop()
            wait = max(0.0, self._last + INTERVAL - loop.time())
            self._flushing = loop.call_later(wait, self._flush)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for listener in self._listeners:
            listener.awake.set()

    async def stream(self, only: str | None = None, *, pings: bool = False) -> AsyncIterator[bytes]:
        """Yield the events of all jobs, or of one until it has ended, and comments in between.

        With `pings` these are events: a browser tells its page of no comment.
        """
        listener = _Listener(only)
        self._listeners.add(listener)
        try:
            yield PING if pings else b": connected\n\n"
            if only is not None:
                told = self._told(only)
                yield told.event
                if told.last:
                    return
            while not self._closed:
                listener.awake.clear()
                if not listener.pending:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(listener.awake.wait(), KEEP_ALIVE)
                    if not listener.pending:
                        yield PING if pings else b": ping\n\n"
                        continue
                events, listener.pending = listener.pending.values(), {}
                yield b"".join(told.event for told in events)
                if only is not None and any(told.last for told in events):
                    return
        finally:
            self._listeners.discard(listener)

    def _flush(self) -> None:
        self._flushing, self._last = None, asyncio.get_running_loop().time()
        dirty, self._dirty = self._dirty, {}
        for job_id in dirty:
            told = self._told(job_id)
            for listener in self._listeners:
                if listener.only in (None, job_id):
                    listener.pending[job_id] = told
                    listener.awake.set()

    def _told(self, job_id: str) -> _Told:
        rendered = self._render(job_id)
        if rendered is None:
            data = f'{{"id":"{job_id}"}}'
            return _Told(format_sse_event(event="deleted", data_str=data), last=True)
        return _Told(format_sse_event(event="video", data_str=rendered[0]), last=rendered[1])
