# SPDX-License-Identifier: Apache-2.0
"""Progress of a whole run: how much of it is done, and how long the rest takes.

The plan says how the work of a clip divides among its stages; how fast it goes is measured, block
by block. Loading networks is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Final

from pw_runtime.system.progress import Progress

# The time left is unknown until so much was measured: seconds, and a share of the run's work.
KNOWN_SECONDS: Final = 1.0
KNOWN_SHARE: Final = 0.001


@dataclass(slots=True)
class _Part:
    """One clip in one stage."""

    clip: str
    stage: str
    expected: float  # seconds: its weight
    done: float = 0.0  # 0..1


@dataclass(slots=True)
class _Measured:
    """Work of a stage that was watched."""

    seconds: float = 0.0
    expected: float = 0.0  # seconds, for the same work


class RunProgress:
    """Adds up what the clips of a run have done, one clip in one stage after the other.

    The fraction never falls, and is 1 once no clip has anything left to do. A stage that begins
    again, as after running out of memory, is measured anew.
    """

    def __init__(
        self,
        show: Callable[[Progress], None] = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Call `show` after every change; `clock` returns seconds."""
        self._show, self._clock = show, clock
        self._parts: dict[Hashable, dict[str, _Part]] = {}
        self._measured: dict[str, _Measured] = {}
        self._fraction = 0.0
        # The part in progress, its steps or frames, and when its latest change was.
        self._part, self._total, self._since = _Part("", "", 0.0), 1, 0.0
        # Sums over all other parts, in expected seconds.
        self._finished = 0.0
        self._left: dict[str, float] = {}

    def expect(self, key: Hashable, clip: str, stages: Mapping[str, float]) -> None:
        """Add a clip: its name, and the seconds expected of its stages, in their order.

        Only the ratios between the seconds matter.
        """
        self._parts[key] = {name: _Part(clip, name, s) for name, s in stages.items()}

    def enter(self, key: Hashable, stage: str, total: int = 1) -> None:
        """Turn to a clip in a stage of `total` steps or frames.

        Stages before it that did not run are left out.
        """
        parts = self._parts[key]
        self._part, self._total, self._since = parts[stage], total, self._clock()
        for part in parts.values():
            if part is self._part:
                break
            _leave_out(part)
        self._add_up()

    def begin(self) -> None:
        """Begin an attempt; what an earlier attempt did is lost."""
        if self._part.done:
            self._part.done = 0.0
            self._measured.pop(self._part.stage, None)
        self._since = self._clock()
        self._report()

    def advance(self, done: float = 1) -> None:
        """Count `done` more steps or frames, and the time since the latest change."""
        now = self._clock()
        part = self._part
        before = part.done
        part.done = min(1.0, before + done / self._total)
        measured = self._measured.setdefault(part.stage, _Measured())
        measured.seconds += now - self._since
        measured.expected += part.expected * (part.done - before)
        self._since = now
        self._report()

    def skip(self, done: float) -> None:
        """Count `done` steps or frames that an earlier run has computed."""
        self._part.done = min(1.0, self._part.done + done / self._total)
        self._since = self._clock()
        self._report()

    def finish(self) -> None:
        """Count what is left of the stage, whose steps may add up to less by rounding."""
        self.advance((1 - self._part.done) * self._total)
        self._part.done = 1.0
        self._add_up()

    def drop(self, key: Hashable) -> None:
        """Expect nothing more of a clip that failed."""
        for part in self._parts[key].values():
            _leave_out(part)
        self._add_up()

    def _add_up(self) -> None:
        """Sum over all parts but the one in progress."""
        self._finished, self._left = 0.0, {}
        for parts in self._parts.values():
            for part in parts.values():
                if part is not self._part:
                    self._finished += part.expected * part.done
                    left = part.expected * (1 - part.done)
                    self._left[part.stage] = self._left.get(part.stage, 0.0) + left
        self._report()

    def _report(self) -> None:
        part = self._part
        finished = self._finished + part.expected * part.done
        open_here = part.expected * (1 - part.done)
        left = sum(self._left.values()) + open_here
        fraction = finished / (finished + left) if left else 1.0
        self._fraction = max(self._fraction, fraction)
        self._show(
            Progress(
                clip=part.clip,
                stage=part.stage,
                done=part.done * self._total,
                total=self._total,
                fraction=self._fraction,
                seconds_left=self._seconds_left(finished + left, open_here) if left else 0.0,
            )
        )

    def _seconds_left(self, run: float, here: float) -> float | None:
        """Estimate the seconds left; None while too little was measured.

        Stages that have not run yet are expected to differ from the plan as the others do.

        Args:
            run: expected seconds of all work.
            here: those left of the part in progress.
        """
        seconds = expected = 0.0
        for measured in self._measured.values():
            seconds += measured.seconds
            expected += measured.expected
        if seconds < KNOWN_SECONDS or expected <= KNOWN_SHARE * run:
            return None
        left = here * self._pace(self._part.stage, seconds / expected)
        for stage, rest in self._left.items():
            left += rest * self._pace(stage, seconds / expected)
        return left

    def _pace(self, stage: str, otherwise: float) -> float:
        """Return measured seconds per expected second."""
        measured = self._measured.get(stage)
        if measured is None or measured.seconds < KNOWN_SECONDS or not measured.expected:
            return otherwise
        return measured.seconds / measured.expected


def _leave_out(part: _Part) -> None:
    """Reduce a part to what was done of it."""
    part.expected, part.done = part.expected * part.done, 1.0
