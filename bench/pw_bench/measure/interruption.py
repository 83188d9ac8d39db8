# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and other signals that end a measurement: what was measured until then is kept.

with Interruption() as interruption:
    ...  # measure one after the other
interruption.require(samples)
...  # make the result of what there is
return interruption.ended_with(result)
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

from pw_bench.results import Result, Skipped

REASON: Final = "interrupted"


class Interrupted(BaseException):
    """A signal has ended a measurement.

    Attributes:
        result: what was measured until then.
        cause: what the signal raised, to be raised again once the result is saved.
    """

    def __init__(self, result: Result, cause: BaseException) -> None:
        super().__init__(REASON)
        self.result, self.cause = result, cause


class Interruption:
    """Holds back what a signal raises inside the block.

    That is every exception that is no error: KeyboardInterrupt, and the `Terminated` of the command
    line, whose room is above this one (docs/structure.md).

    Attributes:
        cause: what was raised; None: nothing was.
    """

    def __init__(self) -> None:
        self.cause: BaseException | None = None

    def __enter__(self) -> Interruption:
        """Begin to hold back."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Keep the exception, unless it is an error."""
        if isinstance(error, Exception):
            return False
        self.cause = error
        return True

    def require(self, measured: object) -> None:
        """Raise what was held back, where nothing was measured before."""
        if self.cause is not None and not measured:
            raise self.cause

    def skipped(self, part: str) -> list[Skipped]:
        """Return the part as skipped, where the block was interrupted."""
        return [] if self.cause is None else [Skipped(part=part, reason=REASON)]

    def ended_with(self, result: Result) -> Result:
        """Return the result. Raises Interrupted where the block was interrupted."""
        if self.cause is not None:
            raise Interrupted(result, self.cause)
        return result
