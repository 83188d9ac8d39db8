# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pw_runtime.system.printable import printable

LINE_INTERVAL = 10.0  # seconds between plain lines of one stage


class Advance(Protocol):
    """Advances a progress display."""

    def __call__(self, done: float = 1) -> None:
        """Count `done` more steps."""


class Reporter:
    """Prints progress on stderr; only warnings when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
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
        print(printable(name) if sys.stdout.isatty() else name, flush=True)

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Advance]:
        """Show the progress of one stage; yield the function to call after each step."""
        if self._quiet:
            yield lambda done=1: None
        elif self._console.is_terminal:
            yield from self._bar(label, total)
        else:
            yield from self._lines(label, total)

    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(printable(label), total=total)
            yield lambda done=1: progress.advance(task, done)

    def _lines(self, label: str, total: int) -> Iterator[Advance]:
        start = last = time.monotonic()
        count = 0.0

        def advance(done: float = 1) -> None:
            nonlocal count, last
            count += done
            now = time.monotonic()
            if now - last >= LINE_INTERVAL and count < total:
                last = now
                eta = (now - start) / count * (total - count)
                self.say(f"{label}: {whole(count)}/{total}, ETA {eta:.0f} s")

        yield advance
        self.say(f"{label}: {whole(count)}/{total} in {time.monotonic() - start:.1f} s")


def whole(count: float) -> int:
    """Return how many whole steps were counted in parts, whose sum may be off by rounding."""
    return int(count + 1e-6)
