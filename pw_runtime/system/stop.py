# SPDX-License-Identifier: Apache-2.0
"""Requests to stop a run, which then stops where nothing is lost."""

from __future__ import annotations

import math
import time


class Stopped(BaseException):
    """The run was asked to stop, and did: it unwinds as Ctrl-C does."""


class StopRequest:
    """A request that a run stops; the run looks for it after every block and between steps.

    Times are those of the monotonic clock, which a change of the date does not move.
    """

    def __init__(self) -> None:
        """Ask for nothing yet."""
        self._end = math.inf

    @property
    def requested(self) -> bool:
        """Tell whether the run was asked to stop."""
        return self._end < math.inf

    def request(self, grace: float = 0.0) -> None:
        """Ask the run to stop; safe in a signal handler and in any thread.

        Args:
            grace: seconds that the step in progress may take to end. A later request shortens an
                earlier one, and never extends it.
        """
        self._end = min(self._end, time.monotonic() + grace)

    def check(self) -> None:
        """Raise Stopped once the grace is over: after a block, whose step is then lost."""
        if self.requested and time.monotonic() >= self._end:
            raise Stopped

    def between_steps(self) -> None:
        """Raise Stopped where a stop was requested: here nothing is lost."""
        if self.requested:
            raise Stopped
