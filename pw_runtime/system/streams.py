# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error that may be closed, full, or read by nobody any more.

A run goes on without them: its clips are worth more than its words.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


def open_missing_streams() -> None:
    """Open /dev/null where standard input, output or error is closed.

    Otherwise the next file that is opened gets its number, and with it all that libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


class EnduringStream:
    """A text stream that says nothing more after the system refused a write, and raises nothing.

    Attributes:
        refused: the error of the first refused write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.refused: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, or nothing where that is refused."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def flush(self) -> None:
        """Pass on what is buffered, or forget it where that is refused."""
        try:
            self._stream.flush()
        except OSError as error:
            self._silence(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def failure(self) -> str | None:
        """The reason of a refused write; None too where the reader has left, as `head` does."""
        if self.refused is None or self.refused.errno == errno.EPIPE:
            return None
        return self.refused.strerror or str(self.refused)

    def _silence(self, error: OSError) -> None:
        """Send all further text, and what is buffered, to /dev/null."""
        self.refused = self.refused or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
