# SPDX-License-Identifier: Apache-2.0
"""A function run in a forked process, which may end in any way without ending this one.

Imports the standard library alone. For processes without threads: it is `pw doctor` that forks,
before anything is imported.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

_RESULT = "="  # opens the last line; the lines before it are notes


@dataclass(frozen=True, slots=True)
class Ended:
    """An ending of a forked process.

    Attributes:
        result: text that the function returned; None where the process ended before.
        note: its last note, if there was one.
        how: the ending, in words.
    """

    result: str | None
    note: str | None
    how: str


def run_forked(function: Callable[[Callable[[str], None]], str]) -> Ended:
    """Call a function in a fork of this process. It gets a function that notes lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "w", encoding="utf-8") as out:
                result = function(lambda line: print(line, file=out, flush=True))
                out.write(f"\n{_RESULT}{result}")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # past everything that belongs to the parent
    os.close(writing)
    status = None
    try:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
    finally:
        if status is None:  # this process is interrupted
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    notes, found, result = text.partition(f"\n{_RESULT}")
    last = notes.splitlines()[-1] if notes else None
    return Ended(result if found and code == 0 else None, last, how)
