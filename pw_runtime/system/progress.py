# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pw_runtime.system.printable import printable

LINE_INTERVAL = 10.0  # seconds between plain lines of one stage


class Tasks(Protocol):
    """Shows several things that are done at the same time, each on a line of its own."""

    def show(self, name: str, doing: str) -> None:
        """Say what is being done about one of them, from any thread."""

    def end(self, name: str) -> None:
        """Remove its line."""


class Advance(Protocol):
    """Advances a progress display."""

    def __call__(self, done: float = 1) -> None:
        """Count `done` more steps."""


class Reporter:
    """Prints progress on stderr, only warnings when quiet, and finished clips on stdout.

    That is the stdout of when it was made: what replaces it later, such as a progress bar that
    catches what others print, does not get the clips.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stdout = sys.stdout
        self._console = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            self._console.print(printable(text))

    def warn(self, text: str) -> None:
        """Print a line even when quiet."""
        self._console.print(printable(text))

    def finished(self, path: Path) -> None:
        """Print the path of a complete clip on stdout, for scripts, also when quiet."""
        name = str(path)
        if self._stdout.isatty():
            print(printable(name), flush=True)
        else:
            print(name, file=self._stdout, flush=True)

    @contextmanager
    def steps(self, label: str | Callable[[], str], total: int) -> Iterator[Advance]:
        """Show the progress of one stage; yield the function to call after each step.

        A label that changes is a function, which is called whenever the progress is shown.
        """
        text = label if callable(label) else lambda: label
        if self._quiet:
            yield lambda done=1: None
        elif self._console.is_terminal:
            yield from self._bar(text, total)
        else:
            yield from self._lines(text, total)

    @contextmanager
    def tasks(self) -> Iterator[Tasks]:
        """Show several things that are done at the same time."""
        if self._quiet or not self._console.is_terminal:
            yield _TaskLines(self.say)
            return
        columns = (TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield _LiveTasks(progress)

    def _bar(self, label: Callable[[], str], total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(printable(label()), total=total)
            yield lambda done=1: progress.update(task, advance=done, description=printable(label()))

    def _lines(self, label: Callable[[], str], total: int) -> Iterator[Advance]:
        start = last = time.monotonic()
        count = 0.0

        def advance(done: float = 1) -> None:
            nonlocal count, last
            count += done
            now = time.monotonic()
            if now - last >= LINE_INTERVAL and count < total:
                last = now
                eta = f", ETA {(now - start) / count * (total - count):.0f} s" if count else ""
                self.say(f"{label()}: {whole(count)}/{total}{eta}")

        yield advance
        self.say(f"{label()}: {whole(count)}/{total} in {time.monotonic() - start:.1f} s")


class _LiveTasks:
    """Tasks on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._ids: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def show(self, name: str, doing: str) -> None:
        text = printable(f"{name}: {doing}")
        with self._lock:
            if name in self._ids:
                self._progress.update(self._ids[name], description=text)
            else:
                self._ids[name] = self._progress.add_task(text, total=None)

    def end(self, name: str) -> None:
        with self._lock:
            if name in self._ids:
                self._progress.remove_task(self._ids.pop(name))


class _TaskLines:
    """Tasks elsewhere: a line now and then for those that take long."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._times: dict[str, tuple[float, float]] = {}  # of the start, and of the last line
        self._lock = threading.Lock()

    def show(self, name: str, doing: str) -> None:
        now = time.monotonic()
        with self._lock:
            start, last = self._times.setdefault(name, (now, now))
            if now - last < LINE_INTERVAL:
                return
            self._times[name] = (start, now)
        self._say(f"{name}: {doing}, after {now - start:.0f} s")

    def end(self, name: str) -> None:
        with self._lock:
            self._times.pop(name, None)


def whole(count: float) -> int:
    """Return how many whole steps were counted in parts, whose sum may be off by rounding."""
    return int(count + 1e-6)
