# SPDX-License-Identifier: Apache-2.0
"""One clip in one stage of a run: its progress, its time, and its notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pw_runtime.system.progress import Advance, Reporter
from pw_runtime.system.run_progress import RunProgress
from pw_runtime.system.stop import StopRequest
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import NoticeKind


def _no_progress(done: float = 1) -> None:
    """Count nothing: the step shows no progress of its own."""


@dataclass(slots=True, kw_only=True)
class Step:
    """Reporting of one clip's computation in a stage, which may be attempted several times.

    Attributes:
        label: of the progress bar.
        reporter: shows it.
        total: sampler steps or frames; None: no bar.
        stopwatch: counts the seconds of every attempt.
        timed_as: name of these seconds; None: the computation times its own parts.
        add_notice: tells the user something, and records it in the clip's receipt.
        stop: asks the run to stop.
        progress: of the run, which has turned to this clip and stage; None: it counts nothing.
    """

    label: str
    reporter: Reporter
    stopwatch: Stopwatch
    add_notice: Callable[[NoticeKind, str], None]
    total: int | None = None
    timed_as: str | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    progress: RunProgress | None = None
    _advance: Advance = field(default=_no_progress)

    def advance(self, done: float = 1) -> None:
        """Count `done` more units of `total`, in the attempt in progress.

        Raises Stopped where the run was asked to stop, and its grace is over.
        """
        if self.progress is not None:
            self.progress.advance(done)
        self._advance(done)
        self.stop.check()

    def skip(self, done: float) -> None:
        """Count `done` units that an earlier run has computed: they say nothing about the pace."""
        if self.progress is not None:
            self.progress.skip(done)
        self._advance(done)

    def notice_text(self, text: str) -> None:
        """Tell the user something about a prompt's text."""
        self.add_notice("text", text)

    def notice_source(self, text: str) -> None:
        """Tell the user what was done to the picture or video that a clip starts from."""
        self.add_notice("source", text)

    def notice_approximation(self, text: str) -> None:
        """Tell the user what came of an approximation that was asked for."""
        self.add_notice("approximation", text)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Show progress from zero and count the time, while the block runs.

        Raises Stopped where the run was asked to stop: nothing has begun.
        """
        self.stop.between_steps()
        with ExitStack() as stack:
            if self.progress is not None:
                self.progress.begin()
            if self.total is not None:
                self._advance = stack.enter_context(self.reporter.steps(self.label, self.total))
            if self.timed_as is not None:
                stack.enter_context(self.stopwatch.stage(self.timed_as))
            yield
