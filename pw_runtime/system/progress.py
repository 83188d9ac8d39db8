# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from pw_runtime.system.printable import printable

LOG: Final = logging.getLogger("pw_runtime")
LOG.addHandler(logging.NullHandler())  # without it, Python prints warnings a second time
LINE_INTERVAL = 10.0  # seconds between plain lines of one stage
STARTED = "started"  # field of a bar that only the whole run's has: when it began


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run in progress.

    Attributes:
        clip: id of the prompt in progress.
        stage: text, draft, highres or decode.
        done: steps or frames of the stage for that clip, also parts of one.
        total: all of them.
        fraction: of the whole run, 0 to 1; it never falls.
        seconds_left: of the whole run; None while unknown.
    """

    clip: str
    stage: str
    done: float
    total: int
    fraction: float
    seconds_left: float | None


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

    All of it also goes to the logger `pw_runtime`, which has no handler of its own.

    That is the stdout of when it was made: what replaces it later, such as a progress bar that
    catches what others print, does not get the clips.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stdout = sys.stdout
        self._console = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._run: Progress | None = None
        self._started = self._logged = time.monotonic()
        self._bars: Bars | None = None  # while a stage shows its own
        self._run_bar: TaskID | None = None

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        LOG.info(printable(text))
        self._print(text)

    def warn(self, text: str) -> None:
        """Print a line even when quiet."""
        LOG.warning(printable(text))
        self._console.print(printable(text))

    def finished(self, path: Path) -> None:
        """Print the path of a complete clip on stdout, for scripts, also when quiet."""
        name = str(path)
        LOG.info("finished: %s", printable(name))
        if self._stdout.isatty():
            print(printable(name), flush=True)
        else:
            print(name, file=self._stdout, flush=True)

    def failed(self, clip: str, error: str) -> None:
        """Say that a clip has failed, and why, also when quiet."""
        self.warn(f"prompt {clip} failed: {error}")

    def begin(self) -> None:
        """Forget how far the run before this one was."""
        self._run = None

    def progress(self, progress: Progress) -> None:
        """Show how far the run is, beside the stage in progress; called after every block."""
        before, now = self._run, time.monotonic()
        if before is None:
            self._started = now
        self._run = progress
        begins = before is None or (before.stage, before.clip) != (progress.stage, progress.clip)
        if begins or now - self._logged >= LINE_INTERVAL:
            self._logged = now
            done = f"{whole(progress.done)}/{progress.total}"
            clip = printable(progress.clip)
            LOG.info("%s %s: %s%s", progress.stage, clip, done, self._run_words())
        if self._bars is not None:
            self._show_run(self._bars, progress)

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
        with Bars(*columns, console=self._console, transient=True) as bars:
            yield _LiveTasks(bars)

    def _bar(self, label: Callable[[], str], total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            _Count(),
            _Elapsed(),
            TextColumn("ETA"),
            _Remaining(),
        )
        with Bars(*columns, console=self._console) as bars:
            task = bars.add_task(printable(label()), total=total)
            self._bars = bars
            try:
                if self._run is not None:
                    self._show_run(bars, self._run)
                yield lambda done=1: bars.update(task, advance=done, description=printable(label()))
            finally:
                self._bars = None
                if self._run_bar is not None:  # the stage's own bar stays
                    bars.remove_task(self._run_bar)
                    self._run_bar = None

    def _show_run(self, bars: Bars, run: Progress) -> None:
        if self._run_bar is None:
            self._run_bar = bars.add_task("whole run", total=1.0, started=self._started, left=None)
        bars.update(self._run_bar, completed=run.fraction, left=run.seconds_left)

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
                self._print(f"{label()}: {whole(count)}/{total}{eta}{self._run_words()}")

        yield advance
        self._print(f"{label()}: {whole(count)}/{total} in {time.monotonic() - start:.1f} s")

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(printable(text))

    def _run_words(self) -> str:
        """Return how far the whole run is, as the end of a line; empty where nobody told."""
        if self._run is None:
            return ""
        left = self._run.seconds_left
        eta = "" if left is None else f", ETA {left:.0f} s"
        return f"; whole run: {int(100 * self._run.fraction)} %{eta}"


class _Count(ProgressColumn):
    """Steps of a stage; the percentage of the whole run."""

    def render(self, task: Task) -> Text:
        if STARTED in task.fields:
            return Text(f"{int(task.percentage)} %", style="progress.download")
        return Text(f"{whole(task.completed)}/{task.total:g}", style="progress.download")


class _Elapsed(TimeElapsedColumn):
    """Time of a stage, or since the run began."""

    def render(self, task: Task) -> Text:
        if STARTED not in task.fields:
            return super().render(task)
        return Text(_clock(time.monotonic() - task.fields[STARTED]), style="progress.elapsed")


class _Remaining(TimeRemainingColumn):
    """Time left of a stage by its own pace, or that of the whole run as it was told."""

    def render(self, task: Task) -> Text:
        if STARTED not in task.fields:
            return super().render(task)
        left = task.fields["left"]
        return Text("-:--:--" if left is None else _clock(left), style="progress.remaining")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class _LiveTasks:
    """Tasks on a terminal."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._ids: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def show(self, name: str, doing: str) -> None:
        text = printable(f"{name}: {doing}")
        with self._lock:
            if name in self._ids:
                self._bars.update(self._ids[name], description=text)
            else:
                self._ids[name] = self._bars.add_task(text, total=None)

    def end(self, name: str) -> None:
        with self._lock:
            if name in self._ids:
                self._bars.remove_task(self._ids.pop(name))


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
